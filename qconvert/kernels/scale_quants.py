"""ggml's super-blocks of 256 weights with sixteen scales and no minima: q3_k, q6_k.

One sub-block of 16 per lane searches its scale; then each super-block rounds its scales, and the codes follow from the
rounded ones. Kernels take x f32[n * 256] in rows of k, importance (see `weigh`) or None, and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, make_qx_quants, make_q3_quants and quantize_row_q{3,6}_K_ref and _impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mean_squares, peak_of, transpose, weigh
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
    to_int,
)

F = np.float32
U8 = np.uint8
TINY = F(1e-15)  # ggml takes smaller values for zero



def _ranges(top: int) -> np.ndarray:
    """The code ranges that the search tries, computed in float32 as C does."""
    ranges: np.ndarray = -(F(top) + F(0.1) * np.array([i for i in range(-9, 10) if i], F))
    return ranges


RANGES_4, RANGES_8, RANGES_16, RANGES_32 = _ranges(4), _ranges(8), _ranges(16), _ranges(32)


@njit(forceinline=True)
def peaks(lanes, X, size):  # type: ignore[no-untyped-def]
    """Of each lane's `size` values the first with the greatest magnitude, and that magnitude."""
    n = count(lanes)
    peak = magnitude = splat(lanes, F(0))
    for i in range(size):
        x = load(lanes, X, i * n)
        larger = absolute(x) > magnitude
        magnitude, peak = select(larger, absolute(x), magnitude), select(larger, x, peak)
    return peak, magnitude


WITHIN = 12  # the first ranges give no code below the least, so there is nothing to clamp (an even number: they go in pairs)


@njit(forceinline=True)
def _sums(lanes, X, W, WX, size, first, second, low, high):  # type: ignore[no-untyped-def]
    """Sums of w * x * code and of w * code * code over each lane's values, for two factors at once."""
    n = count(lanes)
    lx1 = l21 = lx2 = l22 = splat(lanes, F(0))
    for i in range(size):
        x, w, wx = load(lanes, X, i * n), load(lanes, W, i * n), load(lanes, WX, i * n)
        code1, code2 = minimum(rounded(first * x), F(high)), minimum(rounded(second * x), F(high))
        if low is not None:
            code1, code2 = maximum(code1, F(low)), maximum(code2, F(low))
        lx1, lx2 = lx1 + wx * code1, lx2 + wx * code2
        l21, l22 = l21 + w * code1 * code1, l22 + w * code2 * code2
    return lx1, l21, lx2, l22


@njit(forceinline=True)
def _better(sum_lx, sum_l2, factor, best_factor, scale, best):  # type: ignore[no-untyped-def]
    """Where a factor's fit beats the best so far, take it."""
    better = (sum_l2 > F(0)) & (sum_lx * sum_lx > best * sum_l2)
    best_factor = select(better, factor, best_factor)
    scale = select(better, sum_lx / sum_l2, scale)
    return best_factor, scale, select(better, scale * sum_lx, best)


@njit(forceinline=True)
def fit_scale(lanes, X, W, WX, size, top, ranges, fit, at, stride):  # type: ignore[no-untyped-def]
    """Scale of each lane's block by weighted least squares over candidate roundings to -top..top - 1: make_qx_quants.

    X, W f32[size * n]; WX is scratch of that shape. Written to `fit` from `at`, `stride` apart: the scale, the factor
    whose codes won, and what the stored code of a zero is (0 in a block that counts as all zero, else top).
    """
    n = count(lanes)
    zero = splat(lanes, F(0))
    peak, magnitude = peaks(lanes, X, size)
    best_factor = F(-top) / peak
    sum_lx = sum_l2 = zero
    for i in range(size):
        x, w = load(lanes, X, i * n), load(lanes, W, i * n)
        wx = w * x
        store(WX, i * n, wx)
        code = nearest(best_factor * x, -top, top - 1)
        sum_lx = sum_lx + wx * code
        sum_l2 = sum_l2 + w * code * code
    scale = select(sum_l2 != F(0), sum_lx / sum_l2, zero)
    best = scale * sum_lx
    for step in range(0, ranges.size, 2):
        first, second = ranges[step] / peak, ranges[step + 1] / peak
        if step < WITHIN:
            lx1, l21, lx2, l22 = _sums(lanes, X, W, WX, size, first, second, None, top - 1)
        else:
            lx1, l21, lx2, l22 = _sums(lanes, X, W, WX, size, first, second, -top, top - 1)
        best_factor, scale, best = _better(lx1, l21, first, best_factor, scale, best)
        best_factor, scale, best = _better(lx2, l22, second, best_factor, scale, best)
    none = magnitude < TINY
    store(fit, at, select(none, zero, scale))
    store(fit, at + stride, select(none, zero, best_factor))
    store(fit, at + 2 * stride, select(none, zero, splat(lanes, F(top))))


@njit(forceinline=True)
def _square_weights(lanes, X, W):  # type: ignore[no-untyped-def]
    """W = x * x of each lane's 16 values."""
    n = count(lanes)
    for i in range(16):
        x = load(lanes, X, i * n)
        store(W, i * n, x * x)


