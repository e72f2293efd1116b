"""Codes on grids that are given, with or without feeding each column's error forward. Rows over lanes.

Weights lie in tiles of 32 rows, column by column: f32[T*K*32]. A grid is scale * level + offset, one scale and offset for
the columns of a group; levels are integers low..high, a sorted table of up to 16, or e4m3. Sums are in the order of columns,
so a row's codes are the same whatever rows stand beside it and however the columns are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.across import transpose
from qconvert.kernels.cholesky import PANEL as PANEL
from qconvert.kernels.lanes import (
    Lanes,
    absolute,
    bits_of,
    choose,
    copy_sign,
    count,
    float_of,
    load,
    maximum,
    minimum,
    rounded,
    select,
    splat,
    spread,
    store,
    to_int,
)
from qconvert.scheme import F32, Array, Bytes

F = np.float32
ROWS = 32  # of a tile
TOGETHER, CACHED = 64, 256  # columns that take errors of as many others at a time
INTEGERS, TABLE, E4M3 = 0, 1, 2


class Grid(NamedTuple):
    """levels of a unit scale. codes: of the sorted levels of a table; a code of integers is itself, of e4m3 its byte."""

    kind: int
    low: float
    high: float
    levels: F32
    codes: F32


def tiled(x: F32, columns: int = PANEL) -> F32:
    """x f32[N,K] -> f32[T, K rounded up to a multiple of `columns`, 32], zeros (or the last row again) beyond."""
    n, k = x.shape
    if n and k % 16 == 0 and k % columns == 0 and choose(8, 32).n > 1:
        out = np.empty((-(-n // ROWS), k, ROWS), F)
        _tile(Lanes(ROWS, choose(8, 32).wide), np.ascontiguousarray(x, F).reshape(-1), k, out.reshape(-1))
        return out
    padded = np.zeros((-(-n // ROWS) * ROWS, -(-k // columns) * columns), F)
    padded[:n, :k] = x
    return np.ascontiguousarray(padded.reshape(-1, ROWS, padded.shape[1]).transpose(0, 2, 1))


def untiled(tiles: Array, n: int, k: int) -> Array:
    """[T,K,32] -> [n,k]"""
    return np.ascontiguousarray(tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])[:n, :k])


def feed(w: F32, errors: F32, panels: F32, taken: tuple[int, int], begin: int, end: int) -> None:
    """Take the errors of columns `taken`, times their factors, from w f32[T,K,32], columns begin..end (of 8)."""
    _feed(choose(16, 32), w.reshape(-1), errors.reshape(-1), panels, w.shape[1], *taken, begin, end)


def with_feedback(
    w: F32, errors: F32, panels: F32, scales: F32, offsets: F32, groups: npt.NDArray[np.int64], grid: Grid, begin: int,
    end: int, codes: Bytes,
) -> None:  # fmt: skip
    """Codes u8[T,K,32] of columns begin..end (of 8) of w, to which the errors of those before `begin` were fed.

    scales, offsets f32[T,G,32]; groups i64[K]: of each column. errors f32[T,K,32] and w change.
    """
    middles = (grid.levels[1:] + grid.levels[:-1]) * F(0.5)
    flat = (a.reshape(-1) for a in (w, errors, panels, scales, offsets))
    _with_feedback(
        choose(16, 32), *flat, groups, w.shape[1], scales.shape[1], grid.kind, F(grid.low), F(grid.high), grid.levels, middles,
        grid.codes, begin, end, codes.reshape(-1),
    )  # fmt: skip


def nearest(w: F32, scales: F32, offsets: F32, groups: npt.NDArray[np.int64], grid: Grid) -> Bytes:
    """w f32[T,K,32] -> the nearest codes u8[T,K,32]."""
    middles, codes = (grid.levels[1:] + grid.levels[:-1]) * F(0.5), np.empty(w.shape, np.uint8)
    flat = (a.reshape(-1) for a in (w, scales, offsets))
    _nearest(
        choose(16, 32), *flat, groups, w.shape[1], scales.shape[1], grid.kind, F(grid.low), F(grid.high), grid.levels, middles,
        grid.codes, codes.reshape(-1),
    )  # fmt: skip
    return codes


@njit(cache=True, nogil=True, error_model="numpy")
def _tile(lanes, x, k, out):  # type: ignore[no-untyped-def]
    for t in range(out.size // (k * ROWS)):
        transpose(lanes, x, t * ROWS, k, out[t * k * ROWS : (t + 1) * k * ROWS])


@njit(forceinline=True)
def _coded(lanes, w, scale, offset, kind, low, high, levels, middles, codes):  # type: ignore[no-untyped-def]
    """The nearest code, as an integer, and what it stands for."""
    inverse = select(scale != F(0), F(1) / scale, F(0) * scale)
    u = (w - offset) * inverse
    if kind == INTEGERS:
        level = minimum(maximum(rounded(u), low), high)
        return to_int(level), level * scale + offset
    if kind == TABLE:
        level, code = splat(lanes, levels[0]), splat(lanes, codes[0])
        for i in range(middles.size):
            above = u > middles[i]
            level = select(above, splat(lanes, levels[i + 1]), level)
            code = select(above, splat(lanes, codes[i + 1]), code)
        return to_int(code), level * scale + offset
    size = minimum(absolute(u), F(448))
    power = maximum(float_of(bits_of(size) & 0x7F800000), splat(lanes, F(2.0**-6)))
    size = rounded(size / power * F(8)) * power * F(0.125)
    byte = select(size < F(2.0**-6), to_int(size * F(512)), (bits_of(size) >> 20) - (120 << 3))
    level = copy_sign(F(1), u) * size
    return select(level < F(0), byte | 0x80, byte), level * scale + offset


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(lanes, W, S, Z, groups, k, g, kind, low, high, levels, middles, table, codes):  # type: ignore[no-untyped-def]
    for t in range(W.size // (k * ROWS)):
        for lane in range(0, ROWS, count(lanes)):
            for c in range(groups.size):
                at, level_at = (t * k + c) * ROWS + lane, (t * g + groups[c]) * ROWS + lane
                w, scale, offset = load(lanes, W, at), load(lanes, S, level_at), load(lanes, Z, level_at)
                code, _ = _coded(lanes, w, scale, offset, kind, low, high, levels, middles, table)
                store(codes, at, code)


@njit(forceinline=True)
def fed(lanes, W, E, P, base, at, errors_at, begin, end):  # type: ignore[no-untyped-def]
    """Four columns of W at `at` less the errors of columns begin..end."""
    w0, w1, w2, w3 = (load(lanes, W, at), load(lanes, W, at + ROWS), load(lanes, W, at + 2 * ROWS),
                      load(lanes, W, at + 3 * ROWS))  # fmt: skip
    for i in range(begin, end):
        e, v = load(lanes, E, errors_at + i * ROWS), base + i * PANEL
        w0, w1 = w0 - e * spread(lanes, P, v), w1 - e * spread(lanes, P, v + 1)
        w2, w3 = w2 - e * spread(lanes, P, v + 2), w3 - e * spread(lanes, P, v + 3)
    store(W, at, w0)
    store(W, at + ROWS, w1)
    store(W, at + 2 * ROWS, w2)
    store(W, at + 3 * ROWS, w3)


@njit(forceinline=True)
def _panels_fed(lanes, W, E, P, k, first, last, begin, end):  # type: ignore[no-untyped-def]
    """Columns begin..end of all tiles less the errors of columns first..last, as many at a time as stay in the cache."""
    for some in range(first, last, CACHED):
        some_end = min(last, some + CACHED)
        for t in range(W.size // (k * ROWS)):
            for lane in range(0, ROWS, count(lanes)):
                for c in range(begin, end, 4):
                    p = c // PANEL
                    base, at = 32 * p * (p + 1) + c - p * PANEL, (t * k + c) * ROWS + lane
                    fed(lanes, W, E, P, base, at, t * k * ROWS + lane, some, some_end)


@njit(cache=True, nogil=True, error_model="numpy")
def _feed(lanes, W, E, P, k, first, last, begin, end):  # type: ignore[no-untyped-def]
    _panels_fed(lanes, W, E, P, k, first, last, begin, end)


@njit(cache=True, nogil=True, error_model="numpy")
def _with_feedback(lanes, W, E, P, S, Z, groups, k, g, kind, low, high, levels, middles, table, begin, end, codes):  # type: ignore[no-untyped-def]
    for first in range(begin, end, TOGETHER):
        last = min(end, first + TOGETHER)
        _panels_fed(lanes, W, E, P, k, begin, first, first, last)
        for t in range(W.size // (k * ROWS)):
            for lane in range(0, ROWS, count(lanes)):
                for c in range(first, min(groups.size, last)):
                    p = c // PANEL
                    base = 32 * p * (p + 1)
                    at, level_at = (t * k + c) * ROWS + lane, (t * g + groups[c]) * ROWS + lane
                    if c % PANEL == 0:
                        for half in range(0, PANEL, 4):
                            fed(lanes, W, E, P, base + half, at + half * ROWS, t * k * ROWS + lane, first, c)
                    w, scale, offset = load(lanes, W, at), load(lanes, S, level_at), load(lanes, Z, level_at)
                    code, value = _coded(lanes, w, scale, offset, kind, low, high, levels, middles, table)
                    store(codes, at, code)
                    e = w - value
                    store(E, at, e)
                    for j in range(1, (p + 1) * PANEL - c):
                        v = spread(lanes, P, base + c * PANEL + c - p * PANEL + j)
                        store(W, at + j * ROWS, load(lanes, W, at + j * ROWS) - e * v)
