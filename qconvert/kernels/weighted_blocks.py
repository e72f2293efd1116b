"""q4_0, q4_1, q5_0 and q5_1 with importance: a search where ggml without an importance matrix only rounds.

One block of 32 per lane searches its scale (and minimum); weights are importance * sqrt(mean square of the row + x * x).
Kernels take x f32[n * 32] in rows of k, importance (see `weigh`), and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, quantize_row_q{4,5}_{0,1}_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mask_bits, mean_squares, transpose, weigh
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import count, load, maximum, minimum, nearest_any, scratch, store
from qconvert.kernels.min_quants import IMPORTANT_4, IMPORTANT_5, fit_line
from qconvert.kernels.scale_quants import RANGES_8, RANGES_16, fit_scale

U = np.uint64


@njit(forceinline=True)
def _put_codes(row, out, o, L, five):  # type: ignore[no-untyped-def]
    """32 codes of L u8[32]: their fifth bits in 4 bytes if there are five, then code i low and code i + 16 high in byte i."""
    fifth, at = U(0), o + 4 if five else o
    for i in range(0, 16, count(row)):
        low, high = load(row, L, i), load(row, L, 16 + i)
        fifth |= mask_bits(low > 15) << U(i) | mask_bits(high > 15) << U(16 + i)
        store(out, at + i, (low & 15) | high << 4)
    if five:
        for i in range(4):
            out[o + i] = np.uint8((fifth >> U(8 * i)) & U(255))


@njit(forceinline=True)
def _symmetric(lanes, row, x, k, importance, out, top, ranges, nbytes):  # type: ignore[no-untyped-def]
    n, blocks = count(lanes), x.size // 32
    X, W, WX, S, fit = scratch(32 * n), scratch(32 * n), scratch(32 * n), scratch(n), scratch(3 * n)
    L = np.empty(32, np.uint8)
    means = mean_squares(lanes, x, k, 1, k)
    for first in range(0, blocks, n):
        transpose(lanes, x, first, 32, X)
        weigh(lanes, X, first, 32, k, importance, means, k, S, W)
        fit_scale(lanes, X, W, WX, 32, top, ranges, fit, 0, n)
        for lane in range(min(n, blocks - first)):
            o, factor, offset = (first + lane) * nbytes, fit[n + lane], np.int32(fit[2 * n + lane])
            put_half(row, out, o, fit[lane])
            for i in range(0, 32, count(row)):
                code = nearest_any(load(row, x, (first + lane) * 32 + i) * factor)
                store(L, i, minimum(maximum(code, -top), top - 1) + offset)
            _put_codes(row, out, o + 2, L, top == 16)


@njit(forceinline=True)
def _offset(lanes, row, x, k, importance, out, top, steps, nbytes):  # type: ignore[no-untyped-def]
    n, blocks = count(lanes), x.size // 32
    X, W, codes, S, fit = scratch(32 * n), scratch(32 * n), scratch(32 * n), scratch(n), scratch(4 * n)
    L = np.empty(32, np.uint8)
    means = mean_squares(lanes, x, k, 1, k)
    for first in range(0, blocks, n):
        transpose(lanes, x, first, 32, X)
        weigh(lanes, X, first, 32, k, importance, means, k, S, W)
        fit_line(lanes, X, W, codes, 32, top, steps, True, fit, 0, n)
        for lane in range(min(n, blocks - first)):
            o, factor, low = (first + lane) * nbytes, fit[2 * n + lane], fit[3 * n + lane]
            put_half(row, out, o, fit[lane])
            put_half(row, out, o + 2, fit[n + lane])
            for i in range(0, 32, count(row)):
                code = nearest_any(factor * (load(row, x, (first + lane) * 32 + i) - low))
                store(L, i, minimum(maximum(code, 0), top))
            _put_codes(row, out, o + 4, L, top == 31)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _symmetric(lanes, row, x, k, importance, out, 8, RANGES_8, 18)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _symmetric(lanes, row, x, k, importance, out, 16, RANGES_16, 22)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_1(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _offset(lanes, row, x, k, importance, out, 15, IMPORTANT_4, 20)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_1(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _offset(lanes, row, x, k, importance, out, 31, IMPORTANT_5, 24)
