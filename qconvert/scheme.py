"""Quantization schemes: how real numbers become integer codes and levels of metadata. Says nothing about bytes.

A layout (bytes) is declared beside its format and holds exactly one scheme; a solver chooses codes and metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Real = npt.NDArray[np.floating[Any]]
F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Level:
    """One array of metadata. `group` weights along a row share one entry; None: the whole row does.

    w = scale * (code - zero), then + offset or - min. Levels of one role multiply: the coarser is the scale of the finer.
    """

    role: Literal["zero", "scale", "offset", "min"]
    dtype: str  # f16, f32, i8, u6 … : the digits are its bits
    group: int | None

    @property
    def bits(self) -> int:
        return int("".join(c for c in self.dtype if c.isdigit()))

    def entries(self, k: int) -> int:
        """Of a row of k weights."""
        return 1 if self.group is None else k // self.group


@dataclass(frozen=True)
class Scheme:
    """grid and metadata levels, coarse levels first. Codes are signed where the grid is centred on zero."""

    name: str
    bits: int  # of one code
    levels: tuple[Level, ...]
    table: tuple[int, ...] = ()  # a code is an index into it; empty: the code is the value

    @property
    def block(self) -> int:
        """Rows must be a multiple of this many weights."""
        return max(level.group or 1 for level in self.levels)

    @property
    def bits_per_weight(self) -> float:
        """What a whole row shares is not counted."""
        return self.bits + sum(level.bits / level.group for level in self.levels if level.group)


class QTensor(NamedTuple):
    """codes i8[N,K]; one array per scheme level, each f32[N,K/group] (integers kept as exact floats)."""

    scheme: Scheme
    codes: npt.NDArray[np.int8]
    levels: tuple[F32, ...]

    def dequantize(self) -> F32:
        """f32[N,K], computed in the order ggml does: (coarse * fine) * code, then the offset."""
        n, k = self.codes.shape
        value = np.asarray(self.scheme.table, np.float32)[self.codes] if self.scheme.table else self.codes
        out = value.astype(np.float32)
        for role in ("zero", "scale", "offset", "min"):
            both = zip(self.scheme.levels, self.levels, strict=True)
            levels = [(v, level.group or k) for level, v in both if level.role == role]
            if not levels:
                continue
            (factor, group), *finer = levels
            for v, g in finer:
                factor, group = np.repeat(factor, group // g, axis=1) * v, g
            grouped, factor = out.reshape(n, k // group, group), factor[:, :, None]
            out = (grouped * factor if role == "scale" else grouped + factor if role == "offset" else grouped - factor).reshape(
                n, k
            )
        return out


@dataclass(frozen=True)
class Layout:
    """How one scheme's codes and metadata lie in bytes. `block` is the C struct, so its itemsize is the block's nbytes."""

    name: str  # "gguf.q4_k"
    scheme: Scheme
    block: np.dtype[np.void]
    pack: Callable[[QTensor], Bytes]  # -> u8[N, K/block*itemsize]
    unpack: Callable[[Bytes], QTensor]

    def row_nbytes(self, k: int) -> int:
        return k // self.scheme.block * self.block.itemsize

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
        Scheme("iq4_nl", 4, (Level("scale", "f16", 32),), IQ4_TABLE),
        Scheme("iq4_xs", 4, (Level("scale", "f16", 256), Level("scale", "i6", 32)), IQ4_TABLE),
    )
}

GROUPS = (16, 32, 64, 128, 256)
# One float scale a group, and (uint4) an integer zero point: codes -8..7, 0..15, -128..127
AFFINE: dict[str, Scheme] = {
    s.name: s
    for group in GROUPS
    for s in (
        Scheme(f"int4_g{group}", 4, (Level("scale", "f32", group),)),
        Scheme(f"uint4_g{group}", 4, (Level("scale", "f32", group), Level("zero", "u4", group))),
        Scheme(f"int8_g{group}", 8, (Level("scale", "f32", group),)),
    )
}

# One scale for all weights of an output: what integer matrix products take
PER_ROW: dict[str, Scheme] = {"int8_row": Scheme("int8_row", 8, (Level("scale", "f32", None),))}


def scheme_of(name: str) -> Scheme | None:
    """ggml's scheme of that name, or the affine one; None where there is none."""
    return SCHEMES.get(name) or AFFINE.get(name) or PER_ROW.get(name)
