"""Codes of a codebook with feedback: a group of weights becomes the entry that costs least once later columns made up for it.

The errors r of a group of 8 or 4 columns cost r^T M r, M = T^T D T: T takes them to what is left as the columns of the group
are rounded one after another, D is what a squared one of those costs. At scale s and under the signs of the weights x, an
entry of magnitudes v costs s^2 v^T M v - 2 s v^T M x; entries are halves that are summed once, so that each takes 4 (or 2)
products more. Rows over lanes, weights in tiles, as in feedback.py. Source of the idea: block LDL (QuIP#, Tseng et al. 2024).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.codebooks import EVEN, LEAST, entries
from qconvert.kernels.cholesky import PANEL
from qconvert.kernels.feedback import ROWS, fed
from qconvert.kernels.lanes import choose, count, load, ones, scratch, select, splat, spread, store, to_int
from qconvert.scheme import F32, Bytes

F = np.float32
I32 = npt.NDArray[np.int32]
SUPER = 256  # columns under one f16 scale
BY_GROUP, BY_SUB_BLOCK = 1, 2
SHIFTED = {"iq1_m": BY_GROUP, "iq1_s": BY_SUB_BLOCK}  # an eighth is added to or taken from all weights of it
TRIED = np.array([0, -1, 1, -2, 2], F)  # steps from the fine level of ggml's search, which knows of no feedback


class Book(NamedTuple):
    """Entries in the order of their first halves. halves f32[H * width / 2]: what a half may be; begins i32[H + 1]: of the
    entries that share a first half; seconds i32[entries]; values f32[entries * width]."""

    halves: F32
    begins: I32
    seconds: I32
    values: F32
    width: int


@cache
def book(name: str) -> Book:
    signed = name.startswith("iq1")
    values = entries(name).astype(F) * F(8 if signed else 1)
    width, levels = values.shape[1], np.unique(values)
    half, places = width // 2, np.searchsorted(levels, values)
    powers = len(levels) ** np.arange(half)
    first, second = places[:, :half] @ powers, places[:, half:] @ powers
    order, n = np.lexsort((second, first)), len(levels) ** half
    halves = levels[np.arange(n)[:, None] // powers % len(levels)]
    begins = np.searchsorted(first[order], np.arange(n + 1)).astype(np.int32)
    return Book(halves.reshape(-1), begins, second[order].astype(np.int32), values[order].reshape(-1), width)


def metrics(panels: F32, cost: F32, width: int) -> F32:
    """M f32[K / width * width * width] of every group of columns; K is a multiple of 8."""
    out = np.zeros(len(cost) * width, F)
    _metrics(panels, cost.astype(np.float64), width, out)
    return out


def with_entries(
    name: str, w: F32, errors: F32, factors: tuple[F32, F32, F32], d: F32, fine: F32, begin: int, codes: Bytes
) -> None:
    """Codes u8[T,K,32] of the super-block at column `begin` of w f32[T,K,32], to which the errors of those before were fed.

    factors: panels and cost of hessians.Factor, metrics of them. d f32[T,1,32], fine f32[T,S,32]: scales of the super-block
    and of its sub-blocks, whose neighbours are tried: fine, errors f32[T,K,32] and w change.
    """
    b, least = book(name), F(LEAST[name])
    steps = least, least * F(15 if name.startswith("iq1") else 31), 2 * least * TRIED
    flat = (a.reshape(-1) for a in (w, errors, *factors, d, fine))
    kernel = _octets if b.width == 8 else _quartets
    kernel(choose(8, 16), *flat, w.shape[1], fine.shape[1], begin, *b[:-1], *steps, name in EVEN, SHIFTED.get(name, 0),
           codes.reshape(-1))  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def _metrics(panels, cost, width, out):  # type: ignore[no-untyped-def]
    T = np.zeros((width, width))
    for first in range(0, cost.size, width):
        p = first // PANEL
        base = 32 * p * (p + 1) + first - p * PANEL
        for i in range(width):
            T[i] = 0.0
            T[i, i] = 1.0
            for j in range(i):
                T[i] -= panels[base + (first + j) * PANEL + i] * T[j]
        for i in range(width):
            for j in range(width):
                total = 0.0
                for c in range(width):
                    total += T[c, i] * cost[first + c] * T[c, j]
                out[(first + i) * width + j] = F(total)


@njit(forceinline=True)
def _take_signs(lanes, X, S, M, at, width, even, odd):  # type: ignore[no-untyped-def]
    """X becomes magnitudes, S their signs; where they must be even in number (odd: those before), the cheapest turns."""
    n = count(lanes)
    negatives, least = odd, splat(lanes, F(np.inf))
    place = to_int(splat(lanes, F(0)))
    for i in range(width):
        x = load(lanes, X, i * n)
        cost = spread(lanes, M, at + i * width + i) * x * x
        less = cost < least
        least, place = select(less, cost, least), select(less, i, place)
        negatives = negatives + ones(x < F(0))
    for i in range(width):
        x = load(lanes, X, i * n)
        negative = x < F(0)
        if even:
            negative = negative != (((negatives & 1) == 1) & (place == i))
        sign = select(negative, splat(lanes, F(-1)), splat(lanes, F(1)))
        store(S, i * n, sign)
        store(X, i * n, x * sign)


@njit(forceinline=True)
def _prepare(lanes, X, S, M, at, width, scale, A, Q):  # type: ignore[no-untyped-def]
    """A[i] = -2 s (M x)_i and Q[i,j] = s^2 M_ij under signs, twice that off the diagonal."""
    n = count(lanes)
    for i in range(width):
        total, sign = splat(lanes, F(0)), load(lanes, S, i * n)
        for j in range(width):
            m = spread(lanes, M, at + i * width + j) * (sign * load(lanes, S, j * n))
            total = total + m * load(lanes, X, j * n)
            if j > i:
                store(Q, (i * width + j) * n, (scale + scale) * scale * m)
            elif j == i:
                store(Q, (i * width + j) * n, scale * scale * m)
        store(A, i * n, F(-2) * scale * total)


@njit(forceinline=True)
def _alone(lanes, A, Q, width, first, halves, n_halves, costs):  # type: ignore[no-untyped-def]
    """What each half costs by itself, of weights first..first + width / 2."""
    n, half = count(lanes), width // 2
    for h in range(n_halves):
        total = splat(lanes, F(0))
        for i in range(half):
            inner = load(lanes, A, (first + i) * n)
            for j in range(i, half):
                inner = inner + load(lanes, Q, ((first + i) * width + first + j) * n) * spread(lanes, halves, h * half + j)
            total = total + inner * spread(lanes, halves, h * half + i)
        store(costs, h * n, total)


@njit(forceinline=True)
def _across(lanes, Q, width, halves, h, j):  # type: ignore[no-untyped-def]
    """What a unit of weight j of the second half costs more, beside the first half h."""
    n, half = count(lanes), width // 2
    total = splat(lanes, F(0))
    for i in range(half):
        total = total + spread(lanes, halves, h * half + i) * load(lanes, Q, (i * width + half + j) * n)
    return total


@njit(forceinline=True)
def _cheapest(lanes, Q, width, halves, begins, seconds, costs, more):  # type: ignore[no-untyped-def]
    """The least cost and the number of its entry. costs, more: of halves, the first and the second."""
    n, half = count(lanes), width // 2
    best, which = splat(lanes, F(np.inf)), to_int(splat(lanes, F(0)))
    for h in range(begins.size - 1):
        if begins[h] == begins[h + 1]:
            continue
        alone = load(lanes, costs, h * n)
        c0, c1 = _across(lanes, Q, width, halves, h, 0), _across(lanes, Q, width, halves, h, 1)
        c2, c3 = c0, c1
        if half == 4:
            c2, c3 = _across(lanes, Q, width, halves, h, 2), _across(lanes, Q, width, halves, h, 3)
        for e in range(begins[h], begins[h + 1]):
            at = seconds[e] * half
            total = alone + load(lanes, more, seconds[e] * n)
            total = total + c0 * spread(lanes, halves, at) + c1 * spread(lanes, halves, at + 1)
            if half == 4:
                total = total + c2 * spread(lanes, halves, at + 2) + c3 * spread(lanes, halves, at + 3)
            less = total < best
            best, which = select(less, total, best), select(less, e, which)
    return best, which


@njit(forceinline=True)
def _group(  # type: ignore[no-untyped-def]
    lanes, W, M, at, place, scale, halves, begins, seconds, values, even, odd, shifts, width, X, S, A, Q, V, costs, more, chosen
):
    """Codes of the group of columns at W[place], to V, by the metric M[at]. shifts: what is tried as what all of them add."""
    n, n_halves = count(lanes), begins.size - 1
    least, which, shift = splat(lanes, F(np.inf)), to_int(splat(lanes, F(0))), splat(lanes, F(0))
    for turn in range(shifts.size):
        for i in range(width):
            store(X, i * n, load(lanes, W, place + i * ROWS) - scale * shifts[turn])
            store(S, i * n, splat(lanes, F(1)))
        if shifts[turn] == F(0):
            _take_signs(lanes, X, S, M, at, width, even, odd)
        _prepare(lanes, X, S, M, at, width, scale, A, Q)
        _alone(lanes, A, Q, width, 0, halves, n_halves, costs)
        _alone(lanes, A, Q, width, width // 2, halves, n_halves, more)
        cost, entry = _cheapest(lanes, Q, width, halves, begins, seconds, costs, more)
        cost = cost + _constant(lanes, X, M, at, width)
        less = cost < least
        least, which, shift = select(less, cost, least), select(less, entry, which), select(less, shifts[turn], shift)
    store(chosen, 0, which)
    for j in range(n):
        for i in range(width):
            V[i * n + j] = values[chosen[j] * width + i]
    for i in range(width):
        store(V, i * n, load(lanes, V, i * n) * load(lanes, S, i * n) + shift)


@njit(forceinline=True)
def _with_entries(  # type: ignore[no-untyped-def]
    lanes, W, E, P, D, M, coarse, fine, k, subs, begin, halves, begins, seconds, values, low, high, steps, even, shifted,
    codes, width
):  # fmt: skip
    n, size, n_shifts = count(lanes), SUPER // subs, 2 if shifted == BY_SUB_BLOCK else 1
    X, S, A, Q, V = scratch(8 * n), scratch(8 * n), scratch(8 * n), scratch(64 * n), scratch(8 * n)
    costs, more, chosen = scratch((begins.size - 1) * n), scratch((begins.size - 1) * n), np.empty(n, np.int32)
    before, best_codes, best_errors, now = scratch(size * n), scratch(size * n), scratch(size * n), scratch(size * n)
    both = np.array([-1, 1], np.float32)
    shifts = both if shifted == BY_GROUP else np.zeros(1, np.float32)
    for t in range(W.size // (k * ROWS)):
        for lane in range(0, ROWS, n):
            row, d = t * k * ROWS + lane, load(lanes, coarse, t * ROWS + lane)
            for sub in range(subs):
                first, level_at = begin + sub * size, (t * subs + sub) * ROWS + lane
                for c in range(first, first + size, 4):
                    p = c // PANEL
                    fed(lanes, W, E, P, 32 * p * (p + 1) + c - p * PANEL, row + c * ROWS, row, begin, first)
                for i in range(size):
                    store(before, i * n, load(lanes, W, row + (first + i) * ROWS))
                given, best = load(lanes, fine, level_at), splat(lanes, F(np.inf))
                found = given
                for turn in range(steps.size * n_shifts):
                    if shifted == BY_SUB_BLOCK:
                        shifts = both[turn % 2 : turn % 2 + 1]
                    level = given + steps[turn // n_shifts]
                    scale, total, odd = d * level, splat(lanes, F(0)), to_int(splat(lanes, F(0)))
                    for i in range(size):
                        store(W, row + (first + i) * ROWS, load(lanes, before, i * n))
                    for c in range(first, first + size, width):
                        p, at = c // PANEL, row + c * ROWS
                        base = 32 * p * (p + 1)
                        if c % PANEL == 0:
                            odd = to_int(splat(lanes, F(0)))
                            for half in range(0, PANEL, 4):
                                fed(lanes, W, E, P, base + half, at + half * ROWS, row, first, c)
                        closes = even and (c + width) % PANEL == 0
                        _group(lanes, W, M, c * width, at, scale, halves, begins, seconds, values, closes, odd, shifts, width,
                               X, S, A, Q, V, costs, more, chosen)  # fmt: skip
                        for i in range(width):
                            code = load(lanes, V, i * n)
                            odd = odd + ones(code < F(0))
                            e = load(lanes, W, at + i * ROWS) - scale * code
                            total = total + spread(lanes, D, c + i) * e * e
                            store(now, (c + i - first) * n, code)
                            store(E, at + i * ROWS, e)
                            for j in range(i + 1, (p + 1) * PANEL - c):
                                v = spread(lanes, P, base + (c + i) * PANEL + c - p * PANEL + j)
                                store(W, at + j * ROWS, load(lanes, W, at + j * ROWS) - e * v)
                    less = (total < best) & (level >= low) & (level <= high)
                    best, found = select(less, total, best), select(less, level, found)
                    for i in range(size):
                        e = load(lanes, E, row + (first + i) * ROWS)
                        store(best_errors, i * n, select(less, e, load(lanes, best_errors, i * n)))
                        store(best_codes, i * n, select(less, load(lanes, now, i * n), load(lanes, best_codes, i * n)))
                store(fine, level_at, found)
                for i in range(size):
                    store(E, row + (first + i) * ROWS, load(lanes, best_errors, i * n))
                    store(codes, row + (first + i) * ROWS, to_int(load(lanes, best_codes, i * n)))


@njit(forceinline=True)
def _constant(lanes, X, M, at, width):  # type: ignore[no-untyped-def]
    """x^T M x"""
    n, total = count(lanes), splat(lanes, F(0))
    for i in range(width):
        inner = splat(lanes, F(0))
        for j in range(width):
            inner = inner + spread(lanes, M, at + i * width + j) * load(lanes, X, j * n)
        total = total + inner * load(lanes, X, i * n)
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _octets(  # type: ignore[no-untyped-def]
    lanes, W, E, P, D, M, coarse, fine, k, subs, begin, halves, begins, seconds, values, low, high, steps, even, shifted, codes
):
    _with_entries(lanes, W, E, P, D, M, coarse, fine, k, subs, begin, halves, begins, seconds, values, low, high, steps, even,
                  shifted, codes, 8)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def _quartets(  # type: ignore[no-untyped-def]
    lanes, W, E, P, D, M, coarse, fine, k, subs, begin, halves, begins, seconds, values, low, high, steps, even, shifted, codes
):
    _with_entries(lanes, W, E, P, D, M, coarse, fine, k, subs, begin, halves, begins, seconds, values, low, high, steps, even,
                  shifted, codes, 4)  # fmt: skip
