"""The entry of a codebook nearest to a group of weights, among the candidates of its cell: many candidates at a time.

The error of a group is a sum of its weights' errors, and each can have as few as levels are: 3 or 8. They are computed once, as
ggml computes them, and each candidate's are looked up and added in ggml's order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import first_bit, lowest, mask_bits, pick4, pick8
from qconvert.kernels.codebook_cells import LENGTH
from qconvert.kernels.half import nearest_int
from qconvert.kernels.lanes import count, load, maximum, minimum, nearest_any, select, splat, spread, store, to_int, widened

F = np.float32
U = np.uint64
FAR = 1 << 16  # set in a word that was searched for: the cell has no entry of its own
MASK = (1 << LENGTH) - 1


@njit(forceinline=True)
def greatest_of(scales, at, per):  # type: ignore[no-untyped-def]
    """Of the sub-blocks of a super-block; 0 where none is positive."""
    greatest = F(0)
    for j in range(at, at + per):
        greatest = greatest if greatest > scales[j] else scales[j]
    return greatest


@njit(forceinline=True)
def step_of(scale, inverse, top):  # type: ignore[no-untyped-def]
    """The nearest 2 step + 1 that stands for a scale, as a step of 0..top."""
    return min(max(nearest_int(F(0.5) * (inverse * scale - F(1))), 0), top)


@njit(forceinline=True)
def _closest(row, X, R, at, stride, width, steps, T, E, words, begin, length):  # type: ignore[no-untyped-def]
    """Of words[begin : begin + length] the first with the least sum of R * (level - X)**2.

    Weight i of the group is X[at + i * stride]; steps f32[16] its levels, over and over; T f32[8 * 16] and
    E i32[16] are scratch.
    """
    n, bits = count(row), 2 if width == 8 else 3
    if n == 1:
        for i in range(width):
            for level in range(1 << bits):
                difference = steps[level] - X[at + i * stride]
                T[i * 8 + level] = R[at + i * stride] * difference * difference
    else:
        levels = load(row, steps, 0)
        for i in range(width):
            difference = levels - spread(row, X, at + i * stride)
            store(T, i * n, spread(row, R, at + i * stride) * difference * difference)
    apart = 8 if n == 1 else n
    best, where, vectors = splat(row, F(np.inf)), to_int(splat(row, F(0))), (length + n - 1) // n
    for v in range(vectors):
        word = widened(load(row, words, begin + v * n))
        total = pick4(row, T, 0, word) if bits == 2 else pick8(row, T, 0, word)
        for i in range(1, width):
            place = word >> bits * i
            total = total + (pick4(row, T, i * apart, place) if bits == 2 else pick8(row, T, i * apart, place))
        nearer = total < best
        best, where = select(nearer, total, best), select(nearer, v, where)
    least = mask_bits(best == lowest(best))
    lane = first_bit(least)
    if vectors == 1:
        return words[begin + min(lane, n - 1)]
    store(E, 0, where)
    place = 1 << 20
    while least:
        lane = first_bit(least)
        place = min(place, E[lane] * n + lane)
        least &= least - U(1)
    return words[begin + min(place, length - 1)]


@njit(forceinline=True)
def _settle(lanes, row, X, R, at, width, S, C, levels, second, wanted, cells, steps, T, E, words, to):  # type: ignore[no-untyped-def]
    """The word of the entry that stands for a group of each lane, from X[at] on, whose cell is C, at the scale S f32[n].

    To words[to : to + n], FAR set where it was searched for, in lanes of `wanted`. levels f32[16]: the values that levels
    stand for, over and over; from 16 on those of lanes that are in `second`.
    """
    far = U(0)
    for lane in range(count(lanes)):
        span = cells.spans[C[lane]]
        words[to + lane] = cells.words[span >> LENGTH]
        far |= U((span & MASK) != 0) << U(lane)
    far &= wanted
    while far:
        lane = first_bit(far)
        far &= far - U(1)
        span, begin = cells.spans[C[lane]], 16 if second >> U(lane) & U(1) else 0
        for i in range(0, 16, count(row)):
            store(steps, i, S[lane] * load(row, levels, begin + i))
        found = _closest(row, X, R, at + lane, count(lanes), width, steps, T, E, cells.words, span >> LENGTH, span & MASK)
        words[to + lane] = np.int32(found) | FAR


@njit(cache=True, nogil=True, error_model="numpy")
def settle_octets(lanes, row, X, R, at, S, C, levels, second, wanted, cells, steps, T, E, words, to):  # type: ignore[no-untyped-def]
    _settle(lanes, row, X, R, at, 8, S, C, levels, second, wanted, cells, steps, T, E, words, to)


@njit(cache=True, nogil=True, error_model="numpy")
def octets(lanes, row, X, R, size, factor, scale, odd, cells, wanted, S, C, steps, T, E, words):  # type: ignore[no-untyped-def]
    _points(lanes, row, X, R, size, 8, factor, scale, odd, cells, wanted, S, C, steps, T, E, words)


@njit(cache=True, nogil=True, error_model="numpy")
def quartets(lanes, row, X, R, size, factor, scale, odd, cells, wanted, S, C, steps, T, E, words):  # type: ignore[no-untyped-def]
    _points(lanes, row, X, R, size, 4, factor, scale, odd, cells, wanted, S, C, steps, T, E, words)


@njit(forceinline=True)
def _points(lanes, row, X, R, size, width, factor, scale, odd, cells, wanted, S, C, steps, T, E, words):  # type: ignore[no-untyped-def]
    """The word of the entry that stands for each group of each lane's sub-block X f32[size * n], at `scale`, 1 / factor.

    To words i32[size / width * n], FAR set where it was searched for: in lanes whose bit is set in `wanted`. Others are any.
    odd f32[16]: 1, 3, 5 ..., 2 levels + 1, over and over. S f32[n], C i32[n], steps f32[16], T, E are scratch.
    """
    n, radix = count(lanes), 3 if width == 8 else 8
    store(S, 0, scale)
    for group in range(size // width):
        cell = to_int(splat(lanes, F(0)))
        for i in range(width - 1, -1, -1):
            level = nearest_any(F(0.5) * (factor * load(lanes, X, (group * width + i) * n) - F(1)))
            cell = cell * radix + minimum(maximum(level, 0), radix - 1)
        store(C, 0, cell)
        _settle(lanes, row, X, R, group * width * n, width, S, C, odd, U(0), wanted, cells, steps, T, E, words, group * n)
