"""How rows of a weight lie in a tensor that holds a piece of each: whole, as columns, sharing words with neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.scheme import Array, Bytes

Indices = npt.NDArray[np.intp]


class Plane(NamedTuple):
    """A piece of each row that lies apart from the others (codes, scales): `nbytes` of a row as Weights.encoded gives it.

    bits None: the pieces lie one behind another. Else the file has values of `bits` bits side by side in bytes, the first
    in the low ones; encoded gives each as one byte (or `bits` / 8), and
    - word None: pieces are the columns of an array [values, N], and neighbours along N share bytes: N values fill whole ones;
    - else neighbours along N share words of `word` bits, in an array [ceil(N * bits / word), values].
    rows: only the first of so many rows has its piece in the file, which is all theirs; None: the first of all.
    order: which of the values in a word (or in as many columns) lies first, second …
    """

    offset: int
    nbytes: int
    bits: int | None = None
    word: int | None = None
    rows: int | None = 1
    order: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Values of a column."""
        assert self.bits is not None
        return self.nbytes // max(1, self.bits // 8)

    @property
    def columns(self) -> bool:
        return self.bits is not None and self.word is None

    @property
    def step(self) -> int:
        """Rows that are written together."""
        return self.word // self.bits if self.word and self.bits else self.rows or 1

    def laid_out(self, pieces: Bytes) -> Bytes:
        """All rows' pieces u8[N, nbytes] as the file has them, u8 flat."""
        if self.columns:
            assert self.bits is not None
            values = np.ascontiguousarray(pieces).view(f"u{max(1, self.bits // 8)}").T
            lines = side_by_side(values[:, ordered(self, values.shape[1])] if self.order else values, self.bits)
            return np.ascontiguousarray(lines).reshape(-1)
        if self.bits is not None:
            return folded(self, pieces)
        return np.ascontiguousarray(pieces[:: self.rows] if self.rows else pieces[:1]).reshape(-1)

    def file_nbytes(self, n: int) -> int:
        """What n rows, from a multiple of `step` on, take in the file."""
        if self.bits is None:
            return self.nbytes * (-(-n // self.rows) if self.rows else 1)
        return self.depth * (n * self.bits // 8 if self.word is None else -(-n * self.bits // self.word) * self.word // 8)


class Slot(NamedTuple):
    """Room in a file for text that is known only when all weights are written. quoted: it lies inside a JSON string."""

    path: Path
    offset: int
    nbytes: int
    quoted: bool


def ordered(plane: Plane, n: int) -> Indices:
    """Which of n values (a multiple of the order's length) lies first, second …"""
    return (np.arange(n).reshape(-1, len(plane.order))[:, np.array(plane.order)]).reshape(-1)


def folded(plane: Plane, piece: Bytes) -> Bytes:
    """Rows u8[rows, values] -> words of them, u8 flat; rows that are missing in the last word are zeros."""
    assert plane.bits and plane.word
    per, (n, values) = plane.word // plane.bits, piece.shape
    whole = np.zeros((-(-n // per) * per, values), f"<u{plane.word // 8}")
    whole[:n] = piece
    shifts = (np.array(plane.order or range(per)).argsort() * plane.bits).astype(whole.dtype)
    words = np.bitwise_or.reduce(whole.reshape(-1, per, values) << shifts[:, None], axis=1)
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8)


def side_by_side(values: Bytes, bits: int) -> Bytes:
    """[k,n] of one value in a byte (or bits / 8) -> u8[k, n * bits / 8]; the first value lies in the low bits."""
    if bits >= 8:
        return np.ascontiguousarray(values).view(np.uint8)
    per = 8 // bits
    packed = np.array(values[:, ::per], order="C")
    for i in range(1, per):
        packed |= values[:, i::per] << np.uint8(i * bits)
    return packed


# and back -----------------------------------------------------------------------------------------


def stored_range(plane: Plane, n: int, begin: int, end: int) -> tuple[int, int]:
    """Which rows of the file's array (or bytes of each, where rows are columns) hold rows begin..end of n."""
    if plane.bits is None:
        return (begin // plane.rows, -(-end // plane.rows)) if plane.rows else (0, 1)
    unit = len(plane.order) or max(1, 8 // plane.bits)
    if plane.word is not None:
        return begin * plane.bits // plane.word, -(-end * plane.bits // plane.word)
    first, last = begin // unit * unit, min(n, -(-end // unit) * unit)
    return first * plane.bits // 8, last * plane.bits // 8


def pieces_of(plane: Plane, stored: Bytes, begin: int, end: int) -> Bytes:
    """u8[rows, nbytes] of rows begin..end from what `stored_range` names: u8[·, bytes], whole lines of the file's array."""
    if plane.bits is None:
        if plane.rows is None:
            return np.repeat(stored[:1], end - begin, axis=0)
        first = begin // plane.rows * plane.rows
        return stored if plane.rows == 1 else np.repeat(stored, plane.rows, axis=0)[begin - first : end - first]
    if plane.word is not None:
        per = plane.word // plane.bits
        words = np.ascontiguousarray(stored).view(f"<u{plane.word // 8}")
        shifts = (np.array(plane.order or range(per)).argsort() * plane.bits).astype(words.dtype)
        values = (words[:, None] >> shifts[:, None] & words.dtype.type((1 << plane.bits) - 1)).astype(np.uint8)
        first = begin // per * per
        out: Bytes = values.reshape(-1, words.shape[1])[begin - first : end - first]
        return out
    unit = len(plane.order) or max(1, 8 // plane.bits)
    first, size = begin // unit * unit, max(1, plane.bits // 8)
    lines: Array = np.ascontiguousarray(stored)
    if plane.bits < 8:
        shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)
        lines = (lines[..., None] >> shifts & np.uint8((1 << plane.bits) - 1)).reshape(len(lines), -1)
    else:
        lines = lines.view(f"u{size}")
    if plane.order:
        at = ordered(plane, lines.shape[1])
        lines, moved = np.empty_like(lines), lines
        lines[:, at] = moved
    columns: Bytes = np.ascontiguousarray(lines[:, begin - first : end - first].T).view(np.uint8)
    return columns.reshape(end - begin, plane.nbytes)
