"""What an output will be, made from headers alone: its files, and where each tensor lies in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qconvert.graph import n_rows
from qconvert.planes import Plane, Slot


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

    def files_of_pieces(self, own: str) -> tuple[str, ...]:
        """The name of each piece's file; own: of the one that has the entry."""
        return self.files or (own,) * len(self.pieces)


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
    def paths(self) -> tuple[Path, ...]:
        """What is made: the folder, or the files."""
        return (self.folder,) if self.folder else tuple(f.path for f in self.files)

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
