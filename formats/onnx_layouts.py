"""How MatMulNBits (and GatherBlockQuantized) wants a quantized weight: codes, scales and zero points, each a tensor.

A packed row is its codes, then its scales, then its zero points; emit lays each of the three in a place of its own.
Source: the schema of com.microsoft.MatMulNBits in onnxruntime 1.31. Codes are unsigned, the first in the low bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.scheme import AFFINE, Array, Bytes, Layout, QTensor, Scheme


@dataclass(frozen=True)
class MatMulNBits(Layout):
    """`block` is what one group takes, but for its zero point, which may be half a byte."""

    def planes(self, k: int) -> tuple[int, ...]:
        """nbytes of a row of k weights: codes, scales and, where the scheme has them, zero points."""
        groups = k // self.scheme.block
        zeros = (-(-groups * self.scheme.bits // 8),) if has_zeros(self.scheme) else ()
        return (k * self.scheme.bits // 8, 4 * groups, *zeros)

    def row_nbytes(self, k: int) -> int:
        return sum(self.planes(k))

    def row_weights(self, nbytes: int) -> int:
        """The inverse of row_nbytes. InputError where no row has that many bytes."""
        bits = 8 * self.block.itemsize + (self.scheme.bits if has_zeros(self.scheme) else 0)
        k = 8 * nbytes // bits * self.scheme.block
        if self.row_nbytes(k) != nbytes:
            raise InputError(f"{self.name}: no row takes {nbytes} bytes")
        return k


def has_zeros(scheme: Scheme) -> bool:
    return any(level.role == "zero" for level in scheme.levels)


def centre(scheme: Scheme) -> int:
    """What is added to a code to store it unsigned: MatMulNBits' zero point where none is given."""
    return 0 if has_zeros(scheme) else 1 << (scheme.bits - 1)


def to_bits(codes: Array, bits: int) -> Bytes:
    """u8[N,m] of 4 or 8 bits -> u8[N, ceil(m * bits / 8)]; a row begins at a byte."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: Bytes = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    return packed


def from_bits(packed: Bytes, bits: int, m: int) -> Bytes:
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], -1).reshape(len(packed), -1)[:, :m]


def _pack(name: str, q: QTensor) -> Bytes:
    """QTensor -> u8[N, row nbytes]."""
    layout = LAYOUTS[name]
    if (why := layout.accepts(q.scheme)) is not None:
        raise UnsupportedError(why, hint=f"pack as onnx.{q.scheme.name}")
    stored = (q.codes.astype(np.int16) + centre(q.scheme)).astype(np.uint8)
    scales, *zeros = q.levels
    parts = [to_bits(stored, q.scheme.bits), np.ascontiguousarray(scales, "<f4").view(np.uint8)]
    return np.concatenate([*parts, *(to_bits(z.astype(np.uint8), q.scheme.bits) for z in zeros)], axis=1)


def _unpack(name: str, packed: Bytes) -> QTensor:
    layout = LAYOUTS[name]
    scheme, k = layout.scheme, layout.row_weights(packed.shape[1])
    cuts = np.cumsum(layout.planes(k))[:-1]
    codes, scales, *zeros = np.split(packed, cuts, axis=1)
    stored = from_bits(codes, scheme.bits, k).astype(np.int16) - centre(scheme)
    levels = [np.ascontiguousarray(scales).view("<f4").astype(np.float32)]
    levels += [from_bits(z, scheme.bits, k // scheme.block).astype(np.float32) for z in zeros]
    return QTensor(scheme, stored.astype(np.int8), tuple(levels))


def _layout(scheme: Scheme) -> MatMulNBits:
    name = f"onnx.{scheme.name}"
    block = np.dtype([("codes", "u1", scheme.block * scheme.bits // 8), ("scale", "<f4")])
    return MatMulNBits(name, scheme, block, partial(_pack, name), partial(_unpack, name))


LAYOUTS: dict[str, MatMulNBits] = {layout.name: layout for layout in map(_layout, AFFINE.values())}
