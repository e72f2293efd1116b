"""ggml's 4-bit formats with a table of 16 levels: iq4_nl (one f16 scale per 32 weights), iq4_xs (6-bit scales under one).

One block of 32 per lane searches its scale. The nearest level of a value is found by exact float32 thresholds: the least
value that ggml's own comparison gives to the upper of two levels. Kernels take x f32[n * block] in rows of k,
importance (see `weigh`) or None, and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, best_index_int8 and quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mean_squares, pick8, transpose, weigh
from qconvert.kernels.half import nearest_int, put_half
from qconvert.kernels.lanes import count, load, scratch, select, splat, store
from qconvert.kernels.scale_quants import peaks
from qconvert.scheme import F32, IQ4_TABLE

F = np.float32
U8 = np.uint8
TINY = F(1e-15)  # ggml takes smaller values for zero
TRIES = 7
FIRST = F(IQ4_TABLE[0])


def _threshold(low: float, high: float) -> np.float32:
    """The least float32 that best_index_int8 gives to `high`: there x - low < high - x is false."""
    below, above = np.array([low, high], F)
    while np.nextafter(below, above) < above:
        middle = F((below + above) / F(2))
        middle = middle if below < middle < above else np.nextafter(below, above)
        if middle - F(low) < F(high) - middle:
            below = middle
        else:
            above = middle
    return F(above)


def _search_tree(thresholds: list[np.float32]) -> F32:
    """15 thresholds in breadth-first order from index 1: a value goes from node k to 2 * k, or to 2 * k + 1 if not below."""
    tree = np.zeros(16, F)
    for depth in range(4):
        step = 16 >> depth
        tree[1 << depth : 2 << depth] = thresholds[step // 2 - 1 :: step]
    return tree


THRESHOLDS = [_threshold(a, b) for a, b in zip(IQ4_TABLE, IQ4_TABLE[1:], strict=False)]
TREE = _search_tree(THRESHOLDS)
ROOT = TREE[1]
LEVELS = np.array([*IQ4_TABLE[0::2], *IQ4_TABLE[1::2]], F)  # even levels, then odd


@njit(forceinline=True)
def _descend(lanes, v):  # type: ignore[no-untyped-def]
    """Node 8..15 above the nearest level of each lane, and whether it is the lower (even) one of the node's two."""
    node = select(v < ROOT, 2, 3)  # not v >= ROOT: ggml sends NaN up
    node = node + node + select(v < pick8(lanes, TREE, 0, node), 0, 1)
    node = node + node + select(v < pick8(lanes, TREE, 0, node), 0, 1)
    return node, v < pick8(lanes, TREE, 8, node)


@njit(forceinline=True)
def _level(lanes, v):  # type: ignore[no-untyped-def]
    """The nearest of the 16 levels, as a float."""
    node, even = _descend(lanes, v)
    return select(even, pick8(lanes, LEVELS, 0, node), pick8(lanes, LEVELS, 8, node))


@njit(forceinline=True)
def _code(lanes, v):  # type: ignore[no-untyped-def]
    """The index of the nearest level."""
    node, even = _descend(lanes, v)
    return node + node - select(even, 16, 15)


@njit(forceinline=True)
def _sums(lanes, X, W, factor):  # type: ignore[no-untyped-def]
    """Sums of w * q * x and w * q * q with q the level of factor * x."""
    n = count(lanes)
    sum_qx = sum_q2 = splat(lanes, F(0))
    for i in range(32):
        x = load(lanes, X, i * n)
        q = _level(lanes, factor * x)
        wq = load(lanes, W, i * n) * q
        sum_qx, sum_q2 = sum_qx + wq * x, sum_q2 + wq * q
    return sum_qx, sum_q2


