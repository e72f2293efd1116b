"""Affine codes of least squared error: a grid of scales, each judged by the least squares fit of its codes.

One group a lane. For each scale that is tried the codes are rounded, and the scale that suits them best follows in closed
form; the weights are rounded once more by the best of all, and the scale that suits these final codes is kept. Codes are
unsigned, the first in the low bits of an int32.

Kernels take x f32[n * group] and write words i32[n * group * bits / 32] and scales, zeros f32[n]. Sums are of x in units of
the scale that is tried, so that no magnitude of weights over- or underflows them.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numba import njit

from qconvert.kernels.across import put_words, transpose
from qconvert.kernels.fused import exact_sum
from qconvert.kernels.lanes import (
    absolute,
    choose,
    count,
    load,
    maximum,
    minimum,
    rounded,
    scratch,
    select,
    splat,
    store,
    to_int,
)
from qconvert.scheme import F32, U16, Bytes, ZeroPoint

F = np.float32
TINY = F(1e-37)  # a group of less is zero: its inverse would overflow
FLAT = F(1e-6)  # a range of less, in parts of its middle, is that of a constant
# Without a zero point the grid has one code more below 0, so the weight of greatest magnitude goes there: to minus these
# codes, or the other way where they are negative. Best for small groups is near the grid's end, for outliers far outside.
# Error above that of 140 ends of 4 bits: 0.07 % in groups of 16 to 64.
ENDS: dict[int, tuple[float, ...]] = {
    2: (*np.linspace(0.8, 4.4, 12), *-np.linspace(1.5, 3.5, 6)),
    4: tuple(np.linspace(6.3, 10.2, 12)),
    8: tuple(np.arange(121.0, 129.0)),
}
# Large groups need fewer: 0.1 to 0.2 % more error than by 12, and 1.4 times the speed
ENDS_OF_LARGE = {4: tuple(np.linspace(6.6, 9.6, 6))}
LARGE = 128
# With a zero point: the width of the grid in parts of the range of weights, and what is added to the code of its middle.
SPANS: dict[int, tuple[float, ...]] = {
    2: tuple(np.linspace(0.3, 1.1, 12)),
    4: tuple(np.linspace(0.62, 1.06, 12)),
    8: tuple(np.linspace(0.97, 1.0, 4)),
}
# The scale of least squares leaves a weight by 0.65 % too small at 4 bits, all of them alike, and a network adds that up. So
# codes of these bits without a zero point get the scale at which x and its codes are as long as their common part: 0.3 to
# 0.6 % more error. Scales of an earlier search that were changed so had less KL on three of four models, and more on one.
UNSHRUNK = 4
SHIFTS = (-1 / 3, 0.0, 1 / 3)  # of float zero points; integers are tried one below and above the nearest


class Affine(NamedTuple):
    """packed u8[N, K * bits / 8]; scales and zeros f32[N, K / group]: w is about scales * (codes - zeros)."""

    packed: Bytes
    scales: F32
    zeros: F32


def affine(x: F32 | U16, group: int, bits: int, zero_point: ZeroPoint = "none", lanes: int | None = None) -> Affine:
    """x f32[N,K], K a multiple of group; bits 2, 4 or 8. Without a zero point it is 2**(bits - 1) in every group.

    x may be the bits u16[N,K] of bf16, where groups are of a multiple of 32. Without a zero point a group with a NaN or an
    infinity has the scale NaN.
    Groups are of a multiple of 16 weights, or without a zero point a whole row of any length that fills its last byte.
    `lanes` (or QCONVERT_LANES) overrides the SIMD width, 1 means scalar code; the result is the same.
    """
    n, k = x.shape
    assert x.dtype != np.uint16 or group % 32 == 0
    if group % 16:
        assert zero_point == "none" and group == k, "zeros behind the row change nothing there"
        found = affine(np.pad(cast(F32, x), ((0, 0), (0, -k % 16))), k + -k % 16, bits, zero_point, lanes)
        return found._replace(packed=found.packed[:, : k * bits // 8])
    words, scales = np.empty((n, k * bits // 32), np.int32), np.empty((n, k // group), F)
    zeros = np.full((n, k // group), 1 << (bits - 1), F)
    if x.size:
        wide = choose(16, 32 if group <= 128 else 16, lanes)
        ends = ENDS_OF_LARGE.get(bits, ENDS[bits]) if group >= LARGE else ENDS[bits]
        flat = np.ascontiguousarray(x, x.dtype if x.dtype == np.uint16 else F).reshape(-1)
        parts = np.array(ends if zero_point == "none" else SPANS[bits], F)
        outputs = words.reshape(-1), scales.reshape(-1), zeros.reshape(-1)
        {"none": symmetric, "int": with_zero, "float": with_float_zero}[zero_point](wide, flat, group, bits, parts, *outputs)
    return Affine(words.view(np.uint8), scales, zeros)


@njit(forceinline=True)
def peak_of_lane(lanes, X, group):  # type: ignore[no-untyped-def]
    """Of each lane's values the first with the greatest magnitude."""
    n = count(lanes)
    peak = size = splat(lanes, F(0))
    for i in range(group):
        x = load(lanes, X, i * n)
        larger = absolute(x) > size
        size, peak = select(larger, absolute(x), size), select(larger, x, peak)
    return peak


