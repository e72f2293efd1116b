"""Stream a plan into files: one pass over the weights, row block by row block, whole or not at all.

plan -> preflight (disk, permissions) -> workers (together): rows -> bytes -> pwrite at the offset -> fsync -> rename
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
from typing import NamedTuple, Protocol, cast

import numpy as np

from qconvert.errors import ResourceError
from qconvert.graph import n_rows
from qconvert.journal import Digests, Journal, journal_at, sync_folder
from qconvert.planes import Plane, folded, ordered, side_by_side
from qconvert.plans import Entry as Entry
from qconvert.plans import FilePlan as FilePlan
from qconvert.plans import Plan as Plan
from qconvert.scheme import Bytes
from qconvert.weights import BLOCK_VALUES, Weights, rows_per_block

log = logging.getLogger("qconvert")


Key = tuple[Path, str]  # a file and the name of an entry


class Block(NamedTuple):
    files: tuple[Path, ...]  # of each piece, by the names that they will have
    entry: Entry
    begin: int
    end: int
    key: Key


Progress = Callable[[int], None]  # told the bytes written since the last call
Put = Callable[[Path, memoryview, int], None]  # a file by the name that it will have, bytes, their offset
COLUMNS_NBYTES = 1 << 24  # of rows that become columns together: runs of 1024 at K = 16384


class Opened(NamedTuple):
    """Parts that are written: open here, and by path for whoever shares the storage; by the files' final names."""

    fds: dict[Path, int]
    paths: dict[Path, Path]

    def put(self, file: Path, data: memoryview, offset: int) -> None:
        write_all(self.fds[file], data, offset)


class Executor(Protocol):
    """Who evaluates blocks, where threads of this process do not, and tells `todo.wrote` of each that is in its parts."""

    def __call__(self, todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None: ...


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
        target = plan.paths[0]
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

    def blocks(self) -> Iterator[Block]:
        for path, entry in self.entries():
            yield from self.blocks_of(path, entry)

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        for file in self.plan.files:
            yield from ((file.path, entry) for entry in file.entries if (file.path, entry.name) not in self.done)

    def blocks_of(self, path: Path, entry: Entry) -> Iterator[Block]:
        key, files = (path, entry.name), tuple(path.with_name(name) for name in entry.files_of_pieces(path.name))
        ranges = list(entry_ranges(entry, self.values))
        self._left[key] = len(ranges)
        for begin, end in ranges:
            yield Block(files, entry, begin, end, key)

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
def opened(plan: Plan, parts: Parts, journal: Journal) -> Iterator[Opened]:
    """The parts; all that is known beforehand is written."""
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
        yield Opened(fds, parts.paths)
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


def write_block(block: Block, weights: Weights, put: Put) -> int:
    """Evaluate the block's rows and put their bytes where they belong; how many."""
    deque(writing(block, weights, put), 0)
    return written_nbytes(block)


def writing(block: Block, weights: Weights, put: Put) -> Iterator[int]:
    """write_block step by step: yields the row that it has reached."""
    files, entry, begin, end, _ = block
    rows, at, n = (yield from encoding(weights, entry, begin, end)), 0, n_rows(entry.shape)
    for file, plane in zip(files, entry.pieces, strict=True):
        piece = rows[:, at : at + plane.nbytes]
        at += plane.nbytes
        if plane.columns:
            write_columns(partial(put, file), plane, piece, begin, n)
        elif plane.bits is not None:
            put(file, folded(plane, piece).data, plane.offset + plane.file_nbytes(begin))
        elif plane.rows is not None:
            put(file, piece[:: plane.rows].ravel().data, plane.offset + begin // plane.rows * plane.nbytes)
        elif begin == 0:
            put(file, piece[0].data, plane.offset)


def written_nbytes(block: Block) -> int:
    """What the block takes of the file; what all rows share counts for the first."""
    _, entry, begin, end, _ = block
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


def write_columns(put: Callable[[memoryview, int], None], plane: Plane, piece: Bytes, begin: int, n: int) -> None:
    """Rows u8[rows, nbytes] as the columns begin.. of n."""
    assert plane.bits is not None
    size, stride, first = max(1, plane.bits // 8), n * plane.bits // 8, begin * plane.bits // 8
    for at in range(0, plane.depth, 256):
        part = np.ascontiguousarray(piece[:, at * size : (at + 256) * size])
        values = part.view(f"u{size}").T
        lines = side_by_side(values[:, ordered(plane, values.shape[1])] if plane.order else values, plane.bits)
        if lines.shape[1] == stride:
            put(lines.ravel().data, plane.offset + at * stride)
            continue
        for i, line in enumerate(lines, at):
            put(line.data, plane.offset + i * stride + first)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
