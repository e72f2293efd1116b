"""ggml's super-blocks with scales and minima, q2_k, q4_k, q5_k: min_quants.py in Triton, byte for byte.

x [n * 256] f32, f16 or bf16; out: n super-blocks in words; steps f32[N_STEPS]: the code ranges that the search tries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

from qconvert.kernels.gpu.lane_kernels import (
    half,
    nearest,
    nearest_any,
    positive_peak,
    put_words,
    shifted,
    values,
    words_of,
)

KERNELS = ("q2_k", "q4_k", "q5_k")


@triton.jit
def weight(x, mean, SQUARED: tl.constexpr):
    if SQUARED:
        w = mean + tl.abs(x)
    else:
        w = tl.abs(x)
    return w


@triton.jit
def fit_line(xs, steps, SIZE: tl.constexpr, TOP: tl.constexpr, N_STEPS: tl.constexpr, SQUARED: tl.constexpr):
    """Scale and minimum by weighted least squares over candidate roundings; the factor and offset whose codes won.

    SQUARED: errors are, and weights are the root mean square + |x|; else |x| for both.
    """
    zero = tl.full(xs[0].shape, 0.0, tl.float32)
    mean = zero
    if SQUARED:
        for i in tl.static_range(SIZE):
            mean = mean + xs[i] * xs[i]
        mean = tl.sqrt_rn(mean * (1 / SIZE))
    low = xs[0]
    high = xs[0]
    sum_w = weight(xs[0], mean, SQUARED)
    sum_x = sum_w * xs[0]
    for i in tl.static_range(1, SIZE):
        low = tl.where(xs[i] < low, xs[i], low)
        high = tl.where(xs[i] > high, xs[i], high)
        w = weight(xs[i], mean, SQUARED)
        sum_w = sum_w + w
        sum_x = sum_x + w * xs[i]
    low = tl.where(low > 0, 0.0, low)
    best_min = low
    code_min = low
    # an infinite factor, where the span is zero or tiny, gives codes of 0 in ggml: so does the factor 0
    factor = tl.div_rn(zero + TOP, high - low)
    scale = tl.div_rn(zero + 1.0, factor)
    best_factor = tl.where(factor == float("inf"), 0.0, factor)
    best_error = zero
    for i in tl.static_range(SIZE):
        difference = scale * nearest(best_factor * (xs[i] - low), 0.0, TOP) + low - xs[i]
        best_error = best_error + weight(xs[i], mean, SQUARED) * (difference * difference if SQUARED else tl.abs(difference))
    for step in range(N_STEPS):
        factor = tl.div_rn(zero + tl.load(steps + step), high - best_min)
        factor = tl.where(factor == float("inf"), 0.0, factor)
        sum_l = zero
        sum_l2 = zero
        sum_xl = zero
        codes = ()
        for i in tl.static_range(SIZE):
            code = nearest(factor * (xs[i] - best_min), 0.0, TOP)
            codes = codes + (code,)
            weighted = weight(xs[i], mean, SQUARED) * code
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * code
            sum_xl = sum_xl + weighted * xs[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_min = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        clipped = new_min > 0
        new_min = tl.where(clipped, 0.0, new_min)
        new_scale = tl.div_rn(
            tl.where(clipped, sum_xl, sum_w * sum_xl - sum_x * sum_l), tl.where(clipped, sum_l2, determinant)
        )
        error = zero
        for i in tl.static_range(SIZE):
            difference = new_scale * codes[i] + new_min - xs[i]
            error = error + weight(xs[i], mean, SQUARED) * (difference * difference if SQUARED else tl.abs(difference))
        better = (determinant > 0) & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best_factor = tl.where(better, factor, best_factor)
        code_min = tl.where(better, best_min, code_min)
        scale = tl.where(better, new_scale, scale)
        best_min = tl.where(better, new_min, best_min)
    return scale, best_min, best_factor, code_min


@triton.jit
def line_codes(xs, d, dm, factor, low, SIZE: tl.constexpr, TOP: tl.constexpr):
    """i32 codes by the rounded scale d and minimum dm; where d is 0, those of the search."""
    codes = ()
    for i in tl.static_range(SIZE):
        scaled = tl.where(d != 0, tl.div_rn(xs[i] + dm, d), factor * (xs[i] - low))
        codes = codes + (tl.minimum(tl.maximum(nearest_any(scaled), 0), TOP),)
    return codes


@triton.jit
def finish_six_bits(out, n, scale, low, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """d, dmin and 6-bit scales and minima of super-blocks to their first four words; both as rounded, f32[LANES]."""
    S: tl.constexpr = LANES // 8
    scales = tl.reshape(scale, (S, 8))
    minima = -tl.reshape(low, (S, 8))
    zero = tl.full((S,), 0.0, tl.float32)
    greatest = positive_peak(scales)
    deepest = positive_peak(minima)
    to_scale = tl.where(greatest > 0, tl.div_rn(zero + 63.0, greatest), 0.0)
    to_min = tl.where(deepest > 0, tl.div_rn(zero + 63.0, deepest), 0.0)
    d_bits, d = half(tl.div_rn(greatest, zero + 63.0))
    m_bits, dmin = half(tl.div_rn(deepest, zero + 63.0))
    # C keeps the low 8 bits before it takes the smaller
    ls = tl.minimum(nearest_any(to_scale[:, None] * scales) & 255, 63)
    lm = tl.minimum(nearest_any(to_min[:, None] * minima) & 255, 63)
    ls_low, ls_high = tl.split(tl.permute(tl.reshape(ls, (S, 2, 4)), (0, 2, 1)))
    lm_low, lm_high = tl.split(tl.permute(tl.reshape(lm, (S, 2, 4)), (0, 2, 1)))
    put_words(out, d_bits | m_bits << 16, 0, BLOCK, 1, n, S)
    put_words(out, shifted(ls_low | ls_high >> 4 << 6, 4, 8), 1, BLOCK, 1, n, S)
    put_words(out, shifted(lm_low | lm_high >> 4 << 6, 4, 8), 2, BLOCK, 1, n, S)
    put_words(out, shifted(ls_high & 15 | (lm_high & 15) << 4, 4, 8), 3, BLOCK, 1, n, S)
    return tl.reshape(d[:, None] * ls.to(tl.float32), (LANES,)), tl.reshape(dmin[:, None] * lm.to(tl.float32), (LANES,))


@triton.jit
def put_nibbles(out, n, codes, first: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """128 bytes a super-block from word `first` on: of two sub-blocks, codes low and codes high."""
    half_lanes: tl.constexpr = LANES // 2
    part = tl.arange(0, half_lanes) % 4
    for k in tl.static_range(8):
        low, high = tl.split(tl.reshape(words_of(codes, 4 * k, 0), (half_lanes, 2)))
        put_words(out, low & 0x0F0F0F0F | (high & 0x0F0F0F0F) << 4, first + part * 8 + k, BLOCK, 4, n * 4, half_lanes)


@triton.jit
def q4_k(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n super-blocks; out i32[n * 36]."""
    xs = values(x, n * 8, 32, LANES)
    scale, low, factor, code_min = fit_line(xs, steps, 32, 15.0, N_STEPS, True)
    d, dm = finish_six_bits(out, n, scale, low, LANES, 36)
    put_nibbles(out, n, line_codes(xs, d, dm, factor, code_min, 32, 15), 4, 36, LANES)


