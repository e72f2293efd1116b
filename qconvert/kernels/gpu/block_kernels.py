"""ggml's blocks of 32 and its formats with a table of 16 levels: block_quants.py and iq4_quants.py in Triton, byte for byte.

x [n * block] f32, f16 or bf16; out: n blocks in words; steps f32[N_STEPS]: factors that the search tries, the first is unused.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

from qconvert.kernels.gpu.lane_kernels import (
    TINY,
    byte_pairs,
    first_of_rows,
    half,
    inverse_of,
    nearest_any,
    peak,
    put_words,
    shifted,
    values,
)
from qconvert.kernels.iq4_quants import THRESHOLDS
from qconvert.scheme import IQ4_TABLE

IQ4_LEVELS = tl.constexpr(tuple(map(float, IQ4_TABLE)))
IQ4_THRESHOLDS = tl.constexpr(tuple(map(float, THRESHOLDS)))
KERNELS = ("iq4_nl", "iq4_xs", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


@triton.jit
def level_of(v):
    """The nearest of IQ4_NL's levels as ggml compares: the last for a NaN."""
    level = tl.full(v.shape, IQ4_LEVELS[0], tl.float32)
    for i in tl.static_range(15):
        level = tl.where(v < IQ4_THRESHOLDS[i], level, IQ4_LEVELS[i + 1])
    return level


@triton.jit
def code_of(v):
    code = tl.full(v.shape, 0, tl.int32)
    for i in tl.static_range(15):
        code = tl.where(v < IQ4_THRESHOLDS[i], code, i + 1)
    return code


@triton.jit
def fit_levels(xs, steps, N_STEPS: tl.constexpr):
    """Scale by least squares, weights x * x, over candidate factors: steps / the value of greatest magnitude."""
    zero = tl.full(xs[0].shape, 0.0, tl.float32)
    top, size = peak(xs, 32)
    scale = zero
    best = zero
    for step in range(N_STEPS):
        if step == 0:
            factor = tl.div_rn(zero + 1.0, tl.div_rn(top, zero - IQ4_LEVELS[0]))
        else:
            factor = tl.div_rn(zero + tl.load(steps + step), top)
        sum_qx = zero
        sum_q2 = zero
        for i in tl.static_range(32):
            q = level_of(factor * xs[i])
            wq = xs[i] * xs[i] * q
            sum_qx = sum_qx + wq * xs[i]
            sum_q2 = sum_q2 + wq * q
        better = (sum_q2 > 0) & ((step == 0) | (sum_qx * sum_qx > best * sum_q2))
        scale = tl.where(better, tl.div_rn(sum_qx, sum_q2), scale)
        best = tl.where(better | (step == 0), scale * sum_qx, best)
    return tl.where(size < TINY, 0.0, scale)


