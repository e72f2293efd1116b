"""Arithmetic on real weights: bf16, low-rank updates, the check for NaN and infinity."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.scheme import F32, Array

U16 = npt.NDArray[np.uint16]


def widen_bf16(bits: U16) -> F32:
    """u16[...] bits of bf16 -> f32[...], exact."""
    bits = np.ascontiguousarray(bits)
    out = np.empty(bits.shape, np.float32)
    _widen(bits.reshape(-1), out.reshape(-1).view(np.uint32))
    return out


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
    _add_low_rank(w, a, b, np.float32(scale))
    return w


def all_finite(x: Array) -> bool:
    """No NaN and no infinity in f16, f32 or f64[...]."""
    if x.dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        return bool(np.isfinite(cast("npt.NDArray[np.float64]", x)).all())
    bits = np.ascontiguousarray(x).reshape(-1)
    if x.dtype == np.dtype(np.float16):
        return bool(_all_below(bits.view(np.uint16), np.uint16(0x7C00)))
    return bool(_all_below(bits.view(np.uint32), np.uint32(0x7F800000)))


@njit(cache=True, nogil=True)
def _widen(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@njit(cache=True, nogil=True)
def _narrow(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        u = bits[i]
        up = np.uint32(u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
        nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16((u | np.uint32(0x400000) if nan else up) >> np.uint32(16))


@njit(cache=True, nogil=True)
def _all_below(bits, exponent):  # type: ignore[no-untyped-def]
    for start in range(0, bits.size, 4096):
        bad = 0
        for i in range(start, min(bits.size, start + 4096)):
            bad |= (bits[i] & exponent) == exponent
        if bad:
            return False
    return True


@njit(cache=True, nogil=True)
def _add_low_rank(w, a, b, scale):  # type: ignore[no-untyped-def]
    delta = np.empty(1024, np.float32)
    for n in range(w.shape[0]):
        for start in range(0, w.shape[1], 1024):
            m = min(1024, w.shape[1] - start)
            delta[:m] = np.float32(0)
            for j in range(a.shape[0]):
                for i in range(m):
                    delta[i] += b[n, j] * a[j, start + i]
            for i in range(m):
                w[n, start + i] += scale * delta[i]
