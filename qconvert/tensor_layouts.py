"""Layouts that keep a weight's codes and levels of metadata in tensors of their own, as files of safetensors do.

A packed row is its codes and its entries of each level, part by part; emit lays each part where its tensor is, and
`rows_of` brings the parts of a file's tensors together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np

from qconvert import kernels
from qconvert.bits import from_bits, to_bits
from qconvert.errors import InputError, UnsupportedError
from qconvert.float_weights import E4M3, E8M0
from qconvert.planes import Plane, pieces_of, stored_range
from qconvert.scheme import F32, Array, Bytes, Layout, Piece, QTensor, Scheme, scheme_of

# how one code, or one entry of a level, is a number in the file: bits side by side in bytes (low: the first in the low ones;
# high: in the high ones), or a byte or more for each
Kind = Literal["low", "high", "u1", "f16", "bf16", "f32", "f8_e4m3", "e8m0"]
ITEMSIZE = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8}
NBYTES: dict[Kind, int] = {"u1": 1, "f8_e4m3": 1, "e8m0": 1, "f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Part:
    """One tensor of a weight: its name behind the module's, safetensors' dtype, and what it holds.

    level: of the scheme; None: the codes. plus: what is added to an unsigned value to store it, modulo 2^bits.
    fixed: the number that each entry of `level` stands for where the scheme has no such entries: a zero point.
    bits, word, rows, order: see Plane. dims: (n, k) -> the tensor's shape, where it is not what the plane says.
    """

    name: str
    dtype: str
    kind: Kind
    level: int | None = None
    plus: int = 0
    fixed: int | None = None
    bits: int | None = None
    word: int | None = None
    rows: int | None = 1
    order: tuple[int, ...] = ()
    dims: Callable[[int, int], tuple[int, ...]] | None = None

    def row_nbytes(self, scheme: Scheme, k: int) -> int:
        if self.kind in ("low", "high"):
            values = k if self.level is None else scheme.levels[self.level].entries(k)
            return -(-values * scheme.bits // 8)
        return NBYTES[self.kind] * (k if self.level is None else scheme.levels[self.level].entries(k))

    def plane(self, scheme: Scheme, k: int, offset: int = 0) -> Plane:
        return Plane(offset, self.row_nbytes(scheme, k), self.bits, self.word, self.rows, self.order)

    def shape(self, scheme: Scheme, n: int, k: int) -> tuple[int, ...]:
        """Of the tensor that belongs to a weight [n, k]."""
        if self.dims is not None:
            return self.dims(n, k)
        plane, size = self.plane(scheme, k), ITEMSIZE[self.dtype]
        if plane.columns:
            return (plane.depth, n * (self.bits or 8) // 8 // size)
        lines = plane.file_nbytes(n) // (plane.nbytes if self.word is None else plane.depth * size)
        return (lines, plane.file_nbytes(n) // lines // size)


@dataclass(frozen=True)
class Constant:
    """A tensor that the shape of a weight decides."""

    name: str
    dtype: str
    dims: Callable[[int, int], tuple[int, ...]]
    data: Callable[[int, int], bytes]


class Beside(NamedTuple):
    """A tensor that holds another value of the graph, NAME~suffix, of u8 or real numbers.

    finest: what each group of weights reads; else it is above that, and read first.
    """

    name: str
    suffix: str
    dtype: str
    dims: Callable[[int, int], tuple[int, ...]]
    finest: bool = False


@dataclass(frozen=True)
class Tensors(Layout):
    """`parts` in the order of their bytes in a packed row."""

    parts: tuple[Part, ...] = ()
    constants: tuple[Constant, ...] = ()
    beside: tuple[Beside, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.beside

    def row_nbytes(self, k: int) -> int:
        return sum(part.row_nbytes(self.scheme, k) for part in self.parts)

    def planes(self, k: int) -> tuple[Plane, ...]:
        return tuple(part.plane(self.scheme, k) for part in self.parts)

    @property
    def others(self) -> tuple[tuple[str, bool], ...]:
        return tuple((each.suffix, each.finest) for each in self.beside)

    def pieces(self, n: int, k: int) -> tuple[Piece, ...]:
        return tuple(Piece(part.level, part.plane(self.scheme, k).file_nbytes(n)) for part in self.parts)

    def row_weights(self, nbytes: int) -> int:
        """The inverse of row_nbytes."""
        block = self.scheme.block
        fixed, per_block = self.row_nbytes(0), self.row_nbytes(8 * block) - self.row_nbytes(0)
        return (nbytes - fixed) * 8 * block // per_block


def tensors(
    name: str, scheme: Scheme, parts: Sequence[Part], constants: Sequence[Constant] = (), beside: Sequence[Beside] = ()
) -> Tensors:
    """The layout called `name`; codes that are bytes, or bits with the first low, are laid out without a detour over codes."""
    block = np.dtype([("codes", "u1", max(1, scheme.block * scheme.bits // 8))])
    codes = [part for part in parts if part.level is None]
    direct = all((p.kind in ("low", "high") and not p.plus) or (p.kind == "u1" and scheme.bits == 8) for p in codes)
    rest = tuple(parts), tuple(constants), tuple(beside)
    made = Tensors(name, scheme, block, _pack, _unpack, None, *rest)  # type: ignore[arg-type]
    join = partial(_join, made) if direct else None
    return Tensors(name, scheme, block, partial(_pack, made), partial(_unpack, made), join, *rest)


def _pack(layout: Tensors, q: QTensor) -> Bytes:
    """QTensor -> u8[N, row nbytes]"""
    if (why := layout.accepts(q.scheme)) is not None:
        raise UnsupportedError(why)
    return np.concatenate([_part_bytes(part, q.scheme, q.codes, q.levels) for part in layout.parts], axis=1)


def _plus(packed: Bytes, part: Part) -> Bytes:
    return packed + np.uint8(part.plus % 256) if part.plus else packed


def _join(layout: Tensors, packed: Bytes, levels: Sequence[F32]) -> Bytes:
    """Codes in bits, the first low, and levels -> u8[N, row nbytes]"""
    parts = [
        _level_bytes(part, layout.scheme, _entries(part, levels)) if part.level is not None
        else _swapped(packed) if part.kind == "high" else _plus(packed, part)
        for part in layout.parts
    ]  # fmt: skip
    return np.concatenate(parts, axis=1)


def _part_bytes(part: Part, scheme: Scheme, codes: Array, levels: Sequence[F32]) -> Bytes:
    if part.level is not None:
        return _level_bytes(part, scheme, _entries(part, levels))
    stored = (codes.astype(np.int16) + scheme.centre + part.plus).astype(np.uint8)
    if part.kind == "u1":
        return stored if scheme.bits == 8 else stored & np.uint8((1 << scheme.bits) - 1)
    packed = to_bits(stored & np.uint8((1 << scheme.bits) - 1), scheme.bits)
    return packed if part.kind == "low" else _swapped(packed)


def _entries(part: Part, levels: Sequence[F32]) -> F32:
    v = levels[part.level or 0]
    return v if part.fixed is None else np.full_like(v, part.fixed)


def _level_bytes(part: Part, scheme: Scheme, v: F32) -> Bytes:
    match part.kind:
        case "u1" | "low" | "high":
            whole = (v.astype(np.int16) + part.plus).astype(np.uint8) & np.uint8((1 << scheme.bits) - 1)
            return whole if part.kind == "u1" else to_bits(whole, scheme.bits)
        case "bf16":
            return kernels.narrow_bf16(np.ascontiguousarray(v)).view(np.uint8)
        case "f16" | "f32":
            return np.ascontiguousarray(v, f"<f{NBYTES[part.kind]}").view(np.uint8)
        case "f8_e4m3":
            return kernels.e4m3_codes(v, np.ones((len(v), 1), np.float32), v.shape[1])
        case "e8m0":
            return (np.ascontiguousarray(v).view(np.uint32) >> np.uint32(23)).astype(np.uint8)


def _unpack(layout: Tensors, packed: Bytes) -> QTensor:
    scheme, k = layout.scheme, layout.row_weights(packed.shape[1])
    codes, levels = np.empty(0, np.uint8), [np.empty(0, np.float32)] * len(scheme.levels)
    cuts = np.cumsum([part.row_nbytes(scheme, k) for part in layout.parts])[:-1]
    for part, piece in zip(layout.parts, np.split(packed, cuts, axis=1), strict=True):
        if part.level is None:
            codes = _codes(part, scheme, piece, k)
            continue
        level = _level(part, scheme, piece, scheme.levels[part.level].entries(k))
        if part.fixed is None:
            levels[part.level] = level
        elif not (level == part.fixed).all():
            wrong = level[level != part.fixed][0]
            raise InputError(
                f"{part.name}: a zero point is {wrong:g}; where the grid is symmetric each is {part.fixed}",
                hint="do the weights' configuration and their zero points belong together?",
            )
    signed = scheme.centre or (scheme.bits < 8 and not scheme.table)
    return QTensor(scheme, codes.view(np.int8) if signed else codes, tuple(levels))


def _codes(part: Part, scheme: Scheme, piece: Bytes, k: int) -> Bytes:
    """u8[N,K], signed ones in two's complement."""
    if part.kind == "u1":
        stored = piece
    else:
        stored = from_bits(piece if part.kind == "low" else _swapped(piece), scheme.bits, k)
    stored = (stored - np.uint8(part.plus % 256)) & np.uint8((1 << scheme.bits) - 1)
    return stored - np.uint8(scheme.centre)


