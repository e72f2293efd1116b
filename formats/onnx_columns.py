"""Quantized weights laid [K,N], as MatMul behind DequantizeLinear and the integer products read them.

A packed row is its codes, scales and zero points, one value in a byte (scales in 2 or 4); emit lays it as column n of the
arrays codes [K,N], scales and zero points [K/group, N], where values of less than a byte share it along N. Codes without a
zero point are signed, but for those of whole rows, which products of integers take (see MIDDLE).
Source: DequantizeLinear-23, MatMulInteger-10; TensorProto of INT4 and its like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.scheme import AFFINE, PER_ROW, Array, Bytes, Layout, Piece, QTensor, Scheme

PREFIX = "onnx_kn"
MIDDLE = 128  # the code of 0 where a row has one scale: products of integers are exact on every CPU only if all are unsigned


@dataclass(frozen=True)
class Columns(Layout):
    """`block` is what one group takes in a packed row."""

    def planes(self, k: int) -> tuple[int, ...]:
        """nbytes of a packed row of k weights: codes, scales and, where the scheme has them, zero points."""
        levels = (max(1, level.bits // 8) * level.entries(k) for level in self.scheme.levels)
        return (k, *levels)

    @property
    def bits(self) -> tuple[int, ...]:
        """Of one value in the file, for each plane."""
        return (self.scheme.bits, *(level.bits for level in self.scheme.levels))

    @property
    def middle(self) -> int:
        """What is added to a code to store it."""
        return MIDDLE if any(level.group is None for level in self.scheme.levels) else 0

    @property
    def signed(self) -> bool:
        return not self.middle and self.scheme.zero_point == "none"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Type of each plane's tensor, as onnx_proto.DTYPES calls it."""
        codes = f"{'i' if self.signed else 'u'}{self.scheme.bits}"
        return (codes, *(codes if level.role == "zero" else level.dtype for level in self.scheme.levels))

    def dims(self, n: int, k: int) -> tuple[tuple[int, ...], ...]:
        """Shape of each plane's tensor."""
        levels = (((level.entries(k), n) if level.group else (n,)) for level in self.scheme.levels)
        return ((k, n), *levels)

    def pieces(self, n: int, k: int) -> tuple[Piece, ...]:
        both = zip(self.dims(n, k), self.bits, strict=True)
        return tuple(Piece(i - 1 if i else None, math.prod(dims) * bits // 8) for i, (dims, bits) in enumerate(both))

    def fits(self, n: int) -> bool:
        """Whether n outputs fill whole bytes."""
        return n * self.scheme.bits % 8 == 0

    def row_nbytes(self, k: int) -> int:
        return sum(self.planes(k))

    def row_weights(self, nbytes: int) -> int:
        """The inverse of row_nbytes. InputError where no row has that many bytes."""
        groups = all(level.group is not None for level in self.scheme.levels)
        k = nbytes // self.block.itemsize * self.scheme.block if groups else nbytes - self.row_nbytes(0)
        if k < 0 or self.row_nbytes(k) != nbytes:
            raise InputError(f"{self.name}: no row takes {nbytes} bytes")
        return k


def _pack(name: str, q: QTensor) -> Bytes:
    """QTensor -> u8[N, row nbytes]."""
    layout = LAYOUTS[name]
    if (why := layout.accepts(q.scheme)) is not None:
        raise UnsupportedError(why, hint=f"pack as {PREFIX}.{q.scheme.name}")
    both = zip(layout.scheme.levels, q.levels, strict=True)
    codes = q.codes.astype(np.int16) + layout.middle
    return np.concatenate([in_bytes(codes, layout.scheme.bits), *(in_bytes(v, level.bits) for level, v in both)], axis=1)


def in_bytes(values: Array, bits: int) -> Bytes:
    """Integers of up to 8 bits as one byte each, the low bits of two's complement; reals as their own bytes."""
    if bits > 8:
        return np.ascontiguousarray(values, f"<f{bits // 8}").view(np.uint8)
    out: Bytes = (values.astype(np.int16) & ((1 << bits) - 1)).astype(np.uint8)
    return out


def _unpack(name: str, packed: Bytes) -> QTensor:
    layout = LAYOUTS[name]
    scheme, k = layout.scheme, layout.row_weights(packed.shape[1])
    codes, *levels = np.split(packed, np.cumsum(layout.planes(k))[:-1], axis=1)
    sign = np.int8(-1 << (scheme.bits - 1))
    values: Array = (codes.view(np.int8) ^ sign) - sign if layout.signed else codes
    if layout.middle:
        values = (codes - np.uint8(layout.middle)).view(np.int8)
    both = zip(scheme.levels, levels, strict=True)
    return QTensor(scheme, values, tuple(as_reals(v, level.bits) for level, v in both))


def as_reals(stored: Bytes, bits: int) -> Array:
    return (np.ascontiguousarray(stored).view(f"<f{bits // 8}") if bits > 8 else stored).astype(np.float32)


def _layout(scheme: Scheme) -> Columns:
    name = f"{PREFIX}.{scheme.name}"
    per_group = [(level.role, "u1", max(1, level.bits // 8)) for level in scheme.levels]
    block = np.dtype([("codes", "u1", scheme.block), *per_group])
    return Columns(name, scheme, block, partial(_pack, name), partial(_unpack, name))


# DequantizeLinear's zero points are codes
HELD = [scheme for scheme in (*AFFINE.values(), *PER_ROW.values()) if scheme.zero_point != "float"]
LAYOUTS: dict[str, Columns] = {layout.name: layout for layout in map(_layout, HELD)}
