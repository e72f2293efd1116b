"""Quantization schemes: how real numbers become integer codes and levels of metadata. Says nothing about bytes.

A layout (bytes) is declared beside its format and holds exactly one scheme; a solver chooses codes and metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from qconvert import registry

Array = npt.NDArray[Any]
Real = npt.NDArray[np.floating[Any]]
F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
ZeroPoint = Literal["none", "int", "float"]
Device = Literal["cpu", "cuda"]  # cuda: a GPU as torch names it, AMD's too
FOLDED = "folded"  # NAME~folded: codes that rows of a weight share bytes for, beside its packed rows


@dataclass(frozen=True)
class Level:
    """One array of metadata. `group` weights along a row share one entry; None: the whole row does.

    rows: so many rows, from a multiple of it on, share their entries too; None: all rows of the weight.
    w = scale * (code - zero), then + offset or - min. Levels of one role multiply: the coarser is the scale of the finer;
    a scale / divisor comes before the code. adds: this one is added to the product of those before it instead.
    """

    role: Literal["zero", "divisor", "scale", "offset", "min"]
    dtype: str  # f16, f32, i8, u6, f8_e4m3 … : the first digits are its bits
    group: int | None
    rows: int | None = 1
    adds: bool = False

    @property
    def bits(self) -> int:
        return int(re.findall(r"\d+", self.dtype)[0])

    def entries(self, k: int) -> int:
        """Of a row of k weights."""
        return 1 if self.group is None else k // self.group


@dataclass(frozen=True)
class Scheme:
    """grid and metadata levels, coarse levels first. Codes are signed where the grid is centred on zero."""

    name: str
    bits: int  # of one code
    levels: tuple[Level, ...]
    table: tuple[float, ...] = ()  # a code is an index into it; empty: the code is the value
    stored_bits: float | None = None  # of one code, where bytes hold several that do not divide them
    unsigned: bool = False  # codes begin at 0 though none has a zero point: an offset says where the grid lies
    lattice: int = 0  # so many codes together are a point of a lattice: coordinates i8, of more bits than are stored

    @property
    def block(self) -> int:
        """Rows must be a multiple of this many weights."""
        return max(self.lattice, *(level.group or 1 for level in self.levels))

    @property
    def zero_point(self) -> ZeroPoint:
        """Of each group: none, one of its codes, or any number."""
        dtypes = [level.dtype for level in self.levels if level.role == "zero"]
        return "none" if not dtypes else "int" if dtypes[0].startswith("u") else "float"

    @property
    def of_tensors(self) -> bool:
        """Whether something is shared by all rows, so that the weight must have been seen before its first code."""
        return any(level.rows is None for level in self.levels)

    @property
    def centre(self) -> int:
        """What is added to a code where it is stored unsigned: the zero point of signed codes."""
        return 0 if self.table or self.unsigned or self.zero_point != "none" else 1 << (self.bits - 1)

    @property
    def code_bits(self) -> float:
        """Of one code in a file."""
        return self.bits if self.stored_bits is None else self.stored_bits

    @property
    def bits_per_weight(self) -> float:
        """What whole rows share is not counted."""
        metadata = sum(level.bits / level.group / level.rows for level in self.levels if level.group and level.rows)
        return self.code_bits + metadata


class QTensor(NamedTuple):
    """codes i8[N,K], or u8 where none is below 0; one f32[N,K/group] per scheme level (integers kept as exact floats).

    Entries that rows share are there for each of them.
    """

    scheme: Scheme
    codes: npt.NDArray[np.int8 | np.uint8]
    levels: tuple[F32, ...]

    @property
    def divisor(self) -> F32 | None:
        """f32[N,1] of the scales, where there is one."""
        both = zip(self.scheme.levels, self.levels, strict=True)
        return next((v for level, v in both if level.role == "divisor"), None)

    def dequantize(self) -> F32:
        """f32[N,K], computed in the order ggml does: (coarse * fine) * code, then the offset."""
        n, k = self.codes.shape
        value = np.asarray(self.scheme.table, np.float32)[self.codes] if self.scheme.table else self.codes
        out = value.astype(np.float32)
        for role in ("zero", "scale", "offset", "min"):
            both = zip(self.scheme.levels, self.levels, strict=True)
            levels = [(v, level.group or k, level.adds) for level, v in both if level.role == role]
            if not levels:
                continue
            (factor, group, _), *finer = levels
            for v, g, adds in finer:
                fine = min(group, g)
                factor, v = np.repeat(factor, group // fine, axis=1), np.repeat(v, g // fine, axis=1)
                factor, group = (factor + v if adds else factor * v), fine
            if role == "scale" and self.divisor is not None:
                factor = factor / self.divisor
            grouped, factor = out.reshape(n, k // group, group), factor[:, :, None]
            out = (grouped * factor if role == "scale" else grouped + factor if role == "offset" else grouped - factor).reshape(
                n, k
            )
        return out


class Piece(NamedTuple):
    """What lies apart from the rest of a weight: its codes (level None) or the entries of a level, and their nbytes."""

    level: int | None
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """How one scheme's codes and metadata lie in bytes. `block` is the C struct, so its itemsize is the block's nbytes."""

    name: str  # "gguf.q4_k"
    scheme: Scheme
    block: np.dtype[np.void]
    pack: Callable[[QTensor], Bytes]  # -> u8[N, K/block*itemsize]
    unpack: Callable[[Bytes], QTensor]
    join: Callable[[Bytes, Sequence[F32]], Bytes] | None = None  # from codes in bits already (first one low) and levels

    @property
    def whole(self) -> bool:
        """Whether packed rows hold all of a weight; else other values of the graph lie beside them."""
        return True

    @property
    def others(self) -> tuple[tuple[str, bool], ...]:
        """Those values, NAME~suffix, and whether each group of weights has an entry there."""
        return ()

    def row_nbytes(self, k: int) -> int:
        return k // self.scheme.block * self.block.itemsize

    def pieces(self, n: int, k: int) -> tuple[Piece, ...]:
        """Of a weight [n,k], in the order of its planes; none: each block holds codes and metadata together."""
        return ()

    def accepts(self, scheme: Scheme) -> str | None:
        """None, or why this layout cannot hold `scheme`."""
        return None if scheme == self.scheme else f"{self.name} holds {self.scheme.name}, not {scheme.name}"


IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Source of groups and dtypes: ggml/src/ggml-common.h
SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("q8_0", 8, (Level("scale", "f16", 32),)),
        Scheme("q4_0", 4, (Level("scale", "f16", 32),)),
        Scheme("q4_1", 4, (Level("scale", "f16", 32), Level("offset", "f16", 32))),
        Scheme("q5_0", 5, (Level("scale", "f16", 32),)),
        Scheme("q5_1", 5, (Level("scale", "f16", 32), Level("offset", "f16", 32))),
        Scheme(
            "q2_k",
            2,
            (Level("scale", "f16", 256), Level("scale", "u4", 16), Level("min", "f16", 256), Level("min", "u4", 16)),
        ),
        Scheme("q3_k", 3, (Level("scale", "f16", 256), Level("scale", "i6", 16))),
        Scheme(
            "q4_k",
            4,
            (Level("scale", "f16", 256), Level("scale", "u6", 32), Level("min", "f16", 256), Level("min", "u6", 32)),
        ),
        Scheme(
            "q5_k",
            5,
            (Level("scale", "f16", 256), Level("scale", "u6", 32), Level("min", "f16", 256), Level("min", "u6", 32)),
        ),
        Scheme("q6_k", 6, (Level("scale", "f16", 256), Level("scale", "i8", 16))),
        Scheme("tq1_0", 2, (Level("scale", "f16", 256),), (-1.0, 0.0, 1.0), stored_bits=13 / 8),
        Scheme("tq2_0", 2, (Level("scale", "f16", 256),), (-1.0, 0.0, 1.0, 2.0)),
        Scheme("q1_0", 1, (Level("scale", "f16", 128),), (-1.0, 1.0)),
        Scheme("q2_0", 2, (Level("scale", "f16", 64),), (-1.0, 0.0, 1.0, 2.0)),
        Scheme("iq4_nl", 4, (Level("scale", "f16", 32),), IQ4_TABLE),
        Scheme("iq4_xs", 4, (Level("scale", "f16", 256), Level("scale", "i6", 32)), IQ4_TABLE),
    )
}

# Codes are what the entries of a codebook hold, in i8; several share an index. Fine scales are steps of a quarter, from an
# eighth on, and the like: gguf_codebooks.
CODEBOOKS: dict[str, Scheme] = {
    name: Scheme(name, 8, (Level("scale", "f16", 256), Level("scale", dtype, group)), stored_bits=bits)
    for name, bits, dtype, group in (
        ("iq2_xxs", 15 / 8, "u4", 32), ("iq3_xxs", 23 / 8, "u4", 32), ("iq2_xs", 2.0, "u4", 16), ("iq2_s", 9 / 4, "u4", 16),
        ("iq3_s", 13 / 4, "u4", 32), ("iq1_s", 45 / 32, "u3", 32), ("iq1_m", 3 / 2, "u3", 16),
    )
}  # fmt: skip

# Small floats by code: sign, exponent, mantissa. e2m1 has neither NaN nor infinity, e4m3 (fn) NaN in its last code.
E2M1_TABLE = tuple(sign * v for sign in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3_HALF = (*(m / 512 for m in range(8)), *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)))
E4M3_TABLE = tuple(sign * v for sign in (1, -1) for v in (*E4M3_HALF[:-1], float("nan")))
E8M0_TABLE = (*(2.0 ** (e - 127) for e in range(255)), float("nan"))  # scales of MX formats

GROUPS = (16, 32, 64, 128, 256)
# One float scale a group, and a zero point that is a code (uint) or any number (uintNf; of 8 bits onnxruntime has no
# kernel for it). Codes of N bits: signed, 0 in the middle, or from 0 where there is a zero point.
AFFINE: dict[str, Scheme] = {}
for _group in GROUPS:
    _scale = Level("scale", "f32", _group)
    for _name, _bits, _zero in (
        *((f"int{bits}", bits, ()) for bits in (2, 4, 8)),
        *((f"uint{bits}", bits, (Level("zero", f"u{bits}", _group),)) for bits in (2, 4, 8)),
        *((f"uint{bits}f", bits, (Level("zero", "f32", _group),)) for bits in (2, 4)),
    ):
        AFFINE[f"{_name}_g{_group}"] = Scheme(f"{_name}_g{_group}", _bits, (_scale, *_zero))

# bitsandbytes' tables as its kernels and onnxruntime's have them: quantiles of the normal distribution; 1 sign, 2 exponent
# and 1 mantissa bit with a subnormal of 1/192.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_HALF = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_TABLE = (*FP4_HALF, *(-v for v in FP4_HALF))
# One float scale a group, of a table of 16 levels
TABLES: dict[str, Scheme] = {
    f"{name}_g{group}": Scheme(f"{name}_g{group}", 4, (Level("scale", "f32", group),), table)
    for group in GROUPS
    for name, table in (("nf4", NF4_TABLE), ("fp4", FP4_TABLE))
}

# One scale for all weights of an output: what integer matrix products take; bitsandbytes' is the greatest magnitude itself
INT8_TABLE = tuple(code / 127 for code in range(-128, 128))
PER_ROW: dict[str, Scheme] = {"int8_row": Scheme("int8_row", 8, (Level("scale", "f32", None),))}
SCB: dict[str, Scheme] = {"int8_scb": Scheme("int8_scb", 8, (Level("scale", "f32", None),), INT8_TABLE)}
# One scale for the whole weight
TERNARY: dict[str, Scheme] = {
    f"ternary_{dtype}": Scheme(f"ternary_{dtype}", 2, (Level("scale", dtype, None, None),), (-1.0, 0.0, 1.0, 0.0))
    for dtype in ("f32", "f16", "bf16")
}


# QuIP#'s: codes are 4 times the coordinates of points (kernels/lattice.py), one scale for the whole weight, which was turned
# by Hadamard matrices before
LATTICES: dict[str, Scheme] = {"e8p": Scheme("e8p", 2, (Level("scale", "f16", None, None),), lattice=8)}


# Small floats: e4m3 (fp8) with a scale for each row, tensor or block of 128 by 128; fp4 and fp8 with scales that are small
# floats too. What a whole tensor shares may be chosen for several at once.
MINIFLOATS: dict[str, Scheme] = {
    s.name: s
    for s in (
        *(
            Scheme(f"e4m3_{kind}{suffix}", 8, (Level("scale", dtype, group, rows),), E4M3_TABLE)
            for kind, group, rows in (("row", None, 1), ("tensor", None, None), ("b128", 128, 128))
            for dtype, suffix in (("f32", ""), ("f16", "_f16"), ("bf16", "_bf16"))
        ),
        Scheme("nvfp4", 4, (Level("divisor", "f32", None, None), Level("scale", "f8_e4m3", 16)), E2M1_TABLE),
        Scheme("mxfp4", 4, (Level("scale", "e8m0", 32),), E2M1_TABLE),
        Scheme("mxfp8", 8, (Level("scale", "e8m0", 32),), E4M3_TABLE),
    )
}
SCHEMES["mxfp4"] = MINIFLOATS["mxfp4"]  # the same codes and scales, whoever keeps them
GGML_SCHEMES = SCHEMES | CODEBOOKS  # all that GGUF keeps in blocks

AFFINE_NAME = re.compile(r"(u?int)([1-8])([fo]?)_(?:g(\d+)|row)(?:_(f16|bf16))?(_f32)?")
TABLE_NAME = re.compile(r"(nf4|fp4|ternary|binary)_(?:g(\d+)|row)")
NAMED_TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE, "ternary": (-1.0, 0.0, 1.0), "binary": (-1.0, 1.0)}
SECOND_LEVEL = re.compile(r"(.+)_(u8|u6)x(\d+)")


@cache
def scheme_of(name: str) -> Scheme | None:
    """ggml's scheme of that name, the affine one, that of a table, of rows or of small floats; None where there is none.

    An affine name may have any group from 8 on, and say that scales are f16 or bf16: int4_g40, uint4_g128_bf16; with o
    there are offsets, as wide as scales, or f32: uint3o_g64_bf16, uint4o_g32_f16_f32. A table's may have any group:
    nf4_g4096, ternary_g64, binary_row.
    uint4_g32_u8x128 is uint4_g32 with a second level: u8 in the place of real scales and zero points; 128 share a factor
    and an offset. uint4_g32_u6x8 has 6 bits, of which 8 share a factor. The last are those of other packages.
    """
    if m := SECOND_LEVEL.fullmatch(name):
        base = scheme_of(m[1])
        if base is None or any(level.group is None or level.rows != 1 for level in base.levels):
            return None
        if len({level.role for level in base.levels}) < len(base.levels):
            return None  # it has one
        levels = (new for level in base.levels for new in _above(base, level, m[2], int(m[3])))
        return replace(base, name=name, levels=tuple(levels))
    tables = (SCHEMES, CODEBOOKS, AFFINE, TABLES, PER_ROW, SCB, TERNARY, MINIFLOATS, LATTICES)
    own = next((table[name] for table in tables if name in table), None) or _table(name) or _affine(name)
    if (foreign := registry.entries("schemes").get(name)) is None:
        return own
    if own is not None:
        raise registry.clash("schemes", name, registry.OWN, foreign.origin)
    return cast(Scheme, registry.find("schemes", name))


def affine_name(kind: str, group: int | None, scales: str) -> str:
    """kind: int4, uint4f …; group None: the whole row; scales: their dtype."""
    return f"{kind}_{'row' if group is None else f'g{group}'}" + ("" if scales == "f32" else f"_{scales}")


def _table(name: str) -> Scheme | None:
    m = TABLE_NAME.fullmatch(name)
    if m is None:
        return None
    table = NAMED_TABLES[m[1]]
    return Scheme(name, (len(table) - 1).bit_length(), (Level("scale", "f32", int(m[2]) if m[2] else None),), table)


def _affine(name: str) -> Scheme | None:
    m = AFFINE_NAME.fullmatch(name)
    if m is None or (m[4] and int(m[4]) < 8) or (m[3] == "f" and m[1] == "int"):
        return None
    if m[2] == "1" and m[1] == "int":  # codes -1 and 0: binary_g64 has -1 and 1
        return None
    if m[6] and (m[3] != "o" or not m[5]):
        return None
    bits, group, dtype = int(m[2]), int(m[4]) if m[4] else None, m[5] or "f32"
    if m[3] == "o":
        levels = Level("scale", dtype, group), Level("offset", "f32" if m[6] else dtype, group)
        return Scheme(name, bits, levels, unsigned=m[1] == "uint")
    zeros = () if m[1] == "int" else (Level("zero", dtype if m[3] else f"u{bits}", group),)
    return Scheme(name, bits, (Level("scale", dtype, group), *zeros))


def is_real(level: Level) -> bool:
    return level.dtype.startswith(("f", "bf"))


def _above(base: Scheme, level: Level, kind: str, entries: int) -> list[Level]:
    """The levels that stand for one of `base` where it has a second one."""
    if not is_real(level):
        return [level]
    assert level.group is not None
    group = level.group * entries
    if kind == "u8":
        return [Level(level.role, "f16", group), replace(level, dtype="u8"), Level(level.role, "f16", group, adds=True)]
    positive = level.role == "min" or (level.role == "scale" and base.zero_point != "none")  # else a grid may lie upside down
    return [Level(level.role, "f16", group), replace(level, dtype="u6" if positive else "i6")]