def _level(part: Part, scheme: Scheme, piece: Bytes, entries: int) -> F32:
    piece = np.ascontiguousarray(piece)
    match part.kind:
        case "u1" | "low" | "high":
            stored = piece if part.kind == "u1" else from_bits(piece, scheme.bits, entries)
            return ((stored - np.uint8(part.plus % 256)) & np.uint8((1 << scheme.bits) - 1)).astype(np.float32)
        case "bf16":
            return kernels.widen_bf16(piece.view("<u2"))
        case "f16" | "f32":
            return piece.view(f"<f{NBYTES[part.kind]}").astype(np.float32)
        case "f8_e4m3":
            return E4M3[piece]
        case "e8m0":
            return E8M0[piece]


def _swapped(packed: Bytes) -> Bytes:
    """The halves of each byte exchanged: codes of 4 bits, the first in the high ones."""
    return packed << np.uint8(4) | packed >> np.uint8(4)


# out of a file ------------------------------------------------------------------------------------


class Reader(Protocol):
    """sources.Store."""

    def read(self, ref: str, begin: int, end: int) -> Array: ...

    def read_columns(self, ref: str, begin: int, end: int) -> Array: ...


def rows_of(layout: Tensors, store: Reader, refs: Sequence[str], n: int, k: int, begin: int, end: int) -> Bytes:
    """u8[rows, row nbytes] of rows begin..end of a weight [n,k] whose parts are the tensors `refs`."""
    pieces = []
    for part, ref in zip(layout.parts, refs, strict=True):
        plane, size = part.plane(layout.scheme, k), ITEMSIZE[part.dtype]
        first, last = stored_range(plane, n, begin, end)
        if not plane.columns:
            per = part.dims(n, k)[0] // n if part.dims is not None and plane.bits is None and plane.rows == 1 else 1
            lines = np.ascontiguousarray(store.read(ref, first * per, last * per))  # where a row is one or several there
            pieces.append(pieces_of(plane, lines.reshape(last - first, -1).view(np.uint8), begin, end))
            continue
        low, high = first // size, -(-last // size)
        lines = np.ascontiguousarray(store.read_columns(ref, low, high)).view(np.uint8)
        pieces.append(pieces_of(plane, lines[:, first - low * size : last - low * size], begin, end))
    return np.concatenate(pieces, axis=1)


class Made(Mapping[str, Layout]):
    """Layouts by name, PREFIX.SCHEME, each made as it is asked for; `make` gives None for schemes that it cannot hold."""

    def __init__(self, prefix: str, make: Callable[[Scheme], Tensors | None], usual: Sequence[str]) -> None:
        self.prefix, self.make, self.usual = prefix, make, usual
        self.known: dict[str, Layout] = {}

    def __getitem__(self, name: str) -> Layout:
        if name not in self.known:
            scheme = scheme_of(name.partition(".")[2])
            made = self.make(scheme) if scheme and name.startswith(f"{self.prefix}.") else None
            if made is None:
                raise KeyError(name)
            self.known[name] = made
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return (f"{self.prefix}.{scheme}" for scheme in self.usual)

    def __len__(self) -> int:
        return len(self.usual)
