"""How onnxruntime's nodes want a quantized weight: codes, scales and zero points, each a tensor.

A packed row is its codes, then its scales, then its zero points; emit lays each of the three in a place of its own.
Sources: the schemas of com.microsoft's MatMulNBits, GatherBlockQuantized and MatMulBnb4 in onnxruntime 1.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from qconvert.bits import from_bits, to_bits
from qconvert.errors import InputError, UnsupportedError
from qconvert.scheme import AFFINE, F32, NF4_TABLE, TABLES, Bytes, Layout, Piece, QTensor, Scheme


class Part(NamedTuple):
    """One tensor of a weight: its dtype and dims in the file."""

    dtype: str  # u8 or f32
    dims: tuple[int, ...]


@dataclass(frozen=True)
class MatMulNBits(Layout):
    """Unsigned codes, the first in the low bits. `block` is what a group takes, but for a zero point of a few bits."""

    node: str = field(default="MatMulNBits", init=False)

    def planes(self, k: int) -> tuple[int, ...]:
        """nbytes of a row of k weights: codes, scales and, where the scheme has them, zero points."""
        groups = k // self.scheme.block
        more = {"none": (), "int": (-(-groups * self.scheme.bits // 8),), "float": (4 * groups,)}[self.scheme.zero_point]
        return (k * self.scheme.bits // 8, 4 * groups, *more)

    def parts(self, n: int, k: int) -> tuple[Part, ...]:
        """What the node reads of a weight [n, k], in the order of its planes."""
        groups = k // self.scheme.block
        codes, scales = Part("u8", (n, groups, self.scheme.block * self.scheme.bits // 8)), Part("f32", (n, groups))
        packed = Part("u8", (n, -(-groups * self.scheme.bits // 8)))
        more = {"none": (), "int": (packed,), "float": (Part("f32", (n, groups)),)}[self.scheme.zero_point]
        return (codes, scales, *more)

    def attributes(self, n: int, k: int, level: int) -> dict[str, int]:
        """Of the node; level: of accuracy, 4 lets it round activations to 8 bits, group by group."""
        return {"K": k, "N": n, "bits": self.scheme.bits, "block_size": self.scheme.block, "accuracy_level": level}

    @property
    def rounds(self) -> bool:
        """Whether onnxruntime 1.31 rounds activations to 8 bits at level 4: only its fast kernels do."""
        slow = self.scheme.bits == 2 and self.scheme.block in (16, 256)
        return self.scheme.zero_point != "float" and not slow

    def pieces(self, n: int, k: int) -> tuple[Piece, ...]:
        codes, *levels = self.planes(k)
        return (Piece(None, n * codes), *(Piece(i, n * nbytes) for i, nbytes in enumerate(levels)))

    def row_nbytes(self, k: int) -> int:
        return sum(self.planes(k))

    def row_weights(self, nbytes: int) -> int:
        """The inverse of row_nbytes. InputError where no row has that many bytes."""
        bits = 8 * self.block.itemsize + (self.scheme.bits if self.scheme.zero_point == "int" else 0)
        k = 8 * nbytes // bits * self.scheme.block
        if self.row_nbytes(k) != nbytes:
            raise InputError(f"{self.name}: no row takes {nbytes} bytes")
        return k


@dataclass(frozen=True)
class MatMulBnb4(MatMulNBits):
    """Indices of a table, the first in the high bits; the weight is one run of blocks, which lie within rows."""

    node: str = field(default="MatMulBnb4", init=False)

    def parts(self, n: int, k: int) -> tuple[Part, ...]:
        return (Part("u8", (n * k // 2,)), Part("f32", (n * k // self.scheme.block,)))

    def attributes(self, n: int, k: int, level: int) -> dict[str, int]:
        return {"K": k, "N": n, "block_size": self.scheme.block, "quant_type": int(self.scheme.table == NF4_TABLE)}

    @property
    def rounds(self) -> bool:
        return False


def rounds(layout: Layout) -> bool:
    """Whether activations are rounded to 8 bits before they meet a weight of this layout."""
    return not isinstance(layout, MatMulNBits) or layout.rounds


def has_zeros(scheme: Scheme) -> bool:
    return scheme.zero_point != "none"


def centre(scheme: Scheme) -> int:
    """What is added to a code to store it unsigned: MatMulNBits' zero point where none is given."""
    return scheme.centre


def swapped(packed: Bytes) -> Bytes:
    """The halves of each byte exchanged."""
    return packed << np.uint8(4) | packed >> np.uint8(4)


def _join(name: str, packed: Bytes, levels: Sequence[F32]) -> Bytes:
    """Codes u8[N, K * bits / 8], the first in the low bits, and f32 levels -> u8[N, row nbytes]."""
    scheme = LAYOUTS[name].scheme
    scales, *zeros = levels
    parts = [swapped(packed) if scheme.table else packed, np.ascontiguousarray(scales, "<f4").view(np.uint8)]
    if scheme.zero_point == "int":
        parts += [to_bits(z.astype(np.uint8), scheme.bits) for z in zeros]
    else:
        parts += [np.ascontiguousarray(z, "<f4").view(np.uint8) for z in zeros]
    return np.concatenate(parts, axis=1)


def _pack(name: str, q: QTensor) -> Bytes:
    """QTensor -> u8[N, row nbytes]."""
    layout = LAYOUTS[name]
    if (why := layout.accepts(q.scheme)) is not None:
        raise UnsupportedError(why, hint=f"pack as onnx.{q.scheme.name}")
    stored = (q.codes.astype(np.int16) + q.scheme.centre).astype(np.uint8)
    return _join(name, to_bits(stored, q.scheme.bits), q.levels)


def _unpack(name: str, packed: Bytes) -> QTensor:
    layout = LAYOUTS[name]
    scheme, k = layout.scheme, layout.row_weights(packed.shape[1])
    cuts = np.cumsum(layout.planes(k))[:-1]
    codes, scales, *zeros = np.split(packed, cuts, axis=1)
    stored = from_bits(swapped(codes) if scheme.table else codes, scheme.bits, k)
    levels = [np.ascontiguousarray(scales).view("<f4").astype(np.float32)]
    if scheme.zero_point == "int":
        levels += [from_bits(z, scheme.bits, k // scheme.block).astype(np.float32) for z in zeros]
    else:
        levels += [np.ascontiguousarray(z).view("<f4").astype(np.float32) for z in zeros]
    signed = (stored - np.uint8(scheme.centre)).view(np.int8) if scheme.centre else stored
    return QTensor(scheme, signed, tuple(levels))


def _layout(scheme: Scheme) -> MatMulNBits:
    name = f"onnx.{scheme.name}"
    fields = [("codes", "u1", scheme.block * scheme.bits // 8), ("scale", "<f4")]
    block = np.dtype([*fields, ("zero", "<f4")] if scheme.zero_point == "float" else fields)
    kind = MatMulBnb4 if scheme.table else MatMulNBits
    return kind(name, scheme, block, partial(_pack, name), partial(_unpack, name), partial(_join, name))


LAYOUTS: dict[str, MatMulNBits] = {layout.name: layout for layout in map(_layout, [*AFFINE.values(), *TABLES.values()])}
