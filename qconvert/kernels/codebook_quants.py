"""ggml's types whose codes are entries of a codebook of magnitudes, signs apart: iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s.

One sub-block of 16 or 32 weights per lane searches its scale; its groups of 8 or 4 weights become the nearest entries. Then
each super-block of 256 rounds its scales to 4 bits under one f16. Kernels take x f32[n * 256] in rows of k, importance (see
`weigh`) or None, out u8[n * block nbytes] and the codebook's cells.
Source: ggml/src/ggml-quants.c, quantize_row_iq2_{xxs,xs,s}_impl and quantize_row_iq3_{xxs,s}_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mask_bits, mean_squares, transpose, weigh
from qconvert.kernels.codebook_search import FAR, greatest_of, octets, quartets, step_of
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import (
    any_lane,
    count,
    load,
    maximum,
    ones,
    scratch,
    select,
    splat,
    square_root,
    store,
    to_float,
    to_int,
)
from qconvert.kernels.min_quants import _fit_codes

F = np.float32
U8 = np.uint8
FAR_GROUPS, BLOCKS_WITH_FAR, ALL = 0, 1, 2  # which groups are rounded again by the scale that was found
LEAST = F(1e-45)  # no float is between it and 0


def _steps(top: int, by: float, reach: int) -> np.ndarray:
    """What the greatest magnitude may become, 2 levels + 1: top - reach * by to top + reach * by, in float32 as C does."""
    steps: np.ndarray = F(top) + np.arange(-reach, reach + 1).astype(F) * F(by)
    return steps


STEPS_2_XXS, STEPS_2, STEPS_3_XXS, STEPS_3 = _steps(5, 0.1, 6), _steps(5, 0.1, 9), _steps(15, 0.2, 15), _steps(15, 0.2, 9)
ODD_2, ODD_3 = np.arange(16, dtype=F) % 4 * 2 + 1, np.arange(16, dtype=F) % 8 * 2 + 1


@njit(forceinline=True)
def _take_signs(lanes, X, W, size, even, signs, at, stride):  # type: ignore[no-untyped-def]
    """X becomes magnitudes, the greatest is returned; the signs of each 8 go to `signs` at `at`, `stride` apart.

    even: their number is made so, by turning the weight of least W * X * X, which becomes a negative magnitude.
    """
    n = count(lanes)
    none = to_int(splat(lanes, F(0)))
    peak = splat(lanes, F(-np.inf))
    for begin in range(0, size, 8):
        bits = negatives = place = none
        least = splat(lanes, F(np.inf))
        if even:
            for i in range(8):
                x = load(lanes, X, (begin + i) * n)
                cost = load(lanes, W, (begin + i) * n) * x * x
                less = cost < least
                least, place = select(less, cost, least), select(less, i, place)
                negatives = negatives + ones(x < F(0))
        for i in range(8):
            x = load(lanes, X, (begin + i) * n)
            turned = ((negatives & 1) == 1) & (place == i)
            bits = bits | ones((x < F(0)) != turned) << i
            x = select(x < F(0), F(0) - x, x)
            x = select(turned, F(0) - x, x)
            store(X, (begin + i) * n, x)
            peak = maximum(peak, x)
        store(signs, begin // 8 * stride + at, bits)
    return peak


@njit(forceinline=True)
def _sums(lanes, W, WX, size, width, words, at, stride):  # type: ignore[no-untyped-def]
    """Sums of w * x * q and w * q * q with q = 2 levels + 1 of the words."""
    n, bits = count(lanes), 2 if width == 8 else 3
    sum_qx = sum_q2 = splat(lanes, F(0))
    for group in range(size // width):
        word = load(lanes, words, group * stride + at)
        for i in range(width):
            q = to_float((word >> bits * i & ((1 << bits) - 1)) * 2 + 1)
            sum_qx = sum_qx + load(lanes, WX, (group * width + i) * n) * q
            sum_q2 = sum_q2 + load(lanes, W, (group * width + i) * n) * q * q
    return sum_qx, sum_q2


@njit(forceinline=True)
def _any_far(lanes, size, width, words, at, stride):  # type: ignore[no-untyped-def]
    far = to_int(splat(lanes, F(0)))
    for group in range(size // width):
        far = far | load(lanes, words, group * stride + at)
    return (far & FAR) != 0


@njit(forceinline=True)
def _weights(lanes, X, first, size, k, importance, means, S, W):  # type: ignore[no-untyped-def]
    n = count(lanes)
    if importance is not None:
        weigh(lanes, X, first, size, k, importance, means, 256, S, W)
        return
    for j in range(n):
        S[j] = F(0.25) * means[(first + j) * size // 256] if size == 16 else F(0)
    for i in range(size):
        x = load(lanes, X, i * n)
        store(W, i * n, load(lanes, S, 0) + x * x)


@njit(forceinline=True)
def _super_blocks(  # type: ignore[no-untyped-def]
    lanes, row, x, k, importance, out, cells, size, width, points, steps, odd, tiny, even, again, factor, finish, nbytes
):
    """All super-blocks of x: fit their sub-blocks of `size` in groups of `width`, then `finish` each.

    factor: of the squares in the mean that weights hold.
    """
    n, blocks, per = count(lanes), x.size // 256, 256 // size
    stride, groups = max(n, per), size // width
    X, W, R, WX, P, S, T = (scratch(size * n), scratch(size * n), scratch(size * n), scratch(size * n), scratch(size * n),
                            scratch(n), scratch(8 * 16))  # fmt: skip
    E, C, levels = np.empty(16, np.int32), np.empty(n, np.int32), scratch(16)
    now, best = np.empty(groups * n, np.int32), np.empty(groups * stride, np.int32)
    signs, scales = np.empty(size // 8 * stride, np.int32), scratch(stride)
    means = mean_squares(lanes, x, 256, factor, 256)
    everyone = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - n)
    for first in range(0, blocks * per, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, size, X)
            _weights(lanes, X, first + lane, size, k, importance, means, S, W)
            peak = _take_signs(lanes, X, W, size, even, signs, lane, stride)
            for i in range(size):
                v, w = load(lanes, X, i * n), load(lanes, W, i * n)
                store(P, i * n, v)
                store(R, i * n, square_root(w))
                store(WX, i * n, w * v)
            skipped = peak < tiny
            if again == ALL:
                scale = _fit_codes(lanes, P, W, size, 4)
                peak = scale * F(3)
                skipped = skipped | (peak <= F(0))
            else:
                scale = peak / F(5 if width == 8 else 15)
            highest = splat(lanes, F(0))
            for group in range(groups):
                store(best, group * stride + lane, to_int(highest) + (FAR if again == BLOCKS_WITH_FAR else 0))
            for step in range(steps.size):
                to_levels = steps[step] / peak
                points(lanes, row, X, R, size, to_levels, F(1) / to_levels, odd, cells, everyone, S, C, levels, T, E, now)
                sum_qx, sum_q2 = _sums(lanes, W, WX, size, width, now, 0, n)
                better = (sum_q2 > F(0)) & (sum_qx * sum_qx > highest * sum_q2)
                if any_lane(better):
                    scale = select(better, sum_qx / sum_q2, scale)
                    highest = select(better, scale * sum_qx, highest)
                    for group in range(groups):
                        at = group * stride + lane
                        store(best, at, select(better, load(lanes, now, group * n), load(lanes, best, at)))
            repeated = scale > F(0)
            if again != ALL:
                repeated = repeated & _any_far(lanes, size, width, best, lane, stride)
            if any_lane(repeated):
                points(lanes, row, X, R, size, F(1) / scale, scale, odd, cells, mask_bits(repeated), S, C, levels, T, E, now)
                for group in range(groups):
                    before = load(lanes, best, group * stride + lane)
                    chosen = repeated
                    if again == FAR_GROUPS:
                        chosen = chosen & ((before & FAR) != 0)
                    store(best, group * stride + lane, select(chosen, load(lanes, now, group * n), before))
                sum_qx, sum_q2 = _sums(lanes, W, WX, size, width, best, lane, stride)
                scale = select(repeated & (sum_q2 > F(0)), sum_qx / sum_q2, scale)
            turned = scale < F(0)
            scale = select(turned, F(0) - scale, scale)
            store(scales, lane, select(skipped, splat(lanes, F(0)), scale))
            for group in range(groups):
                store(best, group * stride + lane, select(skipped, 0, load(lanes, best, group * stride + lane)))
            for octet in range(size // 8):
                bits = load(lanes, signs, octet * stride + lane)
                bits = select(turned, 255 - bits, bits)
                store(signs, octet * stride + lane, select(skipped, 0, bits))
        for block in range(first // per, min((first + stride) // per, blocks)):
            finish(row, out, block * nbytes, scales, block * per - first, cells.entry, best, signs, stride)


@njit(forceinline=True)
def _put_scales(row, out, o, scales, at, per, fudge, L):  # type: ignore[no-untyped-def]
    """The f16 of a super-block to out[o : o + 2]; its sub-blocks' steps of 0..15 to L. Whether any has a scale."""
    greatest = greatest_of(scales, at, per)
    d = greatest / F(31)
    put_half(row, out, o, d * fudge if greatest != F(0) else F(0))
    inverse = F(1) / d
    for j in range(per):
        L[j] = step_of(scales[at + j], inverse, 15) if greatest != F(0) else 0
    return greatest != F(0)


