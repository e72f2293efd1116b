"""ggml's types whose codes are entries of a codebook of -1, 0 and 1, all moved by an eighth up or down: iq1_s, iq1_m.

One sub-block of 32 (iq1_s) or 16 weights per lane: sorted, every split into three runs is tried for each move, and what does
best becomes the nearest entries. iq1_m moves each 8 weights by themselves. Kernels take x f32[n * 256] in rows of k, importance
(see `weigh`), out u8[n * block nbytes] and the codebook's cells.
Source: ggml/src/ggml-quants.c, quantize_row_iq1_{s,m}_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import mask_bits, mean_squares, transpose, weigh
from qconvert.kernels.codebook_search import FAR, greatest_of, settle_octets, step_of
from qconvert.kernels.half import put_half
from qconvert.kernels.lanes import (
    absolute,
    any_lane,
    count,
    load,
    maximum,
    ones,
    scratch,
    select,
    splat,
    store,
    to_float,
    to_int,
)

F = np.float32
U = np.uint64
U8 = np.uint8
UP, DOWN = F(-0.875), F(-1.125)  # the value of level 0, where values are moved up or down
LEVELS = np.array([UP, UP + 1, UP + 2, 0] * 4 + [DOWN, DOWN + 1, DOWN + 2, 0] * 4, F)
LOWEST = F(-3.4028234663852886e38)


@njit(forceinline=True)
def _rank(lanes, X, size, ranks):  # type: ignore[no-untyped-def]
    """Where each of a lane's values comes in ascending order, equals in the order that they have."""
    n = count(lanes)
    for i in range(size):
        x, rank = load(lanes, X, i * n), to_int(splat(lanes, F(0)))
        for j in range(i):
            before = ones(load(lanes, X, j * n) <= x)
            rank = rank + before
            store(ranks, j * n, load(lanes, ranks, j * n) + (1 - before))
        store(ranks, i * n, rank)


@njit(forceinline=True)
def _running(lanes, X, W, size, begin, end, ranks, SX, SW):  # type: ignore[no-untyped-def]
    """Sums of W * X and of W over the first i of each lane's values in order, i = 0 .. size; of those begin .. end alone."""
    n, zero = count(lanes), splat(lanes, F(0))
    for i in range(size + 1):
        store(SX, i * n, zero)
        store(SW, i * n, zero)
    for i in range(begin, end):
        for lane in range(n):
            at, w = (ranks[i * n + lane] + 1) * n + lane, W[i * n + lane]
            SX[at], SW[at] = w * X[i * n + lane], w
    for i in range(1, size + 1):
        store(SX, i * n, load(lanes, SX, (i - 1) * n) + load(lanes, SX, i * n))
        store(SW, i * n, load(lanes, SW, (i - 1) * n) + load(lanes, SW, i * n))


@njit(forceinline=True)
def _better(qx, q2, best):  # type: ignore[no-untyped-def]
    return (q2 > F(0)) & (qx * qx > best * q2)


