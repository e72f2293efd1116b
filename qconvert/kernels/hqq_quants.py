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
FLAT, LARGEST = F(1e-4), F(2e4)  # of a range; of codes per unit


def hqq_zero_points(
    w: F32, n: int, group: int, bits: int, turns: int, norm: float, beta: float
) -> tuple[F32, F32, npt.NDArray[np.float64]]:
    """w f32[T,K,32] of n rows -> codes per unit and zero points f32[T,K/group,32]; summed error f64[turns] before each turn."""
    per, zeros = (np.empty((len(w), w.shape[1] // group, ROWS), F) for _ in range(2))
    errors = np.zeros(turns)
    free = F((1 / beta) ** (1 / (2 - norm)) * 0.999)  # smaller errors are shrunk to 0
    _zero_points(
        choose(8, 32), w.reshape(-1), n, w.shape[1], group, F((1 << bits) - 1), F(norm - 1), F(1 / beta), free,
        per.reshape(-1), zeros.reshape(-1), errors,
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
def _turn(lanes, W, at, group, per, zero, last):  # type: ignore[no-untyped-def]
    """Sums of code - weight in codes and of the error; the greatest error."""
    rest = error = peak = splat(lanes, F(0))
    step = F(1) / per
    for i in range(group):
        x = load(lanes, W, at + i * ROWS)
        v = x * per
        q = minimum(maximum(rounded(v + zero), F(0)), last)
        e = absolute(x - (q - zero) * step)
        rest, error, peak = rest + (q - v), error + e, maximum(e, peak)
    return rest, error, peak


@njit(forceinline=True)
def _shrunk(lanes, W, at, group, per, zero, last, power, weight, S):  # type: ignore[no-untyped-def]
    """Sum of code - (weight - what is left of its error) in codes."""
    n, rest = count(lanes), splat(lanes, F(0))
    for i in range(group):
        x = load(lanes, W, at + i * ROWS)
        q = minimum(maximum(rounded(x * per + zero), F(0)), last)
        store(S, 0, x - (q - zero) / per)
        for j in range(n):
            size = abs(S[j])
            left = max(size - weight * size**power, F(0)) if size > F(0) else F(0)
            S[j] = left if S[j] > F(0) else -left
        rest = rest + (q - (x - load(lanes, S, 0)) * per)
    return rest


@njit(cache=True, nogil=True, error_model="numpy")
def _zero_points(lanes, W, n, k, group, last, power, weight, free, pers, zeros, errors):  # type: ignore[no-untyped-def]
    m, S = count(lanes), scratch(32)
    for t in range(W.size // (k * ROWS)):
        for g in range(k // group):
            for lane in range(0, ROWS, m):
                at = (t * k + g * group) * ROWS + lane
                least, greatest = extent_of(lanes, W, at, group)
                extent = greatest - least
                per = select(extent <= FLAT, splat(lanes, F(1)), F(1) / extent * last)
                per = minimum(per, splat(lanes, LARGEST))
                zero = (F(0) - least) * per
                for turn in range(errors.size):
                    rest, error, peak = _turn(lanes, W, at, group, per, zero, last)
                    store(S, 0, error)
                    for j in range(min(m, n - t * ROWS - lane)):
                        errors[turn] += np.float64(S[j])
                    if any_lane(peak > free):
                        rest = _shrunk(lanes, W, at, group, per, zero, last, power, weight, S)
                    zero = rest / F(group)
                store(pers, (t * (k // group) + g) * ROWS + lane, per)
                store(zeros, (t * (k // group) + g) * ROWS + lane, zero)
