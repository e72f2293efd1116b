"""Codes into a table of 16 levels, of least squared error: the same search of scales as in affine_quants.py.

Kernels take x f32[n * group] and write words i32[n * group / 8], the first code in the low bits, and scales f32[n].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from qconvert.kernels.across import put_words, transpose
from qconvert.kernels.affine_quants import TINY, Affine, better, peak_of_lane, put_levels
from qconvert.kernels.lanes import absolute, choose, count, load, scratch, select, splat, store, to_int
from qconvert.scheme import F32

F = np.float32
# What the weight of greatest magnitude maps to; below 0 makes a negative scale, which is another table unless it is mirrored
ENDS = (*np.linspace(0.7, 1.2, 6), *-np.linspace(0.7, 1.2, 6))


def table_codes(x: F32, group: int, table: Sequence[float], lanes: int | None = None) -> Affine:
    """x f32[N,K], K a multiple of group; table: 16 levels within -1..1, the first of equal ones is used.

    packed as by affine(); w is about scales * table[code], and zeros are f32[N,0].
    """
    n, k = x.shape
    words, scales = np.empty((n, k // 8), np.int32), np.empty((n, k // group), F)
    levels, at = np.unique(np.array(table, F), return_index=True)
    if x.size:
        flat, middles = np.ascontiguousarray(x, F).reshape(-1), (levels[1:] + levels[:-1]) * F(0.5)
        mirrored = np.array_equal(levels, -levels[::-1])
        ends = np.array([end for end in ENDS if end > 0 or not mirrored], F)
        wide = choose(16, 32 if group <= 128 else 16, lanes)
        search(wide, flat, group, levels, middles, at.astype(F), ends, words.reshape(-1), scales.reshape(-1))
    return Affine(words.view(np.uint8), scales, np.empty((n, 0), F))


@njit(forceinline=True)
def _level(lanes, v, middles, values):  # type: ignore[no-untyped-def]
    """The value of the level that is nearest to v, the lower of two that are as near."""
    found = splat(lanes, values[0])
    for k in range(middles.size):
        found = select(v > middles[k], splat(lanes, values[k + 1]), found)
    return found


@njit(cache=True, nogil=True, error_model="numpy")
def search(lanes, x, group, levels, middles, codes, ends, words, scales):  # type: ignore[no-untyped-def]
    n = count(lanes)
    X, W, S = scratch(group * n), np.empty(group // 8 * n, np.int32), scratch(n)
    zero = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        peak = peak_of_lane(lanes, X, group)
        inverse = select(absolute(peak) > TINY, F(1) / peak, zero)
        best = best_factor = best_fit = zero
        for end in ends:
            factor, vq, qq = inverse * end, zero, zero
            for i in range(group):
                v = factor * load(lanes, X, i * n)
                q = _level(lanes, v, middles, levels)
                vq, qq = vq + v * q, qq + q * q
            best, best_factor, best_fit = better(vq, qq, F(1) / (end * end), factor, best, best_factor, best_fit)
        factor, vq, qq = select(best > F(0), best_factor / best_fit, zero), zero, zero
        for w in range(group // 8):
            word = to_int(zero)
            for j in range(8):
                v = factor * load(lanes, X, (w * 8 + j) * n)
                q = _level(lanes, v, middles, levels)
                vq, qq = vq + v * q, qq + q * q
                word = word | to_int(_level(lanes, v, middles, codes)) << np.int32(j * 4)
            store(W, w * n, word)
        put_words(lanes, W, first, group // 8, scales.size, words)
        put_levels(lanes, select(qq > F(0), vq / qq / factor, zero), S, first, scales)
