"""Codes on grids with and without feedback in Triton, one row a lane: feedback.py and fit_quants.py, bit for bit.

Weights, errors and codes of n rows lie column by column: w, errors f32[K,n], codes u8[K,n], less than 2^31 weights; so do
levels, f32[G,n]. panels: factors of feedback, as cholesky.py has them. A column takes errors in the order of columns, each a
product that is rounded before it is subtracted. Nothing may contract a*b+c.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

from qconvert.kernels.gpu.lane_kernels import MAGIC, larger, smaller, sums

INTEGERS = tl.constexpr(0)  # kinds of grids, as feedback.py has them
TABLE = tl.constexpr(1)
LEVELS = tl.constexpr(16)  # of a table; fewer are filled up
PANEL = tl.constexpr(8)  # columns whose factors lie together
TINY = tl.constexpr(1e-37)
SIGN = tl.constexpr(-(2**31))
LEAST_NORMAL = tl.constexpr(2.0**-6)  # of e4m3
KERNELS = ("feed", "sweep", "nearest_codes", "extremes", "fit_scales", "fit_lines", "fit_zero_points")


@triton.jit
def rounded(v):
    """The nearest integer, halves to even; what is beyond 2^22 stays beyond."""
    return (v + MAGIC) - MAGIC


@triton.jit
def clamped(v, low, high):
    """rounded(v) within low..high, low for a NaN."""
    v = rounded(v)
    v = tl.where(v > low, v, low)
    return tl.where(v < high, v, high)


@triton.jit
def rows_of(n, LANES: tl.constexpr):
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    return row, row < n


@triton.jit
def picked(chosen, v):
    """What v [M,LANES] has in the one chosen row of each lane, 0 where there is none; [LANES]."""
    bits = tl.where(chosen, v.to(tl.int32, bitcast=True), 0)  # as integers, so that -0 stays what it is
    return sums(bits, 0).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def factors_at(c):
    """Where panels have the factors of columns c: row j is 8 j further on."""
    p = c // PANEL
    return 32 * p * (p + 1) + c - PANEL * p


@triton.jit
def coded(w, scale, offset, low, high, table, KIND: tl.constexpr):
    """The nearest code, i32, and what it stands for. table f32[3,16]: middles, levels, codes."""
    one = tl.full(scale.shape, 1.0, tl.float32)
    inverse = tl.where(scale != 0, tl.div_rn(one, scale), 0.0 * scale)
    u = (w - offset) * inverse
    if KIND == INTEGERS:
        level = clamped(u, low, high)
        code = level.to(tl.int32)
    elif KIND == TABLE:
        at = tl.full(u.shape, 0, tl.int32)
        for i in tl.static_range(4):  # halves of what is left of the middles, which are in order
            at = tl.where(u > tl.load(table + at + ((LEVELS >> i + 1) - 1)), at + (LEVELS >> i + 1), at)
        level = tl.load(table + LEVELS + at)
        code = tl.load(table + 2 * LEVELS + at).to(tl.int32)
    else:
        size = tl.abs(u)
        size = tl.where(size < 448.0, size, 448.0)
        power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where(power > LEAST_NORMAL, power, LEAST_NORMAL)
        size = rounded(tl.div_rn(size, power) * 8.0) * power * 0.125
        bits = size.to(tl.int32, bitcast=True)
        byte = tl.where(size < LEAST_NORMAL, (size * 512.0).to(tl.int32), (bits >> 20) - 960)
        sign = tl.where(u == u, u, -1.0).to(tl.int32, bitcast=True) & SIGN  # a NaN is negative on x86
        level = (sign | bits).to(tl.float32, bitcast=True)
        code = tl.where(level < 0, byte | 0x80, byte)
    return code, level * scale + offset


@triton.jit
def feed(w, errors, panels, n, first, last, begin, end, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Columns begin..end less the errors of columns first..last times their factors."""
    row, inside = rows_of(n, LANES)
    c = begin + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (c < end)[:, None] & inside[None, :]
    at = w + c[:, None] * n + row[None, :]
    v = tl.load(at, mask=here, other=0)
    factors = panels + factors_at(c)
    for i in range(first, last):
        e = tl.load(errors + i * n + row, mask=inside, other=0)
        f = tl.load(factors + i * PANEL, mask=c < end, other=0)
        v = v - e[None, :] * f[:, None]
    tl.store(at, v, mask=here)


