"""Stream a plan into files: one pass over the weights, row block by row block, whole or not at all.

plan -> preflight (disk, permissions) -> workers: rows -> bytes -> pwrite at the offset -> fsync -> rename
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from qconvert.errors import ResourceError
from qconvert.graph import n_rows
from qconvert.journal import Digests, Journal, journal_at, sync_all
from qconvert.parallel import in_parallel
from qconvert.planes import Plane, Slot, folded, ordered, side_by_side
from qconvert.scheme import Bytes
from qconvert.weights import BLOCK_VALUES, Weights, rows_per_block

log = logging.getLogger("qconvert")


class Entry(NamedTuple):
    """One tensor of a file. shape is logical ([N,K]); offset is from the start of the file; nbytes is what it takes there.

    planes: where a row's bytes are cut in pieces that lie apart; none: the rows are whole, at `offset`.
    files: of each plane, the name of the file beside the entry's own that has it; none: all lie in the entry's own.
    """

    name: str
    value: str  # in the graph
    dtype: str  # f32, f16, bf16 or a layout
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    planes: tuple[Plane, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[Plane, ...]:
        return self.planes or (Plane(self.offset, self.nbytes // n_rows(self.shape)),)


class FilePlan(NamedTuple):
    path: Path
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int
    between: tuple[tuple[int, bytes], ...] = ()  # more of what is known beforehand, each with its offset

    @property
    def known_nbytes(self) -> int:
        return len(self.header) + sum(len(data) for _, data in self.between)


class Plan(NamedTuple):
    """Everything about the output but the weights' values; made from headers alone.

    folder: of all files, where they are one output; it is made beside its final name, so that they find each other.
    slot: for its certificate, where it is to carry one.
    """

    files: tuple[FilePlan, ...]
    folder: Path | None = None
    slot: Slot | None = None

    @property
    def place(self) -> Path:
        """The folder that must exist before the first byte."""
        return self.folder.parent if self.folder else self.files[0].path.parent

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)

    @property
    def entries(self) -> list[Entry]:
        return [e for f in self.files for e in f.entries]


Key = tuple[Path, str]  # a file and the name of an entry


class Block(NamedTuple):
    fds: tuple[int, ...]  # of each piece
    entry: Entry
    begin: int
    end: int
    key: Key


Progress = Callable[[int], None]  # told the bytes written since the last call
COLUMNS_NBYTES = 1 << 24  # of rows that become columns together: runs of 1024 at K = 16384


@contextmanager
def written(plan: Plan, weights: Weights, threads: int, progress: Progress = lambda _: None) -> Iterator[tuple[Path, ...]]:
    """Write every file beside its final name and yield those paths, to be checked; then rename them all; see `staged`."""
    with staged(plan) as output:
        write_parts(plan, output.parts, weights, threads, progress, output.journal)
        yield tuple(output.parts.paths.values())
        output.publish()


@contextmanager
def staged(plan: Plan) -> Iterator[Staged]:
    """Where the files of a plan lie until they are published.

    Those that are not leave nothing behind but what the next run can go on from: where the disk is full (ResourceError) or
    the run is interrupted. Tensors that such a run finished are not made again.
    """
    parts = Parts.of(plan)
    with journal_at(parts.journal) as journal:
        try:
            yield Staged(plan, parts, journal)
        except (KeyboardInterrupt, ResourceError):
            journal.keep = bool(journal.done)
            if journal.keep:
                where = parts.staging or next(iter(parts.paths.values()))
                log.warning("what is done is kept as %s: the same command goes on from there", where)
            raise
        finally:
            if not journal.keep:
                parts.remove()


class Staged(NamedTuple):
    plan: Plan
    parts: Parts
    journal: Journal

    def publish(self) -> None:
        """Give all files their names."""
        parts, plan = self.parts, self.plan
        if parts.staging and plan.folder and not plan.folder.exists():
            parts.staging.rename(plan.folder)
        else:
            make_folders(parts.paths)
            for path, part in parts.paths.items():
                part.replace(path)
        sync_folder(plan.place)


class Parts(NamedTuple):
    """Where files lie until they have their names. staging: the folder that they lie in, where they are one output."""

    paths: dict[Path, Path]
    staging: Path | None
    journal: Path

    @classmethod
    def of(cls, plan: Plan) -> Parts:
        target = plan.folder or plan.files[0].path
        name = f".{target.name}.part"
        if plan.folder is None:
            paths = {file.path: file.path.with_name(f".{file.path.name}.part") for file in plan.files}
            return cls(paths, None, target.with_name(f"{name}.journal"))
        staging = target.with_name(name)
        paths = {file.path: staging / file.path.relative_to(plan.folder) for file in plan.files}
        return cls(paths, staging, target.with_name(f"{name}.journal"))

    def are_whole(self, plan: Plan) -> bool:
        """All are there, with the room that they need."""
        found = ((self.paths[file.path], file.nbytes) for file in plan.files)
        return all(part.exists() and part.stat().st_size == nbytes for part, nbytes in found)

    def remove(self) -> None:
        for part in self.paths.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if self.staging:
            shutil.rmtree(self.staging, ignore_errors=True)


def write_parts(plan: Plan, parts: Parts, weights: Weights, threads: int, progress: Progress, journal: Journal) -> None:
    """Every file of the plan, but for tensors of which the journal says that they are there."""
    try:
        with opened(plan, parts, journal) as fds:
            todo = Todo(plan, weights, journal, partial(sync_all, fds.values()))
            if todo.done_nbytes:
                progress(todo.done_nbytes)
            try:
                in_parallel(todo.blocks(fds), lambda b: todo.write(b, weights, progress), threads)
            finally:
                todo.flush()
            for fd in fds.values():
                os.fsync(fd)
    except OSError as e:
        raise ResourceError(f"cannot write {plan.files[0].path}: {e.strerror or e}", hint="-o on another disk") from e


class Todo:
    """Which tensors are to be written, and of each how many blocks are left."""

    def __init__(self, plan: Plan, weights: Weights, journal: Journal, sync: Callable[[], None]) -> None:
        digests = Digests(weights)
        self.plan, self.journal, self.sync = plan, journal, sync
        self.values = BLOCK_VALUES[weights.device]
        self.digests = {(f.path, e.name): digests.of(e.value, f.path.name, e) for f in plan.files for e in f.entries}
        self.done = {key for key, digest in self.digests.items() if digest in journal.done}
        self.done_nbytes = sum(e.nbytes for f in plan.files for e in f.entries if (f.path, e.name) in self.done)
        self._left: dict[Key, int] = {}
        self._lock = threading.Lock()

    def blocks(self, fds: dict[Path, int]) -> Iterator[Block]:
        for path, entry in self.entries():
            yield from self.blocks_of(path, entry, fds)

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        for file in self.plan.files:
            yield from ((file.path, entry) for entry in file.entries if (file.path, entry.name) not in self.done)

    def blocks_of(self, path: Path, entry: Entry, fds: dict[Path, int]) -> Iterator[Block]:
        key, names = (path, entry.name), entry.files or (path.name,) * len(entry.pieces)
        places = tuple(fds[path.with_name(name)] for name in names)
        ranges = list(entry_ranges(entry, self.values))
        self._left[key] = len(ranges)
        for begin, end in ranges:
            yield Block(places, entry, begin, end, key)

    def write(self, block: Block, weights: Weights, progress: Progress) -> None:
        write_block(block, weights, progress)
        self.wrote(block)

    def wrote(self, block: Block) -> None:
        with self._lock:
            self._left[block.key] -= 1
            whole = not self._left[block.key]
        if whole:
            self.journal.finished(self.digests[block.key], self.sync)

    def flush(self) -> None:
        self.journal.flush(self.sync)


def make_folders(paths: Iterable[Path]) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def opened(plan: Plan, parts: Parts, journal: Journal) -> Iterator[dict[Path, int]]:
    """The parts by the names that they will have; all that is known beforehand is written."""
    if not parts.are_whole(plan):
        parts.remove()
        journal.forget()
    if parts.staging:
        parts.staging.mkdir(exist_ok=True)
        make_folders(parts.paths.values())
    fds: dict[Path, int] = {}
    try:
        for file in plan.files:
            fds[file.path] = fd = os.open(parts.paths[file.path], os.O_CREAT | os.O_RDWR, 0o644)
            reserve(fd, file.nbytes)
            for offset, data in ((0, file.header), *file.between):
                write_all(fd, memoryview(data), offset)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def reserve(fd: int, nbytes: int) -> None:
    """Set the file's length, with its disk blocks where the file system can: a full disk is found now, not at the end."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
    os.truncate(fd, nbytes)