@njit(forceinline=True)
def _codes_6(row, x, at, d, factor, offset, L):  # type: ignore[no-untyped-def]
    """Stored codes of one sub-block into L u8[256]: by the rounded scale d; where d is 0, those of the search."""
    for i in range(0, 16, count(row)):
        v = load(row, x, at + i)
        scaled = v / d if d != F(0) else factor * v
        store(L, at % 256 + i, minimum(maximum(nearest_any(scaled), -32), 31) + (32 if d != F(0) else np.int32(offset)))


@njit(cache=True, nogil=True, error_model="numpy")
def q6_k(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    stride = max(n, 16)
    X, W, WX = scratch(16 * n), scratch(16 * n), scratch(16 * n)
    fit, scales, L = scratch(3 * stride), scratch(16), np.empty(256, U8)
    for first in range(0, x.size // 16, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 16, X)
            if importance is None:
                _square_weights(lanes, X, W)
            else:
                transpose(lanes, importance, (first + lane) % (k // 16), 16, W)
            fit_scale(lanes, X, W, WX, 16, 32, RANGES_32, fit, lane, stride)
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
    peak, size = peaks(lanes, X, 16)
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
def q3_k(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, subs = count(lanes), x.size // 16
    stride = 16 * n
    X, W, WX, C, S = scratch(16 * n), scratch(16 * n), scratch(16 * n), scratch(16 * stride), scratch(n)
    fit, sums, steps = scratch(3 * stride), scratch(stride), scratch(3 * n)
    scales, L = scratch(16), np.empty(256, U8)
    means = None if importance is None else mean_squares(lanes, x, 256, 2, 256)
    for first in range(0, subs, stride):
        for lane in range(0, min(stride, subs - first), n):
            transpose(lanes, x, first + lane, 16, X)
            if importance is None:
                _fit_3(lanes, X, C[16 * lane :], fit, lane)
            else:
                store(sums, lane, weigh(lanes, X, first + lane, 16, k, importance, means, 256, S, W))
                fit_scale(lanes, X, W, WX, 16, 4, RANGES_4, fit, lane, stride)
                _keep_codes(lanes, X, 16, 4, fit, lane, stride, C[16 * lane :])
        if importance is not None:
            _round_by_weight(lanes, fit, sums, X, W, WX, steps)
        for lane in range(min(n, (subs - first) // 16)):
            step = _round_to_peak(row, fit, lane * 16) if importance is None else steps[lane]
            block = first // 16 + lane
            _finish_3(lanes, row, x, out, block * 110, block, step, fit, C, lane * 16, scales, L)


@njit(forceinline=True)
def _keep_codes(lanes, X, size, top, fit, at, stride, C):  # type: ignore[no-untyped-def]
    """The stored codes that fit_scale chose, to C of the shape of X."""
    n = count(lanes)
    factor, offset = load(lanes, fit, at + stride), load(lanes, fit, at + 2 * stride)
    for i in range(size):
        store(C, i * n, minimum(maximum(rounded(factor * load(lanes, X, i * n)), F(-top)), F(top - 1)) + offset)


@njit(forceinline=True)
def _round_to_peak(row, fit, at):  # type: ignore[no-untyped-def]
    """Sixteen scales as stored codes 0..63, in place, the greatest as 0 (-32); the step."""
    greatest = peak_of(row, fit, at, 16)
    to_scale = F(-32) / greatest if greatest != F(0) else F(0)
    for j in range(0, 16, count(row)):
        ls = minimum(maximum(nearest_any(load(row, fit, at + j) * to_scale), -32), 31)
        store(fit, at + j, to_float(ls) + (F(32) if greatest != F(0) else F(0)))
    return F(1) / to_scale if greatest != F(0) else F(0)


@njit(forceinline=True)
def _round_by_weight(lanes, fit, sums, X, W, WX, steps):  # type: ignore[no-untyped-def]
    """The scales of n super-blocks as stored codes, in place, and their steps; sub-blocks weigh `sums`."""
    n = count(lanes)
    for j in range(16):
        for lane in range(n):
            X[j * n + lane], W[j * n + lane] = fit[lane * 16 + j], sums[lane * 16 + j]
    fit_scale(lanes, X, W, WX, 16, 32, RANGES_32, steps, 0, n)
    _keep_codes(lanes, X, 16, 32, steps, 0, n, WX)
    for j in range(16):
        for lane in range(n):
            fit[lane * 16 + j] = WX[j * n + lane]


@njit(forceinline=True)
def _finish_3(lanes, row, x, out, o, block, step, fit, C, at, scales, L):  # type: ignore[no-untyped-def]
    """Write the 110 bytes of one super-block; scales and L are scratch."""
    n = count(lanes)
    d = put_half(row, out, o + 108, step)
    for j in range(0, 16, count(row)):
        ls = to_int(load(row, fit, at + j))
        store(L, j, ls)
        store(scales, j, to_float(ls - 32) * d)
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
