"""GPTQ's and AWQ's tensors: codes [K,N] in words, scales f16[G,N], zero points [G,N] in words.

GPTQ: qweight i32[K*b/32, N] packs along K, qzeros i32[G, N*b/32] along N; format v1 stores zero points less one, modulo 2^b.
g_idx i32[K] is k // group: columns stay where they are.  AWQ: both pack along N, column 8j + order[i] in the i-th half byte.
Sources: AutoGPTQ's and GPTQModel's pack(); AutoAWQ's WQLinear_GEMM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from qconvert.errors import UsageError
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written, first_that_holds
from qconvert.formats.safetensors_gptq_check import awq_rows, gptq_rows
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme, affine_name, scheme_of
from qconvert.tensor_layouts import Constant, Made, Part, Tensors, tensors

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP, GROUPS = 128, (128, 64, 32)
SCALES: Final = "f16"


def zeros_of(scheme: Scheme, plus: int, order: tuple[int, ...] = ()) -> Part:
    """Zero points of a scheme that has them, or the middle of the codes for each group."""
    fixed = None if scheme.zero_point == "int" else 1 << (scheme.bits - 1)
    return Part("qzeros", "I32", "u1", 0 if fixed else 1, plus, fixed, bits=scheme.bits, order=order)


def affine(scheme: Scheme) -> bool:
    scale = scheme.levels[0]
    return not scheme.table and scheme.zero_point != "float" and (scale.role, scale.dtype, scale.rows) == ("scale", SCALES, 1)


def gptq(prefix: str, plus: int, scheme: Scheme) -> Tensors | None:
    """plus: to zero points; of 8 bits stored less one."""
    if not affine(scheme):
        return None
    group = scheme.levels[0].group
    columns = Constant(
        "g_idx", "I32", lambda n, k: (k,), lambda n, k: (np.arange(k, dtype="<i4") // np.int32(group or k)).tobytes()
    )  # fmt: skip
    parts = [
        Part("qweight", "I32", "low", bits=32), zeros_of(scheme, plus), Part("scales", "F16", SCALES, 0, bits=16),
    ]  # fmt: skip
    return tensors(f"{prefix}.{scheme.name}", scheme, parts, [columns])


def gemm(scheme: Scheme) -> Tensors | None:
    if not affine(scheme) or scheme.bits != 4:
        return None
    codes = Part("qweight", "I32", "u1", bits=4, order=ORDER)
    parts = [codes, zeros_of(scheme, 0, ORDER), Part("scales", "F16", SCALES, 0, bits=16)]
    return tensors(f"awq.{scheme.name}", scheme, parts)


USUAL = [affine_name(kind, g, SCALES) for kind in ("int4", "uint4", "int8") for g in GROUPS]
V1 = Made("gptq", lambda scheme: gptq("gptq", -1, scheme), USUAL)
V2 = Made("gptq_v2", lambda scheme: gptq("gptq_v2", 0, scheme), USUAL)
GEMM = Made("awq", gemm, USUAL[:6])


@dataclass(frozen=True)
class Columns:
    """kind: int or uint, of a scheme's name; words hold codes of `allowed` bits."""

    name: str
    kind: str
    layouts: str
    allowed: tuple[int, ...] = (2, 4, 8)
    solver: str = "mse"

    def bits(self, wanted: Wanted) -> int:
        bits = wanted.bits or 4
        if bits not in self.allowed:
            raise UsageError(f"--quant {self.name} --bits {bits}: it has {', '.join(map(str, self.allowed))}")
        return bits

    def fits(self, bits: int, n: int, k: int, group: int) -> bool:
        return k % group == 0 and k * bits % 32 == 0 and n * bits % 32 == 0

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        bits, group = self.bits(wanted), GROUP if wanted.group is None else wanted.group
        if group < 8:
            raise UsageError(f"--group {group}: a group has 8 weights or more", hint="--group 128")
        found = (g for g in (group, *(g for g in GROUPS if g < group)) if self.fits(bits, n, k, g))
        return next((affine_name(f"{self.kind}{bits}", g, SCALES) for g in found), None)

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        all_bits = self.allowed if wanted.bits is None else (wanted.bits,)
        kinds = (self.kind, *({"int", "uint"} - {self.kind} if wanted.any_kind else ()))
        groups = sorted({stored.block, *GROUPS}, reverse=True) if wanted.group is None else [wanted.group]
        names = [
            affine_name(f"{kind}{bits}", g, SCALES)
            for bits in sorted(all_bits) for g in groups for kind in kinds if g >= 8 and self.fits(bits, n, k, g)
        ]  # fmt: skip
        return first_that_holds(stored, names)

    def config(self, written: Written) -> Mapping[str, object]:
        return {"quantization_config": self.awq_config(written) if self.layouts == "awq" else self.gptq_config(written)}

    def gptq_config(self, written: Written) -> dict[str, object]:
        """The settings of most modules, and of others under `dynamic`, as GPTQModel reads them."""
        usual, others = most(written)
        dynamic: dict[str, object] = {f"-:^{re.escape(module)}$": {} for module in written.left if module != "lm_head"}
        for name in others:
            dynamic[f"+:^{re.escape(name.removesuffix('.weight'))}$"] = settings_of(written.quantized[name])
        config: dict[str, object] = {
            "quant_method": "gptq", "checkpoint_format": self.layouts, **settings_of(usual), "desc_act": False,
            "true_sequential": True, "damp_percent": 0.01, "lm_head": False,
        }  # fmt: skip
        return config | ({"dynamic": dynamic} if dynamic else {})

    def awq_config(self, written: Written) -> dict[str, object]:
        usual, _ = most(written)
        left = [module for module in written.left if module != "lm_head"]
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": settings_of(usual)["group_size"],
            "zero_point": usual.startswith("u"), "modules_to_not_convert": left or None,
        }  # fmt: skip

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        rows = awq_rows if self.layouts == "awq" else gptq_rows
        return rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        return Loading({}, missing="transformers runs it by gptqmodel, in f16")


def most(written: Written) -> tuple[str, list[str]]:
    """The scheme of most weights, and the weights of others."""
    schemes = list(written.quantized.values())
    usual = max(dict.fromkeys(schemes), key=schemes.count, default=f"int4_g{GROUP}_{SCALES}")
    return usual, [name for name, scheme in written.quantized.items() if scheme != usual]


def settings_of(name: str) -> dict[str, object]:
    scheme = scheme_of(name)
    assert scheme is not None
    return {"bits": scheme.bits, "group_size": scheme.levels[0].group or -1, "sym": scheme.zero_point == "none"}


GPTQ = Columns("gptq", "int", "gptq")
GPTQ_ASYM = Columns("gptq-asym", "uint", "gptq")
GPTQ_V2 = Columns("gptq-v2", "int", "gptq_v2")
GPTQ_V2_ASYM = Columns("gptq-v2-asym", "uint", "gptq_v2")
AWQ = Columns("awq", "uint", "awq", (4,))
