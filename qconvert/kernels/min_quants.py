"""ggml's super-blocks of 256 weights with scales and minima per sub-block: q2_k, q4_k, q5_k.

One sub-block per lane searches scale and minimum; then each super-block rounds its scales and minima, and the codes
follow from the rounded ones. Kernels take x f32[n * 256], out u8[n * block nbytes] and nothing else that is written.
Source: ggml/src/ggml-quants.c, make_qkx2_quants and quantize_row_q{2,4,5}_K_ref.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import transpose
from qconvert.kernels.half import nearest_int, put_half
from qconvert.kernels.lanes import (
    absolute,
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


@njit(forceinline=True)
def _fit(lanes, X, W, L, size, top, steps, squared, fit, at, stride):  # type: ignore[no-untyped-def]
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
    low = minimum(low, F(0))
    span, zero = high - low, splat(lanes, F(0))
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
        store(L, at % 256 + i, to_int(nearest(scaled, 0, top)))


@njit(forceinline=True)
def _greatest(fit, at, stride, n):  # type: ignore[no-untyped-def]
    """The greatest scale and the greatest minimum (as a positive offset) of n sub-blocks, at least 0."""
    scale = low = F(0)
    for j in range(at, at + n):
        scale = fit[j] if fit[j] > scale else scale
        low = -fit[j + stride] if -fit[j + stride] > low else low
    return scale, low


@njit(forceinline=True)
def _finish_six_bits(row, x, out, o, block, fit, at, stride, top, L):  # type: ignore[no-untyped-def]
    """d, dmin and twelve bytes of 6-bit scales and minima of one super-block to out[o : o + 16]; its codes to L."""
    greatest, deepest = _greatest(fit, at, stride, 8)
    to_scale = F(63) / greatest if greatest > F(0) else F(0)
    to_min = F(63) / deepest if deepest > F(0) else F(0)
    d, dmin = put_half(row, out, o, greatest / F(63)), put_half(row, out, o + 2, deepest / F(63))
    for j in range(8):
        # C keeps the low 8 bits before it takes the smaller
        ls = min(nearest_int(to_scale * fit[at + j]) & 255, 63)
        lm = min(nearest_int(to_min * -fit[at + stride + j]) & 255, 63)
        if j < 4:
            out[o + 4 + j], out[o + 8 + j] = U8(ls), U8(lm)
        else:
            out[o + 8 + j] = U8((ls & 15) | (lm & 15) << 4)
            out[o + j] |= U8(ls >> 4 << 6)
            out[o + 4 + j] |= U8(lm >> 4 << 6)
        factor, low = fit[at + 2 * stride + j], fit[at + 3 * stride + j]
        _codes(row, x, block * 256 + j * 32, 32, d * F(ls), dmin * F(lm), factor, low, top, L)


@njit(forceinline=True)
def _root_mean_square_weights(lanes, X, W):  # type: ignore[no-untyped-def]
    """W = root mean square of the lane's 32 values + magnitude."""
    n = count(lanes)
    total = splat(lanes, F(0))
    for i in range(32):
        x = load(lanes, X, i * n)
        total = total + x * x
    mean = square_root(total / F(32))
    for i in range(32):
        store(W, i * n, mean + absolute(load(lanes, X, i * n)))


