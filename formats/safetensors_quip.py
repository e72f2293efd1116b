"""QuIP#: codes of a lattice (E8P, 2 bits a weight), signs before and behind Hadamard matrices, one number for the weight.

Of each module Qidxs i64[N,K/32] (quip_words.py), SU f16[K], SV f16[N], Wscale f16, codebook_id i64, which is 7:
a weight is Wscale * diag(SV) H_N P H_K.T diag(SU), with P the points of the codes and H as in kernels/hadamard.py.
Names, tensors and bits are quip-sharp's, which alone runs such weights, on CUDA; no runtime on PyPI does. It keeps q, k and v
(gate and up) as one module, which is read here, but not written; and orders of H that it has not (kernels/hadamard.py) are
said in config.json by "odd_orders", which it does not know.
Source: quip-sharp, lib/linear/quantized_linear.py, lib/codebook/latticee8_padded12.py, quantize_llama/hfize_llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert import kernels
from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.safetensors_ct_read import check_part
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.graph import Attr, Node, Type
from qconvert.passes.incoherence import Incoherence
from qconvert.passes.quantize import Quantize
from qconvert.passes.tile_lattice import TileLattice
from qconvert.pipeline import Pass
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import FOLDED, LATTICES, Scheme
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Beside, Constant, Made, tensors
from qconvert.tensor_layouts import Tensors as Layout

E8P12 = 7  # codebook_id
PARAMS: Mapping[str, object] = {
    "codebook": "E8P12", "codebook_version": 1, "codesz": 8, "idx_dtype": "torch.int64", "packsz": 4, "lora_rank": 0,
    "rescale_WH": False, "resid_scale_override": -1, "model_version": 1,
}  # fmt: skip


def tiles(scheme: Scheme) -> Layout | None:
    if scheme.name not in LATTICES:
        return None
    beside = (
        Beside("Qidxs", FOLDED, "I64", lambda n, k: (n, k // 32)),
        Beside("SU", "signs_in", "F16", lambda n, k: (k,)),
        Beside("SV", "signs_out", "F16", lambda n, k: (n,)),
        Beside("Wscale", "unit", "F16", lambda n, k: ()),
    )
    codebook = Constant("codebook_id", "I64", lambda n, k: (), lambda n, k: np.int64(E8P12).tobytes())
    return tensors(f"quip.{scheme.name}", scheme, [], [codebook], beside)


LAYOUTS = Made("quip", tiles, ["e8p"])


@dataclass(frozen=True)
class QuIP:
    name: str = "quip"
    solver: str = "nearest"
    layouts: str = "quip"

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]:
        plain = {name: dtype for name, dtype in types.items() if dtype not in LATTICES}
        turned = {name: dtype for name, dtype in types.items() if dtype in LATTICES}
        return Quantize(self.name, types=plain), Incoherence(self.solver, types=turned), TileLattice(self.layouts)

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        if wanted.group is not None:
            raise UsageError(f"--group {wanted.group}: {self.name} has one scale for each weight")
        return "e8p" if n % 16 == 0 and k % 64 == 0 else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        return stored.name if stored.name in LATTICES else None

    def config(self, written: Written) -> Mapping[str, object]:
        left = [*written.left, *({"lm_head"} - set(written.left))]
        return {"quantization_config": {"quant_method": "quip", **PARAMS, "odd_orders": "dct", "modules_to_not_convert": left}}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        from qconvert.formats.safetensors_quip_check import decoded_rows  # loads torch

        return decoded_rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        why = "quip-sharp alone runs E8P, on CUDA, and is not on PyPI; transformers 5.23 warns, and makes random weights"
        return Loading({}, missing=why)


QUIP = QuIP()


# as input -----------------------------------------------------------------------------------------

# in which module quip-sharp keeps it: which of its parts it is, and how many of its size are from there to the end
FUSED: Mapping[str, tuple[str, int, int | None]] = {
    "q_proj": ("qkv_proj", 0, None), "k_proj": ("qkv_proj", 1, 2), "v_proj": ("qkv_proj", 2, 1),
    "up_proj": ("upgate_proj", 0, None), "gate_proj": ("upgate_proj", 1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """odd: orders of Hadamard matrices that quip-sharp has not are ours."""

    where: str
    odd: bool

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        module = name.removesuffix(".weight")
        if tensors.has(f"{module}.Qidxs"):
            return self.turned(name, module, shape, attrs, tensors)
        stem, _, part = module.rpartition(".")
        fused, i, to_end = FUSED.get(part, ("", 0, None))
        if not tensors.has(f"{stem}.{fused}.Qidxs"):
            return None
        n = tensors.find(f"{stem}.{fused}.Qidxs").shape[0]
        nodes = self.turned(f"{name}~fused", f"{stem}.{fused}", (n, shape[1]), attrs, tensors)
        times = float(tensors.read(tensors.find(f"{stem}.{fused}.fuse_scales"))[i])
        cut: dict[str, Attr] = {"begin": n - to_end * shape[0] if to_end else 0, "times": times}
        return {**nodes, name: Node("rows", (f"{name}~fused",), Type("f32", shape), cut)}

    def turned(
        self, name: str, module: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors
    ) -> Nodes:  # fmt: skip
        (n, k), nodes, layout = shape, dict[str, Node](), LAYOUTS["quip.e8p"]
        known = self.odd or (kernels.known_width(n) and kernels.known_width(k))
        if n % 16 or k % 64 or not known:
            raise UnsupportedError(f"{self.where}: {module} of {list(shape)}: quip-sharp has no such weights")
        assert isinstance(layout, Layout)
        for each in layout.beside:
            info = tensors.find(f"{module}.{each.name}")
            if each.dtype == "F16" and info.dtype in ("f16", "bf16", "f32"):
                check_part(info, info.dtype.upper(), info.shape if each.name == "Wscale" else each.dims(n, k))
            else:
                check_part(info, each.dtype, each.dims(n, k))
            dims = info.shape or (1,)
            nodes[f"{name}~{each.name}"] = Node("load", (), Type(info.dtype, dims), {"tensor": info.ref, **attrs})
        words, su, sv, unit = nodes
        code = f"{name}~points"
        nodes[code] = Node("untile", (words, unit), Type("e8p", shape))
        return {**nodes, name: Node("coherent", (code, su, sv), Type("f32", shape))}

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        if not info.ref.endswith(".codebook_id"):
            return None
        if (found := int(tensors.read(info).reshape(-1)[0])) != E8P12:
            raise UnsupportedError(f"{info.ref}: codebook {found} is not read", hint=f"{E8P12} is: E8P12, of 2 bits")
        return "says that the codebook is E8P12"


def read(settings: Mapping[str, object], where: str) -> Stored:
    """UnsupportedError for what would be read wrongly."""
    for key in ("codebook", "codebook_version", "lora_rank", "rescale_WH"):
        if settings.get(key, PARAMS[key]) != PARAMS[key]:
            raise UnsupportedError(f"{where}: {key} = {settings[key]!r} is not read", hint=f"{PARAMS[key]!r} is")
    return Stored(where, settings.get("odd_orders") == "dct")
