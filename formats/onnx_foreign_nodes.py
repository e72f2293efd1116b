"""The protobuf of a quantized foreign model: readers of quantized tensors said anew, all else as it was.

MatMul, Gemm -> MatMulNBits        Gather -> GatherBlockQuantized        other readers: DequantizeLinear before them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qconvert.emit import Entry
from qconvert.formats.onnx_columns import MIDDLE, Columns
from qconvert.formats.onnx_foreign_sites import Tensor, Use, Wish, has_bias, standard
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_lowering import part_names, rows_name
from qconvert.formats.onnx_proto import CONTRIB, DATA_FILE, DTYPES, graphs_of, subgraphs
from qconvert.layouts import layout_of

ACCURACY_LEVEL = 4  # activations in 8 bits, group by group: the fast kernels
BYTES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data")


class Part(NamedTuple):
    """An initializer of a quantized tensor and its place in the data file."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    offset: int
    nbytes: int


class Quantized(NamedTuple):
    """A tensor to be written as `entry`; parts: codes, scales and zero points; rows: the codes as they are gathered."""

    tensor: Tensor
    wish: Wish
    entry: Entry
    parts: tuple[Part, ...]
    rows: Part | None
    middle: str | None  # zero points of whole rows, all the same

    @property
    def initializers(self) -> tuple[Part, ...]:
        multiplied = any(u.node is not None and standard(u.node) != "Gather" for u in self.tensor.uses)
        first = (self.parts[0],) if multiplied else ()
        return (*first, *((self.rows,) if self.rows else ()), *self.parts[1:])


def quantized(tensor: Tensor, wish: Wish, entry: Entry, taken: set[str]) -> Quantized:
    """Names that nothing else in the model has, and dims as the nodes want them."""
    names, layout, (n, k) = [_free(name, taken) for name in part_names(tensor.key)], layout_of(entry.dtype), entry.shape
    if isinstance(layout, Columns):  # of whole rows: one scale each
        described = [("u8", tensor.dims), ("f32", (n,))]
    else:
        described = [tuple(part) for part in layout.parts(n, k)]  # type: ignore[attr-defined]
    parts = tuple(
        Part(name, dtype, dims, plane.offset, n * plane.nbytes)
        for name, (dtype, dims), plane in zip(names, described, entry.pieces, strict=False)
    )
    gathered = any(u.node is not None and standard(u.node) == "Gather" for u in tensor.uses)
    width = entry.pieces[0].nbytes
    rows = parts[0]._replace(name=_free(rows_name(tensor.key), taken), dims=(n, width)) if gathered else None
    return Quantized(tensor, wish, entry, parts, rows, names[2] if isinstance(layout, Columns) else None)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def names_in(model: ModelProto) -> set[str]:
    """Of all values and nodes, in branches too."""
    found: set[str] = set()
    for graph in graphs_of(model.graph):
        found.update(v.name for v in (*graph.input, *graph.initializer, *graph.value_info))
        found.update(name for node in graph.node for name in (node.name, *node.output))
    return found


# the model ----------------------------------------------------------------------------------------


