"""Affine codes of given scales and zero points: each weight to the nearest code, ties to even. One group a lane.

Where a file keeps scales in fewer bits than f32, the codes that suit a scale are those of the scale as it is kept.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numba import njit

from qconvert.kernels.across import put_words, transpose
from qconvert.kernels.affine_quants import clamped
from qconvert.kernels.lanes import choose, count, load, scratch, select, splat, store, to_int
from qconvert.scheme import F32, U16, Bytes

F = np.float32


def affine_codes(x: F32 | U16, group: int, bits: int, scales: F32, zeros: F32, lanes: int | None = None) -> Bytes:
    """x as `affine` takes it, scales, zeros f32[N,K/group] -> u8[N, K * bits / 8], unsigned codes, the first in the low bits.

    bits 2, 4 or 8; rows fill their last byte. A scale of 0 gives the zero point's code.
    """
    n, k = x.shape
    per = 32 // bits
    if group % per:
        if group == k:
            padded = np.pad(cast(F32, x), ((0, 0), (0, -k % per)))
            return affine_codes(padded, padded.shape[1], bits, scales, zeros, lanes)[:, : k * bits // 8]
        each = np.where(scales == 0, F(0), F(1) / np.where(scales == 0, F(1), scales))[:, :, None]
        values = np.clip(np.rint(x.reshape(n, -1, group) * each) + np.rint(zeros)[:, :, None], 0, (1 << bits) - 1)
        from qconvert.bits import to_bits

        return to_bits(values.reshape(n, k).astype(np.uint8), bits)
    words = np.empty((n, k // per), np.int32)
    if x.size:
        wide = choose(16, 32 if group <= 128 else 16, lanes)
        flat = np.ascontiguousarray(x, x.dtype if x.dtype == np.uint16 else F).reshape(-1)
        levels = (np.ascontiguousarray(v, F).reshape(-1) for v in (scales, zeros))
        nearest(wide, flat, group, bits, *levels, words.reshape(-1))
    return words.view(np.uint8)


@njit(cache=True, nogil=True, error_model="numpy")
def nearest(lanes, x, group, bits, scales, zeros, words):  # type: ignore[no-untyped-def]
    n, per, last = count(lanes), 32 // bits, F((1 << bits) - 1)
    X, W, S = scratch(group * n), np.empty(group // per * n, np.int32), scratch(2 * n)
    nothing = splat(lanes, F(0))
    for first in range(0, scales.size, n):
        transpose(lanes, x, first, group, X)
        for lane in range(min(n, scales.size - first)):
            S[lane], S[n + lane] = scales[first + lane], zeros[first + lane]
        scale, zero = load(lanes, S, 0), load(lanes, S, n)
        inverse = select((scale > F(0)) | (scale < F(0)), F(1) / scale, nothing)
        for w in range(group // per):
            word = to_int(nothing)
            for j in range(per):
                q = clamped(load(lanes, X, (w * per + j) * n) * inverse, F(0) - zero, last - zero) + zero
                word = word | to_int(q) << np.int32(j * bits)
            store(W, w * n, word)
        put_words(lanes, W, first, group // per, scales.size, words)
