"""The grid that weights lie on: codes and a scale of each group that give every weight back, rounded as it was stored."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.scheme import F32

INVERSES = np.array([0.0, *(1.0 / q for q in range(1, 258))])
DIGITS = {"bf16": 8, "f16": 11, "f32": 24}  # of a significand


class Grid(NamedTuple):
    """codes i8[N,K], scales f32[N,K/group]; found bool[N,K/group]: of groups that lie on no grid both are 0."""

    codes: npt.NDArray[np.int8]
    scales: F32
    found: npt.NDArray[np.bool_]


def recover(x: F32, group: int, low: int, high: int, scale: str) -> Grid:
    """x f32[N,K] as code * scale, codes in low..high, scales exact in the dtype `scale`.

    A product is compared after rounding it to the narrowest dtype that holds all of x. Of all grids the one with the
    smallest codes is taken, and of its scales the one of fewest digits.
    """
    n, k = x.shape
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    codes, scales, found = np.zeros(n * k, np.int8), np.zeros(n * k // group, np.float32), np.zeros(n * k // group, np.bool_)
    digits = stored_digits(flat)
    steps = np.ldexp(1.0, np.arange(256) - 127 - digits)  # by a float's exponent, half of what its last digit is worth
    _search(flat, flat.view(np.int32), steps, group, low, high, digits, DIGITS[scale], scale == "f16", codes, scales, found)
    return Grid(codes.reshape(n, k), scales.reshape(n, -1), found.reshape(n, -1))


def stored_digits(x: F32) -> int:
    """Of the narrowest of bf16, f16 and f32 that holds every value."""
    if not (x.view(np.uint32) & np.uint32(0xFFFF)).any():
        return DIGITS["bf16"]
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).astype(np.float32)
    return DIGITS["f16" if np.array_equal(half, x) else "f32"]


@njit(cache=True, nogil=True, error_model="numpy")
def _rounded(v, digits):  # type: ignore[no-untyped-def]
    """v with so many digits, to nearest even."""
    m, e = math.frexp(v)
    return math.ldexp(np.rint(math.ldexp(m, digits)), e - digits)


@njit(cache=True, nogil=True, error_model="numpy")
def _holds(s, digits, half):  # type: ignore[no-untyped-def]
    """Whether s > 0 is exact with so many digits; half: in f16, where small ones have fewer."""
    if half and s < 6.103515625e-05:
        steps = s * 16777216.0  # 2^-24, the least of all
        return steps == np.rint(steps)
    return _rounded(s, digits) == s and (not half or s <= 65504.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _interval(x, bits, steps, at, group, s, greatest, low, high):  # type: ignore[no-untyped-def]
    """(sign, least, greatest): scales about s that give each weight back, sign 0 where there are none."""
    least, most, up, down, inverse = 0.0, 2 * s, True, True, 1.0 / s
    # s is known to 2^-9 of it: codes beyond 32 are told once small ones have made it closer
    for largest in (16.0, 48.0, 1e9):
        if greatest <= 32 and largest < 1e9:
            continue
        for i in range(at, at + group):
            w = abs(float(x[i]))
            q = np.rint(w * inverse)
            if w == 0.0 or q > largest:
                continue
            if q == 0.0:
                return 0, 0.0, 0.0
            part = INVERSES[int(q)]
            step = steps[bits[i] >> 23 & 255]
            least, most = max(least, (w - step) * part), min(most, (w + step) * part)
            signed = q if x[i] > 0 else -q
            up, down = up and low <= signed <= high, down and low <= -signed <= high
            if least > most or not (up or down):
                return 0, 0.0, 0.0
            if greatest > 32:
                inverse = 2.0 / (least + most)
    return (1 if up else -1), least * (1 - 1e-15), most * (1 + 1e-15)  # products with 1 / q are rounded


@njit(cache=True, nogil=True, error_model="numpy")
def _gives_back(x, bits, steps, at, group, s, digits):  # type: ignore[no-untyped-def]
    inverse = 1.0 / s
    for i in range(at, at + group):
        w = abs(float(x[i]))
        value = np.rint(w * inverse) * s
        if abs(value - w) >= 0.5 * steps[bits[i] >> 23 & 255] and _rounded(value, digits) != w:
            return False
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _scale(x, bits, steps, at, group, least, most, digits, kept, half):  # type: ignore[no-untyped-def]
    """A scale within the bounds that gives all weights back: of 8 digits, else of 11, else as many as are kept; 0: none."""
    middle = 0.5 * (least + most)
    for wanted in (8, 11, 24):
        if wanted > max(kept, 8):
            break
        step = math.ldexp(1.0, math.frexp(middle)[1] - wanted)
        nearest = _rounded(middle, wanted)
        for s in (nearest, nearest - step, nearest + step):
            if least <= s <= most and s > 0.0 and _holds(s, kept, half) and _gives_back(x, bits, steps, at, group, s, digits):
                return s
    return 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _search(x, bits, steps, group, low, high, digits, kept, half, codes, scales, found):  # type: ignore[no-untyped-def]
    for g in range(scales.size):
        at, peak = g * group, 0.0
        for i in range(at, at + group):
            peak = max(peak, abs(float(x[i])))
        if not peak < np.inf:
            continue
        if peak == 0.0:
            found[g] = True
            continue
        for k in range(1, max(-low, high) + 1):
            sign, least, most = _interval(x, bits, steps, at, group, peak / k, k, low, high)
            if sign == 0:
                continue
            s = _scale(x, bits, steps, at, group, least, most, digits, kept, half)
            if s > 0.0:
                for i in range(at, at + group):
                    codes[i] = np.int8(np.rint(float(x[i]) / (sign * s)))
                scales[g], found[g] = sign * s, True
                break