@triton.jit
def q5_k(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n super-blocks; out i32[n * 44]."""
    S: tl.constexpr = LANES // 8
    xs = values(x, n * 8, 32, LANES)
    scale, low, factor, code_min = fit_line(xs, steps, 32, 31.0, N_STEPS, True)
    d, dm = finish_six_bits(out, n, scale, low, LANES, 44)
    codes = line_codes(xs, d, dm, factor, code_min, 32, 31)
    for k in tl.static_range(8):  # bit j of byte i is the fifth bit of code 32 * j + i
        put_words(out, shifted(tl.reshape(words_of(codes, 4 * k, 4), (S, 8)), 8, 1), 4 + k, 44, 1, n, S)
    put_nibbles(out, n, codes, 12, 44, LANES)


@triton.jit
def finish_four_bits(out, n, scale, low, LANES: tl.constexpr):
    """d, dmin and 4-bit scales and minima of q2_k's super-blocks to words 0..3 and 20; both as rounded, f32[LANES]."""
    S: tl.constexpr = LANES // 16
    scales = tl.reshape(scale, (S, 16))
    minima = tl.reshape(low, (S, 16))
    zero = tl.full((S,), 0.0, tl.float32)
    greatest = positive_peak(scales)
    deepest = positive_peak(-minima)
    to_scale = tl.where(greatest > 0, tl.div_rn(zero + 15.0, greatest), 0.0)
    to_min = tl.where(deepest > 0, tl.div_rn(zero + 15.0, deepest), 0.0)
    d_bits, d = half(tl.div_rn(greatest, zero + 15.0))
    m_bits, dmin = half(tl.div_rn(deepest, zero + 15.0))
    ls = nearest_any(scales * to_scale[:, None])
    lm = nearest_any(minima * -to_min[:, None])
    part = tl.arange(0, S * 4) % 4
    put_words(out, shifted(tl.reshape((ls | lm << 4) & 255, (S * 4, 4)), 4, 8), part, 21, 4, n * 4, S * 4)
    put_words(out, d_bits | m_bits << 16, 20, 21, 1, n, S)
    d_lanes = d[:, None] * (ls & 15).to(tl.float32)
    return tl.reshape(d_lanes, (LANES,)), tl.reshape(dmin[:, None] * ((ls >> 4 | lm) & 15).to(tl.float32), (LANES,))


@triton.jit
def q2_k(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n super-blocks; out i32[n * 21]."""
    xs = values(x, n * 16, 16, LANES)
    scale, low, factor, code_min = fit_line(xs, steps, 16, 3.0, N_STEPS, False)
    d, dm = finish_four_bits(out, n, scale, low, LANES)
    codes = line_codes(xs, d, dm, factor, code_min, 16, 3)
    part = tl.arange(0, LANES // 4) % 4  # of a super-block, 64 codes in 16 bytes: every other sub-block of a half
    for k in tl.static_range(4):
        word = tl.permute(tl.reshape(words_of(codes, 4 * k, 0), (LANES // 8, 4, 2)), (0, 2, 1))
        word = shifted(tl.reshape(word, (LANES // 4, 4)), 4, 2)
        put_words(out, word, 4 + part * 4 + k, 21, 4, n * 4, LANES // 4)