@njit(forceinline=True)
def _put(out, o, value, nbytes):  # type: ignore[no-untyped-def]
    for i in range(nbytes):
        out[o + i] = U8(value >> 8 * i & 255)


@njit(forceinline=True)
def _word_of_signs(signs, at, stride, step):  # type: ignore[no-untyped-def]
    """Seven bits of each of four 8 weights, and 4 bits of scale."""
    word = step << 28
    for octet in range(4):
        word |= (signs[octet * stride + at] & 127) << 7 * octet
    return word


@njit(forceinline=True)
def _finish_iq2_xxs(row, out, o, scales, at, entry_of, words, signs, stride):  # type: ignore[no-untyped-def]
    L = np.empty(8, np.int64)
    if not _put_scales(row, out, o, scales, at, 8, F(1), L):
        out[o : o + 66] = U8(0)
        return
    for j in range(8):
        for group in range(4):
            out[o + 2 + 8 * j + group] = U8(entry_of[words[group * stride + at + j] & 0xFFFF])
        _put(out, o + 6 + 8 * j, _word_of_signs(signs, at + j, stride, L[j]), 4)


@njit(forceinline=True)
def _finish_iq3_xxs(row, out, o, scales, at, entry_of, words, signs, stride):  # type: ignore[no-untyped-def]
    L = np.empty(8, np.int64)
    if not _put_scales(row, out, o, scales, at, 8, F(1.0125), L):
        out[o : o + 98] = U8(0)
        return
    for j in range(8):
        for group in range(8):
            out[o + 2 + 8 * j + group] = U8(entry_of[words[group * stride + at + j] & 0xFFF])
        _put(out, o + 66 + 4 * j, _word_of_signs(signs, at + j, stride, L[j]), 4)