@njit(forceinline=True)
def put_levels(lanes, v, S, first, levels):  # type: ignore[no-untyped-def]
    store(S, 0, v)
    for lane in range(min(count(lanes), levels.size - first)):
        levels[first + lane] = S[lane]


@njit(forceinline=True)
def clamped(v, low, high):  # type: ignore[no-untyped-def]
    """The nearest integer within low..high, ties to even, as a float."""
    return minimum(maximum(rounded(v), low), high)


@njit(forceinline=True)
def better(vq, qq, spread, factor, best, best_factor, best_fit):  # type: ignore[no-untyped-def]
    """Where codes explain more of the weights than the best so far (spread: their scale, squared), take them over."""
    fit = vq / qq
    explained = vq * fit * spread
    more = explained > best
    return select(more, explained, best), select(more, factor, best_factor), select(more, fit, best_fit)


@njit(forceinline=True)
def _sums(lanes, X, group, factor1, factor2, low, high):  # type: ignore[no-untyped-def]
    """Sums of v * code and code * code, v = x * factor, for two factors at once; low, high: None where no code is beyond."""
    n = count(lanes)
    vq1 = qq1 = vq2 = qq2 = splat(lanes, F(0))
    for i in range(group):
        v = load(lanes, X, i * n)
        v1, v2 = v * factor1, v * factor2
        q1, q2 = rounded(v1), rounded(v2)
        if low is not None:
            q1, q2 = maximum(q1, low), maximum(q2, low)
        if high is not None:
            q1, q2 = minimum(q1, high), minimum(q2, high)
        vq1, vq2 = vq1 + v1 * q1, vq2 + v2 * q2
        qq1, qq2 = exact_sum(q1, q1, qq1), exact_sum(q2, q2, qq2)
    return vq1, qq1, vq2, qq2


