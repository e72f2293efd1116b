"""hqq's zero points: half-quadratic splitting under an lp norm of the error, with scales of the extremes. Rows over lanes.

The operations of hqq, optimize_weights_proximal_legacy, in f32 and in its order, but for the mean of a group, which torch
sums in another. It stops when the mean error of the whole weight no longer falls, so how many turns there are is found
from all rows first. Source: hqq 0.2.8, core/quantize.py, core/optimize.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.feedback import ROWS
from qconvert.kernels.fit_quants import extent_of
from qconvert.kernels.lanes import (
    absolute,
    any_lane,
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
from qconvert.scheme import F32

F = np.float32
EARLY = 5  # turns of all groups
FLAT, LARGEST = F(1e-4), F(2e4)  # of a range; of codes per unit


def hqq_zero_points(
    w: F32, n: int, group: int, bits: int, turns: int, norm: float, beta: float, measured: bool = True
) -> tuple[F32, F32, npt.NDArray[np.float64]]:
    """w f32[T,K,32] of n rows -> codes per unit and zero points f32[T,K/group,32]; summed error f64[turns] before each turn
    (where it is measured, else 0)."""
    per, zeros = (np.empty((len(w), w.shape[1] // group, ROWS), F) for _ in range(2))
    errors = np.zeros(turns)
    free = F((1 / beta) ** (1 / (2 - norm)) * 0.999)  # smaller errors are shrunk to 0
    _zero_points(
        choose(8, 32), w.reshape(-1), n, w.shape[1], group, F((1 << bits) - 1), F(norm - 1), F(1 / beta), free,
        per.reshape(-1), zeros.reshape(-1), errors, measured,
    )  # fmt: skip
    return per, zeros, errors


def hqq_codes(w: F32, group: int, bits: int, per: F32, zeros: F32) -> npt.NDArray[np.uint8]:
    """u8[T,K,32]"""
    codes = np.empty(w.shape, np.uint8)
    last = F((1 << bits) - 1)
    _codes(choose(16, 32), w.reshape(-1), group, last, per.reshape(-1), zeros.reshape(-1), codes.reshape(-1))
    return codes


@njit(cache=True, nogil=True, error_model="numpy")
def _codes(lanes, W, group, last, pers, zeros, codes):  # type: ignore[no-untyped-def]
    for g in range(W.size // (group * ROWS)):
        for lane in range(0, ROWS, count(lanes)):
            per, zero = load(lanes, pers, g * ROWS + lane), load(lanes, zeros, g * ROWS + lane)
            for i in range(g * group * ROWS + lane, (g + 1) * group * ROWS, ROWS):
                store(codes, i, to_int(minimum(maximum(rounded(load(lanes, W, i) * per + zero), F(0)), last)))


@njit(forceinline=True)
def _turn(lanes, W, at, stride, group, per, zero, last):  # type: ignore[no-untyped-def]
    """Sums of code - weight in codes and of the error; the greatest error."""
    rest = error = peak = splat(lanes, F(0))
    step = F(1) / per
    for i in range(group):
        x = load(lanes, W, at + i * stride)
        v = x * per
        q = minimum(maximum(rounded(v + zero), F(0)), last)
        e = absolute(x - (q - zero) * step)
        rest, error, peak = rest + (q - v), error + e, maximum(e, peak)
    return rest, error, peak


@njit(forceinline=True)
def _rest_of_codes(lanes, W, at, stride, group, per, zero, last):  # type: ignore[no-untyped-def]
    """The first of these sums alone."""
    rest = splat(lanes, F(0))
    for i in range(group):
        v = load(lanes, W, at + i * stride) * per
        rest = rest + (minimum(maximum(rounded(v + zero), F(0)), last) - v)
    return rest


@njit(forceinline=True)
def _shrunk(lanes, W, at, stride, group, per, zero, last, power, weight, S):  # type: ignore[no-untyped-def]
    """Sum of code - (weight - what is left of its error) in codes."""
    n, rest = count(lanes), splat(lanes, F(0))
    for i in range(group):
        x = load(lanes, W, at + i * stride)
        q = minimum(maximum(rounded(x * per + zero), F(0)), last)
        store(S, 0, x - (q - zero) / per)
        for j in range(n):
            size = abs(S[j])
            left = max(size - weight * size**power, F(0)) if size > F(0) else F(0)
            S[j] = left if S[j] > F(0) else -left
        rest = rest + (q - (x - load(lanes, S, 0)) * per)
    return rest


@njit(forceinline=True)
def _add(errors, begin, end, error):  # type: ignore[no-untyped-def]
    for turn in range(begin, end):
        errors[turn] += error


@njit(forceinline=True)
def _turns(  # type: ignore[no-untyped-def]
    lanes, W, at, stride, rows, group, per, origin, zero, first, end, last, power, weight, free, errors, measured, S, T
):
    """Zero points after turns first..end of the lanes below `rows`, and those before the last turn that was needed.

    S has the errors of that turn; those of turns that would change nothing are added too. origin: zero points that no code is
    clipped by, so no error is above half a code or their distance.
    """
    before, total = zero, np.float64(0)
    for turn in range(first, end):
        near = not any_lane(maximum(absolute(zero - origin), splat(lanes, F(0.5))) * F(1.01) > free * per)
        if near and not measured:
            rest = _rest_of_codes(lanes, W, at, stride, group, per, zero, last)
        else:
            rest, error, peak = _turn(lanes, W, at, stride, group, per, zero, last)
            store(S, 0, error)
            total = np.float64(0)
            for j in range(rows):
                total += np.float64(S[j])
            errors[turn] += total
            if any_lane(peak > free):
                rest = _shrunk(lanes, W, at, stride, group, per, zero, last, power, weight, T)
        before, zero = zero, rest / F(group)
        if not any_lane(zero != before):
            _add(errors, turn + 1, end, total)
            break
    return zero, before


@njit(cache=True, nogil=True, error_model="numpy")
def _zero_points(lanes, W, n, k, group, last, power, weight, free, pers, zeros, errors, measured):  # type: ignore[no-untyped-def]
    """Most groups stand still after a few turns; the others are gathered, so that all lanes work."""
    m, S, T, B = count(lanes), scratch(32), scratch(32), scratch(group * 32)
    early, turns, waiting = min(EARLY, errors.size), errors.size, 0
    G, ids, later, before, origins = scratch(3 * 32), np.empty(32, np.int64), scratch(32), scratch(32), scratch(32)
    G[:] = F(1)
    for t in range(W.size // (k * ROWS)):
        for g in range(k // group):
            for lane in range(0, ROWS, m):
                at, rows = (t * k + g * group) * ROWS + lane, max(0, min(m, n - t * ROWS - lane))
                place = (t * (k // group) + g) * ROWS + lane
                least, greatest = extent_of(lanes, W, at, group)
                extent = greatest - least
                per = select(extent <= FLAT, splat(lanes, F(1)), F(1) / extent * last)
                per = minimum(per, splat(lanes, LARGEST))
                origin = (F(0) - least) * per
                zero, then = _turns(lanes, W, at, ROWS, rows, group, per, origin, origin, 0, early, last, power, weight, free,
                                    errors, measured, S, T)  # fmt: skip
                store(pers, place, per)
                store(zeros, place, zero)
                if early == turns:
                    continue
                store(before, 0, then)
                store(origins, 0, origin)
                still = np.float64(0)
                for j in range(rows):
                    if zeros[place + j] == before[j]:
                        still += np.float64(S[j])
                        continue
                    for i in range(group):
                        B[i * m + waiting] = W[at + i * ROWS + j]
                    G[waiting], G[32 + waiting], G[64 + waiting] = pers[place + j], origins[j], zeros[place + j]
                    ids[waiting] = place + j
                    waiting += 1
                    if waiting == m:
                        _rest(lanes, B, m, group, G, ids, early, last, power, weight, free, errors, measured, later, T, zeros)
                        waiting = 0
                _add(errors, early, turns, still)
    if waiting:
        _rest(lanes, B, waiting, group, G, ids, early, last, power, weight, free, errors, measured, later, T, zeros)


@njit(forceinline=True)
def _rest(lanes, B, rows, group, G, ids, early, last, power, weight, free, errors, measured, S, T, zeros):  # type: ignore[no-untyped-def]
    """The later turns of groups that were gathered: weights B f32[group * lanes]; G: codes per unit, origins, zero points."""
    zero, _ = _turns(lanes, B, 0, count(lanes), rows, group, load(lanes, G, 0), load(lanes, G, 32), load(lanes, G, 64), early,
                     errors.size, last, power, weight, free, errors, measured, S, T)  # fmt: skip
    store(S, 0, zero)
    for j in range(rows):
        zeros[ids[j]] = S[j]
