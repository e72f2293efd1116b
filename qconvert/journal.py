"""What an interrupted run has finished, so that the next one goes on from there.

Beside the output's parts lies a journal: a line for each tensor whose bytes are on the disk, by the digest of all that
decides them. It is locked while a run writes: a second run into the same output is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qconvert import __version__
from qconvert.errors import ResourceError, UsageError
from qconvert.text import format_node
from qconvert.weights import Weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SYNC_SECONDS = 1.0  # between writes to the disk: what a machine that loses its power loses
RUN = "run "  # begins the word of a run among the digests
HASHED_NBYTES = 64 << 20  # sources up to this size are known by their contents, larger ones by what the system says of them


class Journal:
    """done: digests of tensors whose bytes are in the parts. keep: whether parts and journal stay for the next run."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.keep, self.done = path, False, set[str]()
        self._fd, self._lock = fd, threading.Lock()
        self._pending: list[str] = []
        self._last = time.monotonic()
        for line in _text(fd).splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a run that was killed
                word = str(json.loads(line))
                self.done |= set() if word.startswith(RUN) else {word}

    def forget(self) -> None:
        """Nothing of the parts can be used."""
        self.done.clear()
        os.ftruncate(self._fd, 0)

    def mark(self) -> str:
        """A word on the disk by which other processes know that the parts here are this run's."""
        word = RUN + os.urandom(8).hex()
        os.write(self._fd, f"{json.dumps(word)}\n".encode())
        os.fsync(self._fd)
        return word

    def finished(self, digest: str, sync: Callable[[], None]) -> None:
        """The tensor's bytes are written. sync: brings them to the disk, which is done once in a while for all."""
        with self._lock:
            self._pending.append(digest)
            if time.monotonic() - self._last >= SYNC_SECONDS:
                self._write(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        with self._lock:
            self._write(sync)

    def _write(self, sync: Callable[[], None]) -> None:
        sync()
        os.write(self._fd, "".join(json.dumps(d) + "\n" for d in self._pending).encode())
        self.done.update(self._pending)
        self._pending.clear()
        self._last = time.monotonic()


def last_mark(path: Path) -> str | None:
    """Of the run that writes the parts beside the journal at `path`; None where there is none."""
    with suppress(OSError):
        words = re.findall(f'^"({RUN}[0-9a-f]+)"$', path.read_text("utf-8", "replace"), re.MULTILINE)
        return words[-1] if words else None
    return None


def _text(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


@contextmanager
def journal_at(path: Path) -> Iterator[Journal]:
    """The journal there, or a new one, locked. UsageError where another run has it; removed at the end unless it is to stay."""
    fd = _locked(path)
    journal = Journal(path, fd)
    try:
        yield journal
    finally:
        if not journal.keep:
            with suppress(OSError):
                path.unlink()
        os.close(fd)


def _locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        except OSError as e:
            raise ResourceError(f"cannot write {path}: {e.strerror}", hint="-o FILE writes elsewhere") from e
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"another run is writing here: {path} is locked", hint="wait for it, or -o FILE writes elsewhere"
            ) from None
        except FileNotFoundError:  # the run that had it ended in between
            pass
        os.close(fd)


# digests ------------------------------------------------------------------------------------------


class Digests:
    """Of weights: their nodes, the files that they are loaded from, and our version."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self._files = weights, dict[str, str]()

    def of(self, value: str, *more: object) -> str:
        """more: what else decides the bytes, such as where they lie."""
        graph = self.weights.graph
        h = hashlib.blake2b(f"{__version__} {more!r}\n".encode(), digest_size=16)
        for name in sorted(graph.needed([value])):
            node = graph.nodes[name]
            h.update(f"{format_node(name, node)}\n".encode())
            if node.op == "load":
                h.update(self.file(str(node.attrs["tensor"])).encode())
        return h.hexdigest()

    def file(self, ref: str) -> str:
        """What tells the file of a tensor from another, or from itself after a change."""
        name = ref.partition("#")[0]
        if name not in self._files:
            alias, _, rest = name.partition("/")
            if not rest:  # a tensor that lies in memory, since its file is no file of tensors
                return self.contents(ref)
            store = self.weights.store
            far = store.roots[alias] in store.mirrors
            self._files[name] = store.stamp(alias, rest) if far else _identity(store.roots[alias] / rest)
        return self._files[name]

    def contents(self, ref: str) -> str:
        shape = self.weights.store.info(ref).shape
        rows = self.weights.store.read(ref, 0, shape[0] if shape else 1)
        return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _identity(path: Path) -> str:
    stat = path.stat()
    if stat.st_size <= HASHED_NBYTES:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def sync_all(fds: Iterable[int]) -> None:
    for fd in fds:
        getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
