"""onnxruntime's own kernels on this very file: one row per distinct type and row length of its quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np

from qconvert.check import LIMITS
from qconvert.formats.onnx_arch import FORMS
from qconvert.formats.onnx_columns import Columns
from qconvert.formats.onnx_layouts import MatMulNBits, rounds
from qconvert.formats.onnx_proto import CONTRIB, DTYPES
from qconvert.formats.onnx_runtime import FUSED_ACCURACY
from qconvert.layouts import layout_of
from qconvert.planes import side_by_side
from qconvert.report import Row, judged
from qconvert.scheme import Array

ROWS, N_INPUTS = 64, 4


class Quantized(NamedTuple):
    """The first rows of a weight as the file has them: u8[N, row nbytes], and the op that reads them."""

    name: str
    layout: MatMulNBits | Columns
    rows: Array
    op: str  # linear or embed


def kernel_rows(weights: Mapping[tuple[str, int, str], Quantized]) -> list[Row]:
    """Each kernel against f64 over the unpacked values: exact arithmetic is judged, 8-bit activations are told."""
    limit, _ = LIMITS["kernel"]
    rows = []
    for (scheme, k, op), weight in sorted(weights.items(), key=lambda item: item[0]):
        if op == "embed":
            row = judged(f"kernel gather {scheme} x {k}", "relative error", gather_error(weight), limit)
        else:
            row = judged(f"kernel {scheme} x {k}", "relative error", product_error(weight, 0), limit)
        rows.append(row if row.verdict == "pass" else row._replace(reason=f"on {weight.name}"))
        if op == "linear" and rounds(weight.layout):
            what = f"kernel {scheme} x {k}, 8-bit activations"
            rows.append(Row(what, "relative error", product_error(weight, 4), None, "info"))
    return rows


def product_error(weight: Quantized, level: int) -> float:
    """|node(x, W) - x W'| / |x W'| with x[4, K] normal, accuracy level `level`."""
    values = real(weight)
    x = np.random.default_rng(0).standard_normal((N_INPUTS, values.shape[1])).astype(np.float32)
    return distance(product(weight, x, level), x.astype(np.float64) @ values.T)


def product(weight: Quantized, x: Array, level: int) -> Array:
    """x f32[M,K] times the weight by onnxruntime -> f32[M,N]."""
    layout, n, k = weight.layout, len(weight.rows), x.shape[1]
    if isinstance(layout, Columns):
        return dequantized_product(x, weight, level)
    inputs = [plane.view({"u8": "u1", "f32": "<f4"}[part.dtype]).reshape(part.dims)
              for plane, part in zip(planes(weight, k), layout.parts(n, k), strict=True)]  # fmt: skip
    return run_node(layout.node, [x, *inputs], (len(x), n), **layout.attributes(n, k, level))


def dequantized_product(x: Array, weight: Quantized, level: int) -> Array:
    """x @ W by DequantizeLinear and MatMul, of which onnxruntime makes a MatMulNBits of that accuracy level."""
    from onnx import TensorProto, helper

    layout, n = cast(Columns, weight.layout), len(weight.rows)
    tensors = []
    described = zip(planes(weight, x.shape[1]), layout.bits, layout.dtypes, layout.dims(n, x.shape[1]), strict=True)
    for name, (piece, bits, dtype, dims) in zip("wsz", described, strict=False):
        values = piece.view(f"u{max(1, bits // 8)}").T
        data = side_by_side(values, bits).tobytes()
        tensors.append(TensorProto(name=name, data_type=DTYPES[dtype], dims=dims, raw_data=data))
    names = [t.name for t in tensors]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["real"], axis=0, block_size=layout.scheme.block),
        helper.make_node("MatMul", ["x", "real"], ["y"]),
    ]
    return run_nodes(nodes, {"x": x}, tensors, (len(x), n), {FUSED_ACCURACY: str(level)})


def gather_error(weight: Quantized) -> float:
    values = real(weight)
    ids = np.arange(len(values))[::-1].astype(np.int64)
    return distance(gathered(weight, ids), values[ids])


def gathered(weight: Quantized, ids: Array) -> Array:
    """Rows `ids` of an embedding by onnxruntime."""
    scheme, k = weight.layout.scheme, weight.layout.row_weights(weight.rows.shape[1])
    codes, scales, *zeros = planes(weight, k)
    return run_node("GatherBlockQuantized", [codes, ids, scales.view("<f4"), *zeros], (len(ids), k), gather_axis=0,
                    quantize_axis=1, block_size=scheme.block, bits=scheme.bits)  # fmt: skip


def real(weight: Quantized) -> Array:
    return weight.layout.unpack(weight.rows).dequantize().astype(np.float64)


def planes(weight: Quantized, k: int) -> list[Array]:
    cuts = np.cumsum(weight.layout.planes(k))[:-1]
    return [np.ascontiguousarray(p) for p in np.split(weight.rows, cuts, axis=1)]


def distance(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))


def run_node(op: str, arrays: list[Array], shape: tuple[int, ...], **attrs: Any) -> Array:
    """One contrib node alone in onnxruntime; all inputs but token ids and activations are constants, as in the file."""
    from onnx import helper, numpy_helper

    free = 1 if op == "GatherBlockQuantized" else 0
    names = [f"input{i}" for i in range(len(arrays))]
    node = helper.make_node(op, names, ["y"], domain=CONTRIB, **attrs)
    constants = [numpy_helper.from_array(a, n) for i, (a, n) in enumerate(zip(arrays, names, strict=True)) if i != free]
    return run_nodes([node], {names[free]: arrays[free]}, constants, shape)


def run_nodes(
    nodes: Sequence[Any], feeds: Mapping[str, Array], constants: Sequence[Any], shape: tuple[int, ...],
    config: Mapping[str, str] = MappingProxyType({}),
) -> Array:  # fmt: skip
    """The value y f32[shape] of a few nodes in onnxruntime; config: entries of its session."""
    import onnxruntime
    from onnx import helper

    form = FORMS["ort"]
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()]
    graph = helper.make_graph(list(nodes), "kernel", inputs, [helper.make_tensor_value_info("y", 1, shape)], list(constants))
    opsets = [helper.make_opsetid("", form.opset), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=form.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, dict(feeds))
    out: Array = y
    return out


def kernels_of(entries: Mapping[str, tuple[str, Array, tuple[str, ...]]]) -> dict[tuple[str, int, str], Quantized]:
    """name -> (layout, first rows, ops that read it); of each (scheme, K, op) the first weight."""
    found: dict[tuple[str, int, str], Quantized] = {}
    for name, (dtype, rows, readers) in entries.items():
        layout = cast(MatMulNBits | Columns, layout_of(dtype))
        for op in readers:
            key = (layout.scheme.name, layout.row_weights(rows.shape[1]), op)
            found.setdefault(key, Quantized(name, layout, rows, op))
    return found
