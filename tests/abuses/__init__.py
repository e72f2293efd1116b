"""Known abuses of each kind of file, one maker each: hostile(...) registers it with the words of the error it must end in.

A maker gets an empty folder and returns what qconvert is asked to read; the file is valid but for what its name says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Maker = Callable[[Path], Path | str]


class Abuse(NamedTuple):
    """says: words of the message. to: the format that it is converted to. harmless: taken, since nothing is wrong with it."""

    name: str
    make: Maker
    says: str
    to: str = "gguf"
    harmless: bool = False


ABUSES: list[Abuse] = []


def hostile(says: str, to: str = "gguf", harmless: bool = False) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        ABUSES.append(Abuse(f"{make.__module__.rpartition('.')[2]}: {make.__name__}", make, says, to, harmless))  # type: ignore[attr-defined]
        return make

    return register
