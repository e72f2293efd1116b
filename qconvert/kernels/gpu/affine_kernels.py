"""Codes of least squared error in Triton, one group a lane: affine_quants.py, affine_nearest.py, table_quants.py, bit for bit.

x f32[group, n], less than 2^31 weights: those of n groups, one a column, so that a warp reads its lanes' values together. words
i32[n * group * BITS / 32], the first code in the low bits; scales, zeros f32[n]. Nothing may contract a*b+c.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

from qconvert.kernels.gpu.lane_kernels import MAGIC

NOTHING = tl.constexpr(1e-37)  # a group of less is zero: its inverse would overflow
FLAT = tl.constexpr(1e-6)  # a range of less, in parts of its middle, is that of a constant
UNSHRUNK = tl.constexpr(4)  # bits of codes whose scale keeps the weights as long as they are
KERNELS = ("symmetric", "with_zero", "with_float_zero", "of_table", "of_given_levels")


@triton.jit
def lanes_of(n, LANES: tl.constexpr):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    return lane, lane < n


@triton.jit
def one(x, i, n, lane, inside):
    """Weight i of each group."""
    return tl.load(x + i * n + lane, mask=inside, other=0)


@triton.jit
def rounded(v):
    """The nearest integer, halves to even: of what is small, which all is that codes come from."""
    return (v + MAGIC) - MAGIC


@triton.jit
def clamped(v, low, high):
    return tl.minimum(tl.maximum(rounded(v), low), high)


@triton.jit
def better(vq, qq, spread, factor, best, best_factor, best_fit):
    """Where codes explain more of the weights than the best so far (spread: their scale, squared), take them over."""
    fit = tl.div_rn(vq, qq)
    explained = vq * fit * spread
    more = explained > best
    return tl.where(more, explained, best), tl.where(more, factor, best_factor), tl.where(more, fit, best_fit)


@triton.jit
def peak_of(x, n, group, lane, inside, LANES: tl.constexpr):
    """Of each group the first weight with the greatest magnitude."""
    peak = tl.full((LANES,), 0.0, tl.float32)
    size = peak
    for i in range(group):
        v = one(x, i, n, lane, inside)
        larger = tl.abs(v) > size
        size = tl.where(larger, tl.abs(v), size)
        peak = tl.where(larger, v, peak)
    return peak


@triton.jit
def symmetric(x, words, scales, ends, n, group, N_ENDS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """Codes around the middle one. ends f32[N_ENDS]."""
    PER: tl.constexpr = 32 // BITS
    half: tl.constexpr = 1 << BITS - 1
    lane, inside = lanes_of(n, LANES)
    zero = tl.full((LANES,), 0.0, tl.float32)
    peak = peak_of(x, n, group, lane, inside, LANES)
    inverse = tl.where(tl.abs(peak) > NOTHING, tl.div_rn(zero - 1.0, peak), 0.0)
    best = zero
    best_factor = zero
    best_fit = zero
    for step in range(N_ENDS):
        end = tl.load(ends + step)
        factor = inverse * end
        vq = zero
        qq = zero
        for i in range(group):
            v = one(x, i, n, lane, inside) * factor
            q = clamped(v, -half, half - 1.0)
            vq = vq + v * q
            qq = qq + q * q
        spread = tl.div_rn(zero + 1.0, zero + end * end)
        best, best_factor, best_fit = better(vq, qq, spread, factor, best, best_factor, best_fit)
    factor = tl.where(best > 0, tl.div_rn(best_factor, best_fit), 0.0)
    vq = zero
    qq = zero
    vv = zero
    for w in range(group // PER):
        word = tl.full((LANES,), 0, tl.int32)
        for j in tl.static_range(PER):
            v = factor * one(x, w * PER + j, n, lane, inside)
            q = clamped(v, -half, half - 1.0)
            vq = vq + v * q
            qq = qq + q * q
            vv = vv + v * v
            word = word | (q + half).to(tl.int32) << j * BITS
        tl.store(words + lane * (group // PER) + w, word, mask=inside)
    if BITS == UNSHRUNK:
        fit = tl.div_rn(vv, vq)
    else:
        fit = tl.div_rn(vq, qq)
    tl.store(scales + lane, tl.where(qq > 0, tl.div_rn(fit, factor), 0.0), mask=inside)


@triton.jit
def with_zero(x, words, scales, zeros, spans, n, group, N_SPANS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """Codes around a zero point that is one of them. spans f32[N_SPANS]."""
    PER: tl.constexpr = 32 // BITS
    last: tl.constexpr = (1 << BITS) - 1.0
    lane, inside = lanes_of(n, LANES)
    zero = tl.full((LANES,), 0.0, tl.float32)
    least = zero
    greatest = zero
    for i in range(group):
        v = one(x, i, n, lane, inside)
        least = tl.where(v < least, v, least)
        greatest = tl.where(v > greatest, v, greatest)
    inverse = tl.where(greatest - least > NOTHING, tl.div_rn(zero + last, greatest - least), 0.0)
    middle = (least + greatest) * 0.5
    best = zero
    best_factor = zero
    best_fit = zero
    best_zero = zero
    for step in range(N_SPANS):
        span = tl.load(spans + step)
        factor = inverse * tl.div_rn(zero + 1.0, zero + span)
        centre = rounded(last * 0.5 - middle * factor)
        point1 = tl.minimum(tl.maximum(centre - 1.0, 0.0), last)
        point2 = tl.minimum(tl.maximum(centre, 0.0), last)
        point3 = tl.minimum(tl.maximum(centre + 1.0, 0.0), last)
        vq1 = zero
        vq2 = zero
        vq3 = zero
        qq1 = zero
        qq2 = zero
        qq3 = zero
        for i in range(group):
            v = factor * one(x, i, n, lane, inside)
            r = rounded(v)
            q1 = tl.minimum(tl.maximum(r, 0.0 - point1), last - point1)
            q2 = tl.minimum(tl.maximum(r, 0.0 - point2), last - point2)
            q3 = tl.minimum(tl.maximum(r, 0.0 - point3), last - point3)
            vq1 = vq1 + v * q1
            vq2 = vq2 + v * q2
            vq3 = vq3 + v * q3
            qq1 = qq1 + q1 * q1
            qq2 = qq2 + q2 * q2
            qq3 = qq3 + q3 * q3
        vqs = (vq1, vq2, vq3)
        qqs = (qq1, qq2, qq3)
        points = (point1, point2, point3)
        for j in tl.static_range(3):
            before = best
            best, best_factor, best_fit = better(vqs[j], qqs[j], span * span, factor, best, best_factor, best_fit)
            best_zero = tl.where(best > before, points[j], best_zero)
    factor = tl.where(best > 0, tl.div_rn(best_factor, best_fit), 0.0)
    vq = zero
    qq = zero
    for w in range(group // PER):
        word = tl.full((LANES,), 0, tl.int32)
        for j in tl.static_range(PER):
            v = factor * one(x, w * PER + j, n, lane, inside)
            q = clamped(v, 0.0 - best_zero, last - best_zero)
            vq = vq + v * q
            qq = qq + q * q
            word = word | (q + best_zero).to(tl.int32) << j * BITS
        tl.store(words + lane * (group // PER) + w, word, mask=inside)
    tl.store(scales + lane, tl.where(qq > 0, tl.div_rn(tl.div_rn(vq, qq), factor), 0.0), mask=inside)
    tl.store(zeros + lane, best_zero, mask=inside)


@triton.jit
def line_sums(x, n, group, lane, inside, middle, factor, offset, last):
    """Sums of u * code, code and code * code, where u = (x - middle) * factor and its code is that of u + offset."""
    uq = tl.full(middle.shape, 0.0, tl.float32)
    q1 = uq
    qq = uq
    for i in range(group):
        u = (one(x, i, n, lane, inside) - middle) * factor
        q = clamped(u + offset, 0.0, last)
        uq = uq + u * q
        q1 = q1 + q
        qq = qq + q * q
    return uq, q1, qq


@triton.jit
def with_float_zero(
    x, words, scales, zeros, spans, offsets, n, group, share,
    N_SPANS: tl.constexpr, N_OFFSETS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Codes of which a line of least squares makes weights. spans f32[N_SPANS], offsets f32[N_OFFSETS]; share: 1 / group."""
    PER: tl.constexpr = 32 // BITS
    last: tl.constexpr = (1 << BITS) - 1.0
    lane, inside = lanes_of(n, LANES)
    zero = tl.full((LANES,), 0.0, tl.float32)
    least = tl.load(x + lane, mask=inside, other=0)
    greatest = least
    for i in range(1, group):
        v = one(x, i, n, lane, inside)
        least = tl.where(v < least, v, least)
        greatest = tl.where(v > greatest, v, greatest)
    middle = (least + greatest) * 0.5
    extent = greatest - least
    varies = (extent > NOTHING) & (extent > tl.abs(middle) * FLAT)
    inverse = tl.where(varies, tl.div_rn(zero + last, extent), 0.0)
    mean = zero
    for i in range(group):
        mean = mean + (one(x, i, n, lane, inside) - middle) * share
    best = zero
    factor = zero
    offset = zero
    for step in range(N_SPANS):
        span = tl.load(spans + step)
        tried = inverse * tl.div_rn(zero + 1.0, zero + span)
        for shift in range(N_OFFSETS):
            uq, q1, qq = line_sums(x, n, group, lane, inside, middle, tried, zero + tl.load(offsets + shift), last)
            centred = uq - mean * tried * q1
            fit = tl.div_rn(centred, qq - q1 * q1 * share)
            explained = centred * fit * (span * span)
            more = explained > best
            best = tl.where(more, explained, best)
            factor = tl.where(more, tl.div_rn(tried, fit), factor)
            offset = tl.where(more, tl.div_rn(fit * q1 * share - mean * tried, fit), offset)
    uq, q1, qq = line_sums(x, n, group, lane, inside, middle, factor, offset, last)
    fit = tl.div_rn(uq - mean * factor * q1, qq - q1 * q1 * share)
    base = mean * factor - fit * q1 * share
    offset = tl.where(fit > 0, 0.0 - tl.div_rn(base, fit), offset)
    factor = tl.where(fit > 0, tl.div_rn(factor, fit), factor)
    uq = zero
    q1 = zero
    qq = zero
    for w in range(group // PER):
        word = tl.full((LANES,), 0, tl.int32)
        for j in tl.static_range(PER):
            u = (one(x, w * PER + j, n, lane, inside) - middle) * factor
            q = clamped(u + offset, 0.0, last)
            uq = uq + u * q
            q1 = q1 + q
            qq = qq + q * q
            word = word | q.to(tl.int32) << j * BITS
        tl.store(words + lane * (group // PER) + w, word, mask=inside)
    fit = tl.div_rn(uq - mean * factor * q1, qq - q1 * q1 * share)
    found = varies & (fit > 0)
    base = mean * factor - fit * q1 * share
    # a constant: code 0 stands one above its zero point
    tl.store(scales + lane, tl.where(found, tl.div_rn(fit, factor), middle), mask=inside)
    tl.store(zeros + lane, tl.where(found, 0.0 - tl.div_rn(base + middle * factor, fit), -1.0), mask=inside)


@triton.jit
def level_of(v, middles, levels, N: tl.constexpr):
    """What is kept of the level nearest to v, the lower of two that are as near."""
    found = tl.full(v.shape, 0.0, tl.float32) + tl.load(levels)
    for k in tl.static_range(N - 1):
        found = tl.where(v > tl.load(middles + k), tl.load(levels + k + 1), found)
    return found


@triton.jit
def of_table(
    x, words, scales, levels, middles, codes, ends, n, group, N_LEVELS: tl.constexpr, N_ENDS: tl.constexpr, LANES: tl.constexpr
):
    """Codes into a table: levels f32[N_LEVELS] in order, their middles, and the code of each, as floats. ends f32[N_ENDS]."""
    lane, inside = lanes_of(n, LANES)
    zero = tl.full((LANES,), 0.0, tl.float32)
    peak = peak_of(x, n, group, lane, inside, LANES)
    inverse = tl.where(tl.abs(peak) > NOTHING, tl.div_rn(zero + 1.0, peak), 0.0)
    best = zero
    best_factor = zero
    best_fit = zero
    for step in range(N_ENDS):
        end = tl.load(ends + step)
        factor = inverse * end
        vq = zero
        qq = zero
        for i in range(group):
            v = factor * one(x, i, n, lane, inside)
            q = level_of(v, middles, levels, N_LEVELS)
            vq = vq + v * q
            qq = qq + q * q
        spread = tl.div_rn(zero + 1.0, zero + end * end)
        best, best_factor, best_fit = better(vq, qq, spread, factor, best, best_factor, best_fit)
    factor = tl.where(best > 0, tl.div_rn(best_factor, best_fit), 0.0)
    vq = zero
    qq = zero
    for w in range(group // 8):
        word = tl.full((LANES,), 0, tl.int32)
        for j in tl.static_range(8):
            v = factor * one(x, w * 8 + j, n, lane, inside)
            q = level_of(v, middles, levels, N_LEVELS)
            vq = vq + v * q
            qq = qq + q * q
            word = word | level_of(v, middles, codes, N_LEVELS).to(tl.int32) << j * 4
        tl.store(words + lane * (group // 8) + w, word, mask=inside)
    tl.store(scales + lane, tl.where(qq > 0, tl.div_rn(tl.div_rn(vq, qq), factor), 0.0), mask=inside)


@triton.jit
def of_given_levels(x, words, scales, zeros, n, group, BITS: tl.constexpr, LANES: tl.constexpr):
    """The nearest codes of scales and zero points that are given; of a scale of 0 the zero point's."""
    PER: tl.constexpr = 32 // BITS
    last: tl.constexpr = (1 << BITS) - 1.0
    lane, inside = lanes_of(n, LANES)
    scale = tl.load(scales + lane, mask=inside, other=0)
    point = tl.load(zeros + lane, mask=inside, other=0)
    inverse = tl.where((scale > 0) | (scale < 0), tl.div_rn(tl.full((LANES,), 1.0, tl.float32), scale), 0.0)
    for w in range(group // PER):
        word = tl.full((LANES,), 0, tl.int32)
        for j in tl.static_range(PER):
            q = clamped(one(x, w * PER + j, n, lane, inside) * inverse, 0.0 - point, last - point) + point
            word = word | q.to(tl.int32) << j * BITS
        tl.store(words + lane * (group // PER) + w, word, mask=inside)
