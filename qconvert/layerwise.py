"""A graph on much text, a layer at a time: every weight is evaluated once, whatever the text's length.

The graph is cut wherever a single activation lives, as it does behind each sum of a layer. All texts pass through one
segment before the next one's weights are read, so memory is a segment's weights and one batch; what lives at a cut lies in
memory, or in a temporary file where it is large.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qconvert.errors import ResourceError
from qconvert.graph import Graph, Node
from qconvert.reals import Reals
from qconvert.run import Values, evaluate_all

BATCH = 1 << 22  # values of the widest activation of a batch: 16 MB of f32
IN_MEMORY = 1 << 28  # bytes at a cut; more go into a file
Tokens = list[list[int]]


class Watcher(Protocol):
    """What is looked at. wanted: the values to be made, with all that they need."""

    @property
    def wanted(self) -> Collection[str]: ...

    def made(self, name: str, value: Tensor) -> None: ...

    def at_expert(self, weight: str, e: int, x: Tensor) -> None:
        """x[n,K]: the tokens that expert e multiplies by its part of a stack of weights."""
        ...

    def product(self, node: Node, y: Tensor) -> Tensor:
        """What a linear gives before its bias, handed on as it is."""
        ...

    def passed(self, names: Sequence[str]) -> None:
        """All texts have made these values; none will make them again."""
        ...


def run_layerwise(graph: Graph, weights: Reals, texts: Tokens, watcher: Watcher, in_memory: int = IN_MEMORY) -> None:
    """Show `watcher` what it wants of texts as token ids. ResourceError where the disk is full."""
    inputs = {n for n, node in graph.nodes.items() if node.op == "input"}
    fixed = graph.constants()
    need = graph.needed(watcher.wanted) - fixed - inputs
    groups, held, lying = batches(graph, texts), Held(weights), Shelf()
    for part in segments(graph, [n for n in graph.nodes if n in need]):
        held.keep(matrices(graph, part.names, fixed))
        reads = {i for name in part.names for i in graph.nodes[name].inputs}
        order = [*(n for n in graph.nodes if n in reads & inputs), *part.names]
        nbytes = 4 * sum(map(len, texts)) * sum(width(graph, name) for name in part.after)
        behind = Shelf(nbytes > in_memory)
        for at, batch in enumerate(groups):
            values = Values(graph, held, torch.tensor(batch), torch.float32, None, watcher.product)
            values.at_expert = watcher.at_expert
            values.live = {name: lying.take(at, name) for name in part.before}
            evaluate_all(values, order, part.after, made=watcher.made)
            for name in part.after:
                behind.put(at, name, values.live[name])
        lying.close()
        lying = behind
        watcher.passed(part.names)


class Segment(NamedTuple):
    """Values made one behind the other; those that it reads of the one before it, and those that it leaves to the next."""

    names: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


def segments(graph: Graph, order: Sequence[str]) -> Iterator[Segment]:
    """`order` cut behind each value that is then the only one alive; inputs are always at hand."""
    last = {i: at for at, name in enumerate(order) for i in graph.nodes[name].inputs}
    begin, before, live = 0, tuple[str, ...](), list[str]()
    for at, name in enumerate(order):
        live = [n for n in (*live, name) if last.get(n, -1) > at]
        if len(live) < 2 or at == len(order) - 1:
            yield Segment(tuple(order[begin : at + 1]), before, tuple(live))
            begin, before = at + 1, tuple(live)


def matrices(graph: Graph, names: Sequence[str], fixed: set[str]) -> set[str]:
    """Constants that these values read whole."""
    return {i for n in names if graph.nodes[n].op != "embed" for i in graph.nodes[n].inputs if i in fixed}


def width(graph: Graph, name: str) -> int:
    return int(graph.nodes[name].type.shape[-1])


def batches(graph: Graph, texts: Tokens) -> list[Tokens]:
    """Texts of one length together, as many as memory is meant for."""
    widest = max(width(graph, name) for name, node in graph.nodes.items() if node.op == "linear")
    out = []
    for length, group in groupby(texts, len):
        same = list(group)
        step = max(1, BATCH // (length * widest))
        out += [same[i : i + step] for i in range(0, len(same), step)]
    return out


@dataclass
class Held:
    """Weights, some of which are kept once they were evaluated."""

    weights: Reals
    kept: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def keep(self, names: Collection[str]) -> None:
        """Evaluate these, and let go of all others."""
        self.kept = {n: v for n, v in self.kept.items() if n in names}
        for name in sorted(names - self.kept.keys()):
            self.kept[name] = self.weights.real(name)

    def real(self, name: str, begin: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        return self.kept[name][begin:end] if name in self.kept else self.weights.real(name, begin, end)


class Shelf:
    """Activations by batch and name; with `in_file` in one that has no name and is gone when it is closed."""

    def __init__(self, in_file: bool = False) -> None:
        self.file: IO[bytes] | None = TemporaryFile() if in_file else None  # noqa: SIM115
        self.here: dict[tuple[int, str], Tensor] = {}
        self.there: dict[tuple[int, str], tuple[int, tuple[int, ...]]] = {}

    def put(self, at: int, name: str, x: Tensor) -> None:
        if self.file is None:
            self.here[at, name] = x
            return
        try:
            self.there[at, name] = self.file.seek(0, 2), tuple(x.shape)
            self.file.write(x.contiguous().numpy().data)
            self.file.flush()
        except OSError as e:
            raise ResourceError(f"activations: {e.strerror}", hint="TMPDIR names another disk; or less text") from e

    def take(self, at: int, name: str) -> Tensor:
        """As it was put; it is given once."""
        if self.file is None:
            return self.here.pop((at, name))
        offset, shape = self.there.pop((at, name))
        return torch.from_numpy(np.memmap(self.file, np.float32, "c", offset, shape))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
