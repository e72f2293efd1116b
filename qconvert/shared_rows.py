"""Rows that the weights of several graphs are made from: evaluated once, for all of them.

nodes of each graph -> identities, of what they compute and not of their names -> values that several graphs have, where
these part -> blocks of rows, the last few of each thread -> the rows that are asked for
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from qconvert.graph import Graph
from qconvert.scheme import Array, QTensor
from qconvert.text import format_node

KEPT_NBYTES = 1 << 24  # of a thread's blocks: what the outputs of one weight read at a time, with heads that are turned whole
AT_ONCE = 4  # blocks; what asks for more of a weight asks for all of it, and only once
Rows = Array | QTensor


class Blocks(threading.local):
    """The last blocks that this thread evaluated, by identity and number."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, int], Rows] = OrderedDict()
        self.nbytes = 0

    def of(self, key: tuple[str, int], make: Callable[[], Rows]) -> Rows:
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        made = make()
        self.kept[key] = made
        self.nbytes += nbytes_of(made)
        while self.nbytes > KEPT_NBYTES and len(self.kept) > AT_ONCE:
            self.nbytes -= nbytes_of(self.kept.popitem(last=False)[1])
        return made


@dataclass(frozen=True)
class Shared:
    """What one graph shares with others. identities: value -> what it has in common with values of theirs."""

    identities: Mapping[str, str]
    blocks: Blocks = field(default_factory=Blocks)

    def rows(self, name: str, step: int, span: tuple[int, int], n: int, make: Callable[[int, int], Rows]) -> Rows:
        """Rows of a value of n, which is shared: whole blocks of `step` are made, unless more is asked for than is kept."""
        begin, end = span
        numbers = range(begin // step, -(-end // step))
        if not 0 < len(numbers) <= AT_ONCE:
            return make(begin, end)
        identity, parts = self.identities[name], list[Rows]()
        for i in numbers:
            first, last = i * step, min(n, (i + 1) * step)
            block = self.blocks.of((identity, i), partial(make, first, last))
            parts.append(_cut(block, max(begin, first) - first, min(end, last) - first))
        return parts[0] if len(parts) == 1 else _joined(parts)


def nbytes_of(rows: Rows) -> int:
    return sum(v.nbytes for v in (rows.codes, *rows.levels)) if isinstance(rows, QTensor) else rows.nbytes


def _cut(rows: Rows, begin: int, end: int) -> Rows:
    if isinstance(rows, QTensor):
        return QTensor(rows.scheme, rows.codes[begin:end], tuple(v[begin:end] for v in rows.levels))
    return rows[begin:end]


def _joined(parts: Sequence[Rows]) -> Rows:
    first = parts[0]
    if not isinstance(first, QTensor):
        out: Array = np.concatenate(parts)  # type: ignore[arg-type]
        return out
    quantized = [p for p in parts if isinstance(p, QTensor)]
    levels = zip(*(q.levels for q in quantized), strict=True)
    return QTensor(first.scheme, np.concatenate([q.codes for q in quantized]), tuple(map(np.concatenate, levels)))


def shared(graphs: Sequence[tuple[Graph, Iterable[str], object]]) -> list[Shared]:
    """Of each graph with the values that are written of it, and the store that it reads from."""
    named = [identities(graph, wanted, store) for graph, wanted, store in graphs]
    owners: dict[str, set[int]] = {}
    for at, found in enumerate(named):
        for identity in found.values():
            owners.setdefault(identity, set()).add(at)
    parting: set[str] = set()  # not all graphs that have it go on with it in the same way
    for (graph, wanted, _), found in zip(graphs, named, strict=True):
        parting |= {found[name] for name in wanted}
        for name, identity in found.items():
            parting |= {found[i] for i in graph.nodes[name].inputs if owners[found[i]] != owners[identity]}
    several = {identity for identity in parting if len(owners[identity]) > 1}
    blocks = Blocks()
    return [Shared({n: i for n, i in found.items() if i in several}, blocks) for found in named]


def identities(graph: Graph, wanted: Iterable[str], store: object) -> dict[str, str]:
    """Of each value that these need: a digest of its node and of those that it is made from, whatever they are called."""
    need, out = graph.needed(wanted), dict[str, str]()
    for name, node in graph.sorted().nodes.items():
        if name in need:
            text = format_node("", replace(node, inputs=tuple(out[i] for i in node.inputs)))
            out[name] = hashlib.blake2b(f"{id(store)} {text}".encode(), digest_size=16).hexdigest()
    return out
