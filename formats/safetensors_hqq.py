"""HQQ: groups along rows with a scale and a zero point that is any number; rows of the halves (quarters) share bytes.

With axis 0, which is read and not written, W_q u8[g/p, N*K/g] and scale and zero [1, N*K/g]: values N*K/g apart are a group.

Of each module W_q u8[N*G/p, g], p = 8 / bits, whose byte holds codes of rows N/p apart, the first in the high bits; scale and
zero [N*G,1]: a weight is (code - zero) * scale; and what else hqq's linear keeps in its state, each as a tensor.
hqq 0.2.8 loads such tensors linear by linear; whole folders only from a pickle, and transformers 5.23 has no HQQ.
Source: hqq 0.2.8, core/quantize.py (HQQLinear.state_dict), core/bitpack.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.safetensors_config import TORCH
from qconvert.formats.safetensors_ct_read import check_part
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.graph import Attr, Node, Type
from qconvert.moves import moved_offsets
from qconvert.passes.fold_rows import FoldRows
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme, affine_name
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Beside, Constant, Kind, Made, Part, tensors
from qconvert.tensor_layouts import Tensors as Layout

GROUP, GROUPS = 64, (64, 32, 16)  # the default, and what is tried where rows do not divide
STORED: Mapping[str, tuple[str, Kind]] = {"f32": ("F32", "f32"), "f16": ("F16", "f16"), "bf16": ("BF16", "bf16")}


def apart(scheme: Scheme) -> Layout | None:
    """The layout of codes with float zero points."""
    group, (dtype, kind) = scheme.levels[0].group, STORED.get(scheme.levels[0].dtype, ("", "f32"))
    if scheme.zero_point != "float" or group is None or not dtype or scheme.bits not in (2, 4, 8):
        return None
    per = 8 // scheme.bits
    parts = [Part(name, dtype, kind, i, dims=lambda n, k: (n * k // group, 1)) for i, name in enumerate(("scale", "zero"))]
    folded = Beside("W_q", "folded", "U8", lambda n, k: (n * k // group // per, group))
    numbers = {"nbits": scheme.bits, "group_size": group, "axis": 1}
    flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1,
             "stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": 0}  # fmt: skip
    words = {"packing": f"{scheme.bits}bit_u8", "unpack_view_dtype": "torch.uint8",
             "compute_dtype": f"torch.{TORCH[scheme.levels[0].dtype]}"}  # fmt: skip
    constants = [Constant("shape", "I64", lambda n, k: (2,), lambda n, k: np.array([n, k], "<i8").tobytes())]
    constants += [scalar(name, "I32", np.int32(value).tobytes()) for name, value in numbers.items()]
    constants += [scalar(name, "U8", bytes([value])) for name, value in flags.items()]
    constants += [text(name, value.encode()) for name, value in words.items()]
    return tensors(f"hqq.{scheme.name}", scheme, parts, constants, [folded])


def scalar(name: str, dtype: str, data: bytes) -> Constant:
    return Constant(name, dtype, lambda n, k: (), lambda n, k: data)


def text(name: str, data: bytes) -> Constant:
    return Constant(name, "U8", lambda n, k: (len(data),), lambda n, k: data)


LAYOUTS = Made("hqq", apart, [f"uint{bits}f_g64_bf16" for bits in (2, 4, 8)])


@dataclass(frozen=True)
class HQQ:
    """Zero points of least squared error: not hqq's own search, which lowers another norm."""

    name: str
    bits: int
    solver: str = "mse"
    layouts: str = "hqq"

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]:
        return Quantize(self.name, self.solver, types), Pack(self.layouts), FoldRows(True)

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """Groups of 64; where rows do not divide, of 32 or 16; None where not even these do."""
        group = wanted.group or GROUP
        if group < 8 or group % 8:
            raise UsageError(f"--group {group}: hqq's groups are multiples of 8", hint="--group 64")
        fits = next((g for g in (group, *(g for g in GROUPS if g < group)) if k % g == 0), None)
        return affine_name(f"uint{self.bits}f", fits, wanted.dtype) if fits and n % (8 // self.bits) == 0 else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        same = stored.zero_point == "float" and stored.bits == self.bits and stored.levels[0].dtype == wanted.dtype
        name = stored.name if same else moved_offsets(stored, affine_name(f"uint{self.bits}f", stored.block, wanted.dtype))
        return name if wanted.group in (None, stored.block) and n % (8 // self.bits) == 0 else None

    def config(self, written: Written) -> Mapping[str, object]:
        weights = {"nbits": self.bits, "group_size": written.wanted.group or GROUP, "axis": 1, "channel_wise": True,
                   "optimize": True, "round_zero": False, "view_as_float": False}  # fmt: skip
        settings = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None}
        left = [*written.left, *({"lm_head"} - set(written.left))]
        return {"quantization_config": {"quant_method": "hqq", "quant_config": settings, "skip_modules": left}}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        from qconvert.formats.safetensors_hqq_check import dequantized_rows  # loads torch

        return dequantized_rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        return Loading({}, runtime="hqq")


FOUR, TWO, EIGHT = HQQ("hqq", 4), HQQ("hqq-2bit", 2), HQQ("hqq-8bit", 8)


# as input -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        """What a module says of itself counts, not config.json."""
        module, (n, k) = name.removesuffix(".weight"), shape
        if not tensors.has(f"{module}.W_q"):
            return None
        said = {
            key: int(tensors.read(tensors.find(f"{module}.{key}")).reshape(-1)[0])
            for key in ("nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero")
            if tensors.has(f"{module}.{key}")
        }
        bits, group = said.get("nbits", 0), said.get("group_size", 0)
        scale = tensors.find(f"{module}.scale")
        layout = LAYOUTS.get(f"hqq.{affine_name(f'uint{bits}f', group or None, scale.dtype)}")
        others = {key for key in ("view_as_float", "quant_scale", "quant_zero") if said.get(key)}
        fits = {0: n * k % group == 0 == group % (8 // bits), 1: k % group == 0 == n % (8 // bits)} if bits and group else {}
        if not isinstance(layout, Layout) or others or not fits.get(said.get("axis", -1)):
            told = ", ".join(f"{key} {value}" for key, value in said.items())
            raise UnsupportedError(f"{self.where}: {module} of {list(shape)} has {told}: not read")
        along, parts, nodes = said["axis"] == 1, 8 // bits, dict[str, Node]()
        if along:
            dims = {b.name: (b.dtype, b.dims(n, k)) for b in layout.beside}
            dims |= {p.name: (p.dtype, p.shape(layout.scheme, n, k)) for p in layout.parts}
        else:
            m = n * k // group
            dims = {"W_q": ("U8", (group // parts, m)), **{p.name: (p.dtype, (1, m)) for p in layout.parts}}
        for part, (dtype, dim) in dims.items():
            info = tensors.find(f"{module}.{part}")
            check_part(info, dtype, dim)
            nodes[f"{name}~{part}"] = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})
        if along:
            options: dict[str, Attr] = {"parts": parts, "high_first": True}
            return {**nodes, name: Node("unfold", tuple(nodes), Type(layout.scheme.name, shape), options)}
        across: dict[str, Attr] = {"scheme": layout.scheme.name, "parts": parts}
        return {**nodes, name: Node("across", tuple(nodes), Type("f32", shape), across)}

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        """Words about a module that only hqq needs."""
        stem, _, key = info.ref.partition("#")[2].rpartition(".")
        return "says how hqq keeps the module" if tensors.has(f"{stem}.W_q") and key in SAID else None


SAID = {c.name for c in LAYOUTS["hqq.uint4f_g64_bf16"].constants}  # type: ignore[attr-defined]


def read(settings: Mapping[str, object], where: str) -> Stored:
    return Stored(where)
