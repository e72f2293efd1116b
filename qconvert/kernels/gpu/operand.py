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
NUMPY: dict[Kind, str] = {"f32": "f4", "f16": "f2", "bf16": "u2", "e4m3": "u1", "e8m0": "u1"}


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
    """Refuse metadata, tables and floats that are not finite, and shapes that do not fit together."""
    n, k = w.shape
    if w.width is not None and n * k % w.width:
        raise UnsupportedError(f"{w.name}: {n} x {k} weights are no rows of {w.width}")
    r, c = w.matrix
    rows, columns = w.block
    for role, m in w.parts:
        data = m.data.words if isinstance(m.data, Codes) else m.data
        wanted = (-(-r // rows), -(-c // columns) if columns else 1)
        if not isinstance(m.data, Codes) and any(have not in (1, want) for have, want in zip(data.shape, wanted, strict=True)):
            raise InputError(f"{w.name}: {role} has shape {list(data.shape)}, wanted {list(wanted)}")
        values = second_arrays(m.second) if m.second else () if m.kind == "int" else (real(data, m.kind),)
        for value in (*values, np.array(m.divisor)):
            _finite(value, w.name, role)
        if m.divisor == 0:
            raise InputError(f"{w.name}: {role} is divided by 0")
    if isinstance(w.codes, np.ndarray):
        _finite(real(w.codes, w.kind), w.name, "weight")
    if w.g_idx is not None and w.scale is not None and not 0 <= w.g_idx.min() <= w.g_idx.max() < _groups(w.scale):
        raise InputError(f"{w.name}: g_idx names group {w.g_idx.max()} of {_groups(w.scale)}")
    for part in w.low_rank[:2] if w.low_rank else ():
        _finite(real(part, w.low_rank.kind if w.low_rank else "f32"), w.name, "low-rank part")


def second_arrays(s: Second) -> tuple[Array, ...]:
    return tuple(a for a in (s.scale, s.zero, s.table, np.array(s.offset)) if a is not None)


def _groups(m: Metadata) -> int:
    return int((m.data.words if isinstance(m.data, Codes) else m.data).shape[1])


def _finite(value: Array, name: str, role: str) -> None:
    wrong = np.argwhere(~np.isfinite(value))
    if wrong.size:
        at = [int(i) for i in wrong[0]]
        raise InputError(f"{name}: {role} {at} is {value[tuple(at)]}", hint="the file is damaged, or was quantized from NaN")