@njit(forceinline=True)
def _split_whole(lanes, X, W, ranks, SX, SW, T):  # type: ignore[no-untyped-def]
    """Scale of each lane's 32 values, and how: first | second << 6 | move << 12, -1 where nothing is. move: 0 up, 1 down.

    T f32[4 * 33 * n] is scratch.
    """
    n, size = count(lanes), 32
    stride = (size + 1) * n
    _running(lanes, X, W, size, 0, size, ranks, SX, SW)
    all_x, all_w = load(lanes, SX, size * n), load(lanes, SW, size * n)
    for i in range(size + 1):
        x, w = all_x - load(lanes, SX, i * n), all_w - load(lanes, SW, i * n)
        store(T, i * n, x * (UP + F(2)))
        store(T, i * n + stride, x * (DOWN + F(2)))
        store(T, i * n + 2 * stride, w * (UP + F(2)) * (UP + F(2)))
        store(T, i * n + 3 * stride, w * (DOWN + F(2)) * (DOWN + F(2)))
    scale, best, how = splat(lanes, F(0)), splat(lanes, LOWEST), to_int(splat(lanes, F(-1)))
    for i in range(size + 1):
        x, w = load(lanes, SX, i * n), load(lanes, SW, i * n)
        up_x, down_x, up_w, down_w = x * UP, x * DOWN, w * UP * UP, w * DOWN * DOWN
        for j in range(i, size + 1):
            x_between = (load(lanes, SX, j * n) - x) * (UP + F(1))
            w_between = (load(lanes, SW, j * n) - w) * (UP + F(1)) * (UP + F(1))
            qx = up_x + x_between + load(lanes, T, j * n)
            q2 = up_w + w_between + load(lanes, T, j * n + 2 * stride)
            other_qx = down_x - x_between + load(lanes, T, j * n + stride)
            other_q2 = down_w + w_between + load(lanes, T, j * n + 3 * stride)
            up = _better(qx, q2, best)
            if any_lane(up | _better(other_qx, other_q2, best)):
                scale = select(up, qx / q2, scale)
                best, how = select(up, scale * qx, best), select(up, i | j << 6, how)
                down = _better(other_qx, other_q2, best)
                scale = select(down, other_qx / other_q2, scale)
                best, how = select(down, scale * other_qx, best), select(down, i | j << 6 | 1 << 12, how)
    return scale, how


@njit(forceinline=True)
def _split_halves(lanes, X, W, ranks, SX, SW, T):  # type: ignore[no-untyped-def]
    """The same of 16 values whose halves are moved apart: 2 for the first, 1 for the second, where it is down.

    SX, SW f32[2 * 17 * n]; T f32[4 * 17 * n] is scratch.
    """
    n, size = count(lanes), 16
    stride = (size + 1) * n
    for half in range(2):
        _running(lanes, X, W, size, 8 * half, 8 * half + 8, ranks, SX[half * stride :], SW[half * stride :])
    up, down = UP + F(2), DOWN + F(2)
    for i in range(size + 1):
        for half in range(2):
            w = load(lanes, SW, half * stride + i * n)
            store(T, i * n + 2 * half * stride, w * F(-1.25))
            store(T, i * n + (2 * half + 1) * stride, w * F(-0.75))
    x0, x1 = load(lanes, SX, size * n), load(lanes, SX, stride + size * n)
    w0, w1 = load(lanes, SW, size * n), load(lanes, SW, stride + size * n)
    scale, best, how = splat(lanes, F(0)), splat(lanes, LOWEST), to_int(splat(lanes, F(-1)))
    for i in range(size + 1):
        a, b = load(lanes, SX, i * n), load(lanes, SX, stride + i * n)
        v, w = load(lanes, SW, i * n), load(lanes, SW, stride + i * n)
        up0, down0 = w0 * up * up + v * F(0.75), w0 * down * down + v * F(1.25)
        up1, down1 = w1 * up * up + w * F(0.75), w1 * down * down + w * F(1.25)
        for j in range(i, size + 1):
            s0, s1 = a + load(lanes, SX, j * n), b + load(lanes, SX, stride + j * n)
            qx0, qx1, other_qx0, other_qx1 = x0 * up - s0, x1 * up - s1, x0 * down - s0, x1 * down - s1
            q20, other_q20 = up0 + load(lanes, T, j * n), down0 + load(lanes, T, j * n + stride)
            q21, other_q21 = up1 + load(lanes, T, j * n + 2 * stride), down1 + load(lanes, T, j * n + 3 * stride)
            uu, ud, du, dd = qx0 + qx1, qx0 + other_qx1, other_qx0 + qx1, other_qx0 + other_qx1
            uu2, ud2, du2, dd2 = q20 + q21, q20 + other_q21, other_q20 + q21, other_q20 + other_q21
            found = _better(uu, uu2, best) | _better(ud, ud2, best) | _better(du, du2, best) | _better(dd, dd2, best)
            if any_lane(found):
                where = i | j << 6
                scale, best, how = _take(uu, uu2, where, scale, best, how)
                scale, best, how = _take(ud, ud2, where | 1 << 12, scale, best, how)
                scale, best, how = _take(du, du2, where | 2 << 12, scale, best, how)
                scale, best, how = _take(dd, dd2, where | 3 << 12, scale, best, how)
    return scale, how


