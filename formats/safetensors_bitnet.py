"""BitNet: codes -1, 0 and 1 beside one scale of the whole weight, four rows a byte; activations are rounded to 8 bits.

weight u8[N/4,K]: bits 2j of row r are code + 1 of row j*N/4 + r; weight_scale [1], by which products are multiplied
(autobitlinear) or divided (bitlinear). For models that were trained so: of any other little is left.
Source: transformers 5.23, integrations/bitnet.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.formats.safetensors_compared import exact_rows
from qconvert.formats.safetensors_ct_read import check_part
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.graph import Attr, Node, Type
from qconvert.passes.fold_rows import FoldRows
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Array, Scheme
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Beside, Made, tensors
from qconvert.tensor_layouts import Tensors as Layout


def four_rows(scheme: Scheme) -> Layout | None:
    kind, _, dtype = scheme.name.partition("_")
    if kind != "ternary":
        return None
    beside = (
        Beside("weight", "folded", "U8", lambda n, k: (n // 4, k)),
        Beside("weight_scale", "scale", dtype.upper(), lambda n, k: (1,)),
    )
    return tensors(f"bitnet.{scheme.name}", scheme, [], [], beside)


LAYOUTS = Made("bitnet", four_rows, ["ternary_bf16"])


@dataclass(frozen=True)
class BitNet:
    name: str = "bitnet"
    solver: str = "absmean"
    layouts: str = "bitnet"

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]:
        return Quantize(self.name, self.solver, types), Pack(self.layouts), FoldRows(False, wanted.dtype)

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        if wanted.group is not None:
            raise UsageError(f"--group {wanted.group}: {self.name} has one scale for each weight")
        return f"ternary_{wanted.dtype}" if n % 4 == 0 else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        return None

    def config(self, written: Written) -> Mapping[str, object]:
        left = [*written.left, *({"lm_head"} - set(written.left))]
        return {"quantization_config": {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
            "modules_to_not_convert": left, "use_rms_norm": False, "rms_norm_eps": 1e-6,
        }}  # fmt: skip

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        """Every weight whose shape is new, by transformers' unpacking."""
        what = "transformers' unpack_weights"
        if find_spec("transformers") is None:
            return [Row(what, "not run", None, None, "skip", "transformers is not installed")]
        import torch
        from transformers.integrations.bitnet import unpack_weights

        with opened_tensors(folder) as tensors, torch.compiler.set_stance("force_eager"):

            def theirs(name: str, _: str) -> Array:
                value = unpack_weights(tensors.tensor(name), torch.float32) * tensors.tensor(f"{name}_scale").float()
                out: Array = value.numpy()
                return out

            return exact_rows(what, written, tensors.shape, theirs, reals.real)

    def loading(self, written: Written) -> Loading:
        rounding = Rounding(frozenset(written.quantized))
        return Loading({}, kind="runtime transformers, 8-bit tokens", round_input=rounding, eager=True)


BITNET = BitNet()


@dataclass(frozen=True)
class Rounding:
    """What BitNet's linears make of their activations: 8 bits for each token."""

    names: frozenset[str]

    def __call__(self, node: Node, x: Any) -> Any:
        if node.inputs[1] not in self.names:
            return x
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x * scale).round().clamp(-128, 127) / scale


# as input -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """divided: products are divided by what is stored."""

    divided: bool

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        if not tensors.has(f"{name}_scale"):
            return None
        (n, k), nodes = shape, dict[str, Node]()
        codes, scale = tensors.find(name), tensors.find(f"{name}_scale")
        if n % 4 or scale.shape not in ((1,), ()) or scale.dtype not in ("f32", "f16", "bf16"):
            raise InputError(f"{scale.ref}: {scale.dtype}{list(scale.shape)} beside {n} rows; one number was wanted")
        check_part(codes, "U8", (n // 4, k))
        for part, info in (("codes", codes), ("weight_scale", scale)):
            nodes[f"{name}~{part}"] = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})
        options: dict[str, Attr] = {"parts": 4, "high_first": False, "inverse": self.divided}
        kind = Type(f"ternary_{'f32' if self.divided else scale.dtype}", shape)
        return {**nodes, name: Node("unfold", tuple(nodes), kind, options)}

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return None


def read(settings: Mapping[str, object], where: str) -> Stored:
    """UnsupportedError for forms that would be read wrongly."""
    if settings.get("quantization_mode", "offline") != "offline":
        raise UnsupportedError(f"{where}: quantization_mode {settings['quantization_mode']}; offline is read")
    if settings.get("use_rms_norm"):
        raise UnsupportedError(f"{where}: use_rms_norm: such models normalize what each linear gets, which is not read")
    return Stored(settings.get("linear_class", "bitlinear") == "bitlinear")
