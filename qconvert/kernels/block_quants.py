"""ggml's formats of 32 weights with one f16 scale (and minimum): q8_0, q4_0, q4_1, q5_0, q5_1.

One block per lane finds its range and scale; then each block's codes are a row of vectors. Each kernel takes
x f32[n * 32], two arguments that kernels with importance read, and out u8[n * block nbytes].
Source: ggml/src/ggml-quants.c, quantize_row_*_ref.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qconvert.kernels.across import extremes, mask_bits, peak_of
from qconvert.kernels.half import halves, put_four, put_half
from qconvert.kernels.lanes import (
    absolute,
    any_lane,
    bits_of,
    copy_sign,
    count,
    load,
    maximum,
    minimum,
    scratch,
    select,
    splat,
    store,
    to_int,
)

F = np.float32
U = np.uint64


@njit(forceinline=True)
def _first_zero(row, x, at):  # type: ignore[no-untyped-def]
    """The first of 32 values that is zero, with its sign."""
    zeros = negatives = U(0)
    for i in range(0, 32, count(row)):
        v = load(row, x, at + i)
        zeros |= mask_bits(v == F(0)) << U(i)
        negatives |= mask_bits(bits_of(v) < 0) << U(i)
    return F(-0.0) if zeros & (U(0) - zeros) & negatives else F(0)


@njit(forceinline=True)
def _scales(row, d, bias, scales, inverses, biases):  # type: ignore[no-untyped-def]
    """Keep each lane's scale d, 1 / d (0 for 0) and the bias that rounds.

    1 / d overflows for a subnormal d: C's conversion then makes every code 0, which the factor and the bias 0 do too.
    """
    zero = splat(row, F(0))
    inverse = select(d != F(0), F(1) / d, zero)
    overflow = absolute(inverse) == F(np.inf)
    store(scales, 0, d)
    store(inverses, 0, select(overflow, zero, inverse))
    store(biases, 0, select(overflow, zero, splat(row, bias)))


@njit(cache=True, nogil=True, error_model="numpy")
def _symmetric_scales(row, x, first, divisor, bias, low, high, scales, inverses, biases):  # type: ignore[no-untyped-def]
    """Scales that map the first value of greatest magnitude to the code without a mirror; low and high are scratch."""
    extremes(row, x, first, low, high)
    least, greatest = load(row, low, 0), load(row, high, 0)
    store(low, 0, select(greatest > F(0) - least, greatest, least))
    if any_lane(greatest == F(0) - least):
        for j in range(min(count(row), x.size // 32 - first)):
            low[j] = peak_of(row, x, (first + j) * 32, 32)
    _scales(row, load(row, low, 0) / divisor, bias, scales, inverses, biases)


@njit(cache=True, nogil=True, error_model="numpy")
def _offset_scales(row, x, first, divisor, low, high, scales, inverses, biases):  # type: ignore[no-untyped-def]
    """Scales from least to greatest value; `low` keeps the least. Where that is a zero, its first sign is stored."""
    extremes(row, x, first, low, high)
    if any_lane(load(row, low, 0) == F(0)):
        for j in range(min(count(row), x.size // 32 - first)):
            if low[j] == F(0):
                low[j] = _first_zero(row, x, (first + j) * 32)
                high[j] = low[j] if high[j] == F(0) else high[j]
    d = (load(row, high, 0) - load(row, low, 0)) / divisor
    _scales(row, d, F(0.5), scales, inverses, biases)


@njit(forceinline=True)
def _put_head(row, out, at, scales, low, heads, j):  # type: ignore[no-untyped-def]
    """Scale and minimum of one block as f16: made for all lanes at once where there are several."""
    if count(row) > 1:
        put_four(out, at, heads[j])
    else:
        put_half(row, out, at, scales[j])
        put_half(row, out, at + 2, low[j])


@njit(cache=True, nogil=True, error_model="numpy")
def q8_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, blocks = count(row), x.size // 32
    low, high, scales, inverses, biases = scratch(n), scratch(n), scratch(n), scratch(n), scratch(n)
    for first in range(0, blocks, n):
        extremes(row, x, first, low, high)
        size = maximum(absolute(load(row, low, 0)), absolute(load(row, high, 0)))
        _scales(row, size / F(127), F(0), scales, inverses, biases)
        for block in range(first, min(first + n, blocks)):
            at, o = block * 32, block * 34
            put_half(row, out, o, scales[block - first])
            for i in range(0, 32, n):
                v = load(row, x, at + i) * inverses[block - first]
                # halves go away from zero: 0.5 minus an ulp lets every smaller fraction stay below the next integer
                store(out, o + 2 + i, to_int(v + copy_sign(F(0.49999997), v)))


@njit(cache=True, nogil=True, error_model="numpy")
def q4_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, blocks = count(row), x.size // 32
    low, high, scales, inverses, biases = scratch(n), scratch(n), scratch(n), scratch(n), scratch(n)
    for first in range(0, blocks, n):
        _symmetric_scales(row, x, first, F(-8), F(8.5), low, high, scales, inverses, biases)
        for block in range(first, min(first + n, blocks)):
            at, o = block * 32, block * 18
            put_half(row, out, o, scales[block - first])
            inverse, bias = inverses[block - first], biases[block - first]
            for i in range(0, 16, n):
                down = minimum(to_int(load(row, x, at + i) * inverse + bias), 15)
                up = minimum(to_int(load(row, x, at + 16 + i) * inverse + bias), 15)
                store(out, o + 2 + i, down | up << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def q4_1(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, blocks = count(row), x.size // 32
    low, high, scales, inverses, biases = scratch(n), scratch(n), scratch(n), scratch(n), scratch(n)
    heads = np.empty(n, np.int32)
    for first in range(0, blocks, n):
        _offset_scales(row, x, first, F(15), low, high, scales, inverses, biases)
        store(heads, 0, halves(load(row, scales, 0)) | halves(load(row, low, 0)) << 16)
        for block in range(first, min(first + n, blocks)):
            at, o = block * 32, block * 20
            _put_head(row, out, o, scales, low, heads, block - first)
            least, inverse, bias = low[block - first], inverses[block - first], biases[block - first]
            for i in range(0, 16, n):
                down = minimum(to_int((load(row, x, at + i) - least) * inverse + bias), 15)
                up = minimum(to_int((load(row, x, at + 16 + i) - least) * inverse + bias), 15)
                store(out, o + 4 + i, down | up << 4)


@njit(forceinline=True)
def _put_five_bits(row, out, at, fifth):  # type: ignore[no-untyped-def]
    """The fifth bits of 32 codes in 4 bytes, little-endian."""
    for i in range(4):
        out[at + i] = np.uint8((fifth >> U(8 * i)) & U(255))


@njit(cache=True, nogil=True, error_model="numpy")
def q5_0(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, blocks = count(row), x.size // 32
    low, high, scales, inverses, biases = scratch(n), scratch(n), scratch(n), scratch(n), scratch(n)
    for first in range(0, blocks, n):
        _symmetric_scales(row, x, first, F(-16), F(16.5), low, high, scales, inverses, biases)
        for block in range(first, min(first + n, blocks)):
            at, o = block * 32, block * 22
            put_half(row, out, o, scales[block - first])
            inverse, bias, fifth = inverses[block - first], biases[block - first], U(0)
            for i in range(0, 16, n):
                down = minimum(to_int(load(row, x, at + i) * inverse + bias), 31)
                up = minimum(to_int(load(row, x, at + 16 + i) * inverse + bias), 31)
                fifth |= mask_bits(down > 15) << U(i) | mask_bits(up > 15) << U(16 + i)
                store(out, o + 6 + i, (down & 15) | (up & 15) << 4)
            _put_five_bits(row, out, o + 2, fifth)


@njit(cache=True, nogil=True, error_model="numpy")
def q5_1(lanes, row, x, k, importance, out):  # type: ignore[no-untyped-def]
    n, blocks = count(row), x.size // 32
    low, high, scales, inverses, biases = scratch(n), scratch(n), scratch(n), scratch(n), scratch(n)
    heads = np.empty(n, np.int32)
    for first in range(0, blocks, n):
        _offset_scales(row, x, first, F(31), low, high, scales, inverses, biases)
        store(heads, 0, halves(load(row, scales, 0)) | halves(load(row, low, 0)) << 16)
        for block in range(first, min(first + n, blocks)):
            at, o = block * 32, block * 24
            _put_head(row, out, o, scales, low, heads, block - first)
            least, inverse, bias = low[block - first], inverses[block - first], biases[block - first]
            fifth = U(0)
            for i in range(0, 16, n):
                down = to_int((load(row, x, at + i) - least) * inverse + bias)
                up = to_int((load(row, x, at + 16 + i) - least) * inverse + bias)
                fifth |= mask_bits(down > 15) << U(i) | mask_bits(up > 15) << U(16 + i)
                store(out, o + 8 + i, (down & 15) | (up & 15) << 4)
            _put_five_bits(row, out, o + 4, fifth)