@njit(forceinline=True)
def _take(qx, q2, where, scale, best, how):  # type: ignore[no-untyped-def]
    better = _better(qx, q2, best)
    scale = select(better, qx / q2, scale)
    return scale, select(better, scale * qx, best), select(better, where, how)


@njit(forceinline=True)
def _sums(lanes, X, W, size, words, moves, at, stride):  # type: ignore[no-untyped-def]
    """Sums of w * q * x and w * q * q with q the values of the words."""
    n = count(lanes)
    sum_qx = sum_q2 = splat(lanes, F(0))
    move = load(lanes, moves, at)
    for octet in range(size // 8):
        word = load(lanes, words, octet * stride + at)
        least = select(_down(move, octet, size), splat(lanes, DOWN), splat(lanes, UP))
        for i in range(8):
            q = to_float(word >> 2 * i & 3) + least
            wq = load(lanes, W, (octet * 8 + i) * n) * q
            sum_qx, sum_q2 = sum_qx + wq * load(lanes, X, (octet * 8 + i) * n), sum_q2 + wq * q
    return sum_qx, sum_q2


@njit(forceinline=True)
def _down(move, octet, size):  # type: ignore[no-untyped-def]
    """Whether those 8 weights are moved down."""
    return (move & (2 if size == 16 and octet == 0 else 1)) != 0


@njit(forceinline=True)
def _super_blocks(lanes, row, x, k, importance, out, cells, size, tiny, finish, nbytes):  # type: ignore[no-untyped-def]
    """All super-blocks of x: split their sub-blocks of `size`, take the nearest entries, then `finish` each."""
    n, blocks, per = count(lanes), x.size // 256, 256 // size
    stride, octets = max(n, per), size // 8
    X, W, T, S, levels = scratch(size * n), scratch(size * stride), scratch(4 * 33 * n), scratch(n), scratch(16)
    SX, SW, D = scratch(34 * n), scratch(34 * n), scratch(8 * 16)
    E, C, ranks = np.empty(16, np.int32), np.empty(n, np.int32), np.zeros(size * n, np.int32)
    words, moves, scales = np.empty(octets * stride, np.int32), np.empty(stride, np.int32), scratch(stride)
    means = mean_squares(lanes, x, 256, 2, 256)
    zero = splat(lanes, F(0))
    for first in range(0, blocks * per, stride):
        for lane in range(0, stride, n):
            transpose(lanes, x, first + lane, size, X)
            V = W[size * lane :]
            if importance is None:
                for i in range(size):
                    v = load(lanes, X, i * n)
                    store(V, i * n, v * v)
            else:
                weigh(lanes, X, first + lane, size, k, importance, means, 256, S, V)
            peak = absolute(load(lanes, X, 0))
            for i in range(1, size):
                peak = maximum(peak, absolute(load(lanes, X, i * n)))
            _rank(lanes, X, size, ranks)
            if size == 32:
                scale, how = _split_whole(lanes, X, V, ranks, SX, SW, T)
            else:
                scale, how = _split_halves(lanes, X, V, ranks, SX, SW, T)
            nothing = (peak < tiny) | (how < 0)
            begin, end, move = how & 63, how >> 6 & 63, how >> 12
            turned = scale < F(0)
            scale = select(turned, F(0) - scale, scale)
            move = select(turned, (1 if size == 32 else 3) - move, move)
            store(moves, lane, select(nothing, 0, move))
            store(S, 0, scale)
            far = to_int(zero)
            for octet in range(octets):
                cell = to_int(zero)
                for i in range(7, -1, -1):
                    rank = load(lanes, ranks, (octet * 8 + i) * n)
                    level = ones(rank >= begin) + ones(rank >= end)
                    cell = cell * 3 + select(turned, 2 - level, level)
                store(C, 0, cell)
                down = mask_bits(_down(move, octet, size))
                searched = (U(0xFFFFFFFFFFFFFFFF) >> U(64 - n)) & ~mask_bits(nothing)
                at = octet * stride + lane
                settle_octets(lanes, row, X, V, octet * 8 * n, S, C, LEVELS, down, searched, cells, levels, D, E, words, at)
                far = far | load(lanes, words, at)
            again = (far & FAR) != 0
            if any_lane(again):
                sum_qx, sum_q2 = _sums(lanes, X, V, size, words, moves, lane, stride)
                scale = select(again & (sum_qx > F(0)) & (sum_q2 > F(0)), sum_qx / sum_q2, scale)
            store(scales, lane, select(nothing, zero, scale))
            for octet in range(octets):
                at = octet * stride + lane
                store(words, at, select(nothing, 0, load(lanes, words, at) & 0xFFFF))
        for block in range(first // per, min((first + stride) // per, blocks)):
            at = block * per - first
            finish(lanes, row, x, block, W, out, block * nbytes, scales, at, cells.entry, words, moves, stride)


@njit(forceinline=True)
def _finish_iq1_s(lanes, row, x, block, W, out, o, scales, at, entry_of, words, moves, stride):  # type: ignore[no-untyped-def]
    d = greatest_of(scales, at, 8) / F(15)
    put_half(row, out, o, d * F(1.125))
    inverse = F(1) / d
    for j in range(8):
        high = 0
        for octet in range(4):
            entry = entry_of[words[octet * stride + at + j]]
            out[o + 2 + 4 * j + octet] = U8(entry & 255)
            high |= entry >> 8 << 3 * octet
        if d != F(0):
            high |= (step_of(scales[at + j], inverse, 7) | moves[at + j] << 3) << 12
        out[o + 34 + 2 * j], out[o + 35 + 2 * j] = U8(high & 255), U8(high >> 8)


@njit(forceinline=True)
def _finish_iq1_m(lanes, row, x, block, W, out, o, scales, at, entry_of, words, moves, stride):  # type: ignore[no-untyped-def]
    """The one f16 is fitted to all weights once the steps are known; its four parts stand above those of 4 sub-blocks each."""
    n, d = count(lanes), greatest_of(scales, at, 16) / F(15)
    inverse, sum_qx, sum_q2 = F(1) / d, F(0), F(0)
    for i in range(4):
        packed = 0
        for j in range(4 * i, 4 * i + 4):
            step = step_of(scales[at + j], inverse, 7) if d != F(0) else 0
            packed |= step << 3 * (j - 4 * i)
            high = 0
            for octet in range(2):
                word, down = words[octet * stride + at + j], moves[at + j] >> (1 - octet) & 1
                entry = entry_of[word]
                out[o + 2 * j + octet] = U8(entry & 255)
                high |= (entry >> 8 | (down << 3 if d != F(0) else 0)) << 4 * octet
                for m in range(8):
                    q = (F(word >> 2 * m & 3) + (DOWN if down else UP)) * F(2 * step + 1)
                    w = W[16 * ((at + j) // n * n) + (octet * 8 + m) * n + (at + j) % n]
                    sum_qx += w * q * x[block * 256 + j * 16 + octet * 8 + m]
                    sum_q2 += w * q * q
            out[o + 32 + j] = U8(high)
        out[o + 48 + 2 * i], out[o + 49 + 2 * i] = U8(packed & 255), U8(packed >> 8)
    if d != F(0):
        d = sum_qx / sum_q2 if sum_q2 > F(0) else d
        half = np.empty(2, np.uint8)
        put_half(row, half, 0, d * F(1.1125))
        for i in range(4):
            out[o + 49 + 2 * i] |= U8((half[i // 2] >> 4 * (i % 2) & 15) << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def iq1_s(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 32, F(1e-12), _finish_iq1_s, 50)


@njit(cache=True, nogil=True, error_model="numpy")
def iq1_m(lanes, row, x, k, importance, out, cells):  # type: ignore[no-untyped-def]
    _super_blocks(lanes, row, x, k, importance, out, cells, 16, F(1e-7), _finish_iq1_m, 56)