@njit(cache=True, nogil=True, error_model="numpy")
def symmetric(lanes, x, group, bits, ends, words, scales, zeros):  # type: ignore[no-untyped-def]
    """Codes around the middle one; an even number of ends."""
    n, per, half, each = count(lanes), 32 // bits, F(1 << (bits - 1)), F(1 << bits)
    low, high, middles = -half, half - F(1), F(half * ((1 << 16) - 1) / (each - F(1)))  # the middle code in 16 bits, all over
    X, W, S = scratch(group * n), np.empty(group // per * n, np.int32), scratch(n)
    zero = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        peak = peak_of_lane(lanes, X, group)
        inverse = select(absolute(peak) > TINY, F(-1) / peak, zero)
        best = best_factor = best_fit = zero
        for step in range(0, ends.size, 2):
            end1, end2 = ends[step], ends[step + 1]
            factor1, factor2, size = inverse * end1, inverse * end2, max(abs(end1), abs(end2))
            if size < half - F(0.6):  # nothing rounds to a code that is not there
                vq1, qq1, vq2, qq2 = _sums(lanes, X, group, factor1, factor2, None, None)
            elif size < half + F(0.4):
                vq1, qq1, vq2, qq2 = _sums(lanes, X, group, factor1, factor2, None, high)
            else:
                vq1, qq1, vq2, qq2 = _sums(lanes, X, group, factor1, factor2, low, high)
            best, best_factor, best_fit = better(vq1, qq1, F(1) / (end1 * end1), factor1, best, best_factor, best_fit)
            best, best_factor, best_fit = better(vq2, qq2, F(1) / (end2 * end2), factor2, best, best_factor, best_fit)
        factor, vq, qq, vv = select(best > F(0), best_factor / best_fit, zero), zero, zero, zero
        for w in range(group // per):
            word = to_int(zero)
            for start in range(0, per, per // 2):
                codes, place = splat(lanes, middles), F(1)
                for j in range(w * per + start, w * per + start + per // 2):
                    v = factor * load(lanes, X, j * n)
                    q = clamped(v, low, high)
                    vq, qq, vv = vq + v * q, exact_sum(q, q, qq), vv + v * v
                    codes, place = exact_sum(q, place, codes), place * each
                word = word | to_int(codes) << np.int32(start * bits)
            store(W, w * n, word)
        put_words(lanes, W, first, group // per, scales.size, words)
        fit = vv / vq if bits == UNSHRUNK else vq / qq
        put_levels(lanes, select(qq > F(0), fit / factor, zero), S, first, scales)


@njit(cache=True, nogil=True, error_model="numpy")
def with_zero(lanes, x, group, bits, spans, words, scales, zeros):  # type: ignore[no-untyped-def]
    """Codes around a zero point that is one of them."""
    n, per, last, each = count(lanes), 32 // bits, F((1 << bits) - 1), F(1 << bits)
    X, W, S = scratch(group * n), np.empty(group // per * n, np.int32), scratch(n)
    zero = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        least = greatest = zero
        for i in range(group):
            v = load(lanes, X, i * n)
            least, greatest = minimum(v, least), maximum(v, greatest)
        inverse = select(greatest - least > TINY, last / (greatest - least), zero)
        middle = (least + greatest) * F(0.5)
        best = best_factor = best_fit = best_zero = zero
        for span in spans:
            factor = inverse * (F(1) / span)
            centre = rounded(last * F(0.5) - middle * factor)
            zero1 = minimum(maximum(centre - F(1), F(0)), last)
            zero2 = minimum(maximum(centre, F(0)), last)
            zero3 = minimum(maximum(centre + F(1), F(0)), last)
            vq1 = qq1 = vq2 = qq2 = vq3 = qq3 = zero
            for i in range(group):
                v = factor * load(lanes, X, i * n)
                r = rounded(v)
                q1, q2, q3 = (
                    minimum(maximum(r, F(0) - zero1), last - zero1),
                    minimum(maximum(r, F(0) - zero2), last - zero2),
                    minimum(maximum(r, F(0) - zero3), last - zero3),
                )
                vq1, vq2, vq3 = vq1 + v * q1, vq2 + v * q2, vq3 + v * q3
                qq1, qq2, qq3 = exact_sum(q1, q1, qq1), exact_sum(q2, q2, qq2), exact_sum(q3, q3, qq3)
            for vq, qq, point in ((vq1, qq1, zero1), (vq2, qq2, zero2), (vq3, qq3, zero3)):
                before = best
                best, best_factor, best_fit = better(vq, qq, span * span, factor, best, best_factor, best_fit)
                best_zero = select(best > before, point, best_zero)
        factor, vq, qq = select(best > F(0), best_factor / best_fit, zero), zero, zero
        for w in range(group // per):
            word = to_int(zero)
            for start in range(0, per, per // 2):
                codes, place = zero, F(1)
                for j in range(w * per + start, w * per + start + per // 2):
                    v = factor * load(lanes, X, j * n)
                    q = clamped(v, F(0) - best_zero, last - best_zero)
                    vq, qq = vq + v * q, exact_sum(q, q, qq)
                    codes, place = exact_sum(q + best_zero, place, codes), place * each
                word = word | to_int(codes) << np.int32(start * bits)
            store(W, w * n, word)
        put_words(lanes, W, first, group // per, scales.size, words)
        put_levels(lanes, select(qq > F(0), vq / qq / factor, zero), S, first, scales)
        put_levels(lanes, best_zero, S, first, zeros)


@njit(forceinline=True)
def _line(lanes, X, group, middle, factor, offset, last):  # type: ignore[no-untyped-def]
    """Sums of u * code, code and code * code, where u = (x - middle) * factor and its code is that of u + offset."""
    n = count(lanes)
    uq = q1 = qq = splat(lanes, F(0))
    for i in range(group):
        u = (load(lanes, X, i * n) - middle) * factor
        q = clamped(u + offset, F(0), last)
        uq, q1, qq = uq + u * q, q1 + q, exact_sum(q, q, qq)
    return uq, q1, qq


@njit(cache=True, nogil=True, error_model="numpy")
def with_float_zero(lanes, x, group, bits, spans, words, scales, zeros):  # type: ignore[no-untyped-def]
    """Codes of which a line of least squares makes weights: u = fit * code + base, u = (x - middle) * factor."""
    n, per, last, share = count(lanes), 32 // bits, F((1 << bits) - 1), F(1) / F(group)
    X, W, S = scratch(group * n), np.empty(group // per * n, np.int32), scratch(n)
    zero = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        least = greatest = load(lanes, X, 0)
        for i in range(1, group):
            v = load(lanes, X, i * n)
            least, greatest = minimum(v, least), maximum(v, greatest)
        middle, extent = (least + greatest) * F(0.5), greatest - least
        varies = (extent > TINY) & (extent > absolute(middle) * FLAT)
        inverse, mean = select(varies, last / extent, zero), zero
        for i in range(group):
            mean = mean + (load(lanes, X, i * n) - middle) * share
        best = factor = offset = zero
        for span in spans:
            for shift in SHIFTS:
                tried = inverse * (F(1) / span)
                uq, q1, qq = _line(lanes, X, group, middle, tried, splat(lanes, last * F(0.5) + F(shift)), last)
                centred = uq - mean * tried * q1
                fit = centred / (qq - q1 * q1 * share)
                more = centred * fit * (span * span) > best
                best = select(more, centred * fit * (span * span), best)
                factor = select(more, tried / fit, factor)
                offset = select(more, (fit * q1 * share - mean * tried) / fit, offset)
        uq, q1, qq = _line(lanes, X, group, middle, factor, offset, last)
        fit = (uq - mean * factor * q1) / (qq - q1 * q1 * share)
        base = mean * factor - fit * q1 * share
        factor, offset = select(fit > F(0), factor / fit, factor), select(fit > F(0), F(0) - base / fit, offset)
        uq = q1 = qq = zero
        for w in range(group // per):
            word = to_int(zero)
            for j in range(per):
                u = (load(lanes, X, (w * per + j) * n) - middle) * factor
                q = clamped(u + offset, F(0), last)
                uq, q1, qq = uq + u * q, q1 + q, exact_sum(q, q, qq)
                word = word | to_int(q) << np.int32(j * bits)
            store(W, w * n, word)
        put_words(lanes, W, first, group // per, scales.size, words)
        fit = (uq - mean * factor * q1) / (qq - q1 * q1 * share)
        found = varies & (fit > F(0))
        base = mean * factor - fit * q1 * share
        # a constant: code 0 stands one above its zero point
        put_levels(lanes, select(found, fit / factor, middle), S, first, scales)
        put_levels(lanes, select(found, F(0) - (base + middle * factor) / fit, splat(lanes, F(-1))), S, first, zeros)
