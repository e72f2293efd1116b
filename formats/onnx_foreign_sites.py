"""What reads each tensor of a foreign model, and so how it may be quantized: a table, op -> wish or the reason against.

A wish is legal where every reader has it: groups along the rows of a matrix (MatMulNBits, GatherBlockQuantized), or one
scale for each output channel (DequantizeLinear before whatever reads the tensor; 8 bits alone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from qconvert.formats.onnx_foreign_tensors import dtype_of
from qconvert.formats.onnx_proto import CONTRIB, graphs_of, subgraphs

MIN_VALUES = 1024
DEQUANTIZE_OPSET = 13  # the first in which DequantizeLinear has an axis
IR_WITH_DEFAULTS = 4  # from it on an initializer that is an input too is a default that callers replace
# how a value came from a tensor: it is the tensor, its transpose, or made of it by ops that move values
Path = Literal["itself", "transposed", "moved"]
MOVES = ("Identity", "Transpose", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Split", "Expand")


class Use(NamedTuple):
    """One reading of a tensor, as the node's input `number`; node None: it is an output of a graph."""

    node: NodeProto | None
    number: int
    path: Path


@dataclass
class Tensor:
    """A constant of the model: an initializer of a graph, or what a Constant node of it gives."""

    name: str
    key: str  # the name, or what tells it from others of that name in other branches
    proto: TensorProto
    graph: GraphProto
    constant: NodeProto | None = None
    replaceable: bool = False  # by a caller
    uses: list[Use] = field(default_factory=list)
    movers: list[NodeProto] = field(default_factory=list)  # nodes on the way to its readers

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.proto.dims)


class Wish(NamedTuple):
    """groups: rows of the tensor, or of its transpose; channels: a scale for each place along `axis`."""

    kind: Literal["groups", "channels"]
    transposed: bool = False
    axis: int = 0


# who reads what -----------------------------------------------------------------------------------


def tensors_of(model: ModelProto) -> list[Tensor]:
    """Every constant of the main graph and its branches, with its readers; bodies of functions are theirs."""
    found: list[Tensor] = []
    _read_graph(model.graph, {}, model.ir_version >= IR_WITH_DEFAULTS, found)
    seen: set[str] = set()
    for tensor in found:
        n = 1
        while tensor.key in seen:
            n += 1
            tensor.key = f"{tensor.name}~{n}"
        seen.add(tensor.key)
    return found


Reads = dict[int, Path]  # number of a tensor -> how the value came from it


def _read_graph(graph: GraphProto, outer: Mapping[str, Reads], defaults: bool, found: list[Tensor]) -> None:
    known = dict(outer)
    inputs = {i.name for i in graph.input}
    known |= {name: {} for name in inputs}
    for proto in graph.initializer:
        known[proto.name] = {len(found): "itself"}
        found.append(Tensor(proto.name, proto.name, proto, graph, replaceable=defaults and proto.name in inputs))
    for node in graph.node:
        made: Reads = {}
        for index, name in enumerate(node.input):
            reads = known.get(name, {})
            if standard(node) in MOVES:
                _move(node, index, reads, made, found)
                continue
            for number, path in reads.items():
                found[number].uses.append(Use(node, index, path))
        for inner in subgraphs(node):
            _read_graph(inner, known, defaults, found)
        if (value := constant_value(node)) is not None:
            made = {len(found): "itself"}
            found.append(Tensor(node.output[0], node.output[0], value, graph, node))
        known |= dict.fromkeys(node.output, made)
    for i, out in enumerate(graph.output):
        for number, path in known.get(out.name, {}).items():
            found[number].uses.append(Use(None, i, path))


def _move(node: NodeProto, index: int, reads: Reads, made: Reads, found: list[Tensor]) -> None:
    """What a node makes that only moves values; its other inputs (axes, shapes) are readers like any."""
    for number, path in reads.items():
        if index and standard(node) != "Concat":
            found[number].uses.append(Use(node, index, path))
            continue
        found[number].movers.append(node)
        after = _moved(node, path, len(found[number].dims))
        made[number] = after if made.get(number, after) == after else "moved"


def _moved(node: NodeProto, path: Path, n_dims: int) -> Path:
    if standard(node) == "Identity":
        return path
    if standard(node) == "Transpose" and n_dims == 2 and path != "moved":
        perm = list(attributes(node)["perm"].ints) if "perm" in attributes(node) else [1, 0]
        return path if perm == [0, 1] else "itself" if path == "transposed" else "transposed"
    return "moved"


def standard(node: NodeProto) -> str | None:
    """The op's name in ONNX's own domain; None for an op of another."""
    return node.op_type if node.domain in ("", "ai.onnx") else None


def attributes(node: NodeProto) -> dict[str, AttributeProto]:
    return {a.name: a for a in node.attribute}


