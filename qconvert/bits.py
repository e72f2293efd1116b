"""Codes of 2, 4 or 8 bits side by side in bytes, the first in the low bits."""

from __future__ import annotations

import numpy as np

from qconvert.scheme import Array, Bytes


def to_bits(codes: Array, bits: int) -> Bytes:
    """u8[N,m] -> u8[N, ceil(m * bits / 8)]; a row begins at a byte."""
    per = 8 // bits
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    packed: Bytes = whole[:, ::per].copy()
    for j in range(1, per):
        packed |= whole[:, j::per] << np.uint8(j * bits)
    return packed


def from_bits(packed: Bytes, bits: int, m: int) -> Bytes:
    """u8[N, ceil(m * bits / 8)] -> u8[N,m]"""
    parts = [packed >> np.uint8(shift) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(packed), -1)[:, :m]
