"""ggml's super-blocks of 256 weights with sixteen scales and no minima: q3_k, q6_k.

One sub-block of 16 per lane searches its scale; then each super-block rounds its scales, and the codes follow from the
rounded ones. Kernels take x f32[n * 256] and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, make_qx_quants, make_q3_quants and quantize_row_q{3,6}_K_ref.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import peak_of, transpose
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import (
    absolute,
    any_lane,
    count,
    load,
    maximum,
    minimum,
    nearest,
    nearest_any,
    rounded,
    scratch,
    select,
    splat,
    store,
    to_float,
)

F = np.float32
U8 = np.uint8
TINY = F(1e-15)  # ggml takes smaller values for zero

# the code ranges that the search for q6_k tries, computed in float32 as C does
RANGES_6 = -(F(32) + F(0.1) * np.array([i for i in range(-9, 10) if i], F))


@njit(forceinline=True)
def _peak(lanes, X):  # type: ignore[no-untyped-def]
    """Of each lane's 16 values the first with the greatest magnitude, and that magnitude."""
    n = count(lanes)
    peak = size = splat(lanes, F(0))
    for i in range(16):
        x = load(lanes, X, i * n)
        larger = absolute(x) > size
        size, peak = select(larger, absolute(x), size), select(larger, x, peak)
    return peak, size


BELOW_33 = 12  # the first ranges give no code below -32, so there is nothing to clamp (an even number: they go in pairs)


@njit(forceinline=True)
def _sums_6(lanes, X, W, WX, first, second, low):  # type: ignore[no-untyped-def]
    """Sums of w * x * code and of w * code * code over each lane's 16 values, for two factors at once."""
    n = count(lanes)
    lx1 = l21 = lx2 = l22 = splat(lanes, F(0))
    for i in range(16):
        x, w, wx = load(lanes, X, i * n), load(lanes, W, i * n), load(lanes, WX, i * n)
        code1, code2 = minimum(rounded(first * x), F(31)), minimum(rounded(second * x), F(31))
        if low is not None:
            code1, code2 = maximum(code1, F(-32)), maximum(code2, F(-32))
        lx1, lx2 = lx1 + wx * code1, lx2 + wx * code2
        l21, l22 = l21 + w * code1 * code1, l22 + w * code2 * code2
    return lx1, l21, lx2, l22


@njit(forceinline=True)
def _better_6(sum_lx, sum_l2, factor, best_factor, scale, best):  # type: ignore[no-untyped-def]
    """Where a factor's fit beats the best so far, take it."""
    better = (sum_l2 > F(0)) & (sum_lx * sum_lx > best * sum_l2)
    best_factor = select(better, factor, best_factor)
    scale = select(better, sum_lx / sum_l2, scale)
    return best_factor, scale, select(better, scale * sum_lx, best)


@njit(forceinline=True)
def _fit_6(lanes, X, W, WX, fit, at, stride):  # type: ignore[no-untyped-def]
    """Scale of each lane's sub-block by least squares, weights x * x, over candidate roundings to -32..31.

    X f32[16 * n]; W and WX are scratch of that shape. Written to `fit` from `at`, `stride` apart: the scale, the factor
    whose codes won, and what the stored code of a zero is (0 in a sub-block that counts as all zero, else 32).
    """
    n = count(lanes)
    zero = splat(lanes, F(0))
    peak, size = _peak(lanes, X)
    best_factor = F(-32) / peak
    sum_lx = sum_l2 = zero
    for i in range(16):
        x = load(lanes, X, i * n)
        w = x * x
        wx = w * x
        store(W, i * n, w)
        store(WX, i * n, wx)
        code = nearest(best_factor * x, -32, 31)
        sum_lx = sum_lx + wx * code
        sum_l2 = sum_l2 + w * code * code
    scale = select(sum_l2 != F(0), sum_lx / sum_l2, zero)
    best = scale * sum_lx
    for step in range(0, RANGES_6.size, 2):
        first, second = RANGES_6[step] / peak, RANGES_6[step + 1] / peak
        if step < BELOW_33:
            lx1, l21, lx2, l22 = _sums_6(lanes, X, W, WX, first, second, None)
        else:
            lx1, l21, lx2, l22 = _sums_6(lanes, X, W, WX, first, second, -32)
        best_factor, scale, best = _better_6(lx1, l21, first, best_factor, scale, best)
        best_factor, scale, best = _better_6(lx2, l22, second, best_factor, scale, best)
    none = size < TINY
    store(fit, at, select(none, zero, scale))
    store(fit, at + stride, select(none, zero, best_factor))
    store(fit, at + 2 * stride, select(none, zero, splat(lanes, F(32))))


@njit(forceinline=True)
def _codes_6(row, x, at, d, factor, offset, L):  # type: ignore[no-untyped-def]
    """Stored codes of one sub-block into L u8[256]: by the rounded scale d; where d is 0, those of the search."""
    for i in range(0, 16, count(row)):
        v = load(row, x, at + i)
        scaled = v / d if d != F(0) else factor * v
        store(L, at % 256 + i, minimum(maximum(nearest_any(scaled), -32), 31) + (32 if d != F(0) else np.int32(offset)))


