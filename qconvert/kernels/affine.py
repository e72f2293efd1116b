"""Affine codes of least squared error: a grid of scales, each refined by least squares, for every group of a row.

Groups are searched LANES at a time, one a lane, so that no sum changes its order whatever the machine's vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.scheme import F32

LANES = 16
F = np.float32
ROUND = F(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, ties to even
# Where the largest weight of a group maps, in parts of the way to the code at the grid's end. Above 1 the grid is wider
# than the weights, below it clips. Negative: to the other end, which without a zero point is one code shorter.
ENDS = {4: (*np.linspace(0.7, 1.05, 8), *np.linspace(-1.2, -0.75, 7)), 8: tuple(np.linspace(0.94, 1.0, 4))}
SPANS = {4: tuple(np.linspace(0.62, 1.06, 12))}


class Affine(NamedTuple):
    """codes i8[N,K]; scales and zeros f32[N,K/group]; w is about scales * (codes - zeros)."""

    codes: npt.NDArray[np.int8]
    scales: F32
    zeros: F32


def affine(x: F32, group: int, bits: int, zero_point: bool) -> Affine:
    """x f32[N,K], K a multiple of group: codes -2**(bits-1) .. 2**(bits-1)-1, or 0 .. 2**bits-1 with a zero point."""
    n, k = x.shape
    codes = np.empty((n, k), np.int8)
    scales, zeros = np.empty((n, k // group), np.float32), np.zeros((n, k // group), np.float32)
    search, parts = (_with_zero, SPANS[bits]) if zero_point else (_symmetric, ENDS[bits])
    trials = np.array(parts, np.float32)
    search(x.reshape(-1, group), trials, F(1 << bits), codes.reshape(-1, group), scales.reshape(-1), zeros.reshape(-1))
    return Affine(codes, scales, zeros)


@njit(inline="always")
def _lane():  # type: ignore[no-untyped-def]
    return np.zeros(LANES, np.float32)


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
def _load(x, at, lanes):  # type: ignore[no-untyped-def]
    """Groups at..at+LANES of x as lanes[group, LANES]; those past the end are zero."""
    for j in range(LANES):
        for i in range(x.shape[1]):
            lanes[i, j] = x[at + j, i] if at + j < x.shape[0] else F(0.0)


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
def _try(lanes, inverse, zero, low, high, best_error, best_inverse, best_zero):  # type: ignore[no-untyped-def]
    """Take over, lane by lane, a grid on which least squares leave less error; the constant sum of x*x is left out."""
    xq, qq = _lane(), _lane()
    for i in range(lanes.shape[0]):
        for j in range(LANES):
            q = (lanes[i, j] * inverse[j] + zero[j] + ROUND) - ROUND
            q = min(max(q, low), high) - zero[j]
            xq[j] += lanes[i, j] * q
            qq[j] += q * q
    for j in range(LANES):
        error = -(xq[j] * xq[j]) / (qq[j] if qq[j] > F(0.0) else F(1.0))
        if error < best_error[j]:
            best_error[j], best_inverse[j], best_zero[j] = error, inverse[j], zero[j]


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
def _store(lanes, inverse, zero, low, high, at, codes, scales, zeros):  # type: ignore[no-untyped-def]
    """The codes of a grid, and the scale of least squares for them."""
    for j in range(min(LANES, codes.shape[0] - at)):
        xq, qq = F(0.0), F(0.0)
        for i in range(codes.shape[1]):
            q = (lanes[i, j] * inverse[j] + zero[j] + ROUND) - ROUND
            q = min(max(q, low), high)
            codes[at + j, i] = np.int8(q)
            xq += lanes[i, j] * (q - zero[j])
            qq += (q - zero[j]) * (q - zero[j])
        scales[at + j], zeros[at + j] = xq / (qq if qq > F(0.0) else F(1.0)), zero[j]


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
def _symmetric(x, trials, levels, codes, scales, zeros):  # type: ignore[no-untyped-def]
    group, half = x.shape[1], levels / F(2.0)
    lanes = np.zeros((group, LANES), np.float32)
    for at in range(0, x.shape[0], LANES):
        _load(x, at, lanes)
        peak, inverse, zero, best_inverse, best_zero = _lane(), _lane(), _lane(), _lane(), _lane()
        best_error = np.full(LANES, F(np.inf))
        for i in range(group):
            for j in range(LANES):
                peak[j] = lanes[i, j] if abs(lanes[i, j]) > abs(peak[j]) else peak[j]
        for part in trials:
            for j in range(LANES):  # -half is the only code without a mirror
                inverse[j] = -half / part / peak[j] if peak[j] != F(0.0) else F(0.0)
            _try(lanes, inverse, zero, -half, half - F(1.0), best_error, best_inverse, best_zero)
        _store(lanes, best_inverse, best_zero, -half, half - F(1.0), at, codes, scales, zeros)


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
def _with_zero(x, trials, levels, codes, scales, zeros):  # type: ignore[no-untyped-def]
    group, last = x.shape[1], levels - F(1.0)
    lanes = np.zeros((group, LANES), np.float32)
    for at in range(0, x.shape[0], LANES):
        _load(x, at, lanes)
        low, high, inverse, zero, best_inverse, best_zero = _lane(), _lane(), _lane(), _lane(), _lane(), _lane()
        best_error = np.full(LANES, F(np.inf))
        for i in range(group):  # from zeros: 0 must be a code
            for j in range(LANES):
                low[j], high[j] = min(low[j], lanes[i, j]), max(high[j], lanes[i, j])
        for part in trials:
            for shift in range(-1, 2):
                for j in range(LANES):
                    span = (high[j] - low[j]) * part
                    inverse[j] = last / span if span > F(0.0) else F(0.0)
                    centre = (-(low[j] + high[j]) / F(2.0) * inverse[j] + last / F(2.0) + ROUND) - ROUND
                    zero[j] = min(max(centre + F(shift), F(0.0)), last)
                _try(lanes, inverse, zero, F(0.0), last, best_error, best_inverse, best_zero)
        _store(lanes, best_inverse, best_zero, F(0.0), last, at, codes, scales, zeros)
