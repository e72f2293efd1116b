"""A packed weight as a kernel sees it: where its codes lie, what they stand for, and its metadata. Knows no file format.

    w = scale * (level(code) - zero) + offset        level: the code itself, a table's entry, or a small float's value

Codes and metadata are those of a matrix [R, C]: the weight [N, K] itself, or its reshape where `width` C is given. A block of
`block` = (rows, columns) of that matrix shares one entry of metadata; columns None: whole rows do. A transposed array is a
transposed view: only strides differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.scheme import Array

Kind = Literal["f32", "f16", "bf16", "e4m3", "e8m0", "int"]  # bf16 travels as u16; e4m3, e8m0 (2^(u - 127)) as u8
Order = Literal["columns", "columns-high", "rows", "rows-awq", "parts", "parts-high"]
Grid = Literal["affine", "table", "ternary", "binary", "float"]


class Codes(NamedTuple):
    """Integers of `bits` in the words of a 2-D array of any strides.

    columns       a little-endian stream along C, the first in the low bits: words [R, C * bits / word]
    columns-high  as columns, the first of a word in its high bits (bitsandbytes)
    rows          a stream along R: words [R * bits / word, C]
    rows-awq      as rows, 4 bits: nibble i of a word is its row 0 2 4 6 1 3 5 7 [i]
    parts         R cut into word // bits parts, part i in bits i * bits up: words [R / parts, C] (BitNet)
    parts-high    as parts, the first part in the high bits (HQQ)
    """

    words: Array
    bits: int
    order: Order = "columns"
    add: int = 0  # to each, modulo 2^bits: what GPTQ's first version subtracted from zero points

    @property
    def word(self) -> int:
        return self.words.itemsize * 8


@dataclass(frozen=True)
class Second:
    """Metadata that are codes: value = (table[code] or code - zero[j]) * scale[j] + offset, j = (i // group) % len(scale).

    i: the entry's index in row-major order; scale, zero f32[n]; table f32[256].
    """

    scale: Array
    group: int
    zero: Array | None = None
    offset: float = 0.0
    table: Array | None = None


@dataclass(frozen=True)
class Metadata:
    """One number a block: [R / rows, C / columns] of any strides; an axis of length 1 is shared by all of it."""

    data: Array | Codes
    kind: Kind = "f32"
    second: Second | None = None
    divisor: float = 1.0  # of every number, for scales kept inverted or in parts of 127


class LowRank(NamedTuple):
    """w + scale * B A, added to the product in f32: A [r,K], B [N,r]."""

    a: Array
    b: Array
    scale: float
    kind: Kind = "f32"


class Part(NamedTuple):
    """Rows first .. last of a weight, and the first `columns` of them."""

    first: int
    last: int
    columns: int


@dataclass(frozen=True)
class Operand:
    name: str  # as messages have it: file and tensor
    shape: tuple[int, int]  # N, K
    codes: Codes | Array  # an array: small floats of `kind`
    grid: Grid = "affine"
    kind: Kind = "int"
    scale: Metadata | None = None
    zero: Metadata | float = 0.0
    offset: Metadata | None = None
    block: tuple[int, int | None] = (1, None)
    width: int | None = None
    table: tuple[float, ...] = ()
    g_idx: Array | None = None  # i32[K]: the column block of each column (GPTQ)
    low_rank: LowRank | None = None

    @property
    def whole(self) -> Part:
        return Part(0, *self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """R, C: the matrix that was quantized."""
        n, k = self.shape
        return (n, k) if self.width is None else (n * k // self.width, self.width)

    @property
    def centre(self) -> float:
        """The zero point of all groups."""
        return 1.0 if self.grid == "ternary" else 0.0 if isinstance(self.zero, Metadata) else float(self.zero)

    @property
    def group(self) -> int | None:
        """Neighbours along K that share their metadata, wherever in K such a run may begin: a multiple of it. None: all do."""
        rows, columns = self.block
        if self.g_idx is not None:
            return 1
        if self.width is None:
            return columns
        if rows > 1:  # a block lies across rows of the reshape: neighbours belong to different ones
            return 1
        return math.gcd(self.shape[1], self.width if columns is None else math.gcd(columns, self.width))

    @property
    def parts(self) -> tuple[tuple[str, Metadata], ...]:
        both = (("scale", self.scale), ("zero point", self.zero), ("offset", self.offset))
        return tuple((role, m) for role, m in both if isinstance(m, Metadata))


def contract(w: Operand, integers: bool = False) -> str:
    """The name of the formula that a product computes (methods.md 7.1)."""
    names = {"float": "dense float", "table": "table", "ternary": "ternary by adds", "binary": "binary by adds"}
    zero = isinstance(w.zero, Metadata) or w.offset is not None
    name = names.get(w.grid, "affine group" if zero else "symmetric")
    if integers:
        name = "int32 sums of rows" if w.group is None else f"{name} x int8"
    if any(m.second for _, m in w.parts):
        name += ", second level"
    return name + (", low rank" if w.low_rank else "")


def bf16(a: Array) -> Array:
    """The f32 values of bits u16."""
    return (a.astype(np.uint32) << 16).view(np.float32)


def e4m3(a: Array) -> Array:
    """The f32 values of OCP 8-bit floats: 4 exponent bits, 3 mantissa bits, no infinity."""
    u = a.view(np.uint8).astype(np.int32)
    exponent, mantissa = u >> 3 & 15, (u & 7).astype(np.float32)
    value = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    return np.where(u & 127 == 127, np.nan, np.where(u > 127, -value, value)).astype(np.float32)


def e8m0(a: Array) -> Array:
    """The f32 values of powers of two, 2^(u - 127); 255 is NaN."""
    u = a.view(np.uint8).astype(np.int32)
    return np.where(u == 255, np.nan, np.ldexp(1.0, u - 127)).astype(np.float32)


def real(a: Array, kind: Kind) -> Array:
    """f32: exact, for every kind's values are f32 values."""
    decoders = {"bf16": bf16, "e4m3": e4m3, "e8m0": e8m0}
    return decoders[kind](a) if kind in decoders else a.astype(np.float32)


def check(w: Operand) -> None:
    """Refuse what is not finite, and arrays that a kernel would read past the end of."""
    n, k = w.shape
    if w.width is not None and (w.width < 1 or n * k % w.width):
        raise UnsupportedError(f"{w.name}: {n} x {k} weights are no rows of {w.width}")
    r, c = w.matrix
    rows, columns = w.block
    _fit(w.codes, (r, c), w.name, "weight")
    if isinstance(w.codes, np.ndarray):
        _finite(w.codes, w.kind, w.name, "weight")
    elif w.grid == "table" and len(w.table) != 1 << w.codes.bits:
        raise InputError(f"{w.name}: a table of {len(w.table)} levels for codes of {w.codes.bits} bits")
    if w.g_idx is not None and w.g_idx.shape != (k,):
        raise InputError(f"{w.name}: g_idx has shape {list(w.g_idx.shape)}, wanted [{k}]")
    n_groups = 1 if w.g_idx is None else int(w.g_idx.max()) + 1
    if w.g_idx is not None and (w.g_idx.min() < 0 or columns is None or n_groups > -(-c // columns)):
        raise InputError(f"{w.name}: g_idx names a group that there is not: {w.g_idx.min()} .. {w.g_idx.max()}")
    for role, m in w.parts:
        _fit(m.data, (-(-r // rows), -(-c // columns) if columns else 1), w.name, role, shared=True)
        if m.second is not None:
            _check_second(m.second, w.name, role)
        elif isinstance(m.data, np.ndarray):
            _finite(m.data, m.kind, w.name, role)
        inverse = 1 / m.divisor if m.divisor else math.inf
        _finite(np.array([m.divisor, inverse], np.float32), "f32", w.name, f"divisor of the {role}")
    if w.low_rank is not None:
        a, b, scale, kind = w.low_rank
        _fit(a, (len(a), k), w.name, "low-rank A")
        _fit(b, (n, len(a)), w.name, "low-rank B")
        for factor, name in ((a, "A"), (b, "B")):
            _finite(factor, kind, w.name, f"low-rank {name}")
        _finite(np.array([scale], np.float32), "f32", w.name, "low-rank scale")


def _check_second(s: Second, name: str, role: str) -> None:
    for array, what in ((s.scale, "scale"), (s.zero, "zero point"), (s.table, "table"), (np.array([s.offset]), "offset")):
        if array is not None:
            _finite(array.reshape(-1).astype(np.float32), "f32", name, f"{what} of the {role}")
    same = s.zero is None or s.zero.size == s.scale.size
    if not s.scale.size or not same or (s.table is not None and s.table.size != 256):
        raise InputError(f"{name}: second level of the {role} has {s.scale.size} scales that do not fit the rest")


def _fit(data: Codes | Array, shape: tuple[int, int], name: str, role: str, shared: bool = False) -> None:
    """Refuse an array that is not of this shape; shared: an axis may be 1. Words may be more than are needed."""
    array, (r, c) = data.words if isinstance(data, Codes) else data, shape
    wanted, enough = shape, array.shape == shape
    if isinstance(data, Codes):
        axis, in_word = data.order.partition("-")[0], data.word // data.bits
        along = {"columns": (r, -(-c * data.bits // data.word)), "rows": (-(-r * data.bits // data.word), c)}
        wanted = along.get(axis, (-(-r // in_word), c))
        enough = array.ndim == 2 and all(have >= want for have, want in zip(array.shape, wanted, strict=True))
    elif shared:
        enough = array.ndim == 2 and all(have in (1, want) for have, want in zip(array.shape, shape, strict=True))
    if not enough:
        raise InputError(f"{name}: {role} has shape {list(array.shape)}, wanted {list(wanted)}")


def _finite(array: Array, kind: Kind, name: str, role: str) -> None:
    """Refuse floats of which all exponent bits are set; of e4m3 all bits."""
    if kind == "int":
        return
    bits = np.dtype(f"u{array.itemsize}")
    mask = bits.type({"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80, "e4m3": 0x7F, "e8m0": 0xFF}[kind])
    wrong = np.argwhere(array.view(bits) & mask == mask)
    if wrong.size:
        at = [int(i) for i in wrong[0]]
        value = real(array[tuple(at)].reshape(1), kind)[0]
        raise InputError(f"{name}: {role} {at} is {value}", hint="the file is damaged, or was quantized from NaN")