@njit(cache=True, nogil=True, error_model="numpy")
def q6_k(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    stride = max(n, 16)
    X, W, WX = scratch(16 * n), scratch(16 * n), scratch(16 * n)
    fit, scales, L = scratch(3 * stride), scratch(16), np.empty(256, U8)
    for first in range(0, x.size // 16, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 16, X)
            _fit_6(lanes, X, W, WX, fit, lane, stride)
        for block in range(first // 16, min(first + stride, x.size // 16) // 16):
            _finish_6(row, x, out, block * 210, block, fit, block * 16 - first, stride, scales, L)


@njit(forceinline=True)
def _finish_6(row, x, out, o, block, fit, at, stride, scales, L):  # type: ignore[no-untyped-def]
    """Round the scales of one super-block and write its 210 bytes; scales and L are scratch."""
    greatest = peak_of(row, fit, at, 16)
    if abs(greatest) < TINY:
        out[o : o + 210] = U8(0)
        return
    to_scale = F(-128) / greatest
    d = put_half(row, out, o + 208, F(1) / to_scale)
    for j in range(0, 16, count(row)):
        ls = minimum(nearest_any(load(row, fit, at + j) * to_scale), 127)
        store(out, o + 192 + j, ls)
        store(scales, j, to_float(ls) * d)
    for j in range(16):
        _codes_6(row, x, block * 256 + j * 16, scales[j], fit[at + stride + j], fit[at + 2 * stride + j], L)
    for half in range(2):
        for i in range(0, 32, count(row)):
            a, b = load(row, L, half * 128 + i), load(row, L, half * 128 + 32 + i)
            c, e = load(row, L, half * 128 + 64 + i), load(row, L, half * 128 + 96 + i)
            store(out, o + half * 64 + i, (a & 15) | c << 4)
            store(out, o + half * 64 + 32 + i, (b & 15) | e << 4)
            store(out, o + 128 + half * 32 + i, a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6)


@njit(forceinline=True)
def _fit_3(lanes, X, C, fit, at):  # type: ignore[no-untyped-def]
    """Scale of each lane's sub-block by coordinate descent over its codes -4..3, weights x * x.

    X f32[16 * n]; the codes go to C of that shape, as stored (0..7), the scale to `fit` at `at`.
    A lane that a sweep leaves as it was stays so: all lanes sweep until none changes, at most five times.
    """
    n = count(lanes)
    zero = splat(lanes, F(0))
    peak, size = _peak(lanes, X)
    factor = F(-4) / peak
    sum_lx = sum_l2 = zero
    for i in range(16):
        x = load(lanes, X, i * n)
        code = nearest(factor * x, -4, 3)
        store(C, i * n, code)
        w = x * x
        sum_lx = sum_lx + w * x * code
        sum_l2 = sum_l2 + w * code * code
    for _ in range(5):
        moved = False
        for i in range(16):
            x, code = load(lanes, X, i * n), load(lanes, C, i * n)
            w = x * x
            wx = w * x
            lx, l2 = sum_lx - wx * code, sum_l2 - w * code * code
            new = to_float(minimum(maximum(nearest_any(x * l2 / lx), -4), 3))
            new_lx, new_l2 = lx + wx * new, l2 + w * new * new
            better = (lx > F(0)) & (new != code) & (new_l2 > F(0))
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            if any_lane(better):
                store(C, i * n, select(better, new, code))
                sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
                moved = True
        if not moved:
            break
    none = size < TINY
    store(fit, at, select((sum_l2 > F(0)) & (size >= TINY), sum_lx / sum_l2, zero))
    for i in range(16):
        store(C, i * n, select(none, zero, load(lanes, C, i * n) + F(4)))


@njit(cache=True, nogil=True, error_model="numpy")
def q3_k(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    stride = max(n, 16)
    X, C = scratch(16 * n), scratch(16 * stride)
    fit, scales, L = scratch(stride), scratch(16), np.empty(256, U8)
    for first in range(0, x.size // 16, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 16, X)
            _fit_3(lanes, X, C[16 * lane :], fit, lane)
        for block in range(first // 16, min(first + stride, x.size // 16) // 16):
            _finish_3(lanes, row, x, out, block * 110, block, fit, C, block * 16 - first, scales, L)


@njit(forceinline=True)
def _finish_3(lanes, row, x, out, o, block, fit, C, at, scales, L):  # type: ignore[no-untyped-def]
    """Round the scales of one super-block and write its 110 bytes; scales and L are scratch."""
    n = count(lanes)
    greatest = peak_of(row, fit, at, 16)
    to_scale = F(-32) / greatest if greatest != F(0) else F(0)
    d = put_half(row, out, o + 108, F(1) / to_scale if greatest != F(0) else F(0))
    for j in range(0, 16, count(row)):
        ls = minimum(maximum(nearest_any(load(row, fit, at + j) * to_scale), -32), 31)
        store(L, j, ls + 32 if greatest != F(0) else ls)
        store(scales, j, to_float(ls) * d)
    for j in range(8):
        out[o + 96 + j] = (L[j] & U8(15)) | (L[j + 8] & U8(15)) << U8(4)
    for j in range(4):
        out[o + 104 + j] = L[j] >> 4 | L[j + 4] >> 4 << 2 | L[j + 8] >> 4 << 4 | L[j + 12] >> 4 << 6
    for j in range(16):
        scale = scales[j]
        if scale != F(0):
            for i in range(0, 16, count(row)):
                v = load(row, x, block * 256 + j * 16 + i)
                store(L, j * 16 + i, minimum(maximum(nearest_any(v / scale), -4), 3) + 4)
        else:  # the codes of the search
            start = (at + j) // n * 16 * n + (at + j) % n
            for i in range(16):
                L[j * 16 + i] = U8(C[start + i * n])
    for i in range(0, 32, count(row)):
        high = load(row, L, i) >> 2
        for j in range(1, 8):
            high = high | load(row, L, 32 * j + i) >> 2 << j
        store(out, o + i, high)
    for half in range(2):
        for i in range(0, 32, count(row)):
            low = load(row, L, half * 128 + i) & 3
            for j in range(1, 4):
                low = low | (load(row, L, half * 128 + 32 * j + i) & 3) << 2 * j
            store(out, o + 32 + half * 32 + i, low)
