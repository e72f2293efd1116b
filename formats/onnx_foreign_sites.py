"""Which weights of a foreign ONNX model can be quantized, and by which node each is then read.

    MatMul, Gemm, FusedMatMul   -> MatMulNBits
    Gather of a table's rows    -> GatherBlockQuantized
    Conv and recurrent weights  -> DequantizeLinear before them, 8 bits, a scale for each output
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qconvert.formats.onnx_foreign_tensors import FLOATS

LEAST = 1024  # values: a smaller weight saves less than its nodes take
Kind = Literal["product", "rows", "dequantized"]
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
DEQUANTIZED = {"Conv": (1,), "ConvTranspose": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}
MOVED = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Concat", "Identity")  # on the way to one of those


class Site(NamedTuple):
    """How all readers of a weight read it. turned: stored [K,N], so that its rows are columns there.

    A tied weight is read both as a product's and by rows: the same codes serve both.
    """

    kinds: frozenset[Kind]
    turned: bool
    n: int
    k: int

    @property
    def dequantized(self) -> bool:
        return "dequantized" in self.kinds


@dataclass(frozen=True)
class Readers:
    """nodes: (node, which input) of every graph; exposed: whether the value leaves the graph, or can be given from outside."""

    nodes: tuple[tuple[Any, int], ...]
    exposed: bool


def readers_of(model: Any) -> dict[str, Readers]:
    """Value -> who reads it."""
    found: dict[str, list[tuple[Any, int]]] = {}
    exposed: set[str] = {i.name for i in model.graph.input}
    for graph in graphs(model.graph):
        exposed |= {o.name for o in graph.output}
        for node in graph.node:
            for i, name in enumerate(node.input):
                found.setdefault(name, []).append((node, i))
    return {name: Readers(tuple(nodes), name in exposed) for name, nodes in found.items()}


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and all branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def site_of(name: str, tensor: Any, readers: Mapping[str, Readers], bits: int, opset: int) -> Site | str:
    """How a weight is read, or why it stays as it is."""
    if tensor.data_type not in FLOATS or FLOATS[tensor.data_type][0] not in ("f32", "f16"):
        return "not f32 or f16"
    if len(tensor.dims) < 2 or math.prod(tensor.dims) < LEAST:
        return f"fewer than {LEAST} values" if len(tensor.dims) > 1 else "no matrix"
    found = readers.get(name)
    if found is None or found.exposed:
        return "nothing reads it" if found is None else "it can be given from outside, or is an output"
    sites = {_site(node, i, tensor, bits, opset) for node, i in found.nodes}
    if reasons := sorted(s for s in sites if isinstance(s, str)):
        return reasons[0]
    kinds = frozenset(kind for s in sites if isinstance(s, Site) for kind in s.kinds)
    if len({s[1:] for s in sites}) > 1 or (len(kinds) > 1 and "dequantized" in kinds):
        return "read in several ways: " + ", ".join(sorted({node.op_type for node, _ in found.nodes}))
    site = sites.pop()
    assert isinstance(site, Site)
    return site._replace(kinds=kinds)


def _site(node: Any, i: int, tensor: Any, bits: int, opset: int) -> Site | str:
    attrs, dims = {a.name: a for a in node.attribute}, tuple(tensor.dims)
    if node.op_type in PRODUCTS and i == 1:
        if len(dims) != 2:
            return f"{node.op_type} of {len(dims)} dimensions"
        if bad := plain_product(node, attrs):
            return bad
        turned = not _number(attrs, "transB")
        k, n = dims if turned else dims[::-1]
        return Site(frozenset({"product"}), turned, n, k)
    if node.op_type == "Gather" and i == 0 and _number(attrs, "axis") == 0 and len(dims) == 2:
        return Site(frozenset({"rows"}), False, *dims)
    if i in DEQUANTIZED.get(node.op_type, ()) or node.op_type in MOVED:
        if bits != 8:
            return f"{node.op_type} has no kernel for {bits} bits"
        if opset < 13:
            return f"opset {opset} has no scale for each output; 13 has"
        return Site(frozenset({"dequantized"}), False, dims[0], math.prod(dims[1:]))
    return f"{node.op_type} reads it"


def plain_product(node: Any, attrs: Mapping[str, Any]) -> str | None:
    """Why a product is more than x @ w + c; None where it is not."""
    for key, plain in (("transA", 0), ("alpha", 1), ("beta", 1), ("transBatchA", 0), ("transBatchB", 0)):
        if _number(attrs, key, plain) != plain:
            return f"{node.op_type} with {key}"
    return None


def _number(attrs: Mapping[str, Any], key: str, default: float = 0) -> float:
    if key not in attrs:
        return default
    return float(attrs[key].f if attrs[key].type == 1 else attrs[key].i)