@triton.jit
def iq4_nl(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n blocks; out i16[n * 9]."""
    xs = values(x, n, 32, LANES)
    scale = fit_levels(xs, steps, N_STEPS)
    bits, _ = half(scale)
    put_words(out, bits, 0, 9, 1, n, LANES)
    inverse = inverse_of(scale)
    codes = ()
    for i in tl.static_range(32):
        codes = codes + (code_of(xs[i] * inverse),)
    for k in tl.static_range(4):
        word = byte_pairs(codes, k)
        put_words(out, word, 1 + 2 * k, 9, 1, n, LANES)
        put_words(out, word >> 16, 2 + 2 * k, 9, 1, n, LANES)


@triton.jit
def iq4_xs(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n super-blocks; out i32[n * 34]."""
    S: tl.constexpr = LANES // 8
    xs = values(x, n * 8, 32, LANES)
    scales = tl.reshape(fit_levels(xs, steps, N_STEPS), (S, 8))
    d = first_of_rows(scales, 8) * -0.03125
    bits, _ = half(d)
    ls = tl.minimum(tl.maximum(nearest_any(inverse_of(d)[:, None] * scales), -32), 31)
    put_words(out, bits | shifted(ls + 32 >> 4, 8, 2) << 16, 0, 34, 1, n, S)
    put_words(out, shifted(ls + 32 & 15, 8, 4), 1, 34, 1, n, S)
    inverse = inverse_of(tl.reshape(d[:, None] * ls.to(tl.float32), (LANES,)))
    codes = ()
    for i in tl.static_range(32):
        codes = codes + (code_of(xs[i] * inverse),)
    part = tl.arange(0, LANES) % 8
    for k in tl.static_range(4):
        put_words(out, byte_pairs(codes, k), 2 + part * 4 + k, 34, 8, n * 8, LANES)


@triton.jit
def inverse_and_bias(d, bias):
    """1 / d and what rounds; both 0 where d is 0 or so small that 1 / d overflows: C's conversion makes codes of 0 then."""
    inverse = inverse_of(d)
    over = tl.abs(inverse) == float("inf")
    return tl.where(over, 0.0, inverse), tl.where(over, 0.0, bias)


@triton.jit
def put_block(out, n, head, N_HEADS: tl.constexpr, codes, FIFTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """A block of 32 codes in 4 bits behind its head of f16s; FIFTH: and of their fifth bits, in i16 words."""
    first: tl.constexpr = N_HEADS + 2 * FIFTH
    for j in tl.static_range(N_HEADS):
        put_words(out, head >> 16 * j, j, BLOCK, 1, n, LANES)
    if FIFTH:
        for j in tl.static_range(2):
            word = codes[16 * j] >> 4 & 1
            for i in tl.static_range(1, 16):
                word = word | (codes[16 * j + i] >> 4 & 1) << i
            put_words(out, word, N_HEADS + j, BLOCK, 1, n, LANES)
    for k in tl.static_range(4):
        word = byte_pairs(codes, k)
        put_words(out, word, first + 2 * k, BLOCK, 1, n, LANES)
        put_words(out, word >> 16, first + 1 + 2 * k, BLOCK, 1, n, LANES)


@triton.jit
def q8_0(x, out, n, LANES: tl.constexpr):
    """n blocks; out i16[n * 17]."""
    xs = values(x, n, 32, LANES)
    _, size = peak(xs, 32)
    d = tl.div_rn(size, tl.full((LANES,), 127.0, tl.float32))
    inverse, _ = inverse_and_bias(d, 0.0)
    bits, _ = half(d)
    put_words(out, bits, 0, 17, 1, n, LANES)
    codes = ()
    for i in tl.static_range(32):
        v = xs[i] * inverse
        # halves go away from zero: 0.5 minus an ulp lets every smaller fraction stay below the next integer
        codes = codes + ((v + tl.where(v < 0, -0.49999997, 0.49999997)).to(tl.int32) & 255,)
    for k in tl.static_range(16):
        put_words(out, codes[2 * k] | codes[2 * k + 1] << 8, 1 + k, 17, 1, n, LANES)


@triton.jit
def symmetric(x, out, n, BITS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    middle: tl.constexpr = 1 << BITS - 1
    xs = values(x, n, 32, LANES)
    top, _ = peak(xs, 32)
    d = tl.div_rn(top, tl.full((LANES,), -middle, tl.float32))
    inverse, bias = inverse_and_bias(d, middle + 0.5)
    codes = ()
    for i in tl.static_range(32):
        codes = codes + (tl.minimum((xs[i] * inverse + bias).to(tl.int32), 2 * middle - 1),)
    bits, _ = half(d)
    put_block(out, n, bits, 1, codes, BITS - 4, BLOCK, LANES)


@triton.jit
def offset(x, out, n, BITS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    last: tl.constexpr = (1 << BITS) - 1
    xs = values(x, n, 32, LANES)
    low = xs[0]
    high = xs[0]
    for i in tl.static_range(1, 32):
        low = tl.where(xs[i] < low, xs[i], low)
        high = tl.where(xs[i] > high, xs[i], high)
    d = tl.div_rn(high - low, tl.full((LANES,), last, tl.float32))
    inverse, bias = inverse_and_bias(d, 0.5)
    codes = ()
    for i in tl.static_range(32):
        codes = codes + (tl.minimum(((xs[i] - low) * inverse + bias).to(tl.int32), last),)
    d_bits, _ = half(d)
    low_bits, _ = half(low)
    put_block(out, n, d_bits | low_bits << 16, 2, codes, BITS - 4, BLOCK, LANES)


@triton.jit
def q4_0(x, out, n, LANES: tl.constexpr):
    symmetric(x, out, n, 4, 9, LANES)


@triton.jit
def q5_0(x, out, n, LANES: tl.constexpr):
    symmetric(x, out, n, 5, 11, LANES)


@triton.jit
def q4_1(x, out, n, LANES: tl.constexpr):
    offset(x, out, n, 4, 10, LANES)


@triton.jit
def q5_1(x, out, n, LANES: tl.constexpr):
    offset(x, out, n, 5, 12, LANES)
