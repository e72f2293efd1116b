"""bitsandbytes' folders as input: what QLoRA trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.safetensors_bnb import ROWS, SINGLE_F32
from qconvert.formats.safetensors_ct_read import assembled, check_part
from qconvert.graph import Attr, Node, Type
from qconvert.scheme import FP4_TABLE, NF4_TABLE
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Tensors as Layout

KINDS = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}


@dataclass(frozen=True)
class Bitsandbytes:
    """bits: 4 or 8."""

    bits: int
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        module = name.removesuffix(".weight")
        if self.bits == 8:
            rows = ROWS["bnb_int8.int8_scb"]
            assert isinstance(rows, Layout)
            return assembled(name, shape, attrs, tensors, rows) if tensors.has(f"{module}.SCB") else None
        kind = next((kind for kind in KINDS if tensors.has(f"{name}.quant_state.bitsandbytes__{kind}")), None)
        if kind is None:
            return None
        state = state_of(tensors.find(f"{name}.quant_state.bitsandbytes__{kind}"), tensors)
        group = state.get("blocksize")
        if list(shape) != state.get("shape"):
            raise InputError(f"{name}: quant_state has the shape {state.get('shape')}, config.json says {list(shape)}")
        layout = SINGLE_F32.get(f"bnb_f32.{kind}_g{group}")
        if not isinstance(layout, Layout) or shape[1] % layout.scheme.block:
            raise UnsupportedError(f"{name}: rows of {shape[1]} in blocks of {group} are not read")
        table = tensors.find(f"{name}.quant_map")
        if not np.array_equal(tensors.read(table), np.array(KINDS[kind], np.float32)):
            raise UnsupportedError(f"{table.ref}: its levels are not those of {kind.upper()}")
        if "nested_offset" not in state:
            return assembled(name, shape, attrs, tensors, layout)
        return twice(name, shape, attrs, tensors, layout, state)

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return "a mark of the order of rows, as they are" if info.ref.endswith(".weight_format") else None


def state_of(info: TensorInfo, tensors: Tensors) -> dict[str, Any]:
    """A quant_state's JSON."""
    try:
        state = json.loads(tensors.read(info).tobytes())
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise InputError(f"{info.ref}: this is no JSON object", hint="is the file damaged?")
    return state


def twice(
    name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors, layout: Layout, state: Mapping[str, Any]
) -> Nodes:
    """Scales that are quantized once more are made f32; the codes stay."""
    (n, k), nodes = shape, dict[str, Node]()
    groups = k // layout.scheme.block
    if state.get("nested_blocksize") != 256:
        raise UnsupportedError(f"{name}: nested_blocksize {state.get('nested_blocksize')}; 256 is read")
    wanted = {
        "weight": ("U8", (n * k // 2, 1)), "weight.absmax": ("U8", (n * groups,)),
        "weight.nested_absmax": ("F32", (-(-n * groups // 256),)), "weight.nested_quant_map": ("F32", (256,)),
    }  # fmt: skip
    for part, (dtype, dims) in wanted.items():
        info = tensors.find(f"{name.removesuffix('.weight')}.{part}")
        check_part(info, dtype, dims)
        load = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})
        nodes[f"{name}~{part.removeprefix('weight.')}"] = load
    codes, *second = nodes
    nodes[f"{name}~nested_offset"] = Node("constant", (), Type("f32", (1,)), {"values": [float(state["nested_offset"])]})
    inputs = (second[0], second[1], f"{name}~nested_offset", second[2])
    nodes[f"{name}~absmaxes"] = Node("nested", inputs, Type("f32", (n, groups)))
    made = Node("halves", (codes, f"{name}~absmaxes"), Type(layout.scheme.name, shape))
    return {**nodes, name: made}


def read(settings: Mapping[str, object], where: str) -> Bitsandbytes:
    """UnsupportedError for forms that would be read wrongly."""
    if (storage := settings.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
        raise UnsupportedError(f"{where}: bnb_4bit_quant_storage is {storage}; uint8 is read")
    return Bitsandbytes(8 if settings.get("load_in_8bit") else 4, where)