@njit(forceinline=True)
def _fit(lanes, X, W, scales, at):  # type: ignore[no-untyped-def]
    """Scale of each lane's 32 values by weighted least squares over candidate factors; X, W f32[32 * n].

    Written to `scales` at `at`.
    """
    zero = splat(lanes, F(0))
    peak, size = peaks(lanes, X, 32)
    factor = F(1) / (peak / -FIRST)
    sum_qx, sum_q2 = _sums(lanes, X, W, factor)
    scale = select(sum_q2 > F(0), sum_qx / sum_q2, zero)
    best = scale * sum_qx
    for step in range(-TRIES, TRIES + 1):
        sum_qx, sum_q2 = _sums(lanes, X, W, F(step + FIRST) / peak)
        better = (sum_q2 > F(0)) & (sum_qx * sum_qx > best * sum_q2)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
    store(scales, at, select(size < TINY, zero, scale))


@njit(forceinline=True)
def _put_codes(row, x, at, inverse, out, o):  # type: ignore[no-untyped-def]
    """The codes of 32 weights in 16 bytes: byte i holds code i low and code i + 16 high."""
    for i in range(0, 16, count(row)):
        low, high = _code(row, load(row, x, at + i) * inverse), _code(row, load(row, x, at + 16 + i) * inverse)
        store(out, o + i, low | high << 4)


@njit(forceinline=True)
def _weights(lanes, X, first, k, importance, means, span, S, W):  # type: ignore[no-untyped-def]
    n = count(lanes)
    if importance is None:
        for i in range(32):
            x = load(lanes, X, i * n)
            store(W, i * n, x * x)
    else:
        weigh(lanes, X, first, 32, k, importance, means, span, S, W)


@njit(cache=True, nogil=True, error_model="numpy")
def iq4_nl(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    X, W, S, scales = scratch(32 * n), scratch(32 * n), scratch(n), scratch(n)
    means = None if importance is None else mean_squares(lanes, x, 32, 2 / 32, 1)
    for first in range(0, x.size // 32, n):
        transpose(lanes, x, first, 32, X)
        _weights(lanes, X, first, k, importance, means, 32, S, W)
        _fit(lanes, X, W, scales, 0)
        for block in range(first, min(first + n, x.size // 32)):
            scale = scales[block - first]
            put_half(row, out, block * 18, scale)
            inverse = F(1) / scale if scale != F(0) else F(0)
            _put_codes(row, x, block * 32, inverse, out, block * 18 + 2)


@njit(cache=True, nogil=True, error_model="numpy")
def iq4_xs(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n = count(lanes)
    stride = max(n, 8)
    X, W, S, scales = scratch(32 * n), scratch(32 * n), scratch(n), scratch(stride)
    means = None if importance is None else mean_squares(lanes, x, 256, 2 / 256, 1)
    for first in range(0, x.size // 32, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, 32, X)
            _weights(lanes, X, first + lane, k, importance, means, 256, S, W)
            _fit(lanes, X, W, scales, lane)
        for block in range(first // 8, min(first + stride, x.size // 32) // 8):
            _finish_xs(row, x, out, block * 136, block, scales, block * 8 - first)


@njit(forceinline=True)
def _finish_xs(row, x, out, o, block, scales, at):  # type: ignore[no-untyped-def]
    """Round the eight scales of one super-block and write its 136 bytes."""
    greatest = F(0)
    for j in range(at, at + 8):
        greatest = scales[j] if abs(scales[j]) > abs(greatest) else greatest
    d = -greatest / F(32)
    to_scale = F(1) / d if d != F(0) else F(0)
    put_half(row, out, o, d)
    high = 0
    for j in range(8):
        ls = min(max(nearest_int(to_scale * scales[at + j]), -32), 31)
        scale = d * F(ls)
        inverse = F(1) / scale if scale != F(0) else F(0)
        _put_codes(row, x, block * 256 + j * 32, inverse, out, o + 8 + j * 16)
        stored = ls + 32
        low = stored & 15 if j % 2 == 0 else out[o + 4 + j // 2] | (stored & 15) << 4
        out[o + 4 + j // 2] = U8(low)
        high |= stored >> 4 << 2 * j
    out[o + 2], out[o + 3] = U8(high & 255), U8(high >> 8)
