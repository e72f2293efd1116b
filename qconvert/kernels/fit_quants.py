"""Scales and offsets of least weighted squared error, group by group, of weights in tiles (see feedback.py): rows over lanes.

Each start of a list gives codes, codes give the scale (and offset) that suits them best, and from the best start on both
take turns. importance f32[K]: what a squared error of a column costs, e.g. the mean square of its inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.feedback import E4M3, INTEGERS, ROWS, Grid, _coded
from qconvert.kernels.lanes import absolute, choose, count, load, maximum, minimum, rounded, select, splat, spread, store
from qconvert.scheme import F32

F = np.float32
TURNS = 6
TINY = F(1e-37)
# The width of the grid in parts of the range of weights, by bits
SPANS = {
    1: (0.5, 0.7), 2: tuple(np.linspace(0.4, 1.1, 8)), 3: tuple(np.linspace(0.5, 1.1, 8)),
    4: tuple(np.linspace(0.65, 1.05, 8)), 5: tuple(np.linspace(0.8, 1.02, 6)), 6: tuple(np.linspace(0.88, 1.01, 6)),
    7: tuple(np.linspace(0.94, 1.0, 4)), 8: tuple(np.linspace(0.97, 1.0, 4)),
}  # fmt: skip
SHIFTS = (-1 / 3, 0.0, 1 / 3)


def fit_lines(w: F32, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
    """w f32[T,K,32], groups first.. of `group` columns -> scales, offsets f32[T,n_groups,32] of codes 0..2**bits - 1.

    Of 1 bit the best of all ways to part a group in two.
    """
    scales, offsets = (np.empty((len(w), n_groups, ROWS), F) for _ in range(2))
    out = scales.reshape(-1), offsets.reshape(-1)
    where = w.reshape(-1), w.shape[1], group, importance, first, n_groups
    if bits == 1:
        _two_levels(*where, *out)
    else:
        _lines(choose(8, 32), *where, np.array(SPANS[bits], F), np.array(SHIFTS, F), F((1 << bits) - 1), *out)
    return scales, offsets


def fit_zero_points(w: F32, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
    """The same where an offset is minus a scale times a code: scales, zero points."""
    scales, zeros = (np.empty((len(w), n_groups, ROWS), F) for _ in range(2))
    spans = np.array((1.0, *SPANS[bits]), F)
    out = scales.reshape(-1), zeros.reshape(-1)
    _zero_points(
        choose(8, 32), w.reshape(-1), w.shape[1], group, importance, first, n_groups, spans, F((1 << bits) - 1), *out
    )  # fmt: skip
    return scales, zeros


def fit_scales(w: F32, group: int, grid: Grid, importance: F32, first: int, n_groups: int) -> F32:
    """Without offsets: scales f32[T,n_groups,32], below 0 where the grid has no mirror and that is better."""
    scales = np.empty((len(w), n_groups, ROWS), F)
    middles = (grid.levels[1:] + grid.levels[:-1]) * F(0.5)
    _scales(
        choose(8, 32), w.reshape(-1), w.shape[1], group, importance, first, n_groups, starts_of(grid), grid.kind,
        F(grid.low), F(grid.high), grid.levels, middles, grid.codes, scales.reshape(-1),
    )  # fmt: skip
    return scales


def extremes(w: F32, group: int, n_groups: int) -> tuple[F32, F32]:
    """The least and the greatest of each group, f32[T,n_groups,32]; a zero is +0."""
    least, greatest = (np.empty((len(w), n_groups, ROWS), F) for _ in range(2))
    _extremes(choose(8, 32), w.reshape(-1), w.shape[1], group, n_groups, least.reshape(-1), greatest.reshape(-1))
    return least, greatest


def starts_of(grid: Grid) -> F32:
    """Where a grid has the peak of a group, for a start."""
    if grid.kind == INTEGERS:
        least, greatest = grid.low, grid.high
        fine = 8.0 / max(greatest - least, 8.0)  # the more codes, the less a grid's end should stay away from the peak
    else:
        least, greatest = float(grid.levels.min()), float(grid.levels.max())
        fine = 1.0 if grid.kind != E4M3 else 0.1
    ends = np.linspace(1 - 0.45 * fine, 1 + 0.35 * fine, 10)
    starts = [end * greatest for end in ends]
    if least != -greatest:  # for positive peaks the one end, for others the other
        starts += [end * least for end in ends]
    return np.array(starts, F)


@njit(forceinline=True)
def extent_of(lanes, W, at, group):  # type: ignore[no-untyped-def]
    least = greatest = load(lanes, W, at)
    for i in range(1, group):
        v = load(lanes, W, at + i * ROWS)
        least, greatest = minimum(v, least), maximum(v, greatest)
    return least, greatest


@njit(cache=True, nogil=True, error_model="numpy")
def _extremes(lanes, W, k, group, n_groups, lows, highs):  # type: ignore[no-untyped-def]
    for t in range(W.size // (k * ROWS)):
        for g in range(n_groups):
            for lane in range(0, ROWS, count(lanes)):
                least, greatest = extent_of(lanes, W, (t * k + g * group) * ROWS + lane, group)
                at = (t * n_groups + g) * ROWS + lane
                store(lows, at, least + F(0))
                store(highs, at, greatest + F(0))


@njit(forceinline=True)
def _line(lanes, W, at, group, importance, column, scale, offset, middle, mean, total, last):  # type: ignore[no-untyped-def]
    """By the codes of a line: the line of least squares through weights less `middle`, and what it explains of them."""
    half = last * F(0.5)
    xq = q1 = qq = splat(lanes, F(0))
    inverse = select(scale > F(0), F(1) / scale, F(0) * scale)
    for i in range(group):
        x, w = load(lanes, W, at + i * ROWS) - middle, spread(lanes, importance, column + i)
        q = minimum(maximum(rounded((x - offset) * inverse), F(0)), last) - half
        wq = w * q
        xq, q1, qq = xq + wq * (x - mean), q1 + wq, qq + wq * q
    variance = qq - q1 * q1 / total
    fit = select(variance > F(0), xq / variance, F(0) * scale)
    return fit, mean - fit * q1 / total - half * fit, xq * fit


@njit(cache=True, nogil=True, error_model="numpy")
def _lines(lanes, W, k, group, importance, first, n_groups, spans, shifts, last, scales, offsets):  # type: ignore[no-untyped-def]
    for t in range(W.size // (k * ROWS)):
        for g in range(n_groups):
            column = (first + g) * group
            total = F(0)
            for i in range(group):
                total += importance[column + i]
            for lane in range(0, ROWS, count(lanes)):
                at = (t * k + column) * ROWS + lane
                least, greatest = extent_of(lanes, W, at, group)
                middle, extent = (least + greatest) * F(0.5), greatest - least
                mean = splat(lanes, F(0))
                for i in range(group):
                    w = spread(lanes, importance, column + i)
                    mean = mean + (load(lanes, W, at + i * ROWS) - middle) * w
                mean = mean / total
                best = scale = offset = splat(lanes, F(0))
                for span in spans:
                    step = extent * (span / last)
                    for shift in shifts:
                        start = F(0) - step * (last * F(0.5) + shift)
                        s, o, explained = _line(
                            lanes, W, at, group, importance, column, step, start, middle, mean, total, last
                        )  # fmt: skip
                        more = explained > best
                        best, scale, offset = select(more, explained, best), select(more, s, scale), select(more, o, offset)
                for _ in range(TURNS):
                    s, o, explained = _line(
                        lanes, W, at, group, importance, column, scale, offset, middle, mean, total, last
                    )  # fmt: skip
                    more = explained > best
                    best, scale, offset = select(more, explained, best), select(more, s, scale), select(more, o, offset)
                found = scale > F(0)
                store(scales, (t * n_groups + g) * ROWS + lane, scale)
                store(offsets, (t * n_groups + g) * ROWS + lane, select(found, middle + offset, middle + mean))


@njit(cache=True, nogil=True, error_model="numpy")
def _two_levels(W, k, group, importance, first, n_groups, scales, offsets):  # type: ignore[no-untyped-def]
    """Sorted, the lower part gets its mean and the upper part its own; the best cut explains most."""
    x, w = np.empty(group), np.empty(group)
    for t in range(W.size // (k * ROWS)):
        for g in range(n_groups):
            for lane in range(ROWS):
                total = weighted = 0.0
                for i in range(group):
                    x[i] = W[(t * k + (first + g) * group + i) * ROWS + lane]
                    w[i] = importance[(first + g) * group + i]
                    total, weighted = total + w[i], weighted + w[i] * x[i]
                order = np.argsort(x)
                below = below_x = 0.0
                low = high = weighted / total
                best = weighted * low
                for i in range(group - 1):
                    j = order[i]
                    below, below_x = below + w[j], below_x + w[j] * x[j]
                    if x[order[i + 1]] > x[j] and total > below > 0.0:
                        a, b = below_x / below, (weighted - below_x) / (total - below)
                        explained = below_x * a + (weighted - below_x) * b
                        if explained > best:
                            best, low, high = explained, a, b
                at = (t * n_groups + g) * ROWS + lane
                scales[at], offsets[at] = high - low, low


@njit(cache=True, nogil=True, error_model="numpy")
def _zero_points(lanes, W, k, group, importance, first, n_groups, spans, last, scales, zeros):  # type: ignore[no-untyped-def]
    for t in range(W.size // (k * ROWS)):
        for g in range(n_groups):
            column = (first + g) * group
            for lane in range(0, ROWS, count(lanes)):
                at = (t * k + column) * ROWS + lane
                nothing = splat(lanes, F(0))
                least, greatest = extent_of(lanes, W, at, group)
                least, greatest = minimum(least, nothing), maximum(greatest, nothing)
                middle, extent = (least + greatest) * F(0.5), greatest - least
                best = scale = zero = nothing
                for turn in range(spans.size * 3 + TURNS):
                    if turn < spans.size * 3:
                        s = extent * (spans[turn // 3] / last)
                        z = rounded(last * F(0.5) - select(s > TINY, middle / s, nothing)) + F(turn % 3 - 1)
                        z = minimum(maximum(z, nothing), last)
                    else:
                        s, z = scale, zero
                    inverse = select(absolute(s) > TINY, F(1) / s, nothing)
                    xq = qq = nothing
                    for i in range(group):
                        x, w = load(lanes, W, at + i * ROWS), spread(lanes, importance, column + i)
                        q = minimum(maximum(rounded(x * inverse), F(0) - z), last - z)
                        xq, qq = xq + w * x * q, qq + w * q * q
                    fit = select(qq > F(0), xq / qq, nothing)
                    more = (xq * fit > best) & (fit > F(0))
                    best, scale, zero = select(more, xq * fit, best), select(more, fit, scale), select(more, z, zero)
                store(scales, (t * n_groups + g) * ROWS + lane, scale)
                store(zeros, (t * n_groups + g) * ROWS + lane, zero)


@njit(cache=True, nogil=True, error_model="numpy")
def _scales(lanes, W, k, group, importance, first, n_groups, starts, kind, low, high, levels, middles, codes, scales):  # type: ignore[no-untyped-def]
    for t in range(W.size // (k * ROWS)):
        for g in range(n_groups):
            column = (first + g) * group
            for lane in range(0, ROWS, count(lanes)):
                at = (t * k + column) * ROWS + lane
                nothing = splat(lanes, F(0))
                peak = nothing
                for i in range(group):
                    x = load(lanes, W, at + i * ROWS)
                    peak = select(absolute(x) > absolute(peak), x, peak)
                best = scale = nothing
                for turn in range(starts.size + TURNS):
                    s = peak / starts[min(turn, starts.size - 1)] if turn < starts.size else scale
                    xq = qq = nothing
                    for i in range(group):
                        x, w = load(lanes, W, at + i * ROWS), spread(lanes, importance, column + i)
                        _, value = _coded(lanes, x, s, nothing, kind, low, high, levels, middles, codes)
                        xq, qq = xq + w * x * value, qq + w * value * value
                    fit = select(qq > F(0), xq / qq, nothing)
                    more = xq * fit > best
                    best, scale = select(more, xq * fit, best), select(more, s * fit, scale)
                store(scales, (t * n_groups + g) * ROWS + lane, scale)


def ones(k: int) -> npt.NDArray[np.float32]:
    return np.ones(k, F)
