"""Files as bytes at offsets, which several threads read at once: of a disk here, by URL in url_files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import numpy as np

from qconvert.errors import InputError
from qconvert.scheme import Array


class Counter(threading.local):
    """Bytes that a thread has read."""

    nbytes = 0


READ = Counter()


class ByteFile(Protocol):
    """name: a path or a URL, for errors."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

    def read_into(self, out: memoryview, offset: int, end: int) -> int:
        """Some bytes from `offset` on, at least one, 0 at the file's end. What is wanted next too ends at `end`."""
        ...

    def close(self) -> None: ...


class LocalFile:
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise InputError(f"{path}: {e.strerror}") from e
        self.nbytes = os.fstat(self.fd).st_size

    def read_into(self, out: memoryview, offset: int, end: int) -> int:
        n = os.preadv(self.fd, [out], offset)
        READ.nbytes += n
        return n

    def close(self) -> None:
        os.close(self.fd)


def fill(file: ByteFile, out: Array, offset: int, name: str, end: int | None = None) -> Array:
    """`out`, which is contiguous, with the bytes at `offset`. InputError where the file ends before.

    end: of what is read in order, so that a file that is far away is asked for more at once.
    """
    flat = out.reshape(-1).view(np.uint8)  # no copy
    done = 0
    while done < flat.size:
        try:
            n = file.read_into(flat[done:].data, offset + done, end or offset + flat.size)
        except OSError as e:
            raise InputError(f"{file.name}: {name}: {e.strerror} at byte {offset + done}") from e
        if n == 0:
            where = f"the file ended at byte {offset + done}"
            raise InputError(f"{file.name}: {name}: {where}", hint="it was changed while it was read")
        done += n
    return out
