"""Codes of 1 to 8 bits side by side in bytes, the first in the low bits; of 3, 5, 6 and 7 bits some lie in two bytes."""

from __future__ import annotations

import numpy as np

from qconvert.scheme import Array, Bytes


def to_bits(codes: Array, bits: int) -> Bytes:
    """u8[N,m] -> u8[N, ceil(m * bits / 8)]; a row begins at a byte."""
    if 8 % bits:
        single = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, count=bits, bitorder="little")
        return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")
    per = 8 // bits
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    packed: Bytes = whole[:, ::per].copy()
    for j in range(1, per):
        packed |= whole[:, j::per] << np.uint8(j * bits)
    return packed


def from_bits(packed: Bytes, bits: int, m: int) -> Bytes:
    """u8[N, ceil(m * bits / 8)] -> u8[N,m]"""
    if 8 % bits:
        single = np.unpackbits(packed, axis=1, count=m * bits, bitorder="little").reshape(len(packed), m, bits)
        return np.packbits(single, axis=-1, bitorder="little")[..., 0]
    parts = [packed >> np.uint8(shift) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(packed), -1)[:, :m]