@njit(forceinline=True)
def _put_nibbles(row, out, o, L):  # type: ignore[no-untyped-def]
    """Codes 0..255 to 128 bytes: byte i of each 32 holds code i low and code i + 32 high, of 64."""
    n = count(row)
    for chunk in range(4):
        for i in range(0, 32, n):
            low, high = load(row, L, chunk * 64 + i), load(row, L, chunk * 64 + 32 + i)
            store(out, o + chunk * 32 + i, (low & 15) | high << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_k(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    stride = max(n, 8)
    X, W, codes = scratch(32 * n), scratch(32 * n), scratch(32 * n)
    fit, L = scratch(4 * stride), np.empty(256, U8)
    for first in range(0, x.size // 32, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 32, X)
            _root_mean_square_weights(lanes, X, W)
            _fit(lanes, X, W, codes, 32, 15, STEPS_4, True, fit, lane, stride)
        for block in range(first // 8, min(first + stride, x.size // 32) // 8):
            o = block * 144
            _finish_six_bits(row, x, out, o, block, fit, block * 8 - first, stride, 15, L)
            _put_nibbles(row, out, o + 16, L)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_k(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n, m = count(lanes), count(row)
    stride = max(n, 8)
    X, W, codes = scratch(32 * n), scratch(32 * n), scratch(32 * n)
    fit, L = scratch(4 * stride), np.empty(256, U8)
    for first in range(0, x.size // 32, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 32, X)
            _root_mean_square_weights(lanes, X, W)
            _fit(lanes, X, W, codes, 32, 31, STEPS_5, True, fit, lane, stride)
        for block in range(first // 8, min(first + stride, x.size // 32) // 8):
            o = block * 176
            _finish_six_bits(row, x, out, o, block, fit, block * 8 - first, stride, 31, L)
            for i in range(0, 32, m):  # bit j of byte i is the fifth bit of code 32 * j + i
                fifth = load(row, L, i) >> 4
                for j in range(1, 8):
                    fifth = fifth | load(row, L, 32 * j + i) >> 4 << j
                store(out, o + 16 + i, fifth)
            _put_nibbles(row, out, o + 48, L)


@njit(forceinline=True)
def _finish_four_bits(row, x, out, o, block, fit, at, stride, scales, L):  # type: ignore[no-untyped-def]
    """Sixteen bytes of 4-bit scales and minima to out[o : o + 16], d and dmin to out[o + 80 : o + 84]; the codes to L."""
    greatest, deepest = _greatest(fit, at, stride, 16)
    to_scale = F(15) / greatest if greatest > F(0) else F(0)
    to_min = F(15) / deepest if deepest > F(0) else F(0)
    d, dmin = put_half(row, out, o + 80, greatest / F(15)), put_half(row, out, o + 82, deepest / F(15))
    for j in range(0, 16, count(row)):
        ls = nearest_any(load(row, fit, at + j) * to_scale)
        lm = nearest_any(load(row, fit, at + stride + j) * -to_min)
        store(out, o + j, ls | lm << 4)
        store(scales, j, to_float(ls & 15) * d)
        store(scales, 16 + j, to_float((ls >> 4 | lm) & 15) * dmin)
    for j in range(16):
        factor, low = fit[at + 2 * stride + j], fit[at + 3 * stride + j]
        _codes(row, x, block * 256 + j * 16, 16, scales[j], scales[16 + j], factor, low, 3, L)


@njit(cache=True, nogil=True, error_model="numpy")
def q2_k(lanes, row, x, out):  # type: ignore[no-untyped-def]
    n, m = count(lanes), count(row)
    stride = max(n, 16)
    X, W, codes = scratch(16 * n), scratch(16 * n), scratch(16 * n)
    fit, scales, L = scratch(4 * stride), scratch(32), np.empty(256, U8)
    for first in range(0, x.size // 16, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 16, X)
            for i in range(16):
                store(W, i * n, absolute(load(lanes, X, i * n)))
            _fit(lanes, X, W, codes, 16, 3, STEPS_2, False, fit, lane, stride)
        for block in range(first // 16, min(first + stride, x.size // 16) // 16):
            o = block * 84
            _finish_four_bits(row, x, out, o, block, fit, block * 16 - first, stride, scales, L)
            for half in range(2):
                for i in range(0, 32, m):
                    packed = load(row, L, half * 128 + i)
                    for j in range(1, 4):
                        packed = packed | load(row, L, half * 128 + 32 * j + i) << 2 * j
                    store(out, o + 16 + half * 32 + i, packed)