UNSUPPORTED = (95, 22)  # EOPNOTSUPP, EINVAL: file systems without fallocate


def entry_ranges(entry: Entry, values: int = BLOCK_VALUES["cpu"]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks in which an entry is written. Columns are written in long runs, one a value of a row."""
    together = math.lcm(*(p.step for p in entry.pieces))
    if not any(p.columns for p in entry.planes) and together == 1:
        yield from row_ranges(entry.shape, values=values)
        return
    n, columns = n_rows(entry.shape), any(p.columns for p in entry.planes)
    step = rows_per_block(sum(p.nbytes for p in entry.planes), COLUMNS_NBYTES if columns else COLUMNS_NBYTES >> 4)
    unit = math.lcm(together, 256 if columns else 1)
    step = max(unit, step // unit * unit)
    for begin in range(0, n, step):
        yield begin, min(n, begin + step)


def row_ranges(
    shape: tuple[int, ...], begin: int = 0, end: int | None = None, values: int = BLOCK_VALUES["cpu"]
) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks in which a tensor's rows, or some of them, are evaluated; a vector is one block."""
    n = n_rows(shape) if end is None else end
    step = rows_per_block(shape[-1], values) if len(shape) > 1 else n
    for i in range(begin, n, step):
        yield i, min(n, i + step)


def write_block(block: Block, weights: Weights, progress: Progress) -> None:
    deque(writing(block, weights, progress), 0)


def writing(block: Block, weights: Weights, progress: Progress) -> Iterator[int]:
    """Write a block step by step: yields the row that it has reached."""
    fds, entry, begin, end, _ = block
    rows, at, n = (yield from encoding(weights, entry, begin, end)), 0, n_rows(entry.shape)
    for fd, plane in zip(fds, entry.pieces, strict=True):
        piece = rows[:, at : at + plane.nbytes]
        at += plane.nbytes
        if plane.columns:
            write_columns(fd, plane, piece, begin, n)
        elif plane.bits is not None:
            write_all(fd, folded(plane, piece).data, plane.offset + plane.file_nbytes(begin))
        elif plane.rows is not None:
            write_all(fd, piece[:: plane.rows].ravel().data, plane.offset + begin // plane.rows * plane.nbytes)
        elif begin == 0:
            write_all(fd, piece[0].data, plane.offset)
    progress(written_nbytes(entry, begin, end))


def written_nbytes(entry: Entry, begin: int, end: int) -> int:
    """What the block takes of the file; what all rows share counts for the first."""
    return sum(p.file_nbytes(end - begin) for p in entry.pieces if p.rows is not None or begin == 0)


def encoded_rows(weights: Weights, entry: Entry, begin: int, end: int) -> Bytes:
    """Rows begin..end as u8[rows, nbytes of all planes], evaluated in blocks of the usual size."""
    steps = encoding(weights, entry, begin, end)
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return cast(Bytes, e.value)


def encoding(weights: Weights, entry: Entry, begin: int, end: int) -> Generator[int, None, Bytes]:
    """encoded_rows step by step: yields the row that it has reached."""
    values = BLOCK_VALUES[weights.device]
    width, ranges = sum(plane.nbytes for plane in entry.pieces), list(row_ranges(entry.shape, begin, end, values))
    rows = np.empty((end - begin if len(ranges) > 1 else 0, width), np.uint8)
    for i, j in ranges:
        data = weights.encoded(entry.value, i, j)
        if data.nbytes != (j - i) * width:
            raise AssertionError(f"{entry.name}: {data.nbytes} bytes for rows {i}..{j}, planned {(j - i) * width}")
        if len(ranges) == 1:
            return data.reshape(j - i, width)
        rows[i - begin : j - begin] = data.reshape(j - i, width)
        yield j
    return rows


def write_columns(fd: int, plane: Plane, piece: Bytes, begin: int, n: int) -> None:
    """Rows u8[rows, nbytes] as the columns begin.. of n."""
    assert plane.bits is not None
    size, stride, first = max(1, plane.bits // 8), n * plane.bits // 8, begin * plane.bits // 8
    for at in range(0, plane.depth, 256):
        part = np.ascontiguousarray(piece[:, at * size : (at + 256) * size])
        values = part.view(f"u{size}").T
        lines = side_by_side(values[:, ordered(plane, values.shape[1])] if plane.order else values, plane.bits)
        if lines.shape[1] == stride:
            write_all(fd, lines.ravel().data, plane.offset + at * stride)
            continue
        for i, line in enumerate(lines, at):
            write_all(fd, line.data, plane.offset + i * stride + first)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
