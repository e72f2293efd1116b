"""bitsandbytes: NF4 and FP4 in blocks of 64, with scales quantized once more or not, and rows of 8 bits.

4 bits: weight u8[N*K/2,1], the first code in the high half; weight.absmax f32[N*K/64]; weight.quant_map f32[16], the table;
weight.quant_state.bitsandbytes__nf4, JSON as u8. Twice quantized: absmax u8, and weight.nested_absmax f32[ceil(blocks/256)],
weight.nested_quant_map f32[256] beside it; a scale is nested_quant_map[absmax] * nested_absmax + nested_offset, which is in
the JSON. 8 bits: weight i8[N,K]; SCB f32[N], a row's greatest magnitude: a weight is weight * SCB / 127.
Source: bitsandbytes 0.50, functional.QuantState and nn.modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert import kernels
from qconvert.errors import UsageError
from qconvert.formats.safetensors_bnb_check import dequantized_rows
from qconvert.formats.safetensors_config import TORCH
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.passes.nest_scales import NOTE_NBYTES, NestScales
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme
from qconvert.tensor_layouts import Beside, Constant, Made, Part, Tensors, tensors

BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)  # the default, and what bitsandbytes takes


def four_bits(dtype: str, double: bool) -> Callable[[Scheme], Tensors | None]:
    """dtype: of weights as bitsandbytes dequantizes them."""

    def make(scheme: Scheme) -> Tensors | None:
        kind, group = scheme.name.partition("_")[0], scheme.levels[0].group
        if kind not in ("nf4", "fp4") or group not in BLOCKS:
            return None

        def state(n: int, k: int) -> bytes:
            return json.dumps({"quant_type": kind, "blocksize": group, "dtype": TORCH[dtype], "shape": [n, k]}).encode()

        def blocks(n: int, k: int) -> tuple[int, ...]:
            return (n * k // group,)

        key, prefix = f"weight.quant_state.bitsandbytes__{kind}", "bnb_nested" if double else "bnb"
        table = np.array(scheme.table, "<f4").tobytes()
        codes = Part("weight", "U8", "high", dims=lambda n, k: (n * k // 2, 1))
        quant_map = Constant("weight.quant_map", "F32", lambda n, k: (16,), lambda n, k: table)
        if not double:
            scales = Part("weight.absmax", "F32", "f32", 0, dims=blocks)
            note = Constant(key, "U8", lambda n, k: (len(state(n, k)),), state)
            return tensors(f"{prefix}_{dtype}.{scheme.name}", scheme, [codes, scales], [quant_map, note])
        levels = kernels.dynamic_map().astype("<f4").tobytes()
        second = Constant("weight.nested_quant_map", "F32", lambda n, k: (256,), lambda n, k: levels)
        beside = (
            Beside("weight.absmax", "nested", "U8", blocks, finest=True),
            Beside("weight.nested_absmax", "second", "F32", lambda n, k: (-(-blocks(n, k)[0] // 256),)),
            Beside(key, "state", "U8", lambda n, k: (NOTE_NBYTES,)),
        )
        return tensors(f"{prefix}_{dtype}.{scheme.name}", scheme, [codes], [quant_map, second], beside)

    return make


def rows_of_8(scheme: Scheme) -> Tensors | None:
    if scheme.name != "int8_scb":
        return None
    parts = [Part("weight", "I8", "u1", plus=128), Part("SCB", "F32", "f32", 0, dims=lambda n, k: (n,))]
    row_major = Constant("weight_format", "U8", lambda n, k: (), lambda n, k: b"\0")
    return tensors("bnb_int8.int8_scb", scheme, parts, [row_major])


USUAL = ("nf4_g64", "fp4_g64")
SINGLE_F32, SINGLE_F16, SINGLE_BF16 = (Made(f"bnb_{dtype}", four_bits(dtype, False), USUAL) for dtype in ("f32", "f16", "bf16"))
NESTED_F32, NESTED_F16, NESTED_BF16 = (
    Made(f"bnb_nested_{dtype}", four_bits(dtype, True), USUAL) for dtype in ("f32", "f16", "bf16")
)
ROWS = Made("bnb_int8", rows_of_8, ["int8_scb"])


@dataclass(frozen=True)
class FourBits:
    """kind: nf4 or fp4; double: scales are quantized too."""

    name: str
    kind: str
    double: bool

    @property
    def layouts(self) -> str:
        return "bnb_nested" if self.double else "bnb"

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]:
        nest = (NestScales(TORCH[wanted.dtype]),) if self.double else ()
        return Quantize(self.name, "absmax", types), Pack(f"{self.layouts}_{wanted.dtype}"), *nest

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """Blocks of 64; where rows do not divide, of 32; None where not even these do."""
        group = wanted.group or BLOCKS[0]
        if group not in BLOCKS:
            raise UsageError(f"--group {group}: bitsandbytes has blocks of {', '.join(map(str, sorted(BLOCKS)))}")
        return next((f"{self.kind}_g{g}" for g in (group, *(g for g in BLOCKS[:2] if g < group)) if k % g == 0), None)

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        return stored.name if stored.name.startswith(self.kind) and wanted.group in (None, stored.block) else None

    def config(self, written: Written) -> Mapping[str, object]:
        return {"quantization_config": {
            **COMMON, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double, "bnb_4bit_compute_dtype": TORCH[written.wanted.dtype],
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skipped(written),
        }}  # fmt: skip

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return dequantized_rows(folder, reals, written, exact=True)

    def loading(self, written: Written) -> Loading:
        return Loading({}, written.wanted.dtype, then="dequantize")


@dataclass(frozen=True)
class EightBits:
    """LLM.int8: activations are rounded to 8 bits as the model runs, but for outliers, which stay as they are."""

    name: str = "int8-bnb"
    layouts: str = "bnb_int8"

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]:
        return Quantize(self.name, "absmax", types), Pack(self.layouts)

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        if wanted.group is not None:
            raise UsageError(f"--group {wanted.group}: {self.name} has one scale for each row")
        return "int8_scb"

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        return stored.name if stored.name == "int8_scb" else None

    def config(self, written: Written) -> Mapping[str, object]:
        return {"quantization_config": {
            **COMMON, "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": skipped(written),
        }}  # fmt: skip

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return dequantized_rows(folder, reals, written, exact=False)

    def loading(self, written: Written) -> Loading:
        return Loading({}, then="dequantize")


def skipped(written: Written) -> list[str]:
    """A head that is tied is a module too, where a list is given."""
    return [*written.left, *({"lm_head"} - set(written.left))]


COMMON: Mapping[str, object] = {"quant_method": "bitsandbytes"}
NF4, NF4_SINGLE = FourBits("nf4", "nf4", True), FourBits("nf4-single", "nf4", False)
FP4, FP4_SINGLE = FourBits("fp4", "fp4", True), FourBits("fp4-single", "fp4", False)
INT8 = EightBits()
