"""Codes on a line: a weight is scale * code + bias, whatever the sign of the scale. One group a lane.

`mlx_affine` has the bytes of mx.quantize: the end of greater magnitude becomes a code's value exactly where that leaves zero a
code of its own. `line_codes` are the nearest codes of lines that are given, as a file keeps them.
Source: mlx 0.32, mlx/backend/cpu/quantized.cpp, quantize.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from qconvert.kernels.across import put_words, transpose
from qconvert.kernels.affine_quants import clamped, put_levels
from qconvert.kernels.lanes import (
    absolute,
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
from qconvert.scheme import F32, Bytes

F = np.float32
LEAST = F(1e-7)  # mlx's smallest scale


class Lines(NamedTuple):
    """packed u8[N, K * bits / 8], the first code in the low bits of little-endian words; scales, biases f32[N,K/group]."""

    packed: Bytes
    scales: F32
    biases: F32


def mlx_affine(x: F32, group: int, bits: int, lanes: int | None = None) -> Lines:
    """x f32[N,K], K a multiple of group, group of 32; bits 2 to 8. Codes suit scales and biases as f32 has them.

    `lanes` (or QCONVERT_LANES) overrides the SIMD width, 1 means scalar code; the result is the same.
    """
    n, k = x.shape
    words, scales, biases = np.empty((n, k * bits // 32), np.int32), *(np.empty((n, k // group), F) for _ in range(2))
    if x.size:
        flat = np.ascontiguousarray(x, F).reshape(-1)
        _mlx(choose(16, 16, lanes), flat, group, bits, words.reshape(-1), scales.reshape(-1), biases.reshape(-1))
    return Lines(words.view(np.uint8), scales, biases)


def line_codes(x: F32, group: int, bits: int, scales: F32, biases: F32, lanes: int | None = None) -> Bytes:
    """x f32[N,K], group as above; scales, biases f32[N,K/group] -> u8[N, K * bits / 8]. A scale of 0 gives code 0."""
    n, k = x.shape
    words = np.empty((n, k * bits // 32), np.int32)
    if x.size:
        flat = np.ascontiguousarray(x, F).reshape(-1)
        levels = (np.ascontiguousarray(v, F).reshape(-1) for v in (scales, biases))
        _nearest(choose(16, 16, lanes), flat, group, bits, *levels, words.reshape(-1))
    return words.view(np.uint8)


@njit(forceinline=True)
def _codes(lanes, X, group, bits, scale, bias, W):  # type: ignore[no-untyped-def]
    """The nearest codes, one behind another in the bits of words: of 3, 5 or 6 bits some lie in two of them."""
    n, last = count(lanes), F((1 << bits) - 1)
    nothing = to_int(splat(lanes, F(0)))
    word, at, used = nothing, 0, 0
    for j in range(group):
        q = to_int(clamped((load(lanes, X, j * n) - bias) / scale, F(0), last))
        word = word | q << np.int32(used)
        used += bits
        if used >= 32:
            store(W, at, word)
            at, used = at + n, used - 32
            word = q >> np.int32(bits - used) if used else nothing


@njit(cache=True, nogil=True, error_model="numpy")
def _mlx(lanes, x, group, bits, words, scales, biases):  # type: ignore[no-untyped-def]
    n, n_words, last = count(lanes), group * bits // 32, F((1 << bits) - 1)
    X, W, S = scratch(group * n), np.empty(n_words * n, np.int32), scratch(n)
    zero = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        least = greatest = load(lanes, X, 0)
        for i in range(1, group):
            v = load(lanes, X, i * n)
            least, greatest = minimum(v, least), maximum(v, greatest)
        below = absolute(least) > absolute(greatest)
        scale = maximum((greatest - least) / last, splat(lanes, LEAST))
        scale, edge = select(below, scale, zero - scale), select(below, least, greatest)
        code = rounded(edge / scale)
        shifted = (code > F(0)) | (code < F(0))
        scale, bias = select(shifted, edge / code, scale), select(shifted, edge, zero)
        _codes(lanes, X, group, bits, scale, bias, W)
        put_words(lanes, W, first, n_words, scales.size, words)
        put_levels(lanes, scale, S, first, scales)
        put_levels(lanes, bias, S, first, biases)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(lanes, x, group, bits, scales, biases, words):  # type: ignore[no-untyped-def]
    n, n_words = count(lanes), group * bits // 32
    X, W, S = scratch(group * n), np.empty(n_words * n, np.int32), scratch(2 * n)
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        for lane in range(min(n, scales.size - first)):
            S[lane], S[n + lane] = scales[first + lane], biases[first + lane]
            if S[lane] == F(0):
                S[lane] = np.inf
        _codes(lanes, X, group, bits, load(lanes, S, 0), load(lanes, S, n), W)
        put_words(lanes, W, first, n_words, scales.size, words)
