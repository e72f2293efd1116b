"""A file's protobuf as it would be if its nodes rounded no activation: the same weights and wiring, exact arithmetic.

What rounds falls the other way now and then, and a few layers on that is as large as the rounding itself; so the wiring
is proved on this, and rounding on single kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import ModelProto, NodeProto, helper

from qconvert.formats.onnx_proto import graphs_of

QUANTIZERS = ("QuantizeLinear", "QLinearMatMul", "DynamicQuantizeLinear")


def without_levels(model: ModelProto) -> ModelProto:
    """In place: every accuracy_level 0, in branches too."""
    for attribute in (a for graph in graphs_of(model.graph) for node in graph.node for a in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    return model


def without_rounding(model: ModelProto) -> ModelProto:
    """In place: every accuracy_level 0, and products of integers, as onnx_int8 says them, as products of reals.

    QMoE rounds for weights of other bits than 4 at any level, but takes a plain path where they are no constants.
    """
    without_levels(model)
    free = {name for node in model.graph.node if node.op_type == "QMoE" for name in (node.input[2], node.input[5])}
    for tensor in model.graph.initializer:
        if tensor.name in free:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    codes = {name for node in model.graph.node if node.op_type in QUANTIZERS for name in node.output[:1]}
    read = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"}
    nodes = [new for node in model.graph.node for new in exact(node, codes, read)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if codes:  # they are reals now
        del model.graph.value_info[:]
    return model


def exact(node: NodeProto, codes: set[str], read: dict[str, str]) -> Iterator[NodeProto]:
    """codes: activations that were rounded. read: codes of dynamic range -> what was rounded."""
    name, (x, *more) = node.name, node.input or ("",)
    match node.op_type:
        case "QuantizeLinear":
            yield helper.make_node("Identity", [x], node.output, name)
        case "DequantizeLinear" if x in codes:
            yield helper.make_node("Identity", [x], node.output, name)
        case "QLinearMatMul":
            yield from product(name, x, more[2:5], node.output, {"axis": 1})
        case "DynamicQuantizeLinear":
            yield helper.make_node("Constant", [], node.output[1:2], name, value_float=1.0)
        case "MatMulInteger":
            one = f"{name}/one"
            yield helper.make_node("Constant", [], [one], one, value_float=1.0)
            yield from product(name, read[x], [more[0], one, more[2]], node.output, {})
        case _:
            yield node


def product(name: str, x: str, weight: list[str], outputs: Any, attrs: dict[str, int]) -> Iterator[NodeProto]:
    """x by a weight given as codes, scales and zero points."""
    real = f"{name}/weight"
    yield helper.make_node("DequantizeLinear", weight, [real], real, **attrs)
    yield helper.make_node("MatMul", [x, real], outputs, name)
