"""The order in which several outputs are written: what is made of the same rows of a source is made together.

entries of each output -> groups that are made of the same tensors -> regions of rows, a thread's work each
one region -> the output that is furthest behind goes on by a block, so that what they share is at hand
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from qconvert.graph import Graph

T = TypeVar("T")


class Span(NamedTuple, Generic[T]):
    """Rows begin..end of a value, and what is done about them."""

    begin: int
    end: int
    work: T


class Weight(NamedTuple, Generic[T]):
    """One value of an output, and all that is to be done about it."""

    value: str
    spans: Callable[[], Iterable[Span[T]]]


def regions(outputs: Sequence[tuple[Graph, Iterable[Weight[T]]]]) -> Iterator[list[list[Span[T]]]]:
    """Spans of each output that go together, in rows of what they have in common; of one output each by itself."""
    if len(outputs) == 1:
        yield from ([[span]] for weight in outputs[0][1] for span in weight.spans())
        return
    graphs, weights = [graph for graph, _ in outputs], [list(each) for _, each in outputs]
    for group in _groups([[origins(g, w.value) for w in each] for g, each in zip(graphs, weights, strict=True)]):
        found = [(at, first, span) for at, i, first in group for span in weights[at][i].spans()]
        spans = [(at, Span(first + span.begin, first + span.end, span.work)) for at, first, span in found]
        step = max((s.end - s.begin for _, s in spans), default=1)
        together: dict[int, list[list[Span[T]]]] = {}
        for at, span in sorted(spans, key=lambda each: each[1].begin):
            together.setdefault(span.begin // step, [[] for _ in outputs])[at].append(span)
        yield from together.values()


Origin = tuple[str, int]  # a tensor, and which row of a value its first one is


def origins(graph: Graph, value: str, first: int = 0, times: int = 1) -> list[Origin]:
    """What the rows of a weight come from: one tensor, by first inputs, or several where experts are stacked."""
    node = graph.nodes[value]
    if node.op == "stack":
        n = node.type.rows // len(node.inputs)
        return [each for i, name in enumerate(node.inputs) for each in origins(graph, name, first + times * i * n, times)]
    if node.op == "interleave":
        return [each for name in node.inputs for each in origins(graph, name, first, 2 * times)]
    if node.op == "expert":
        first -= times * int(str(node.attrs["e"])) * node.type.rows
    if node.inputs:
        return origins(graph, node.inputs[0], first, times)
    return [(str(node.attrs.get("tensor", value)), first)]


def _groups(outputs: Sequence[Sequence[list[Origin]]]) -> list[list[tuple[int, int, int]]]:
    """(output, its weight, the row of the group that the weight's first row is), in the order of the first output."""
    group_of: dict[str, int] = {}
    row_of: dict[str, int] = {}
    groups: dict[int, list[tuple[int, int, int]]] = {}
    whole = sorted((-len(each), at, i) for at, weights in enumerate(outputs) for i, each in enumerate(weights))
    for _, at, i in whole:  # stacks first: they say where the rows of each expert are
        for tensor, row in outputs[at][i]:
            group_of.setdefault(tensor, group_of.get(outputs[at][i][0][0], len(group_of)))
            row_of.setdefault(tensor, row)
    for at, weights in enumerate(outputs):
        for i, each in enumerate(weights):
            tensor, row = each[0]
            groups.setdefault(group_of[tensor], []).append((at, i, row_of[tensor] - row))
    return list(groups.values())


def in_step(chains: Iterable[Iterator[int]]) -> None:
    """Run all to their ends. Each yields the row that it has reached; the one that is furthest behind goes on."""
    waiting = [(0, i, chain) for i, chain in enumerate(chains)]
    while waiting:
        _, i, chain = heappop(waiting)
        if (row := next(chain, None)) is not None:
            heappush(waiting, (row, i, chain))