def odd_name(model: ModelProto) -> object:
    """The first name in the graphs that is no text; None where all are."""
    for graph in graphs_of(model.graph):
        names = [v.name for v in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
        if (odd := next((n for n in names if not isinstance(n, str)), None)) is not None:
            return odd
    return None


def bare_node(model: ModelProto) -> str | None:
    """The first node without an output, which no operator of a graph's may be; None where all have one."""
    found = (node for graph in graphs_of(model.graph) for node in graph.node if not any(node.output))
    return next((f"{node.op_type or 'a node'} {node.name!r}" for node in found), None)


def constant_value(node: NodeProto) -> TensorProto | None:
    if standard(node) != "Constant" or not node.output:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


# what they want -----------------------------------------------------------------------------------


def wish_of(tensor: Tensor) -> Wish | str:
    """How all of a tensor's readers take it quantized, or why it is carried over as it is."""
    dims, dtype = tensor.dims, dtype_of(tensor.proto)
    if dtype not in ("f32", "f16"):
        return f"is of {dtype}" if dtype in ("bf16", "f64") else "not real numbers"
    if len(dims) < 2:
        return "a vector" if dims else "a number"
    if math.prod(dims) < MIN_VALUES:
        return f"smaller than {MIN_VALUES} values"
    if tensor.replaceable:
        return "also an input of the graph, so a caller may replace it"
    if not tensor.uses:
        return "nothing reads it"
    wishes = [wish(use, dims) for use in tensor.uses]
    against = next((w for w in wishes if isinstance(w, str)), None)
    if against is not None:
        return against
    if len(set(wishes)) > 1:
        ops = sorted({use.node.op_type for use in tensor.uses if use.node is not None})
        return f"{' and '.join(ops)} read it in ways that no quantized form has together"
    return wishes[0]


def wish(use: Use, dims: tuple[int, ...]) -> Wish | str:
    if use.node is None:
        return "an output of the graph"
    op = standard(use.node)
    if (use.node.domain, use.node.op_type) == (CONTRIB, "FusedMatMul"):
        return _gemm(use.node, use, dims)  # the same attributes, and no bias
    if op is None:
        return f"{use.node.domain}.{use.node.op_type} reads it"
    rule = RULES.get(op)
    return f"{op} reads it, which has no quantized form" if rule is None else rule(use.node, use, dims)


def _matmul(node: NodeProto, use: Use, dims: tuple[int, ...]) -> Wish | str:
    if use.number != 1:
        return "the left side of a MatMul"
    if len(dims) != 2:
        return f"MatMulNBits multiplies by matrices, this has {len(dims)} dimensions"
    if use.path == "moved":
        return "a MatMul reads it sliced or reshaped"
    return Wish("groups", transposed=use.path == "itself")


def _gemm(node: NodeProto, use: Use, dims: tuple[int, ...]) -> Wish | str:
    said = attributes(node)
    if use.number != 1:
        return f"the left side of a {node.op_type}" if use.number == 0 else f"the bias of a {node.op_type}"
    if any(name in said and said[name].i for name in ("transA", "transBatchA", "transBatchB")):
        return f"a {node.op_type} that transposes its left side reads it"
    scales = ["alpha", *(["beta"] if has_bias(node) else [])]
    if any(name in said and said[name].f != 1 for name in scales):
        return f"a {node.op_type} with alpha or beta other than 1 reads it"
    if use.path == "moved" or len(dims) != 2:
        return f"a {node.op_type} reads it sliced or reshaped"
    flipped = "transB" in said and bool(said["transB"].i)
    return Wish("groups", transposed=(use.path == "itself") != flipped)


def has_bias(node: NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _gather(node: NodeProto, use: Use, dims: tuple[int, ...]) -> Wish | str:
    said = attributes(node)
    axis = said["axis"].i if "axis" in said else 0
    if use.number != 0 or len(dims) != 2 or axis not in (0, -2) or use.path != "itself":
        return "a Gather reads it otherwise than by rows of a matrix"
    return Wish("groups")


def _conv(node: NodeProto, use: Use, dims: tuple[int, ...]) -> Wish | str:
    if use.number != 1 or use.path != "itself":
        return f"{node.op_type} reads it otherwise than as its weight"
    return Wish("channels")


def _recurrent(node: NodeProto, use: Use, dims: tuple[int, ...]) -> Wish | str:
    """W [D, 4H, K] and R of one direction; or [4H, K], out of which they are put together."""
    if use.number not in (1, 2):
        return f"{node.op_type} reads it otherwise than as a weight"
    if len(dims) == 3 and dims[0] == 1:
        return Wish("channels", axis=1)
    if len(dims) == 2 and use.path == "moved":
        return Wish("channels")
    return f"{node.op_type} of two directions: their rows have no scales of their own in DequantizeLinear"


RULES: Mapping[str, Callable[[NodeProto, Use, tuple[int, ...]], Wish | str]] = {
    "MatMul": _matmul, "Gemm": _gemm, "Gather": _gather, "Conv": _conv, "ConvTranspose": _conv,
    "LSTM": _recurrent, "GRU": _recurrent, "RNN": _recurrent,
}  # fmt: skip
