"""Codes that are small floats, e4m3 (fp8) and e2m1 (fp4), with scales as compressed-tensors has them; and int8 of rows.

A code is the nearest to x / scale, ties to the even one; beyond the greatest it saturates. The division is one, not a product
with an inverse, so bytes equal those of compressed-tensors wherever the scales do.

Scales of weights with peak p: fp8 p / 448, int8 p / 127.5; nvfp4 the e4m3 of divisor * p / 6, of which the value is divided by
the tensor's divisor 448 * 6 / peak; mx a power of two, of p less the greatest code's, and one more where p is above 1.75 times
it, which would be clipped by more than a step. A search of nvfp4's scales lowers the error of weights by 10 to 15 % (a group's
peak at 6 or at 4, whichever is better: 4 to 7 %) and KL by 28 to 35 % on three models; other scales gain nothing by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.across import put_words, transpose
from qconvert.kernels.lanes import (
    Lanes,
    absolute,
    bits_of,
    choose,
    count,
    float_of,
    load,
    maximum,
    minimum,
    ones,
    rounded,
    scratch,
    select,
    splat,
    store,
    to_float,
    to_int,
)
from qconvert.kernels.real import narrow_bf16, widen_bf16
from qconvert.scheme import F32, Bytes

F = np.float32
I32 = np.int32
SCALAR = Lanes(1, False)
NVFP4_GROUP, MX_GROUP = 16, 32
EPSILON = {"f32": F(2.0**-23), "f16": F(2.0**-10), "bf16": F(2.0**-7)}  # the scale of zeros
EMPTY = 0x20  # the e4m3 scale 0.125 of a group of zeros
# Codes of nvfp4's scales that a search tries beside the usual one, which comes first: it is kept where another is no better.
NEAR = (0, -1, 1, 2, 3, 4, 5, 6)


class Packed(NamedTuple):
    """packed u8[N,K/2], the first of two codes in the low half; scales u8[N,K/group]: codes of e4m3 or e8m0."""

    packed: Bytes
    scales: Bytes


def group_peaks(x: F32, group: int) -> F32:
    """x f32[N,K] -> f32[N, ceil(K / group)], the greatest magnitude of each group; the last one may be shorter."""
    n, k = x.shape
    out = np.zeros((n, -(-k // group)), F)
    _group_peaks(choose(16, 32), np.ascontiguousarray(x, F), group, out)
    return out


def scales_of(peaks: F32, steps: float, dtype: str) -> F32:
    """peaks f32[...] / steps, rounded to `dtype` f32, f16 or bf16, in which the file holds them; none is 0."""
    scales: F32 = peaks / F(steps)
    if dtype == "bf16":
        scales = widen_bf16(narrow_bf16(scales))
    elif dtype == "f16":
        scales = scales.astype(np.float16).astype(F)
    return np.where(scales == 0, EPSILON[dtype], scales)


def e4m3_codes(x: F32, scales: F32, group: int) -> Bytes:
    """Codes of x f32[N,K] / scales f32[N, ceil(K / group)], none of which is 0 -> u8[N,K]."""
    out = np.empty(x.shape, np.uint8)
    _scaled(choose(16, 32), SCALAR, np.ascontiguousarray(x, F), np.ascontiguousarray(scales, F), group, True, out)
    return out


def int8_codes(x: F32, scales: F32, group: int) -> npt.NDArray[np.int8]:
    """x f32[N,K] / scales f32[N, ceil(K / group)] -> i8[N,K] in -128..127."""
    out = np.empty(x.shape, np.uint8)
    _scaled(choose(16, 32), SCALAR, np.ascontiguousarray(x, F), np.ascontiguousarray(scales, F), group, False, out)
    return out.view(np.int8)


def mx_exponents(peaks: F32, greatest: int) -> Bytes:
    """peaks f32[...] -> codes e of scales 2 ** (e - 127); greatest: the exponent of the greatest code, 2 of e2m1, 8 of e4m3."""
    bits = np.ascontiguousarray(peaks, F).view(np.uint32) + np.uint32(1 << 21)
    out: Bytes = np.maximum(np.minimum(bits >> 23, 254).astype(I32) - greatest, 0).astype(np.uint8)
    return out


def nvfp4(x: F32, divisor: float, search: bool = False) -> Packed:
    """x f32[N,K], K a multiple of 16; divisor: of the tensor, as f32. `search`: scales of least squared error."""
    return _fp4(x, NVFP4_GROUP, divisor, NEAR if search else (0,))


def mxfp4(x: F32) -> Packed:
    """x f32[N,K], K a multiple of 32."""
    return _fp4(x, MX_GROUP, None, (0,))


def _fp4(x: F32, group: int, divisor: float | None, near: tuple[int, ...]) -> Packed:
    n, k = x.shape
    words, scales = np.empty((n, k // 8), I32), np.empty((n, k // group), np.uint8)
    if x.size:
        flat = np.ascontiguousarray(x, F).reshape(-1)
        divided, by = divisor is not None, F(1 if divisor is None else divisor)
        _groups(choose(16, 32), flat, group, divided, by, np.array(near, I32), words.reshape(-1), scales.reshape(-1))
    return Packed(words.view(np.uint8), scales)


@njit(forceinline=True)
def small_float(v, mantissa, bias, top):  # type: ignore[no-untyped-def]
    """|v| -> the code of exponent and mantissa bits, as an int32; top: the greatest code."""
    shift, first = I32(23 - mantissa), I32(127 - bias) << I32(mantissa)
    size = minimum(bits_of(absolute(v)), (first + I32(top)) << shift)
    half = (I32(1) << (shift - I32(1))) - I32(1)
    normal = ((size + half + ((size >> shift) & I32(1))) >> shift) - first
    subnormal = to_int(rounded(absolute(v) * F(2.0 ** (mantissa + bias - 1))))
    return select(size < I32(128 - bias) << I32(23), subnormal, normal)


@njit(forceinline=True)
def value(code, mantissa, bias):  # type: ignore[no-untyped-def]
    """int32 codes without a sign -> f32."""
    small = to_float(code) * F(2.0 ** (1 - mantissa - bias))
    return select(code < I32(1 << mantissa), small, float_of((code + (I32(127 - bias) << I32(mantissa))) << I32(23 - mantissa)))


@njit(forceinline=True)
def power(code):  # type: ignore[no-untyped-def]
    """int32 codes e of e8m0 -> 2 ** (e - 127)."""
    return float_of(select(code == I32(0), 0x00400000, code << I32(23)))


@njit(cache=True, nogil=True, error_model="numpy")
def _group_peaks(lanes, x, group, out):  # type: ignore[no-untyped-def]
    n, flat, k = count(lanes), x.reshape(-1), x.shape[1]
    S = scratch(n)
    for row in range(x.shape[0]):
        for g in range(out.shape[1]):
            begin, end = row * k + g * group, row * k + min(k, (g + 1) * group)
            whole = begin + (end - begin) // n * n
            widest = splat(lanes, F(0))
            for i in range(begin, whole, n):
                widest = maximum(absolute(load(lanes, flat, i)), widest)
            store(S, 0, widest)
            peak = F(0)
            for lane in range(n):
                peak = max(peak, S[lane])
            for i in range(whole, end):
                peak = max(peak, abs(flat[i]))
            out[row, g] = peak


@njit(forceinline=True)
def _put_code(lanes, x, at, scale, floats, out):  # type: ignore[no-untyped-def]
    v = load(lanes, x, at) / scale
    if floats:
        store(out, at, small_float(v, 3, 7, 0x7E) | ((bits_of(v) >> I32(24)) & I32(0x80)))
    else:
        store(out, at, to_int(rounded(minimum(maximum(v, F(-128)), F(127)))))


@njit(cache=True, nogil=True, error_model="numpy")
def _scaled(lanes, scalar, x, scales, group, floats, out):  # type: ignore[no-untyped-def]
    n, flat, codes, k = count(lanes), x.reshape(-1), out.reshape(-1), x.shape[1]
    for row in range(x.shape[0]):
        for g in range(scales.shape[1]):
            begin, end = row * k + g * group, row * k + min(k, (g + 1) * group)
            whole = begin + (end - begin) // n * n
            scale = splat(lanes, scales[row, g])
            for i in range(begin, whole, n):
                _put_code(lanes, flat, i, scale, floats, codes)
            scale = splat(scalar, scales[row, g])
            for i in range(whole, end):
                _put_code(scalar, flat, i, scale, floats, codes)


@njit(forceinline=True)
def _scale_of(code, divided, divisor):  # type: ignore[no-untyped-def]
    """What the weights of lanes are divided by."""
    return value(code, 3, 7) / divisor if divided else power(code)


@njit(forceinline=True)
def _error(lanes, X, group, scale, unit):  # type: ignore[no-untyped-def]
    """Squared error of codes with this scale, in parts of `unit`."""
    inverse, error = F(1) / scale, splat(lanes, F(0))
    for i in range(group):
        v = absolute(load(lanes, X, i * count(lanes))) * inverse
        rest = v - value(small_float(v, 1, 1, 7), 1, 1)
        error = error + rest * rest
    ratio = scale / unit
    return error * ratio * ratio


@njit(cache=True, nogil=True, error_model="numpy")
def _groups(lanes, x, group, divided, divisor, near, words, scales):  # type: ignore[no-untyped-def]
    """fp4 codes and codes of scales, a group a lane: of e4m3 where the scale is `divided`, else of e8m0."""
    n = count(lanes)
    X, W = scratch(group * n), np.empty(group // 8 * n, I32)
    zero = to_int(splat(lanes, F(0)))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        peak = splat(lanes, F(0))
        for i in range(group):
            peak = maximum(absolute(load(lanes, X, i * n)), peak)
        if divided:
            base = small_float(peak / F(6) * divisor, 3, 7, 0x7E)
            base = select(base == I32(0), EMPTY, base)
        else:  # 252: of which the greatest code is still finite
            base = minimum(maximum(((bits_of(peak) + I32(1 << 21)) >> I32(23)) - I32(2), I32(0)), I32(252))
        code, unit = base, _scale_of(base, divided, divisor)
        if near.size > 1:
            least = _error(lanes, X, group, unit, unit)
            for step in near[1:]:
                tried = minimum(maximum(base + step, I32(1)), I32(0x7E))
                error = _error(lanes, X, group, _scale_of(tried, divided, divisor), unit)
                less = error < least
                least, code = select(less, error, least), select(less, tried, code)
        scale = _scale_of(code, divided, divisor)
        for w in range(group // 8):
            word = zero
            for j in range(8):
                v = load(lanes, X, (w * 8 + j) * n) / scale
                word = word | (small_float(v, 1, 1, 7) | (ones(v < F(0)) << I32(3))) << I32(j * 4)
            store(W, w * n, word)
        put_words(lanes, W, first, group // 8, scales.size, words)
        store(W, 0, code)
        for lane in range(min(n, scales.size - first)):
            scales[first + lane] = W[lane]
