"""ggml's super-blocks of 256 weights with scales and minima per sub-block: q2_k, q4_k, q5_k.

One sub-block per lane searches scale and minimum; then each super-block rounds its scales and minima, and the codes
follow from the rounded ones. Kernels take x f32[n * 256] in rows of k, importance (see `weigh`) or None, and out
u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, make_qkx2_quants and quantize_row_q{2,4,5}_K_ref; with importance make_qkx3_quants,
make_qp_quants and quantize_row_q{2,4,5}_K_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mean_squares, transpose, weigh
from qconvert.kernels.half import nearest_int, put_half
from qconvert.kernels.lanes import (
    absolute,
    any_lane,
    count,
    load,
    maximum,
    minimum,
    nearest,
    nearest_any,
    scratch,
    select,
    splat,
    square_root,
    store,
    to_float,
    to_int,
)

F = np.float32
U8 = np.uint8


def _steps(top: int, low: float, n: int) -> np.ndarray:
    """The code ranges that the search tries, computed in float32 as C does: low + 0.1 * i + top."""
    i = np.arange(n, dtype=F)
    steps: np.ndarray = F(low) + F(0.1) * i + F(top)
    return steps


STEPS_2 = _steps(3, -0.5, 16)
STEPS_4 = _steps(15, -1.0, 21)
STEPS_5 = _steps(31, -0.5, 16)


def important_steps(top: int) -> np.ndarray:
    """Those that it tries with an importance matrix."""
    steps: np.ndarray = F(-0.9) + F(0.05) * np.arange(37, dtype=F) + F(top)
    return steps


IMPORTANT_2, IMPORTANT_4, IMPORTANT_5 = important_steps(3), important_steps(15), important_steps(31)
TENTHS = F(0.1) * np.array([i for i in range(-4, 5) if i], F)
TINY = F(1e-15)  # ggml takes smaller values for zero


@njit(forceinline=True)
def fit_line(lanes, X, W, L, size, top, steps, squared, fit, at, stride):  # type: ignore[no-untyped-def]
    """Scale and minimum of each lane's sub-block by weighted least squares over candidate roundings.

    X, W f32[size * n] hold weight i of lane j at i * n + j; L is scratch of that shape. Written to `fit` from `at`,
    `stride` apart: scale, minimum, and the factor and offset whose codes won. error: squared or absolute.
    """
    n = count(lanes)
    low = high = load(lanes, X, 0)
    sum_w = load(lanes, W, 0)
    sum_x = sum_w * low
    for i in range(1, size):
        x, w = load(lanes, X, i * n), load(lanes, W, i * n)
        low, high = minimum(x, low), maximum(x, high)
        sum_w = sum_w + w
        sum_x = sum_x + w * x
    zero = splat(lanes, F(0))
    low = select(low > F(0), zero, low)
    span = high - low
    best_min = code_min = low
    # an infinite factor, where the span is zero or tiny, gives codes of 0 in ggml: so does the factor 0
    factor = F(top) / span
    scale = F(1) / factor
    best_factor = select(factor == F(np.inf), zero, factor)
    best_error = zero
    for i in range(size):
        x = load(lanes, X, i * n)
        code = nearest(best_factor * (x - low), 0, top)
        difference = scale * code + low - x
        best_error = best_error + load(lanes, W, i * n) * (difference * difference if squared else absolute(difference))
    for step in range(steps.size):
        factor = steps[step] / (high - best_min)
        factor = select(factor == F(np.inf), zero, factor)
        sum_l = sum_l2 = sum_xl = zero
        for i in range(size):
            x, w = load(lanes, X, i * n), load(lanes, W, i * n)
            code = nearest(factor * (x - best_min), 0, top)
            store(L, i * n, code)
            weighted = w * code
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * code
            sum_xl = sum_xl + weighted * x
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        clipped = new_min > F(0)
        new_scale = select(clipped, sum_xl / sum_l2, new_scale)
        new_min = select(clipped, zero, new_min)
        error = zero
        for i in range(size):
            difference = new_scale * load(lanes, L, i * n) + new_min - load(lanes, X, i * n)
            error = error + load(lanes, W, i * n) * (difference * difference if squared else absolute(difference))
        better = (determinant > F(0)) & (error < best_error)
        best_error = select(better, error, best_error)
        best_factor = select(better, factor, best_factor)
        code_min = select(better, best_min, code_min)
        scale = select(better, new_scale, scale)
        best_min = select(better, new_min, best_min)
    store(fit, at, scale)
    store(fit, at + stride, best_min)
    store(fit, at + 2 * stride, best_factor)
    store(fit, at + 3 * stride, code_min)


@njit(forceinline=True)
def _codes(row, x, at, size, d, dm, factor, low, top, L):  # type: ignore[no-untyped-def]
    """Codes of one sub-block into L u8[256]: by the rounded scale d and minimum dm; where d is 0, those of the search."""
    for i in range(0, size, count(row)):
        v = load(row, x, at + i)
        scaled = (v + dm) / d if d != F(0) else factor * (v - low)
        store(L, at % 256 + i, minimum(maximum(nearest_any(scaled), 0), top))


@njit(forceinline=True)
def _round_to_greatest(fit, at, stride, n, top):  # type: ignore[no-untyped-def]
    """Scales and minima of n sub-blocks as codes, in place, the greatest of each as `top`; the two steps."""
    scale = low = F(0)
    for j in range(at, at + n):
        scale = fit[j] if fit[j] > scale else scale
        low = -fit[j + stride] if -fit[j + stride] > low else low
    to_scale = F(top) / scale if scale > F(0) else F(0)
    to_min = F(top) / low if low > F(0) else F(0)
    for j in range(at, at + n):
        # C keeps the low 8 bits
        fit[j] = F(nearest_int(to_scale * fit[j]) & 255)
        fit[j + stride] = F(nearest_int(to_min * -fit[j + stride]) & 255)
    return scale / F(top), low / F(top)


@njit(forceinline=True)
def _fit_codes(lanes, X, W, size, top):  # type: ignore[no-untyped-def]
    """Scale of each lane's `size` values by weighted coordinate descent over codes 0..top, which replace X: make_qp_quants.

    A code of less than 0 is kept as C keeps it in a byte.
    """
    n = count(lanes)
    peak = zero = splat(lanes, F(0))
    for i in range(size):
        peak = maximum(peak, load(lanes, X, i * n))
    best_factor = F(top) / peak
    scale, best_error = F(1) / best_factor, zero
    for i in range(size):
        x = load(lanes, X, i * n)
        difference = x - scale * to_float(nearest_any(best_factor * x) & 255)
        best_error = best_error + load(lanes, W, i * n) * difference * difference
    for step in range(TENTHS.size):
        factor = (TENTHS[step] + F(top)) / peak
        scale, error = F(1) / factor, zero
        for i in range(size):
            x = load(lanes, X, i * n)
            difference = x - scale * to_float(minimum(nearest_any(factor * x), top))
            error = error + load(lanes, W, i * n) * difference * difference
        better = error < best_error
        best_error, best_factor = select(better, error, best_error), select(better, factor, best_factor)
    C = scratch(size * n)
    sum_lx = sum_l2 = zero
    for i in range(size):
        x, w = load(lanes, X, i * n), load(lanes, W, i * n)
        integer = minimum(nearest_any(best_factor * x), top)
        code = to_float(integer)
        store(C, i * n, to_float(integer & 255))
        sum_lx = sum_lx + w * x * code
        sum_l2 = sum_l2 + w * code * code
    for _ in range(5):
        moved = False
        for i in range(size):
            x, w, code = load(lanes, X, i * n), load(lanes, W, i * n), load(lanes, C, i * n)
            lx, l2 = sum_lx - w * x * code, sum_l2 - w * code * code
            integer = minimum(nearest_any(x * l2 / lx), top)
            new = to_float(integer)
            new_lx, new_l2 = lx + w * x * new, l2 + w * new * new
            better = (lx > F(0)) & (l2 > F(0)) & (new != code)
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            if any_lane(better):
                store(C, i * n, select(better, to_float(integer & 255), code))
                sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
                moved = True
        if not moved:
            break
    none = peak < TINY
    for i in range(size):
        store(X, i * n, select(none, zero, load(lanes, C, i * n)))
    return select(none | (sum_l2 <= F(0)), zero, sum_lx / sum_l2)


@njit(forceinline=True)
def _round_by_weight(lanes, fit, sums, at, sign, size, top, X, W, steps):  # type: ignore[no-untyped-def]
    """The scales or minima (sign -1) of n super-blocks as codes, in place, and their n steps. Sub-blocks weigh `sums`."""
    n = count(lanes)
    for j in range(size):
        for lane in range(n):
            X[j * n + lane] = sign * fit[at + lane * size + j]
            W[j * n + lane] = sums[lane * size + j]
    store(steps, 0, _fit_codes(lanes, X, W, size, top))
    for j in range(size):
        for lane in range(n):
            fit[at + lane * size + j] = X[j * n + lane]


@njit(forceinline=True)
def _finish_six_bits(row, x, out, o, block, fit, at, stride, d, dmin, most, top, L):  # type: ignore[no-untyped-def]
    """d, dmin and twelve bytes of 6-bit scales and minima of one super-block to out[o : o + 16]; its codes to L."""
    d, dmin = put_half(row, out, o, d), put_half(row, out, o + 2, dmin)
    for j in range(8):
        ls, lm = min(int(fit[at + j]), most), min(int(fit[at + stride + j]), most)
        if j < 4:
            out[o + 4 + j], out[o + 8 + j] = U8(ls), U8(lm)
        else:
            out[o + 8 + j] = U8((ls & 15) | (lm & 15) << 4)
            out[o + j] |= U8(ls >> 4 << 6)
            out[o + 4 + j] |= U8(lm >> 4 << 6)
    for j in range(8):
        if j < 4:
            ls, lm = out[o + 4 + j] & 63, out[o + 8 + j] & 63
        else:
            ls, lm = out[o + 8 + j] & 15 | out[o + j] >> 6 << 4, out[o + 8 + j] >> 4 | out[o + 4 + j] >> 6 << 4
        factor, low = fit[at + 2 * stride + j], fit[at + 3 * stride + j]
        _codes(row, x, block * 256 + j * 32, 32, d * F(ls), dmin * F(lm), factor, low, top, L)


@njit(forceinline=True)
def _plain_weights(lanes, X, W, size):  # type: ignore[no-untyped-def]
    """W = magnitude, and of 32 values + their root mean square."""
    n = count(lanes)
    total = splat(lanes, F(0))
    for i in range(size):
        x = load(lanes, X, i * n)
        total = total + x * x
    mean = square_root(total / F(32))
    for i in range(size):
        size_of_x = absolute(load(lanes, X, i * n))
        store(W, i * n, size_of_x if size == 16 else mean + size_of_x)


@njit(forceinline=True)
def _put_nibbles(row, out, o, L):  # type: ignore[no-untyped-def]
    """Codes 0..255 to 128 bytes: byte i of each 32 holds code i low and code i + 32 high, of 64."""
    n = count(row)
    for chunk in range(4):
        for i in range(0, 32, n):
            low, high = load(row, L, chunk * 64 + i), load(row, L, chunk * 64 + 32 + i)
            store(out, o + chunk * 32 + i, (low & 15) | high << 4)


@njit(forceinline=True)
def _super_blocks(lanes, row, x, k, importance, out, size, top, coarse, steps, important, squared, finish, nbytes):  # type: ignore[no-untyped-def]
    """All super-blocks of x: fit their sub-blocks of `size`, round scales and minima to 0..coarse, `finish` each."""
    n, subs, span = count(lanes), x.size // size, 256 // size
    stride = n * span
    X, W, codes, S = scratch(size * n), scratch(size * n), scratch(size * n), scratch(n)
    fit, sums, D, M = scratch(4 * stride), scratch(stride), scratch(n), scratch(n)
    scales, L = scratch(32), np.empty(256, U8)
    means = None if importance is None else mean_squares(lanes, x, 256, 1 if size == 16 else 2, 256)
    for first in range(0, subs, stride):
        for lane in range(0, min(stride, subs - first), n):
            transpose(lanes, x, first + lane, size, X)
            if importance is None:
                _plain_weights(lanes, X, W, size)
                fit_line(lanes, X, W, codes, size, top, steps, squared, fit, lane, stride)
            else:
                store(sums, lane, weigh(lanes, X, first + lane, size, k, importance, means, 256, S, W))
                fit_line(lanes, X, W, codes, size, top, important, True, fit, lane, stride)
        if importance is not None:
            _round_by_weight(lanes, fit, sums, 0, F(1), span, coarse, X, W, D)
            _round_by_weight(lanes, fit, sums, stride, F(-1), span, coarse, X, W, M)
        for lane in range(min(n, (subs - first) // span)):
            block = first // span + lane
            if importance is None:
                d, dmin = _round_to_greatest(fit, lane * span, stride, span, coarse)
            else:
                d, dmin = D[lane], M[lane]
            finish(row, x, out, block * nbytes, block, fit, lane * span, stride, d, dmin, scales, L)


@njit(forceinline=True)
def _finish_4(row, x, out, o, block, fit, at, stride, d, dmin, scales, L):  # type: ignore[no-untyped-def]
    _finish_six_bits(row, x, out, o, block, fit, at, stride, d, dmin, 255, 15, L)
    _put_nibbles(row, out, o + 16, L)


@njit(forceinline=True)
def _finish_5(row, x, out, o, block, fit, at, stride, d, dmin, scales, L):  # type: ignore[no-untyped-def]
    _finish_six_bits(row, x, out, o, block, fit, at, stride, d, dmin, 63, 31, L)
    for i in range(0, 32, count(row)):  # bit j of byte i is the fifth bit of code 32 * j + i
        fifth = load(row, L, i) >> 4
        for j in range(1, 8):
            fifth = fifth | load(row, L, 32 * j + i) >> 4 << j
        store(out, o + 16 + i, fifth)
    _put_nibbles(row, out, o + 48, L)


@njit(forceinline=True)
def _finish_2(row, x, out, o, block, fit, at, stride, d, dmin, scales, L):  # type: ignore[no-untyped-def]
    """Sixteen bytes of 4-bit scales and minima, the codes, d and dmin."""
    d, dmin = put_half(row, out, o + 80, d), put_half(row, out, o + 82, dmin)
    for j in range(0, 16, count(row)):
        ls, lm = to_int(load(row, fit, at + j)), to_int(load(row, fit, at + stride + j))
        store(out, o + j, ls | lm << 4)
        store(scales, j, to_float(ls & 15) * d)
        store(scales, 16 + j, to_float((ls >> 4 | lm) & 15) * dmin)
    for j in range(16):
        factor, low = fit[at + 2 * stride + j], fit[at + 3 * stride + j]
        _codes(row, x, block * 256 + j * 16, 16, scales[j], scales[16 + j], factor, low, 3, L)
    for half in range(2):
        for i in range(0, 32, count(row)):
            packed = load(row, L, half * 128 + i)
            for j in range(1, 4):
                packed = packed | load(row, L, half * 128 + 32 * j + i) << 2 * j
            store(out, o + 16 + half * 32 + i, packed)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_k(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, 32, 15, 63, STEPS_4, IMPORTANT_4, True, _finish_4, 144)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_k(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, 32, 31, 63, STEPS_5, IMPORTANT_5, True, _finish_5, 176)


@njit(cache=True, nogil=True, error_model="numpy")
def q2_k(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, 16, 3, 15, STEPS_2, IMPORTANT_2, False, _finish_2, 84)
