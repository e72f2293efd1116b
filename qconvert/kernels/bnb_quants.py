"""The bytes of bitsandbytes' quantizers on a CPU: codes of a table beside the greatest magnitude of each block, 8-bit rows.

Its CUDA kernels differ in ties alone: of FP4 they take the sign apart, so that a weight halfway between two levels below zero
goes to the smaller one, and weights that round to zero get code 0 (here the small ones above zero get 8, the other zero).
Source: bitsandbytes 0.50, backends/default/ops.py (4 and 8 bits), csrc/cpu_ops.cpp (the second level).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.across import highest, pairs
from qconvert.kernels.lanes import absolute, choose, count, load, maximum, minimum, rounded, select, splat, store, to_int
from qconvert.scheme import F32, Bytes

F = np.float32
LEAST = F(1e-38)  # a block of less is divided by this
TINY = F(1e-36)  # of a row or of scales: less has no inverse, and all its codes are 0
NESTED = 256  # scales that share one of the second level


class Blocks(NamedTuple):
    """packed u8[N,K/2]; scales f32[N,K/group], the greatest magnitudes."""

    packed: Bytes
    scales: F32


class Nested(NamedTuple):
    """codes u8[n]; scales f32[ceil(n / 256)]: a value is levels[code] * scale."""

    codes: Bytes
    scales: F32


def block_codes(x: F32, group: int, table: Sequence[float], high_first: bool = True, lanes: int | None = None) -> Blocks:
    """x f32[N,K], K a multiple of group, group of 32; table: 16 levels within -1..1 (NF4, FP4).

    high_first: the first code of a byte lies in its high half, as bitsandbytes has it.

    `lanes` (or QCONVERT_LANES) overrides the SIMD width, 1 means scalar code; the result is the same.
    """
    n, k = x.shape
    levels = np.array(table, F)
    order = np.argsort(levels, kind="stable")
    middles = (levels[order][1:] + levels[order][:-1]) / F(2)
    packed, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // group), F)
    wide = choose(16, 16, lanes)
    wide = choose(16, 16, 16) if 2 * wide.n > group else wide
    flat = np.ascontiguousarray(x, F).reshape(-1)
    _blocks(wide, flat, group, middles, order.astype(F), 4 * high_first, packed.reshape(-1), scales.reshape(-1))
    return Blocks(packed, scales)


def block_peaks(x: F32, group: int, lanes: int | None = None) -> F32:
    """x f32[N,K], K a multiple of group, group of 32 -> f32[N,K/group]: the greatest magnitude of each group."""
    n, k = x.shape
    peaks = np.empty((n, k // group), F)
    wide = choose(32, 32, lanes)
    _peaks(wide, np.ascontiguousarray(x, F).reshape(-1), group, peaks.reshape(-1))
    return peaks


def dynamic_map() -> F32:
    """f32[256], ascending: 0, 1 and in each of seven decades twice as many steps as in the one below, of either sign.

    The levels are those of exact arithmetic, rounded once: torch.linspace, from which bitsandbytes has its own, gives other
    last bits with other widths of vectors.
    """
    decades = []
    for i in range(7):
        edges = np.linspace(0.1, 1, (1 << i) + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, positive, [0.0, 1.0]])).astype(F)


def nested_codes(v: F32, levels: F32) -> Nested:
    """v f32[n] in blocks of 256, the last as long as it is; levels f32[256], ascending: dynamic_map().

    A value is looked up at the nearest of 65536 places, as bitsandbytes does, so that its code may be a neighbour's.
    """
    codes, scales = np.empty(v.size, np.uint8), np.empty(-(-v.size // NESTED), F)
    _nested(np.ascontiguousarray(v, F), F(0.5) * (levels[1:] + levels[:-1]), codes, scales)
    return Nested(codes, scales)


def int8_rows(x: F32, lanes: int | None = None) -> tuple[npt.NDArray[np.int8], F32]:
    """x f32[N,K] -> codes i8[N,K], peaks f32[N] (SCB): a weight is about code * peak / 127."""
    codes, peaks = np.empty(x.shape, np.uint8), np.empty(len(x), F)
    _rows(choose(16, 16, lanes), np.ascontiguousarray(x, F).reshape(-1), x.shape[1], codes.reshape(-1), peaks)
    return codes.view(np.int8), peaks


@njit(cache=True, nogil=True, error_model="numpy")
def _blocks(lanes, x, group, middles, codes, shift, packed, scales):  # type: ignore[no-untyped-def]
    n = count(lanes)
    for block in range(scales.size):
        at = block * group
        largest = splat(lanes, F(0))
        for i in range(at, at + group, n):
            largest = maximum(absolute(load(lanes, x, i)), largest)
        scales[block] = peak = highest(largest)
        inverse = F(1) / max(peak, LEAST)
        for i in range(at, at + group, 2 * n):
            even, odd = pairs(lanes, x, i)
            even = minimum(maximum(even * inverse, F(-1)), F(1))
            odd = minimum(maximum(odd * inverse, F(-1)), F(1))
            first = second = splat(lanes, codes[0])
            for k in range(middles.size):
                first = select(even > middles[k], codes[k + 1], first)
                second = select(odd > middles[k], codes[k + 1], second)
            store(packed, i // 2, to_int(first) << np.int32(shift) | to_int(second) << np.int32(4 - shift))


@njit(cache=True, nogil=True, error_model="numpy")
def _peaks(lanes, x, group, peaks):  # type: ignore[no-untyped-def]
    n = count(lanes)
    for block in range(peaks.size):
        largest = splat(lanes, F(0))
        for i in range(block * group, (block + 1) * group, n):
            largest = maximum(absolute(load(lanes, x, i)), largest)
        peaks[block] = highest(largest)


@njit(cache=True, nogil=True, error_model="numpy")
def _nested(v, middles, codes, scales):  # type: ignore[no-untyped-def]
    last = F(65535)
    for block in range(scales.size):
        begin, end = block * NESTED, min(v.size, (block + 1) * NESTED)
        peak = F(0)
        for i in range(begin, end):
            peak = max(peak, abs(v[i]))
        scales[block] = peak
        inverse = F(1) / peak if peak > TINY else F(0)
        for i in range(begin, end):
            place = np.int32((min(max(v[i] * inverse, F(-1)), F(1)) + F(1)) * F(0.5) * last + F(0.5))
            value = F(-1) + F(2) * F(place) / last
            below, step = 0, 128
            while step and peak > TINY:
                below += step if middles[below + step - 1] < value else 0
                step //= 2
            codes[i] = below


@njit(cache=True, nogil=True, error_model="numpy")
def _rows(lanes, x, k, codes, peaks):  # type: ignore[no-untyped-def]
    n = count(lanes)
    whole = k // n * n
    for row in range(peaks.size):
        at, largest = row * k, splat(lanes, F(0))
        for i in range(at, at + whole, n):
            largest = maximum(absolute(load(lanes, x, i)), largest)
        peak = highest(largest)
        for i in range(at + whole, at + k):
            peak = max(peak, abs(x[i]))
        peaks[row] = peak
        factor = F(1) / peak * F(127) if peak > TINY else F(0)  # torch's 127 / t
        for i in range(at, at + whole, n):
            store(codes, i, to_int(rounded(load(lanes, x, i) * factor)))
        for i in range(at + whole, at + k):
            codes[i] = np.int32(np.rint(x[i] * factor))
