"""Stream a plan into files: one pass over the weights, row block by row block, whole or not at all.

plan -> preflight (disk, permissions) -> workers: rows -> bytes -> pwrite at the offset -> fsync -> rename
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from qconvert.errors import ResourceError, UsageError
from qconvert.graph import n_rows
from qconvert.planes import Plane, folded, ordered, side_by_side
from qconvert.scheme import Bytes
from qconvert.weights import BLOCK_VALUES, Weights, rows_per_block


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
    """

    files: tuple[FilePlan, ...]
    folder: Path | None = None

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


class Block(NamedTuple):
    fds: tuple[int, ...]  # of each piece
    entry: Entry
    begin: int
    end: int


Progress = Callable[[int], None]  # told the bytes written since the last call
T = TypeVar("T")
COLUMNS_NBYTES = 1 << 24  # of rows that become columns together: runs of 1024 at K = 16384


def default_threads() -> int:
    """QCONVERT_THREADS, else the cores that this process may use."""
    if (wanted := os.environ.get("QCONVERT_THREADS", "")).isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preflight(plan: Plan, force: bool) -> None:
    """Refuse what cannot work before the first byte: existing outputs, folders without write permission, full disks."""
    for file in plan.files:
        if file.path.is_dir():
            raise UsageError(f"{file.path} is a folder", hint="-o FILE")
        if file.path.exists() and not force:
            raise UsageError(f"{file.path} exists already", hint="--force overwrites it; -o FILE writes elsewhere")
    folder = plan.place
    for place in {file.path.parent for file in plan.files if plan.folder} | ({plan.folder} if plan.folder else set()):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file; the output is a folder", hint="-o FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ResourceError(f"cannot make the folder {folder}: {e.strerror}", hint="-o FILE writes elsewhere") from e
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(f"cannot write into {folder}: permission denied", hint="-o FILE writes elsewhere")
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes:
        raise ResourceError(
            f"{folder} has {free / 1e9:.2f} GB free, the output needs {plan.nbytes / 1e9:.2f} GB",
            hint="fewer bits, or -o on another disk",
        )


@contextmanager
def written(plan: Plan, weights: Weights, threads: int, progress: Progress = lambda _: None) -> Iterator[tuple[Path, ...]]:
    """Write every file beside its final name and yield those paths, to be checked; then rename them all.

    An error, inside the body too, leaves nothing behind. ResourceError where the disk refuses.
    """
    staging = plan.folder and plan.folder.with_name(f".{plan.folder.name}.{os.getpid()}.part")
    parts = {file.path: part_of(file.path, plan, staging) for file in plan.files}
    try:
        try:
            if staging:
                staging.mkdir()
                make_folders(parts.values())
            with open_parts(plan, parts) as fds:
                todo = blocks(plan, fds, BLOCK_VALUES[weights.device])
                in_parallel(todo, lambda b: write_block(b, weights, progress), threads)
                for fd in fds.values():
                    os.fsync(fd)
        except OSError as e:
            raise ResourceError(f"cannot write {plan.files[0].path}: {e.strerror or e}", hint="nothing was left behind") from e
        yield tuple(parts.values())
        if staging and plan.folder and not plan.folder.exists():
            staging.rename(plan.folder)
        else:
            make_folders(parts)
            for path, part in parts.items():
                part.replace(path)
        sync_folder(plan.place)
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if staging:
            shutil.rmtree(staging, ignore_errors=True)


def part_of(path: Path, plan: Plan, staging: Path | None) -> Path:
    """Where a file lies until it has its name."""
    if staging and plan.folder:
        return staging / path.relative_to(plan.folder)
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def make_folders(paths: Iterable[Path]) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_parts(plan: Plan, parts: dict[Path, Path]) -> Iterator[dict[Path, int]]:
    fds: dict[Path, int] = {}
    try:
        for file in plan.files:
            fds[file.path] = fd = os.open(parts[file.path], os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o644)
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


def blocks(plan: Plan, fds: dict[Path, int], values: int) -> Iterator[Block]:
    for file in plan.files:
        for entry in file.entries:
            names = entry.files or (file.path.name,) * len(entry.pieces)
            places = tuple(fds[file.path.with_name(name)] for name in names)
            for begin, end in entry_ranges(entry, values):
                yield Block(places, entry, begin, end)


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
    fds, entry, begin, end = block
    rows, at, n = encoded_rows(weights, entry, begin, end), 0, n_rows(entry.shape)
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


def in_parallel(items: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """Call work(item) for each item from `threads` threads; the first error stops all and is raised here."""
    source, lock, errors = iter(items), threading.Lock(), list[BaseException]()

    def loop() -> None:
        try:
            while not errors:
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item)
        except BaseException as e:
            errors.append(e)

    workers = [threading.Thread(target=loop, daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # wakes up for Ctrl-C
    except BaseException as e:
        errors.append(e)
        for worker in workers:
            if worker.ident is not None:  # Ctrl-C can come before all are started
                worker.join()
    if errors:
        raise errors[0]


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
