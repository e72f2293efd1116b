"""torchao: Int4Tensor in its plain packing, which Int4WeightOnlyConfig's kernels multiply by.

_weight_qdata i8[N,K/2], codes in two's complement, the first in the low half; _weight_scale and _weight_zero_point [K/g,N]: a
weight is code * scale + zero_point. The files' metadata say of each tensor what it is.
Source: torchao 0.18, quantize_/workflows/int4/int4_tensor.py, prototype/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.formats.safetensors_ct_read import assembled
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.graph import Attr
from qconvert.moves import moved_offsets
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.scheme import Array, Scheme, affine_name
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Kind, Made, Part, tensors
from qconvert.tensor_layouts import Tensors as Layout

GROUP, GROUPS = 128, (128, 64, 32)  # the default, and what is tried where rows do not divide
STORED: Mapping[str, tuple[str, Kind]] = {"f32": ("F32", "f32"), "f16": ("F16", "f16"), "bf16": ("BF16", "bf16")}


def plain(scheme: Scheme) -> Layout | None:
    """The layout of signed codes of 4 bits with a scale and an offset for each group."""
    if scheme.unsigned or scheme.bits != 4 or [level.role for level in scheme.levels] != ["scale", "offset"]:
        return None
    dtype, kind = STORED[scheme.levels[0].dtype]
    bits = scheme.levels[0].bits
    parts = [
        Part("_weight_qdata", "I8", "low", plus=8, dims=lambda n, k: (n, k // 2)),
        Part("_weight_scale", dtype, kind, 0, bits=bits), Part("_weight_zero_point", dtype, kind, 1, bits=bits),
    ]  # fmt: skip
    return tensors(f"torchao.{scheme.name}", scheme, parts)


LAYOUTS = Made("torchao", plain, ["int4o_g128_bf16"])


@dataclass(frozen=True)
class Int4:
    name: str = "torchao-int4"
    solver: str = "mse"
    layouts: str = "torchao"

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """Groups of 128; where rows do not divide, of 64 or 32; None where not even these do."""
        group = wanted.group or GROUP
        if group < 32 or group % 32:
            raise UsageError(f"--group {group}: torchao's groups are multiples of 32", hint="--group 128")
        fits = next((g for g in (group, *(g for g in GROUPS if g < group)) if k % g == 0), None)
        return affine_name("int4o", fits, wanted.dtype) if fits else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        same = plain(stored) is not None and stored.levels[0].dtype == wanted.dtype
        name = stored.name if same else moved_offsets(stored, affine_name("int4o", stored.block, wanted.dtype))
        return name if wanted.group in (None, stored.block) and (same or stored.block % 32 == 0) else None

    def config(self, written: Written) -> Mapping[str, object]:
        kind = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {
            "group_size": written.wanted.group or GROUP, "set_inductor_config": True, "int4_packing_format": "plain",
            "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
            "int4_tile_packed_ntile": 8,
        }}  # fmt: skip
        left = [*written.left, *({"lm_head"} - set(written.left))]
        return {"quantization_config": {
            "quant_method": "torchao", "quant_type": {"default": kind}, "modules_to_not_convert": left,
            "include_input_output_embeddings": False, "untie_embedding_weights": False,
        }}  # fmt: skip

    def described(self, shapes: Mapping[str, tuple[int, ...]], written: Written) -> dict[str, str]:
        """What torchao makes of the tensors, for the files' metadata."""
        activations = {"_type": "torch.dtype", "_data": "bfloat16"}
        said: dict[str, dict[str, object]] = {}
        for name, shape in shapes.items():
            if name not in written.quantized:
                said[name] = {"_type": "Tensor"}
                continue
            group = int(written.quantized[name].split("_g")[1].partition("_")[0])
            data = {"activation_dtype": activations, "block_size": [1, group], "shape": list(shape)}
            names = ["qdata", "scale", "zero_point"]
            said[name] = {"_type": "Int4Tensor", "_data": data, "_tensor_data_names": names}
        return {**{name: json.dumps(found) for name, found in said.items()}, "tensor_names": json.dumps(list(shapes))}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return unflattened_rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        return Loading({}, missing="torchao multiplies Int4Tensors by mslk's kernels alone, on a GPU")


INT4 = Int4()


def unflattened_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """Every weight, as torchao puts it together from the tensors and what the metadata say of them."""
    what = "torchao's unflatten_tensor_state_dict"
    if find_spec("torchao") is None:
        return [Row(what, "not run", None, None, "skip", "torchao is not installed: pip install torchao")]
    from safetensors import safe_open

    unflatten = import_module("torchao.prototype.safetensors.safetensors_support").unflatten_tensor_state_dict
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata |= file.metadata()
    with opened_tensors(folder) as opened:
        found, left = unflatten({name: opened.tensor(name) for name in opened}, metadata)
    wrong = [f"{name} (left over)" for name in left]
    for name in written.quantized:
        own = found.get(name)
        value = own is not None and dequantized(own.qdata, own.scale, own.zero_point, own.block_size[1])
        if own is None or not np.array_equal(value, reals.real(name)):
            wrong.append(name)
    return [judged(f"{what}: {len(written.quantized)} weights", "differ", len(wrong), 0.0, min(wrong, default=""))]


def dequantized(qdata: object, scale: object, zero_point: object, group: int) -> Array:
    """f32[N,K] of an Int4Tensor's parts, which has no way to say its weights but in a product."""
    import torch

    assert isinstance(qdata, torch.Tensor) and isinstance(scale, torch.Tensor) and isinstance(zero_point, torch.Tensor)
    low, high = qdata << 4 >> 4, qdata >> 4  # with their signs
    codes = torch.stack([low, high], -1).reshape(len(qdata), -1).float()
    scales, zeros = (v.float().t().repeat_interleave(group, dim=1) for v in (scale, zero_point))
    value: Array = (codes * scales + zeros).numpy()
    return value


# as input -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        """Groups are as long as the shapes say."""
        module, (_, k) = name.removesuffix(".weight"), shape
        if not tensors.has(f"{module}._weight_qdata"):
            return None
        scale = tensors.find(f"{module}._weight_scale")
        group = k // scale.shape[0] if scale.shape and scale.shape[0] else 0
        layout = LAYOUTS.get(f"torchao.{affine_name('int4o', group, scale.dtype)}")
        if not isinstance(layout, Layout) or k % group or tensors.has(f"{module}._weight_act_pre_scale"):
            raise InputError(f"{scale.ref}: {scale.dtype}{list(scale.shape)} for rows of {k} is not read")
        return assembled(name, shape, attrs, tensors, layout)

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return None


def read(settings: Mapping[str, object], where: str) -> Stored:
    """UnsupportedError for other forms than Int4Tensor's plain one."""
    kinds = settings.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, dict) else None
    data = default.get("_data") if isinstance(default, dict) else None
    packing = data.get("int4_packing_format") if isinstance(data, dict) else None
    packing = packing.get("_data") if isinstance(packing, dict) else packing
    if not isinstance(default, dict) or default.get("_type") != "Int4WeightOnlyConfig" or str(packing).lower() != "plain":
        kind = default.get("_type") if isinstance(default, dict) else kinds
        told = f"{where}: torchao's {kind}, packed {packing}"
        raise UnsupportedError(told, hint="Int4WeightOnlyConfig, packed plain, is read")
    return Stored(where)