def rewrite_nodes(model: ModelProto, tensors: Sequence[Tensor], changed: Sequence[Quantized], taken: set[str]) -> None:
    """Change `model` in place: its nodes, initializers and imports."""
    nodes: dict[int, list[NodeProto]] = {}
    first: dict[int, list[NodeProto]] = {}
    vectors = _vectors(tensors)
    for q in changed:
        if q.wish.kind == "channels":
            made = dequantized(q, taken)
            where, key = (first, id(q.tensor.graph)) if q.tensor.constant is None else (nodes, id(q.tensor.constant))
            where.setdefault(key, []).extend(made)
            continue
        if q.tensor.constant is not None:
            nodes[id(q.tensor.constant)] = []
        nodes |= {id(mover): [] for mover in q.tensor.movers}
        for use in q.tensor.uses:
            assert use.node is not None
            nodes[id(use.node)] = said_anew(q, use, vectors, taken)
    gone = {name for node in _dropped(model.graph, nodes) for name in node.output}
    gone |= {q.tensor.name for q in changed if q.wish.kind == "groups"}
    for q in changed:
        _swap_initializers(q, model.ir_version < 4)
    _edit(model.graph, nodes, first, gone)
    if any(q.wish.kind == "groups" for q in changed) and CONTRIB not in {o.domain for o in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def opset_of(model: ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _vectors(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Names of constant vectors and their lengths; not those that mean two things."""
    lengths: dict[str, set[tuple[int, ...]]] = {}
    for t in tensors:
        lengths.setdefault(t.name, set()).add(t.dims)
    return {name: dims[0] for name, (dims, *more) in lengths.items() if len(dims) == 1 and not more}


def _dropped(graph: GraphProto, nodes: Mapping[int, list[NodeProto]]) -> list[NodeProto]:
    return [node for g in graphs_of(graph) for node in g.node if nodes.get(id(node), [node]) == []]


def _swap_initializers(q: Quantized, inputs_too: bool) -> None:
    """The tensor's parts in its place; before IR 4 an initializer is among the inputs."""
    graph = q.tensor.graph
    if q.tensor.constant is None:
        at = next(i for i, t in enumerate(graph.initializer) if t is q.tensor.proto)
        del graph.initializer[at]
    listed = [i for i, value in enumerate(graph.input) if value.name == q.tensor.name]
    for i in listed:
        del graph.input[i]
    n_before = len(graph.initializer)
    for part in q.initializers:
        graph.initializer.append(TensorProto(name=part.name, data_type=DTYPES[part.dtype], dims=part.dims))
        set_external(graph.initializer[-1], DATA_FILE, part.offset, part.nbytes)
    if q.middle is not None:
        graph.initializer.append(numpy_helper.from_array(np.full(q.entry.shape[0], MIDDLE, np.uint8), q.middle))
    for added in graph.initializer[n_before:] if inputs_too and listed else ():
        graph.input.append(helper.make_tensor_value_info(added.name, added.data_type, added.dims))


def _edit(
    graph: GraphProto, nodes: Mapping[int, list[NodeProto]], first: Mapping[int, list[NodeProto]], gone: set[str]
) -> None:
    for node in graph.node:
        for inner in subgraphs(node):
            _edit(inner, nodes, first, gone)
    after = GraphProto()
    after.node.extend(first.get(id(graph), []))
    after.node.extend(new for node in graph.node for new in nodes.get(id(node), [node]))
    after.value_info.extend(v for v in graph.value_info if v.name not in gone)
    for name in ("node", "value_info"):
        graph.ClearField(name)
        getattr(graph, name).extend(getattr(after, name))


# nodes --------------------------------------------------------------------------------------------


def said_anew(q: Quantized, use: Use, vectors: Mapping[str, int], taken: set[str]) -> list[NodeProto]:
    """A reader's node by the quantized tensor: same name, same outputs."""
    assert use.node is not None
    node, scheme, (n, k) = use.node, layout_of(q.entry.dtype).scheme, q.entry.shape
    names = [part.name for part in q.parts]
    if standard(node) == "Gather":
        assert q.rows is not None
        inputs = [q.rows.name, node.input[1], *names[1:]]
        return [_like(node, "GatherBlockQuantized", inputs, node.output[0], gather_axis=0, quantize_axis=1,
                      bits=scheme.bits, block_size=scheme.block)]  # fmt: skip
    inputs, out, more = [node.input[0], *names], node.output[0], []
    if standard(node) == "Gemm" and has_bias(node):
        if vectors.get(node.input[2]) == n:
            inputs = [*inputs, *[""] * (5 - len(inputs)), node.input[2]]
        else:
            out = _free(f"{out}.product", taken)
            label = _free(f"{node.name or out}/bias", taken)
            more = [helper.make_node("Add", [out, node.input[2]], [node.output[0]], name=label)]
    return [_like(node, "MatMulNBits", inputs, out, **LAYOUTS[f"onnx.{scheme.name}"].attributes(n, k, ACCURACY_LEVEL)), *more]


def _like(node: NodeProto, op: str, inputs: Sequence[str], output: str, **attrs: int) -> NodeProto:
    made = helper.make_node(op, list(inputs), [output], name=node.name, domain=CONTRIB, **attrs)
    made.doc_string = node.doc_string
    made.metadata_props.extend(node.metadata_props)
    return made


def dequantized(q: Quantized, taken: set[str]) -> list[NodeProto]:
    """Nodes that give the tensor's value under its name; DequantizeLinear makes f32 in every opset."""
    inputs, name = [*(part.name for part in q.parts), *([q.middle] if q.middle else [])], q.tensor.name
    half = q.tensor.proto.data_type == TensorProto.FLOAT16
    made = _free(f"{name}.f32", taken) if half else name
    label = _free(f"{name}/DequantizeLinear", taken)
    nodes = [helper.make_node("DequantizeLinear", inputs, [made], name=label, axis=q.wish.axis)]
    if half:
        cast = _free(f"{name}/Cast", taken)
        nodes.append(helper.make_node("Cast", [made], [name], name=cast, to=TensorProto.FLOAT16))
    return nodes


# bytes --------------------------------------------------------------------------------------------


def set_external(tensor: TensorProto, file: str, offset: int, nbytes: int) -> None:
    for name in BYTES:
        tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def set_inline(tensor: TensorProto, data: bytes) -> None:
    for name in (*BYTES, "data_location"):
        tensor.ClearField(name)
    tensor.raw_data = data
