"""Codes -1, 0 and 1 beside one scale of the whole weight, its mean magnitude: what BitNet b1.58 is trained with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.affine_quants import clamped
from qconvert.kernels.lanes import choose, count, load, store, to_int
from qconvert.scheme import F32

F = np.float32
F64 = npt.NDArray[np.float64]


def ternary_codes(x: F32, factor: float, lanes: int | None = None) -> npt.NDArray[np.int8]:
    """x f32[N,K] -> i8[N,K]: x * factor, as f32 has it, to the nearest of -1, 0 and 1; ties to 0.

    `lanes` (or QCONVERT_LANES) overrides the SIMD width, 1 means scalar code; the result is the same.
    """
    codes = np.empty(x.shape, np.uint8)
    _ternary(choose(16, 16, lanes), np.ascontiguousarray(x, F).reshape(-1), F(factor), codes.reshape(-1))
    return codes.view(np.int8)


def magnitude_sums(x: F32) -> F64:
    """f32[N,K] -> f64[N]: sums of |x| from left to right in f64: the same bits on every machine."""
    out = np.empty(len(x), np.float64)
    _sums(np.ascontiguousarray(x, F), out)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
def _ternary(lanes, x, factor, codes):  # type: ignore[no-untyped-def]
    n = count(lanes)
    whole = x.size // n * n
    for i in range(0, whole, n):
        store(codes, i, to_int(clamped(load(lanes, x, i) * factor, F(-1), F(1))))
    for i in range(whole, x.size):
        codes[i] = np.int32(min(max(np.rint(x[i] * factor), F(-1)), F(1)))


@njit(cache=True, nogil=True)
def _sums(x, out):  # type: ignore[no-untyped-def]
    for n in range(x.shape[0]):
        total = 0.0
        for i in range(x.shape[1]):
            total += np.float64(abs(x[n, i]))
        out[n] = total