@triton.jit
def sweep(
    w, errors, panels, scales, offsets, groups, table, codes, n, begin, end, low, high,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Codes and errors of columns begin..end, at most COLUMNS, which took the errors of all before. groups i32[end-begin]."""
    row, inside = rows_of(n, LANES)
    c = begin + tl.arange(0, COLUMNS)
    v = tl.load(w + c[:, None] * n + row[None, :], mask=(c < end)[:, None] & inside[None, :], other=0)
    factors = panels + factors_at(c)
    for j in range(begin, end):
        x = picked((c == j)[:, None], v)
        level = tl.load(groups + j - begin) * n + row
        scale = tl.load(scales + level, mask=inside, other=0)
        offset = tl.load(offsets + level, mask=inside, other=0)
        code, value = coded(x, scale, offset, low, high, table, KIND)
        e = x - value
        tl.store(codes + j * n + row, code.to(tl.uint8), mask=inside)
        tl.store(errors + j * n + row, e, mask=inside)
        f = tl.load(factors + j * PANEL, mask=(c > j) & (c < end), other=0)
        v = v - e[None, :] * f[:, None]  # columns up to j are done with


@triton.jit
def nearest_codes(
    w, scales, offsets, groups, table, codes, n, k, low, high, KIND: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr
):
    """groups i32[k]."""
    row, inside = rows_of(n, LANES)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (c < k)[:, None] & inside[None, :]
    at = c[:, None] * n + row[None, :]
    level = tl.load(groups + c, mask=c < k, other=0)[:, None] * n + row[None, :]
    scale = tl.load(scales + level, mask=here, other=0)
    offset = tl.load(offsets + level, mask=here, other=0)
    code, _ = coded(tl.load(w + at, mask=here, other=0), scale, offset, low, high, table, KIND)
    tl.store(codes + at, code.to(tl.uint8), mask=here)


@triton.jit
def groups_of(w, importance, n, n_groups, first, group, LANES: tl.constexpr):
    """[1,LANES] of row after row, group after group from `first` on: where they store, whether they are any, where each one's
    weights begin and their importance."""
    lane = (tl.program_id(0) * LANES + tl.arange(0, LANES))[None, :]
    column = (first + lane // n) * group
    return lane, lane < n * n_groups, w + (column * n + lane % n), importance + column


@triton.jit
def extent_of(w, n, inside, group):
    """The least and the greatest of columns 0..group from w on."""
    least = tl.load(w, mask=inside, other=0)
    greatest = least
    for i in range(1, group):
        v = tl.load(w + i * n, mask=inside, other=0)
        least = tl.where(v < least, v, least)
        greatest = tl.where(v > greatest, v, greatest)
    return least, greatest


@triton.jit
def extremes(w, lows, highs, n, n_groups, group, LANES: tl.constexpr):
    """Of each group; zeros are +0."""
    lane, inside, x_at, _ = groups_of(w, w, n, n_groups, 0, group, LANES)
    least, greatest = extent_of(x_at, n, inside, group)
    tl.store(lows + lane, least + 0.0, mask=inside)
    tl.store(highs + lane, greatest + 0.0, mask=inside)


@triton.jit
def first_best(explained, N: tl.constexpr, TRIES: tl.constexpr):
    """Of each lane the first of N tries that explains most, if it explains anything, as a mask, and how much that is."""
    place = tl.arange(0, TRIES)[:, None]
    explained = tl.where((place < N) & (explained > 0), explained, 0.0)
    most = tl.reduce(explained, 0, larger)[None, :]
    first = tl.reduce(tl.where((explained == most) & (most > 0), place, TRIES), 0, smaller)
    return place == first[None, :], most


@triton.jit
def scales_fit(x_at, weight_at, n, inside, group, s, low, high, table, KIND: tl.constexpr):
    """By the codes of scales s: the scale of least squares in parts of s, and what it explains."""
    zero = tl.full(s.shape, 0.0, tl.float32)
    xq = zero
    qq = zero
    for i in range(group):
        x = tl.load(x_at + i * n, mask=inside, other=0)
        weight = tl.load(weight_at + i, mask=inside, other=1)
        _, value = coded(x, s, zero, low, high, table, KIND)
        xq = xq + x * weight * value
        qq = qq + value * weight * value
    fit = tl.where(qq > 0, tl.div_rn(xq, qq), 0.0)
    return fit, xq * fit


@triton.jit
def fit_scales(
    w, importance, starts, table, scales, n, n_groups, group, first, low, high,
    N: tl.constexpr, TRIES: tl.constexpr, TURNS: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of groups from `first` on. starts f32[TRIES], of which N count: where the grid has the peak."""
    lane, inside, x_at, weight_at = groups_of(w, importance, n, n_groups, first, group, LANES)
    peak = tl.full((1, LANES), 0.0, tl.float32)
    for i in range(group):
        x = tl.load(x_at + i * n, mask=inside, other=0)
        peak = tl.where(tl.abs(x) > tl.abs(peak), x, peak)
    nothing = tl.full((TRIES, LANES), -0.0, tl.float32)  # added, it changes no number
    s = tl.div_rn(peak + nothing, tl.load(starts + tl.arange(0, TRIES))[:, None] + nothing)
    fit, explained = scales_fit(x_at, weight_at, n, inside, group, s, low, high, table, KIND)
    chosen, best = first_best(explained, N, TRIES)
    scale = picked(chosen, s * fit)[None, :]
    for _ in range(TURNS):
        refit, gain = scales_fit(x_at, weight_at, n, inside, group, scale, low, high, table, KIND)
        scale = tl.where(gain > best, scale * refit, scale)
        best = tl.where(gain > best, gain, best)
    tl.store(scales + lane, scale, mask=inside)


@triton.jit
def lines_fit(x_at, weight_at, n, inside, group, scale, offset, middle, mean, total, last):
    """By the codes of lines: the line of least squares through weights less `middle`, and what it explains of them."""
    half = last * 0.5
    xq = tl.full(scale.shape, 0.0, tl.float32)
    q1 = xq
    qq = xq
    inverse = tl.where(scale > 0, tl.div_rn(xq + 1.0, scale), 0.0 * scale)
    for i in range(group):
        x = tl.load(x_at + i * n, mask=inside, other=0) - middle
        weight = tl.load(weight_at + i, mask=inside, other=1)
        q = clamped((x - offset) * inverse, 0.0, last) - half
        wq = q * weight
        xq = xq + wq * (x - mean)
        q1 = q1 + wq
        qq = qq + wq * q
    variance = qq - tl.div_rn(q1 * q1, total)
    fit = tl.where(variance > 0, tl.div_rn(xq, variance), 0.0 * scale)
    return fit, mean - tl.div_rn(fit * q1, total) - fit * half, xq * fit


@triton.jit
def fit_lines(
    w, importance, steps, shifts, scales, offsets, n, n_groups, group, first, last,
    N: tl.constexpr, TRIES: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of groups from `first` on. Of tries f32[TRIES] N count. steps: in parts of an extent; shifts: the level of its middle."""
    lane, inside, x_at, weight_at = groups_of(w, importance, n, n_groups, first, group, LANES)
    least, greatest = extent_of(x_at, n, inside, group)
    middle = (least + greatest) * 0.5
    total = tl.full((1, LANES), 0.0, tl.float32)
    mean = total
    for i in range(group):
        weight = tl.load(weight_at + i, mask=inside, other=1)
        total = total + weight
        mean = mean + (tl.load(x_at + i * n, mask=inside, other=0) - middle) * weight
    mean = tl.div_rn(mean, total)
    tries = tl.arange(0, TRIES)
    s = (greatest - least) * tl.load(steps + tries)[:, None]
    o = 0.0 - s * tl.load(shifts + tries)[:, None]
    totals = total + tl.full((TRIES, 1), 0.0, tl.float32)
    s, o, explained = lines_fit(x_at, weight_at, n, inside, group, s, o, middle, mean, totals, last)
    chosen, best = first_best(explained, N, TRIES)
    scale = picked(chosen, s)[None, :]
    offset = picked(chosen, o)[None, :]
    for _ in range(TURNS):
        rescaled, moved, gain = lines_fit(x_at, weight_at, n, inside, group, scale, offset, middle, mean, total, last)
        scale = tl.where(gain > best, rescaled, scale)
        offset = tl.where(gain > best, moved, offset)
        best = tl.where(gain > best, gain, best)
    tl.store(scales + lane, scale, mask=inside)
    tl.store(offsets + lane, tl.where(scale > 0, middle + offset, middle + mean), mask=inside)


@triton.jit
def points_fit(x_at, weight_at, n, inside, group, s, z, last):
    """By the codes of scales s and zero points z: the scale of least squares, and what it explains where it is positive."""
    xq = tl.full(s.shape, 0.0, tl.float32)
    qq = xq
    inverse = tl.where(tl.abs(s) > TINY, tl.div_rn(xq + 1.0, s), 0.0)
    for i in range(group):
        x = tl.load(x_at + i * n, mask=inside, other=0)
        weight = tl.load(weight_at + i, mask=inside, other=1)
        q = clamped(x * inverse, 0.0 - z, last - z)
        xq = xq + x * weight * q
        qq = qq + q * weight * q
    fit = tl.where(qq > 0, tl.div_rn(xq, qq), 0.0)
    return fit, tl.where(fit > 0, xq * fit, 0.0)


@triton.jit
def fit_zero_points(
    w, importance, steps, shifts, scales, zeros, n, n_groups, group, first, last,
    N: tl.constexpr, TRIES: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same where an offset is minus a scale times a code. shifts: from the code that would be nearest."""
    lane, inside, x_at, weight_at = groups_of(w, importance, n, n_groups, first, group, LANES)
    least, greatest = extent_of(x_at, n, inside, group)
    least = tl.where(least < 0, least, 0.0)
    greatest = tl.where(greatest > 0, greatest, 0.0)
    middle = (least + greatest) * 0.5
    tries = tl.arange(0, TRIES)
    s = (greatest - least) * tl.load(steps + tries)[:, None]
    part = tl.div_rn(middle + tl.full((TRIES, 1), -0.0, tl.float32), s)
    z = rounded(last * 0.5 - tl.where(s > TINY, part, 0.0)) + tl.load(shifts + tries)[:, None]
    z = tl.where(z > 0, z, 0.0)
    z = tl.where(z < last, z, last)
    fit, explained = points_fit(x_at, weight_at, n, inside, group, s, z, last)
    chosen, best = first_best(explained, N, TRIES)
    scale = picked(chosen, fit)[None, :]
    zero = picked(chosen, z)[None, :]
    for _ in range(TURNS):
        refit, gain = points_fit(x_at, weight_at, n, inside, group, scale, zero, last)
        scale = tl.where(gain > best, refit, scale)
        best = tl.where(gain > best, gain, best)
    tl.store(scales + lane, scale, mask=inside)
    tl.store(zeros + lane, zero, mask=inside)
