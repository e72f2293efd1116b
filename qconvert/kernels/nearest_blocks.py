"""ggml's formats that only round: tq1_0, tq2_0 (three levels), q1_0 (two), q2_0 (four) and mxfp4. None heeds importance.

Kernels take x f32[n * block], two arguments that kernels with importance read, and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, quantize_row_{tq1_0,tq2_0,q1_0,q2_0,mxfp4}_ref.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from qconvert.kernels.across import highest, mask_bits
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import absolute, copy_sign, count, load, maximum, scratch, select, splat, store, to_int

F = np.float32
U = np.uint64
U8 = np.uint8
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], F)  # twice the value: scales are halved


@njit(forceinline=True)
def _magnitude(row, x, at, size):  # type: ignore[no-untyped-def]
    """The greatest of size values."""
    largest = splat(row, F(0))
    for i in range(0, size, count(row)):
        largest = maximum(absolute(load(row, x, at + i)), largest)
    return highest(largest)


@njit(forceinline=True)
def _trits(row, x, at, size, overflowed, L):  # type: ignore[no-untyped-def]
    """Codes 0, 1, 2 for -1, 0 and 1 times the greatest magnitude, which is returned; halves go away from zero.

    Where 1 / magnitude overflows, all codes are `overflowed`: what C's conversion of infinity comes to.
    """
    d = _magnitude(row, x, at, size)
    inverse, shift = F(1) / d if d > F(0) else F(0), 1
    if inverse == F(np.inf):
        inverse, shift = F(0), overflowed
    for i in range(0, size, count(row)):
        v = load(row, x, at + i) * inverse
        store(L, i, to_int(v + copy_sign(F(0.49999997), v)) + shift)
    return d


@njit(cache=True, nogil=True, error_model="numpy")
def tq2_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    L = np.empty(256, U8)
    for block in range(x.size // 256):
        o = block * 66
        put_half(row, out, o + 64, _trits(row, x, block * 256, 256, 1, L))
        for half in range(2):
            for i in range(32):
                a, b = L[half * 128 + i] | L[half * 128 + 32 + i] << 2, L[half * 128 + 64 + i] | L[half * 128 + 96 + i] << 2
                out[o + half * 32 + i] = U8(a | b << 4)


@njit(forceinline=True)
def _put_trits(L, at, run, n, out, o):  # type: ignore[no-untyped-def]
    """`run` bytes of n trits each, n at most 5: trit i of byte j is L[at + i * run + j], the first the highest."""
    for j in range(run):
        q = 0
        for i in range(5):
            q = 3 * q + (L[at + i * run + j] if i < n else 0)
        out[o + j] = U8((q * 256 + 242) // 243)


@njit(cache=True, nogil=True, error_model="numpy")
def tq1_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    L = np.empty(256, U8)
    for block in range(x.size // 256):
        o = block * 54
        put_half(row, out, o + 52, _trits(row, x, block * 256, 256, 1, L))
        _put_trits(L, 0, 32, 5, out, o)
        _put_trits(L, 160, 16, 5, out, o + 32)
        _put_trits(L, 240, 4, 4, out, o + 48)


@njit(cache=True, nogil=True, error_model="numpy")
def q2_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    L = np.empty(64, U8)
    for block in range(x.size // 64):
        o = block * 18
        put_half(row, out, o, _trits(row, x, block * 64, 64, 0, L))
        for i in range(16):
            out[o + 2 + i] = U8(L[4 * i] | L[4 * i + 1] << 2 | L[4 * i + 2] << 4 | L[4 * i + 3] << 6)


@njit(cache=True, nogil=True, error_model="numpy")
def q1_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n = count(row)
    for block in range(x.size // 128):
        at, o = block * 128, block * 18
        total = F(0)
        for i in range(128):
            total = total + abs(x[at + i])
        put_half(row, out, o, total / F(128))
        for i in range(0, 128, 64):
            signs = U(0)
            for j in range(0, 64, n):
                signs |= mask_bits(load(row, x, at + i + j) >= F(0)) << U(j)
            for j in range(8):
                out[o + 2 + i // 8 + j] = U8((signs >> U(8 * j)) & U(255))


@njit(cache=True, nogil=True, error_model="numpy")
def mxfp4(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n = count(row)
    L, scale = np.empty(32, U8), scratch(1)
    bits = scale.view(np.int32)
    for block in range(x.size // 32):
        at, o = block * 32, block * 17
        peak = _magnitude(row, x, at, 32)
        # log2f is rounded: just below a power of two it is the next integer
        exponent = (np.int64(np.floor(F(math.log2(np.float64(peak))))) + 125) & 255 if peak > F(0) else 0
        out[o] = U8(exponent)
        bits[0] = 0x200000 << exponent if exponent < 2 else (exponent - 1) << 23
        for i in range(0, 32, n):
            v = load(row, x, at + i)
            size = best = absolute(v)
            code = to_int(splat(row, F(0)))
            for level in range(1, 8):
                error = absolute(E2M1[level] * scale[0] - size)
                better = error < best
                best, code = select(better, error, best), select(better, level, code)
            store(L, i, select((v < F(0)) & (code > 0), code + 8, code))
        for i in range(0, 16, n):
            store(out, o + 1 + i, load(row, L, i) | load(row, L, 16 + i) << 4)
