"""ggml's super-blocks with scales alone, q3_k, q6_k: scale_quants.py in Triton, byte for byte.

x [n * 256] f32, f16 or bf16; out: n super-blocks in words; steps f32[N_STEPS]: the code ranges that the search tries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

from qconvert.kernels.gpu.lane_kernels import (
    TINY,
    first_of_rows,
    half,
    nearest,
    nearest_any,
    peak,
    put_words,
    shifted,
    values,
    words_of,
)

KERNELS = ("q3_k", "q6_k")


@triton.jit
def fit_6(xs, steps, N_STEPS: tl.constexpr):
    """Scale by least squares, weights x * x, over candidate roundings to -32..31; the factor whose codes won; all but zero."""
    zero = tl.full(xs[0].shape, 0.0, tl.float32)
    top, size = peak(xs, 16)
    best_factor = tl.div_rn(zero - 32.0, top)
    sum_lx = zero
    sum_l2 = zero
    for i in tl.static_range(16):
        w = xs[i] * xs[i]
        code = nearest(best_factor * xs[i], -32.0, 31.0)
        sum_lx = sum_lx + w * xs[i] * code
        sum_l2 = sum_l2 + w * code * code
    scale = tl.where(sum_l2 != 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for step in range(N_STEPS):
        factor = tl.div_rn(zero + tl.load(steps + step), top)
        sum_lx = zero
        sum_l2 = zero
        for i in tl.static_range(16):
            w = xs[i] * xs[i]
            code = nearest(factor * xs[i], -32.0, 31.0)
            sum_lx = sum_lx + w * xs[i] * code
            sum_l2 = sum_l2 + w * code * code
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        best_factor = tl.where(better, factor, best_factor)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
    none = size < TINY
    return tl.where(none, 0.0, scale), tl.where(none, 0.0, best_factor), none


@triton.jit
def q6_k(x, out, n, steps, N_STEPS: tl.constexpr, LANES: tl.constexpr):
    """n super-blocks; out i16[n * 105]."""
    S: tl.constexpr = LANES // 16
    xs = values(x, n * 16, 16, LANES)
    scale, factor, none = fit_6(xs, steps, N_STEPS)
    scales = tl.reshape(scale, (S, 16))
    greatest = first_of_rows(scales, 16)
    empty = tl.abs(greatest) < TINY
    to_scale = tl.div_rn(tl.full((S,), -128.0, tl.float32), greatest)
    d_bits, d = half(tl.div_rn(tl.full((S,), 1.0, tl.float32), to_scale))
    ls = tl.minimum(nearest_any(scales * to_scale[:, None]), 127)
    put_words(out, tl.where(empty, 0, d_bits), 104, 105, 1, n, S)
    pairs = shifted(tl.reshape(tl.where(empty[:, None], 0, ls & 255), (S * 8, 2)), 2, 8)
    put_words(out, pairs, 96 + tl.arange(0, S * 8) % 8, 105, 8, n * 8, S * 8)
    by = tl.reshape(ls.to(tl.float32) * d[:, None], (LANES,))
    offset = tl.where(none & (by == 0), 0, 32)
    codes = ()
    for i in tl.static_range(16):
        code = nearest_any(tl.where(by != 0, tl.div_rn(xs[i], by), factor * xs[i]))
        code = tl.minimum(tl.maximum(code, -32), 31) + offset
        codes = codes + (tl.where(tl.reshape(tl.broadcast_to(empty[:, None], (S, 16)), (LANES,)), 0, code & 255),)
    low_part = tl.arange(0, LANES // 2)  # block, half, half of 64 bytes, half of 32
    high_part = tl.arange(0, LANES // 4)  # block, half, half of 32 bytes
    for k in tl.static_range(4):
        word = words_of(codes, 4 * k, 0)
        low = tl.permute(tl.reshape(word & 0x0F0F0F0F, (S * 2, 2, 4)), (0, 2, 1))
        low = shifted(tl.reshape(low, (LANES // 2, 2)), 2, 4)
        high = tl.permute(tl.reshape(word >> 4 & 0x03030303, (S * 2, 4, 2)), (0, 2, 1))
        high = shifted(tl.reshape(high, (LANES // 4, 4)), 4, 2)
        for j in tl.static_range(2):
            put_words(out, low >> 16 * j, low_part % 8 * 8 + 2 * k + j, 105, 8, n * 8, LANES // 2)
            put_words(out, high >> 16 * j, 64 + high_part % 4 * 8 + 2 * k + j, 105, 4, n * 4, LANES // 4)


@triton.jit
def fit_3(xs):
    """Scale by coordinate descent over codes -4..3, weights x * x, five sweeps; the codes as stored (0..7), i32."""
    zero = tl.full(xs[0].shape, 0.0, tl.float32)
    top, size = peak(xs, 16)
    factor = tl.div_rn(zero - 4.0, top)
    sum_lx = zero
    sum_l2 = zero
    codes = ()
    for i in tl.static_range(16):
        w = xs[i] * xs[i]
        code = nearest(factor * xs[i], -4.0, 3.0)
        codes = codes + (code,)
        sum_lx = sum_lx + w * xs[i] * code
        sum_l2 = sum_l2 + w * code * code
    for _ in range(5):
        swept = ()
        for i in tl.static_range(16):
            w = xs[i] * xs[i]
            code = codes[i]
            lx = sum_lx - w * xs[i] * code
            l2 = sum_l2 - w * code * code
            new = tl.minimum(tl.maximum(nearest_any(tl.div_rn(xs[i] * l2, lx)), -4), 3).to(tl.float32)
            new_lx = lx + w * xs[i] * new
            new_l2 = l2 + w * new * new
            better = (lx > 0) & (new != code) & (new_l2 > 0)
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            sum_lx = tl.where(better, new_lx, sum_lx)
            sum_l2 = tl.where(better, new_l2, sum_l2)
            swept = swept + (tl.where(better, new, code),)
        codes = swept
    stored = ()
    for i in tl.static_range(16):
        stored = stored + (tl.where(size < TINY, 0, codes[i].to(tl.int32) + 4),)
    return tl.where((sum_l2 > 0) & (size >= TINY), tl.div_rn(sum_lx, sum_l2), 0.0), stored


@triton.jit
def q3_k(x, out, n, LANES: tl.constexpr):
    """n super-blocks; out i16[n * 55]."""
    S: tl.constexpr = LANES // 16
    xs = values(x, n * 16, 16, LANES)
    scale, found = fit_3(xs)
    scales = tl.reshape(scale, (S, 16))
    greatest = first_of_rows(scales, 16)
    to_scale = tl.where(greatest != 0, tl.div_rn(tl.full((S,), -32.0, tl.float32), greatest), 0.0)
    bits, d = half(tl.where(greatest != 0, tl.div_rn(tl.full((S,), 1.0, tl.float32), to_scale), 0.0))
    put_words(out, bits, 54, 55, 1, n, S)
    ls = tl.minimum(tl.maximum(nearest_any(scales * to_scale[:, None]), -32), 31)
    stored = tl.where(greatest[:, None] != 0, ls + 32, ls)
    low, high = tl.split(tl.permute(tl.reshape(stored & 15, (S, 2, 8)), (0, 2, 1)))
    eight = tl.arange(0, S * 4) % 4
    put_words(out, shifted(tl.reshape(low | high << 4, (S * 4, 2)), 2, 8), 48 + eight, 55, 4, n * 4, S * 4)
    top = tl.permute(tl.reshape(stored >> 4 & 3, (S, 4, 4)), (0, 2, 1))
    top = shifted(tl.reshape(top, (S * 4, 4)), 4, 2)
    put_words(out, shifted(tl.reshape(top, (S * 2, 2)), 2, 8), 52 + tl.arange(0, S * 2) % 2, 55, 2, n * 2, S * 2)
    by = tl.reshape(ls.to(tl.float32) * d[:, None], (LANES,))
    codes = ()
    for i in tl.static_range(16):
        code = tl.minimum(tl.maximum(nearest_any(tl.div_rn(xs[i], by)), -4), 3) + 4
        codes = codes + (tl.where(by != 0, code, found[i]),)
    fifth = tl.arange(0, S * 2) % 2
    part = tl.arange(0, LANES // 4) % 4
    for k in tl.static_range(4):
        word = words_of(codes, 4 * k, 0)
        high = tl.permute(tl.reshape(word >> 2 & 0x01010101, (S, 8, 2)), (0, 2, 1))
        high = shifted(tl.reshape(high, (S * 2, 8)), 8, 1)
        low = tl.permute(tl.reshape(word & 0x03030303, (S * 2, 4, 2)), (0, 2, 1))
        low = shifted(tl.reshape(low, (LANES // 4, 4)), 4, 2)
        for j in tl.static_range(2):
            put_words(out, high >> 16 * j, fifth * 8 + 2 * k + j, 55, 2, n * 2, S * 2)
            put_words(out, low >> 16 * j, 16 + part * 8 + 2 * k + j, 55, 4, n * 4, LANES // 4)
