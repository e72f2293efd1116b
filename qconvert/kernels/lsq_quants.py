"""Scales of least squared error for ggml's formats of one f16 scale a block, whose own quantizers mostly only round.

One block per lane tries code ranges that clip ever more of its peak, then follows codes and scale in turn. What falls is
the sum of importance * (x - scale * code)**2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.errors import UnsupportedError
from qconvert.kernels.across import transpose
from qconvert.kernels.ggml_search import cyclic
from qconvert.kernels.lanes import choose, count, load, maximum, minimum, rounded, scratch, select, splat, store
from qconvert.kernels.scale_quants import peaks
from qconvert.scheme import F32, SCHEMES

F = np.float32
LEVELS = {"q1_0": (-1, 1), "tq1_0": (-1, 1), "tq2_0": (-1, 1), "q2_0": (-1, 2), "q4_0": (-8, 7), "q8_0": (-127, 127)}
TURNS = 4  # of codes and scale; the error no longer falls after that
BEYOND = np.arange(-0.45, 3.3, 0.1)  # what the peak is above the last code, in codes


class LeastSquares(NamedTuple):
    """codes as the scheme keeps them, i8 or (with a table) u8[N,K]; scales f32[N,K/group], which f16 holds."""

    codes: npt.NDArray[np.int8 | np.uint8]
    scales: F32


def lsq(scheme: str, x: F32, importance: F32 | None = None, lanes: int | None = None) -> LeastSquares:
    """x f32[N,K], importance f32[K] or None (all equal) -> codes and scales of least weighted squared error found.

    `lanes` (or QCONVERT_LANES) overrides the SIMD width; the result is the same. UnsupportedError for other schemes.
    """
    if scheme not in LEVELS:
        raise UnsupportedError(f"lsq is not for {scheme}", hint=f"it is for {', '.join(LEVELS)}")
    s, (low, high), (n, k) = SCHEMES[scheme], LEVELS[scheme], x.shape
    group = s.block
    x = np.ascontiguousarray(x, F)
    starts = np.concatenate([high + BEYOND, low - BEYOND] if low != -high else [high + BEYOND]).astype(F)
    scales = np.empty(x.size // group + 32, F)
    weights = np.ones(k, F) if importance is None else importance
    if x.size:
        two = scheme == "q1_0"
        _scales(choose(16, 16, lanes), x.reshape(-1), k, cyclic(weights, k), group, F(low), F(high), two, starts, scales)
    kept = scales[: x.size // group].reshape(n, -1)
    kept = np.clip(kept, -65504, 65504).astype(np.float16).astype(F)
    if scheme == "q1_0":
        return LeastSquares((x >= 0).astype(np.uint8), kept)
    inverse = np.divide(F(1), kept, out=np.zeros_like(kept), where=kept != 0)
    codes = np.clip(np.rint(x.reshape(n, -1, group) * inverse[..., None]), low, high).reshape(n, k)
    return LeastSquares((codes - low).astype(np.uint8) if s.table else codes.astype(np.int8), kept)


@njit(forceinline=True)
def _sums(lanes, X, W, WX, size, factor, low, high):  # type: ignore[no-untyped-def]
    n = count(lanes)
    lx = l2 = splat(lanes, F(0))
    for i in range(size):
        code = maximum(minimum(rounded(factor * load(lanes, X, i * n)), high), low)
        lx, l2 = lx + load(lanes, WX, i * n) * code, l2 + load(lanes, W, i * n) * code * code
    return lx, l2


@njit(cache=True, nogil=True, error_model="numpy")
def _scales(lanes, x, k, importance, size, low, high, two, starts, scales):  # type: ignore[no-untyped-def]
    n = count(lanes)
    X, W, WX = scratch(size * n), scratch(size * n), scratch(size * n)
    zero = splat(lanes, F(0))
    for first in range(0, x.size // size, n):
        transpose(lanes, x, first, size, X)
        transpose(lanes, importance, first % (k // size), size, W)
        total = magnitude = zero
        for i in range(size):
            v, w = load(lanes, X, i * n), load(lanes, W, i * n)
            store(WX, i * n, w * v)
            total, magnitude = total + w, magnitude + w * maximum(v, zero - v)
        if two:
            store(scales, first, select(total > F(0), magnitude / total, zero))
            continue
        peak, _ = peaks(lanes, X, size)
        scale = best = zero
        for step in range(starts.size + TURNS):
            factor = starts[step] / peak if step < starts.size else F(1) / scale
            lx, l2 = _sums(lanes, X, W, WX, size, factor, low, high)
            better = (l2 > F(0)) & (lx * lx > best * l2)
            scale, best = select(better, lx / l2, scale), select(better, lx * (lx / l2), best)
        store(scales, first, scale)