@njit(forceinline=True)
def _put_nibbles(out, o, L, n):  # type: ignore[no-untyped-def]
    for j in range(0, n, 2):
        out[o + j // 2] = U8(L[j] | L[j + 1] << 4)


@njit(forceinline=True)
def _finish_iq2_xs(row, out, o, scales, at, entry_of, words, signs, stride):  # type: ignore[no-untyped-def]
    L = np.empty(16, np.int64)
    if not _put_scales(row, out, o, scales, at, 16, F(1), L):
        out[o : o + 74] = U8(0)
        return
    for j in range(16):
        for group in range(2):
            place = group * stride + at + j
            _put(out, o + 2 + 4 * j + 2 * group, entry_of[words[place] & 0xFFFF] | (signs[place] & 127) << 9, 2)
    _put_nibbles(out, o + 66, L, 16)


@njit(forceinline=True)
def _finish_iq2_s(row, out, o, scales, at, entry_of, words, signs, stride):  # type: ignore[no-untyped-def]
    L = np.empty(16, np.int64)
    _put_scales(row, out, o, scales, at, 16, F(0.9875), L)
    for j in range(8):
        high = 0
        for i in range(4):
            place = i % 2 * stride + at + 2 * j + i // 2
            entry = entry_of[words[place] & 0xFFFF]
            out[o + 2 + 4 * j + i], out[o + 34 + 4 * j + i] = U8(entry & 255), U8(signs[place])
            high |= entry >> 8 << 2 * i
        out[o + 66 + j] = U8(high)
    _put_nibbles(out, o + 74, L, 16)


@njit(forceinline=True)
def _finish_iq3_s(row, out, o, scales, at, entry_of, words, signs, stride):  # type: ignore[no-untyped-def]
    L = np.empty(8, np.int64)
    _put_scales(row, out, o, scales, at, 8, F(1.033), L)
    for j in range(8):
        high = 0
        for group in range(8):
            entry = entry_of[words[group * stride + at + j] & 0xFFF]
            out[o + 2 + 8 * j + group] = U8(entry & 255)
            high |= entry >> 8 << group
        out[o + 66 + j] = U8(high)
        for octet in range(4):
            out[o + 74 + 4 * j + octet] = U8(signs[octet * stride + at + j])
    _put_nibbles(out, o + 106, L, 8)


@njit(cache=True, nogil=True, error_model="numpy")
def iq2_xxs(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 32, 8, octets, STEPS_2_XXS, ODD_2,
                  F(1e-15), True, ALL, 1, _finish_iq2_xxs, 66)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def iq2_xs(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 16, 8, octets, STEPS_2, ODD_2,
                  F(1e-15), True, FAR_GROUPS, 1, _finish_iq2_xs, 74)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def iq2_s(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 16, 8, octets, STEPS_2, ODD_2,
                  F(1e-8), False, FAR_GROUPS, 2, _finish_iq2_s, 82)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def iq3_xxs(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 32, 4, quartets, STEPS_3_XXS, ODD_3,
                  F(1e-8), True, FAR_GROUPS, 2, _finish_iq3_xxs, 98)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def iq3_s(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 32, 4, quartets, STEPS_3, ODD_3,
                  LEAST, False, BLOCKS_WITH_FAR, 2, _finish_iq3_s, 110)  # fmt: skip
