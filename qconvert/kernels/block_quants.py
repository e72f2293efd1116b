"""ggml's formats of 32 weights with one f16 scale (and minimum): q8_0, q4_0, q4_1, q5_0, q5_1.

A block is a row of vectors. Each kernel takes x f32[n * 32] and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, quantize_row_*_ref.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import highest, lowest, mask_bits, peak_of
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import absolute, bits_of, copy_sign, count, load, maximum, minimum, store, to_int

F = np.float32
U = np.uint64


@njit(forceinline=True)
def _extremes(lanes, x, at):  # type: ignore[no-untyped-def]
    """Least and greatest of the 32 values; a zero among them may have either sign."""
    n = count(lanes)
    low = high = load(lanes, x, at)
    for i in range(n, 32, n):
        v = load(lanes, x, at + i)
        low, high = minimum(v, low), maximum(v, high)
    return lowest(low), highest(high)


@njit(forceinline=True)
def _first_zero(lanes, x, at):  # type: ignore[no-untyped-def]
    """The first of the 32 values that is zero, with its sign."""
    n = count(lanes)
    zeros = negatives = U(0)
    for i in range(0, 32, n):
        v = load(lanes, x, at + i)
        zeros |= mask_bits(v == F(0)) << U(i)
        negatives |= mask_bits(bits_of(v) < 0) << U(i)
    return F(-0.0) if zeros & (U(0) - zeros) & negatives else F(0)


@njit(forceinline=True)
def _inverse(d, bias):  # type: ignore[no-untyped-def]
    """1 / d and the bias that rounds. 1 / d overflows for subnormal d: C's conversion then makes every code 0."""
    inverse = F(1) / d if d != F(0) else F(0)
    return (F(0), F(0)) if abs(inverse) == F(np.inf) else (inverse, bias)


@njit(cache=True, nogil=True, error_model="numpy")
def q8_0(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(row)
    for b in range(x.size // 32):
        at, o = b * 32, b * 34
        size = absolute(load(row, x, at))
        for i in range(n, 32, n):
            size = maximum(absolute(load(row, x, at + i)), size)
        d = highest(size) / F(127)
        inverse, _ = _inverse(d, F(0))
        put_half(row, out, o, d)
        for i in range(0, 32, n):
            v = load(row, x, at + i) * inverse
            # halves go away from zero: 0.5 minus an ulp lets every smaller fraction stay below the next integer
            store(out, o + 2 + i, to_int(v + copy_sign(F(0.49999997), v)))


@njit(cache=True, nogil=True, error_model="numpy")
def q4_0(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(row)
    for b in range(x.size // 32):
        at, o = b * 32, b * 18
        d = peak_of(row, x, at, 32) / F(-8)  # the peak maps to -8, the only code without a mirror
        inverse, bias = _inverse(d, F(8.5))
        put_half(row, out, o, d)
        for i in range(0, 16, n):
            low = minimum(to_int(load(row, x, at + i) * inverse + bias), 15)
            high = minimum(to_int(load(row, x, at + 16 + i) * inverse + bias), 15)
            store(out, o + 2 + i, low | high << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_1(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(row)
    for b in range(x.size // 32):
        at, o = b * 32, b * 20
        least, greatest = _extremes(row, x, at)
        if least == F(0):  # the sign is stored, and a scan keeps the first
            least = _first_zero(row, x, at)
            greatest = least if greatest == F(0) else greatest
        d = (greatest - least) / F(15)
        inverse, bias = _inverse(d, F(0.5))
        put_half(row, out, o, d)
        put_half(row, out, o + 2, least)
        for i in range(0, 16, n):
            low = minimum(to_int((load(row, x, at + i) - least) * inverse + bias), 15)
            high = minimum(to_int((load(row, x, at + 16 + i) - least) * inverse + bias), 15)
            store(out, o + 4 + i, low | high << 4)


@njit(forceinline=True)
def _put_five_bits(row, out, at, codes):  # type: ignore[no-untyped-def]
    """32 codes below 32 (i32) as the fifth bits, 4 bytes, then 16 bytes of nibbles."""
    n = count(row)
    fifth = U(0)
    for i in range(0, 16, n):
        low, high = load(row, codes, i), load(row, codes, 16 + i)
        fifth |= mask_bits(low > 15) << U(i) | mask_bits(high > 15) << U(16 + i)
        store(out, at + 4 + i, (low & 15) | (high & 15) << 4)
    for i in range(4):
        out[at + i] = np.uint8((fifth >> U(8 * i)) & U(255))


@njit(cache=True, nogil=True, error_model="numpy")
def q5_0(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(row)
    codes = np.empty(32, np.int32)
    for b in range(x.size // 32):
        at, o = b * 32, b * 22
        d = peak_of(row, x, at, 32) / F(-16)
        inverse, bias = _inverse(d, F(16.5))
        put_half(row, out, o, d)
        for i in range(0, 32, n):
            store(codes, i, minimum(to_int(load(row, x, at + i) * inverse + bias), 31))
        _put_five_bits(row, out, o + 2, codes)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_1(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(row)
    codes = np.empty(32, np.int32)
    for b in range(x.size // 32):
        at, o = b * 32, b * 24
        least, greatest = _extremes(row, x, at)
        if least == F(0):  # the sign is stored, and a scan keeps the first
            least = _first_zero(row, x, at)
            greatest = least if greatest == F(0) else greatest
        d = (greatest - least) / F(31)
        inverse, bias = _inverse(d, F(0.5))
        put_half(row, out, o, d)
        put_half(row, out, o + 2, least)
        for i in range(0, 32, n):
            store(codes, i, to_int((load(row, x, at + i) - least) * inverse + bias))
        _put_five_bits(row, out, o + 4, codes)
