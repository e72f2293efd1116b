"""Stream a plan into files: one pass over the weights, row block by row block, whole or not at all.

plan -> preflight (disk, permissions) -> workers: rows -> bytes -> pwrite at the offset -> fsync -> rename
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from qconvert.errors import ResourceError, UsageError
from qconvert.graph import n_rows
from qconvert.weights import Weights, rows_per_block


class Entry(NamedTuple):
    """One tensor of a file. shape is logical ([N,K]); offset is from the start of the file.

    planes: where a row's bytes are cut in pieces that lie apart (codes, scales): each piece's offset and nbytes per row.
    """

    name: str
    value: str  # in the graph
    dtype: str  # f32, f16, bf16 or a layout
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    planes: tuple[tuple[int, int], ...] = ()


class FilePlan(NamedTuple):
    path: Path
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


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
    fd: int
    entry: Entry
    begin: int
    end: int


Progress = Callable[[int], None]  # told the bytes written since the last call
T = TypeVar("T")


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preflight(plan: Plan, force: bool) -> None:
    """Refuse what cannot work before the first byte: existing outputs, folders without write permission, full disks."""
    for file in plan.files:
        if file.path.is_dir():
            raise UsageError(f"{file.path} is a folder", hint="-o FILE")
        if file.path.exists() and not force:
            raise UsageError(f"{file.path} exists already", hint="--force overwrites it; -o FILE writes elsewhere")
    folder = plan.place
    if plan.folder and plan.folder.exists() and not plan.folder.is_dir():
        raise UsageError(f"{plan.folder} is a file; the output is a folder", hint="-o FOLDER")
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
    parts = {file.path: part_of(file.path, staging) for file in plan.files}
    try:
        try:
            if staging:
                staging.mkdir()
            with open_parts(plan, parts) as fds:
                in_parallel(blocks(plan, fds), lambda b: write_block(b, weights, progress), threads)
                for fd in fds.values():
                    os.fsync(fd)
        except OSError as e:
            raise ResourceError(f"cannot write {plan.files[0].path}: {e.strerror or e}", hint="nothing was left behind") from e
        yield tuple(parts.values())
        if staging and plan.folder and not plan.folder.exists():
            staging.rename(plan.folder)
        else:
            for path, part in parts.items():
                part.replace(path)
        sync_folder(plan.place)
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if staging:
            with suppress(OSError):
                staging.rmdir()


def part_of(path: Path, staging: Path | None) -> Path:
    """Where a file lies until it has its name."""
    return staging / path.name if staging else path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def open_parts(plan: Plan, parts: dict[Path, Path]) -> Iterator[dict[Path, int]]:
    fds: dict[Path, int] = {}
    try:
        for file in plan.files:
            fds[file.path] = fd = os.open(parts[file.path], os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o644)
            reserve(fd, file.nbytes)
            write_all(fd, memoryview(file.header), 0)
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


def blocks(plan: Plan, fds: dict[Path, int]) -> Iterator[Block]:
    for file in plan.files:
        for entry in file.entries:
            for begin, end in row_ranges(entry.shape):
                yield Block(fds[file.path], entry, begin, end)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks in which a tensor's rows are evaluated; a vector is one block."""
    n = n_rows(shape)
    step = rows_per_block(shape[-1]) if len(shape) > 1 else n
    for begin in range(0, n, step):
        yield begin, min(n, begin + step)


def write_block(block: Block, weights: Weights, progress: Progress) -> None:
    fd, entry, begin, end = block
    data = weights.encoded(entry.value, begin, end)
    row_nbytes = entry.nbytes // n_rows(entry.shape)
    if data.nbytes != (end - begin) * row_nbytes:
        raise AssertionError(f"{entry.name}: {data.nbytes} bytes for rows {begin}..{end}, planned {(end - begin) * row_nbytes}")
    rows, at = data.reshape(end - begin, row_nbytes), 0
    for offset, nbytes in entry.planes or ((entry.offset, row_nbytes),):
        write_all(fd, rows[:, at : at + nbytes].ravel().data, offset + begin * nbytes)
        at += nbytes
    progress(data.nbytes)


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
