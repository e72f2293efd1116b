"""Arithmetic on real weights: bf16, low-rank updates, the check for NaN and infinity."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.lanes import any_lane, choose, count, load, scratch, splat, store
from qconvert.scheme import F32, U16, Array

F64 = npt.NDArray[np.float64]


def widen_bf16(bits: U16) -> F32:
    """u16[...] bits of bf16 -> f32[...], exact."""
    bits = np.ascontiguousarray(bits)
    out = np.empty(bits.shape, np.float32)
    _widen(bits.reshape(-1), out.reshape(-1).view(np.uint32))
    return out


def widen_and_check(bits: U16) -> tuple[F32, bool]:
    """What widen_bf16 gives, and whether it has no NaN and no infinity, in one sweep."""
    bits = np.ascontiguousarray(bits)
    out = np.empty(bits.shape, np.float32)
    return out, bool(_widen_and_peak(bits.reshape(-1), out.reshape(-1).view(np.uint32)) < 0x7F80)


def narrow_bf16(x: F32) -> U16:
    """f32[...] -> u16[...], the bits of the nearest bf16, ties to even; NaN stays NaN."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty(x.shape, np.uint16)
    _narrow(x.reshape(-1).view(np.uint32), out.reshape(-1))
    return out


def add_low_rank(w: F32, a: F32, b: F32, scale: float) -> F32:
    """w f32[N,K] += scale * b f32[N,r] @ a f32[r,K], in place; returns w.

    One element is w + scale * (((b0*a0) + b1*a1) + ...): the same bits on every machine and for every split of rows.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    _add_low_rank(choose(16, 16), w, a, b, np.float32(scale))
    return w


def row_norms(x: F32) -> F64:
    """f32[N,K] -> f64[N]: Euclidean norms, summed from left to right in f64: the same bits on every machine."""
    out = np.empty(len(x), np.float64)
    _row_norms(np.ascontiguousarray(x, np.float32), out)
    return out


def all_finite(x: Array) -> bool:
    """No NaN and no infinity in f16, f32 or f64[...], or in the bits u16[...] of bf16."""
    flat = np.ascontiguousarray(x).reshape(-1)
    if flat.dtype == np.dtype(np.float32):
        return bool(_all_below(choose(16, 32), flat.view(np.int32), np.int32(0x7F800000)))
    if flat.dtype == np.dtype(np.uint16) and flat.size % 2 == 0:
        pairs, lanes = flat.view(np.int32), choose(16, 32)
        return bool(_all_below(lanes, pairs, np.int32(0x7F800000)) and _all_below(lanes, pairs, np.int32(0x7F80)))
    real = widen_bf16(cast(U16, flat)) if flat.dtype == np.dtype(np.uint16) else flat
    return bool(np.isfinite(cast("npt.NDArray[np.float64]", real)).all())


@njit(cache=True, nogil=True)
def _row_norms(x, out):  # type: ignore[no-untyped-def]
    for n in range(x.shape[0]):
        total = 0.0
        for i in range(x.shape[1]):
            total += np.float64(x[n, i]) * np.float64(x[n, i])
        out[n] = np.sqrt(total)


@njit(cache=True, nogil=True)
def _widen(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@njit(cache=True, nogil=True)
def _widen_and_peak(bits, out):  # type: ignore[no-untyped-def]
    """The greatest magnitude, as bits without their sign; those of NaN are above those of infinity."""
    peak = np.uint16(0)
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)
        peak = max(peak, np.uint16(bits[i] & np.uint16(0x7FFF)))
    return peak


@njit(cache=True, nogil=True)
def _narrow(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        u = bits[i]
        up = np.uint32(u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
        nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16((u | np.uint32(0x400000) if nan else up) >> np.uint32(16))


@njit(cache=True, nogil=True)
def _all_below(lanes, bits, exponent):  # type: ignore[no-untyped-def]
    """No i32 has all bits of `exponent` set; stops at the first 4096 that hold one."""
    width = count(lanes)
    whole = bits.size // width * width
    for start in range(0, whole, 4096):
        bad = splat(lanes, np.int32(0)) != np.int32(0)
        for i in range(start, min(whole, start + 4096), width):
            bad = bad | ((load(lanes, bits, i) & exponent) == exponent)
        if any_lane(bad):
            return False
    for i in range(whole, bits.size):
        if bits[i] & exponent == exponent:
            return False
    return True


ROWS = 4  # of w that share each load of a
TILE = 8192  # values of `a` copied together: its rows lie powers of two apart, which caches bear badly


@njit(cache=True, nogil=True, error_model="numpy")
def _add_low_rank(lanes, w, a, b, scale):  # type: ignore[no-untyped-def]
    width, (n, k), r = count(lanes), w.shape, a.shape[0]
    flat_w, flat_a, whole = w.reshape(-1), a.reshape(-1), k // width * width
    columns = max(width, TILE // max(r, 1) // width * width)
    stride = columns + 16
    tile = scratch(r * stride)
    for begin in range(0, whole, columns):
        end = min(begin + columns, whole)
        for j in range(r):
            for i in range(begin, end, width):
                store(tile, j * stride + i - begin, load(lanes, flat_a, j * k + i))
        for start in range(0, n - ROWS + 1, ROWS):
            b0, b1, b2, b3 = b[start], b[start + 1], b[start + 2], b[start + 3]
            for i in range(begin, end, width):
                x0 = x1 = x2 = x3 = splat(lanes, np.float32(0))
                for j in range(r):
                    x = load(lanes, tile, j * stride + i - begin)
                    x0, x1, x2, x3 = x0 + b0[j] * x, x1 + b1[j] * x, x2 + b2[j] * x, x3 + b3[j] * x
                at = start * k + i
                store(flat_w, at, load(lanes, flat_w, at) + x0 * scale)
                store(flat_w, at + k, load(lanes, flat_w, at + k) + x1 * scale)
                store(flat_w, at + 2 * k, load(lanes, flat_w, at + 2 * k) + x2 * scale)
                store(flat_w, at + 3 * k, load(lanes, flat_w, at + 3 * k) + x3 * scale)
    _add_columns(w, a, b, scale, 0, n // ROWS * ROWS, whole)
    _add_columns(w, a, b, scale, n // ROWS * ROWS, n, 0)


@njit(cache=True, nogil=True)
def _add_columns(w, a, b, scale, begin, end, first):  # type: ignore[no-untyped-def]
    for n in range(begin, end):
        for i in range(first, w.shape[1]):
            delta = np.float32(0)
            for j in range(a.shape[0]):
                delta += b[n, j] * a[j, i]
            w[n, i] += scale * delta
