"""Linears as products of integers, in standard nodes that onnxruntime fuses: activations and weights are codes of 8 bits.

dynamic: DynamicQuantizeLinear, MatMulInteger, Cast, Mul   -> MatMulIntegerToFloat or DynamicQuantizeMatMul
static:  QuantizeLinear, DequantizeLinear, MatMul over DequantizeLinear -> MatMulIntegerToFloat; or QLinearMatMul itself
All that read one activation share its codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import numpy_helper

from qconvert.formats.onnx_columns import MIDDLE, PREFIX
from qconvert.formats.onnx_int8_plan import SCHEME
from qconvert.formats.onnx_lowering import Lower, Lowering, module, part_names, product
from qconvert.formats.onnx_proto import i64
from qconvert.graph import Attr, Node
from qconvert.passes.quantize_activations import DYNAMIC


def with_integers(ops: Mapping[str, Lower]) -> dict[str, Lower]:
    """A form's table that says linears with rounded activations, and rows of their weights, in the nodes of this file."""

    def linear(e: Lowering, name: str, node: Node) -> None:
        if "round_output" in node.attrs:
            _qlinear(e, name, node)
        elif "round_input" in node.attrs:
            (_dynamic if node.attrs["round_input"] == DYNAMIC else _static)(e, name, node)
        else:
            ops["linear"](e, name, node)

    def embed(e: Lowering, name: str, node: Node) -> None:
        by_column = e.graph.nodes[node.inputs[1]].type.dtype == f"{PREFIX}.{SCHEME}"
        (_gathered_columns if by_column else ops["embed"])(e, name, node)

    return {**ops, "linear": linear, "embed": embed}


def _dynamic(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    m, path, (codes, scales, _) = e.model, module(weight), part_names(weight)
    x_codes, x_scale, x_zero = (f"{x}.{part}" for part in ("u8", "scale", "zero"))

    def rounded() -> None:
        outputs = [m.value(x_codes, "u8", e.shape(x)), m.value(x_scale, "f32", ()), m.value(x_zero, "u8", ())]
        m.node("DynamicQuantizeLinear", x, [e.edge(x)], outputs)

    e.once(x_codes, rounded)
    sums = m.value(f"{name}.sums", "i32", e.shape(name))
    real_sums = m.value(f"{name}.real_sums", "f32", e.shape(name))
    factors = m.value(f"{name}.factors", "f32", (e.graph.nodes[weight].type.dims[0],))
    m.node("MatMulInteger", path, [x_codes, codes, x_zero, middle(e)], [sums])
    m.node("Cast", path, [sums], [real_sums], to=1)
    m.node("Mul", path, [x_scale, scales], [factors])
    product(e, "Mul", name, [real_sums, factors], bias, path)


def _static(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    m, path, (codes, scales, _) = e.model, module(weight), part_names(weight)
    n, k = e.graph.nodes[weight].type.dims
    x_codes, grid = quantized(e, x, node.attrs["round_input"])
    rounded, real = f"{x}.rounded", f"{weight}.real"

    def round_x() -> None:
        m.node("DequantizeLinear", x, [x_codes, *grid], [m.value(rounded, "f32", e.shape(x))])

    def dequantize() -> None:
        m.node("DequantizeLinear", path, [codes, scales, middles(e, n)], [m.value(real, "f32", (k, n))], axis=1)

    product(e, "MatMul", name, [e.once(rounded, round_x), e.once(real, dequantize)], bias, path)


def _qlinear(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    m, path, (codes, scales, _) = e.model, module(weight), part_names(weight)
    x_codes, x_grid = quantized(e, x, node.attrs["round_input"])
    y_grid, y_codes = grid_of(e, f"{name}.product", node.attrs["round_output"]), f"{name}.product.u8"
    zeros = middles(e, e.graph.nodes[weight].type.dims[0])
    inputs = [x_codes, *x_grid, codes, scales, zeros, *y_grid]
    m.node("QLinearMatMul", path, inputs, [m.value(y_codes, "u8", e.shape(name))])
    product(e, "DequantizeLinear", name, [y_codes, *y_grid], bias, path)


def quantized(e: Lowering, x: str, grid: Attr) -> tuple[str, tuple[str, str]]:
    """The codes of an activation on a fixed grid, and the names of that grid."""
    codes, names = f"{x}.u8", grid_of(e, x, grid)

    def make() -> None:
        e.model.node("QuantizeLinear", x, [e.edge(x), *names], [e.model.value(codes, "u8", e.shape(x))])

    return e.once(codes, make), names


def grid_of(e: Lowering, name: str, grid: Attr) -> tuple[str, str]:
    """Initializers of scale and zero point; however large, they take the same bytes."""
    assert isinstance(grid, dict)
    names = f"{name}.scale", f"{name}.zero"
    for key, dtype, n in zip(("scale", "zero"), (np.float32, np.uint8), names, strict=True):
        e.model.initializers[n] = numpy_helper.from_array(np.array(grid[key], dtype), n)
    return names


def middle(e: Lowering) -> str:
    return e.model.constant(np.array(MIDDLE, np.uint8))


def middles(e: Lowering, n: int) -> str:
    """A zero point for each of n outputs; the runtime makes them as it loads, so they take no bytes."""
    name = f"zeros.{n}"

    def make() -> None:
        e.model.node("Expand", "zeros", [middle(e), e.model.constant(i64(n))], [e.model.value(name, "u8", (n,))])

    return e.once(name, make)


def _gathered_columns(e: Lowering, name: str, node: Node) -> None:
    """Rows of an embedding that is also a head: columns of its codes [K,N], each times the scale of its token."""
    ids, weight = node.inputs
    m, path, (codes, scales, _) = e.model, module(weight), part_names(weight)
    shape = e.shape(name)
    outer, last = shape[:-1], m.constant(i64(-1))
    turned = [*range(1, len(shape)), 0]
    parts = {part: f"{name}.{part}" for part in ("columns", "rows", "counts", "scales", "factors")}
    m.node("Gather", path, [codes, e.edge(ids)], [m.value(parts["columns"], "u8", [shape[-1], *outer])], axis=1)
    m.node("Transpose", path, [parts["columns"]], [m.value(parts["rows"], "u8", shape)], perm=turned)
    one = m.constant(np.array(1, np.float32))
    m.node("DequantizeLinear", path, [parts["rows"], one, middle(e)], [m.value(parts["counts"], "f32", shape)])
    m.node("Gather", path, [scales, e.edge(ids)], [m.value(parts["scales"], "f32", outer)])
    m.node("Unsqueeze", path, [parts["scales"], last], [m.value(parts["factors"], "f32", [*outer, 1])])
    e.say("Mul", name, [parts["counts"], parts["factors"]], path=path)
