"""The nodes of a foreign model as they read quantized weights: each in the place of the one that read the float weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qconvert.emit import Entry
from qconvert.formats.onnx_columns import MIDDLE
from qconvert.formats.onnx_foreign_sites import PRODUCTS, Site, graphs
from qconvert.formats.onnx_layouts import has_zeros
from qconvert.formats.onnx_lowering import part_names, rows_name
from qconvert.formats.onnx_proto import CONTRIB, DTYPES
from qconvert.scheme import Scheme

DATA = "model.onnx.data"
ACCURACY_LEVEL = 4


class Parts(NamedTuple):
    """A quantized weight: how it is read, where its pieces lie, and the float tensor's dims and type."""

    site: Site
    scheme: Scheme
    entry: Entry
    dims: tuple[int, ...]
    data_type: int


def quantized_nodes(source: ModelProto, weights: Mapping[str, Parts], entries: Mapping[str, Entry]) -> ModelProto:
    """A copy of the model that reads `weights` quantized, and its other large tensors from where `entries` place them."""
    model = ModelProto()
    model.CopyFrom(source)
    first = [node for name, parts in weights.items() for node in nodes_before(name, parts)]
    for graph in graphs(model.graph):
        nodes = [new for node in graph.node for new in replacement(node, weights)]
        del graph.node[:]
        graph.node.extend([*(first if graph is model.graph else ()), *nodes])
    kept = [t for t in model.graph.initializer if t.name not in weights]
    for tensor in kept:
        if tensor.name in entries:
            tensor.CopyFrom(placed(tensor.name, tensor.data_type, tensor.dims, entries[tensor.name], 0))
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(t for name, parts in weights.items() for t in initializers(name, parts))])
    if any(n.domain == CONTRIB for g in graphs(model.graph) for n in g.node) and not any(
        o.domain == CONTRIB for o in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return model


def initializers(name: str, parts: Parts) -> Iterator[TensorProto]:
    """Codes, scales and zero points."""
    site, scheme, entry = parts.site, parts.scheme, parts.entry
    names, groups = part_names(name), site.k // scheme.block
    if site.dequantized:
        yield placed(names[0], DTYPES["u8"], parts.dims, entry, 0)
        yield placed(names[1], DTYPES["f32"], (site.n,), entry, 1)
        yield numpy_helper.from_array(np.full(site.n, MIDDLE, np.uint8), names[2])
        return
    blob = scheme.block * scheme.bits // 8
    if "product" in site.kinds:
        yield placed(names[0], DTYPES["u8"], (site.n, groups, blob), entry, 0)
    if "rows" in site.kinds:
        yield placed(rows_name(name), DTYPES["u8"], (site.n, groups * blob), entry, 0)
    yield placed(names[1], DTYPES["f32"], (site.n, groups), entry, 1)
    if has_zeros(scheme):
        yield placed(names[2], DTYPES["u8"], (site.n, entry.planes[2].nbytes), entry, 2)


def placed(name: str, data_type: int, dims: Any, entry: Entry, i: int) -> TensorProto:
    plane, n = entry.planes[i], entry.shape[0]
    tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", plane.offset), ("length", plane.nbytes * n)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def nodes_before(name: str, parts: Parts) -> Iterator[NodeProto]:
    """Scales in the weight's own type, where that is not f32; convolutions' weights, real again."""
    codes, scales, zeros = part_names(name)
    if parts.data_type != TensorProto.FLOAT:
        yield helper.make_node("Cast", [scales], [f"{scales}.cast"], name=f"{scales}.cast", to=parts.data_type)
    if parts.site.dequantized:
        inputs = [codes, scales_of(name, parts), zeros]
        yield helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dequantized", axis=0)


def scales_of(name: str, parts: Parts) -> str:
    scales = part_names(name)[1]
    return scales if parts.data_type == TensorProto.FLOAT else f"{scales}.cast"


def replacement(node: NodeProto, weights: Mapping[str, Parts]) -> Iterator[NodeProto]:
    if node.op_type == "Constant" and node.output[0] in weights:
        return
    read = node.input[0 if node.op_type == "Gather" else 1] if len(node.input) > 1 else ""
    parts = weights.get(read)
    if parts is None or parts.site.dequantized or node.op_type not in (*PRODUCTS, "Gather"):
        yield node
        return
    codes, _, zeros = part_names(read)
    scheme, more = parts.scheme, [scales_of(read, parts), *([zeros] if has_zeros(parts.scheme) else [])]
    if node.op_type == "Gather":
        yield helper.make_node(
            "GatherBlockQuantized", [rows_name(read), node.input[1], *more], node.output, name=node.name, domain=CONTRIB,
            gather_axis=0, quantize_axis=1, block_size=scheme.block, bits=scheme.bits,
        )  # fmt: skip
        return
    added = node.input[2] if len(node.input) > 2 else ""
    product = f"{node.output[0]}.product" if added else node.output[0]
    yield helper.make_node(
        "MatMulNBits", [node.input[0], codes, *more], [product], name=node.name, domain=CONTRIB, K=parts.site.k, N=parts.site.n,
        bits=scheme.bits, block_size=scheme.block, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip
    if added:
        yield helper.make_node("Add", [product, added], node.output, name=f"{node.name}.bias")
