"""Weights as tasks for other processes: a few nodes as text, where their sources lie, which rows. Data is read where it is
needed, and written where it belongs by whoever sees the parts.

blocks of a plan -> tasks of about TASK_NBYTES of source -> performed anywhere -> bytes in the parts, or handed back
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from platform import node
from typing import NamedTuple

from qconvert import __version__
from qconvert.byte_files import READ
from qconvert.dtypes import DTYPES
from qconvert.emit import Block, write_all, write_block
from qconvert.errors import InputError, UsageError
from qconvert.gguf_reader import row_nbytes
from qconvert.graph import Graph
from qconvert.journal import last_mark
from qconvert.sources import Store
from qconvert.text import format, parse
from qconvert.weights import Weights

TASK_NBYTES = 128 << 20  # of source: some seconds of work; a model of 70B in 16 bits makes about 1100 tasks
# these read all of a weight for any row of it, which every task with a part of it would do again
WHOLE = ("amax", "transpose", "column_norm", "refit", "shift_factor", "incoherent", "coherent")
WHOLE_SOLVERS = ("gptq", "ldlq", "nearest")
WHOLE_INPUTS = {
    "merge": (1,), "merge_pooled": (1,), "dora": (2, 4, 5), "set_rows": (2,), "across": (1, 2), "quantize": (1,),
}  # fmt: skip  # once a task


class Task(NamedTuple):
    """text: the nodes that the blocks need. places: of each alias, what to add. stamps: of each file, which it must be.

    parts: of files by their final names. journal, mark: whoever finds the mark there sees the parts of this run.
    """

    version: str
    text: str
    places: tuple[tuple[str, str], ...]
    stamps: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    parts: Mapping[Path, Path]
    journal: Path
    mark: str


class Done(NamedTuple):
    """What a task did: bytes read of sources, bytes made; `pieces` to write (file, offset, bytes) where it saw no parts.

    worker: machine and process.
    """

    worker: str
    read: int
    made: int
    pieces: tuple[tuple[Path, int, bytes], ...] | None

    @property
    def moved(self) -> int:
        return sum(len(data) for _, _, data in self.pieces or ())


class Tasks:
    """Blocks of `weights` as tasks of about `nbytes` of source."""

    def __init__(self, weights: Weights, parts: Mapping[Path, Path], journal: Path, mark: str, nbytes: int) -> None:
        self.weights, self.journal, self.mark, self.nbytes = weights, journal.absolute(), mark, nbytes
        self.parts = {file: part.absolute() for file, part in parts.items()}
        self.places = weights.store.places()
        self._reads: dict[str, Reads] = {}

    def of(self, blocks: Iterable[Block]) -> Iterator[Task]:
        """In the order of the blocks. A weight is divided by rows, but one that is needed whole for any of them."""
        batch: list[Block] = []
        for block in blocks:
            reads = self.reads(block.entry.value)
            new = not batch or reads.root != self.reads(batch[-1].entry.value).root
            if batch and (new or reads.divides) and self.read_nbytes([*batch, block]) > self.nbytes:
                yield self.task(batch)
                batch = []
            batch.append(block)
        if batch:
            yield self.task(batch)

    def task(self, blocks: Iterable[Block]) -> Task:
        blocks, store = tuple(blocks), self.weights.store
        values = tuple(dict.fromkeys(b.entry.value for b in blocks))
        graph = self.weights.graph
        need = graph.needed(values)
        text = format(replace(graph, nodes={n: v for n, v in graph.nodes.items() if n in need}, outputs=values, meta={}))
        files = dict.fromkeys(ref.partition("#")[0] for n in need if (ref := loaded(graph, n)))
        stamps = tuple((file, store.stamp(*file.split("/", 1))) for file in files)
        parts = {file: self.parts[file] for b in blocks for file in b.files}
        return Task(__version__, text, self.places, stamps, blocks, parts, self.journal, self.mark)

    def read_nbytes(self, blocks: Iterable[Block]) -> int:
        """What a task of these blocks reads of its sources, headers apart."""
        rows, whole = 0.0, dict[str, int]()
        for block in blocks:
            reads = self.reads(block.entry.value)
            rows += reads.row * (block.end - block.begin)
            whole |= reads.whole
        return round(rows) + sum(whole.values())

    def reads(self, value: str) -> Reads:
        if value not in self._reads:
            self._reads[value] = reads_of(self.weights, value)
        return self._reads[value]


class Reads(NamedTuple):
    """What a value is made from. row: bytes of source for one of its rows; whole: loads that are read for any rows."""

    root: str
    row: float
    whole: Mapping[str, int]
    divides: bool


def reads_of(weights: Weights, value: str) -> Reads:
    """Nothing is kept between the blocks of a task but what `WHOLE_INPUTS` says, and what solvers keep."""
    graph, store, whole = weights.graph, weights.store, dict[str, int]()

    def rows_of(name: str) -> float:
        """Bytes that are read for one row of a value."""
        node = graph.nodes[name]
        if ref := loaded(graph, name):
            return source_nbytes(store, ref) / node.type.rows
        at_once = WHOLE_INPUTS.get(node.op, ())
        for i, other in enumerate(node.inputs):
            if i in at_once or node.op in WHOLE:
                whole.update({ref: source_nbytes(store, ref) for n in graph.needed([other]) if (ref := loaded(graph, n))})
        if node.op in WHOLE:
            return 0.0
        parts = [(graph.nodes[n].type.rows, rows_of(n)) for i, n in enumerate(node.inputs) if i not in at_once]
        if node.op in ("stack", "interleave"):  # each row is of one input
            return sum(n * nbytes for n, nbytes in parts) / node.type.rows
        times = graph.nodes[node.inputs[0]].type.dims[0] if node.op == "beside" else 1
        return times * sum(nbytes for _, nbytes in parts)

    need = graph.needed([value])
    solvers = {str(graph.nodes[name].attrs.get("solver", "")).partition("{")[0] for name in need}
    divides = not ({graph.nodes[name].op for name in need} & set(WHOLE) or solvers & set(WHOLE_SOLVERS))
    row = rows_of(value)
    return Reads(str(graph.root(value).attrs.get("tensor", value)), row, whole, divides)


def loaded(graph: Graph, name: str) -> str | None:
    node = graph.nodes[name]
    return str(node.attrs["tensor"]) if node.op == "load" else None


def source_nbytes(store: Store, ref: str) -> int:
    _, dtype, shape = store.info(ref)
    if dtype.startswith("gguf."):
        return prod(shape[:-1]) * row_nbytes(dtype.removeprefix("gguf."), shape[-1])
    return prod(shape) * DTYPES[dtype].nbytes


# where it is performed ----------------------------------------------------------------------------


def perform(task: Task) -> Done:
    """Evaluate the task's blocks, and write them into the parts where they are seen; idempotent: the same bytes each time."""
    if task.version != __version__:
        raise UsageError(
            f"a worker has qconvert {__version__}, the driver {task.version}", hint="install one of them everywhere"
        )
    before, worker = READ.nbytes, f"{node()} {os.getpid()}"
    store = _store(task.mark, task.places)
    _refuse_others(store, task)
    weights = Weights(parse(task.text), store)
    if last_mark(task.journal) != task.mark:
        pieces: list[tuple[Path, int, bytes]] = []
        made = sum(write_block(b, weights, lambda file, data, at: pieces.append((file, at, bytes(data)))) for b in task.blocks)
        return Done(worker, READ.nbytes - before, made, tuple(pieces))
    with ExitStack() as closing:
        fds = {}
        for file, part in task.parts.items():
            fds[file] = fd = os.open(part, os.O_RDWR)
            closing.callback(os.close, fd)
        made = sum(write_block(b, weights, lambda file, data, at: write_all(fds[file], data, at)) for b in task.blocks)
        for fd in fds.values():
            os.fsync(fd)
    return Done(worker, READ.nbytes - before, made, None)


@lru_cache(maxsize=1)
def _store(mark: str, places: tuple[tuple[str, str], ...]) -> Store:
    """Kept from task to task of a run, so that headers are read once."""
    store = Store()
    for alias, place in places:
        store.add_place(alias, place)
    return store


def _refuse_others(store: Store, task: Task) -> None:
    """InputError where a worker sees other files than the driver did."""
    for place, stamp in task.stamps:
        alias, _, name = place.partition("/")
        try:
            found = store.stamp(alias, name)
        except OSError as e:
            found = e.strerror or str(e)
        if found != stamp:
            raise InputError(
                f"a worker on {node()} sees another {store.roots[alias] / name}: {found}, not {stamp}",
                hint="tasks read shared storage, or copies with their times kept",
            )
