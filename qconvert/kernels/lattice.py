"""E8P, QuIP#'s lattice: 65,536 points of 8 coordinates, a code of 16 bits each; and the nearest of them.

A point is v + 1/4 or v - 1/4 in every coordinate, where v has half-integer coordinates, an even sum, and magnitudes among
256: all within radius sqrt(10) (227, in lexicographic order), then 29 that have five 3/2 and three 1/2. Here points are
i8 in quarters: 4 times their coordinates, odd, from -11 to 11; +1/4 leaves 3 modulo 4 and -1/4 leaves 1.
A code is the magnitudes' index << 8 | eight bits of sign for coordinates 0, 2, 4, 6, 1, 3, 5, 7, of which the first also says
the shift by making their number odd: then it is turned over and the shift is -1/4. Signs are against the magnitudes with the
last coordinate negative where their sum is odd.
Source: quip-sharp, lib/codebook/latticee8_padded12.py.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.scheme import F32

I8 = npt.NDArray[np.int8]
U16 = npt.NDArray[np.uint16]
F = np.float32
LANES = (0, 2, 4, 6, 1, 3, 5, 7)  # the coordinate of each bit of sign
# Which coordinates (bit i: coordinate i) of the 29 are 1/2, in their order; the choice is the format's
HALVES = np.frombuffer(bytes.fromhex("0e0d0b07c8a898685838c4a494645434c2a292625231c1a1916151138c"), np.uint8)


def _magnitudes() -> I8:
    """i8[256,8], in halves."""
    inner = np.array([v for v in product((1, 3, 5), repeat=8) if sum(x * x for x in v) <= 40], np.int8)
    outer = np.where(np.unpackbits(HALVES[:, None], axis=1, bitorder="little"), 1, 3).astype(np.int8)
    return np.concatenate([inner, outer])


def _points() -> I8:
    """i8[65536,8], in quarters, by code."""
    base = MAGNITUDES.copy()
    base[:, 7] *= np.where(base.sum(1) // 2 % 2, -1, 1).astype(np.int8)
    signs = np.arange(256, dtype=np.uint8)
    bits = np.unpackbits(signs[:, None], axis=1, bitorder="little")
    odd = bits.sum(1) % 2
    bits[:, 0] ^= odd.astype(np.uint8)
    flips = np.empty((256, 8), np.int8)
    flips[:, LANES] = 1 - 2 * bits.astype(np.int8)
    shift = (1 - 2 * odd).astype(np.int8)
    points: I8 = (2 * base[:, None] * flips + shift[:, None]).astype(np.int8)
    return points.reshape(-1, 8)


def _places() -> npt.NDArray[np.uint8]:
    """u8[6561]: which magnitudes they are, by their number in base 3, coordinate 0 first."""
    out = np.zeros(3**8, np.uint8)
    out[MAGNITUDES.astype(np.int64) // 2 @ 3 ** np.arange(7, -1, -1)] = np.arange(256)
    return out


MAGNITUDES = _magnitudes()
POINTS = _points()
PLACES = _places()


def e8p_points(codes: U16) -> I8:
    """u16[N,G] -> i8[N,8*G], in quarters."""
    return POINTS[codes].reshape(len(codes), -1)


def e8p_codes(points: I8) -> U16:
    """i8[N,K] in quarters, which must be points of the lattice -> u16[N,K/8]"""
    out = np.empty((len(points), points.shape[1] // 8), np.uint16)
    _codes(np.ascontiguousarray(points).reshape(-1, 8), PLACES, np.array(LANES), out.reshape(-1))
    return out


def e8p_nearest(x: F32, scale: float) -> I8:
    """f32[N,K] -> i8[N,K], in quarters: the point that is nearest to each 8 of x / scale, found exactly."""
    out = np.empty(x.shape, np.int8)
    inverse = F(1) / F(scale) if scale else F(0)
    _nearest(np.ascontiguousarray(x, F).reshape(-1, 8), inverse, HALVES, out.reshape(-1, 8))
    return out


@njit(cache=True, nogil=True)
def _codes(points, places, lanes, out):  # type: ignore[no-untyped-def]
    for n in range(out.size):
        shift = 1 if points[n, 0] & 3 == 3 else -1
        place, total = 0, 0
        for i in range(8):
            twice = abs(points[n, i] - shift)  # 2, 6 or 10
            place, total = place * 3 + (twice >> 2), total + (twice >> 1)
        odd, signs = total >> 1 & 1, 0
        for bit in range(8):
            negative = points[n, lanes[bit]] - shift < 0
            signs |= (negative ^ (lanes[bit] == 7 and odd == 1)) << bit
        out[n] = np.uint16(places[place]) << np.uint16(8) | np.uint16(signs ^ (shift < 0))


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(x, inverse, halves, out):  # type: ignore[no-untyped-def]
    """Of v with magnitudes a and signs of one's choice, |x - v|^2 is least where a descends with |x| and signs agree; an odd
    sum costs turning over the least product. So of the 227, seven patterns count: of 3/2 none to four, of 5/2 none or one.
    """
    size, rank, value = np.empty(8, F), np.empty(8, np.int64), np.empty(8, F)
    for n in range(x.shape[0]):
        best = F(np.inf)
        for shift in (1, -1):
            negative, beyond, total = 0, F(0.5), F(0)  # beyond: |x - shift|^2 less |x|^2
            for i in range(8):
                y = x[n, i] * inverse
                v = y - F(0.25) * F(shift)
                negative ^= v < 0
                size[i] = abs(v)
                beyond, total = beyond - F(0.5) * F(shift) * y, total + size[i]
                rank[i] = 0
            for i in range(8):
                for j in range(i):
                    less = size[j] < size[i]
                    rank[j] += less
                    rank[i] += not less
            for i in range(8):
                value[rank[i]] = size[i]
            least = value[7]
            found, of_best = -1, best
            far, first = beyond + F(2) - total, value[0]  # all 1/2
            for k in range(5):
                cost = far + F(2) * least * F((negative ^ k) & 1)
                if cost < of_best:
                    found, of_best = k, cost
                far += F(2) - F(2) * value[k]
            far = beyond + F(8) - total - F(4) * first
            for k in range(2):
                cost = far + F(2) * least * F((negative ^ k) & 1)
                if cost < of_best:
                    found, of_best = 5 + k, cost
                far += F(2) - F(2) * value[1]
            far = beyond + F(12) - F(3) * total
            if far + F(2) * (value[5] + value[6] + value[7]) < of_best:
                for m in range(halves.size):
                    small, low, high = F(0), F(np.inf), F(np.inf)
                    for i in range(8):
                        if halves[m] >> i & 1:
                            small, low = small + size[i], min(low, size[i])
                        else:
                            high = min(high, size[i])
                    cost = far + F(2) * small
                    if not negative:
                        cost += min(F(2) * low, F(6) * high)
                    if cost < of_best:
                        found, of_best = 7 + m, cost
            if found < 0:
                continue
            best = of_best
            turned, product, odd = 0, F(np.inf), negative
            for i in range(8):
                if found < 5:
                    a, odd = 3 if rank[i] < found else 1, (negative ^ found) & 1
                elif found < 7:
                    a, odd = 5 if rank[i] == 0 else 3 if rank[i] < found - 4 else 1, (negative ^ (found - 5)) & 1
                else:
                    a, odd = 1 if halves[found - 7] >> i & 1 else 3, (negative ^ 1) & 1
                if F(a) * size[i] < product:
                    turned, product = i, F(a) * size[i]
                out[n, i] = -2 * a if x[n, i] * inverse - F(0.25) * F(shift) < 0 else 2 * a
            if odd:
                out[n, turned] = -out[n, turned]
            for i in range(8):
                out[n, i] += shift
