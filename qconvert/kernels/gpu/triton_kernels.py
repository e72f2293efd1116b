"""The kernels, in Triton: dequantize, and x [M,K] by a packed weight, its codes never written out.

loading.py loads this file twice, once for the interpreter and once for the compiler; launch.py describes the arguments w, m and
low: records of pointers, strides and what is known when a kernel is compiled. Sums are in f32, or in i32 of integers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

add = tl.standard._sum_combine  # the interpreter sums by numpy only where it meets this one
larger = tl.standard._elementwise_max
KERNELS = ("dequantize", "gemv", "gemm", "quantize_rows")


@triton.jit
def sums(v, axis: tl.constexpr):
    return tl.reduce(v, axis, add)


@triton.jit
def real(v, kind: tl.constexpr):
    """f32 of stored bits, by integers where a type is not one of all devices."""
    if kind == "bf16":
        v = (v.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif kind == "e4m3":
        # the same bits as a half have the exponent 8 less: exact, subnormals too
        u = v.to(tl.uint16)
        v = ((u & 128) << 8 | (u & 127) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif kind == "e8m0":
        u = v.to(tl.uint32)
        v = tl.where(u == 0, 1 << 22, u << 23).to(tl.float32, bitcast=True)
    else:
        v = v.to(tl.float32)
    return v


@triton.jit
def quotient(i, by: tl.constexpr, shift: tl.constexpr):
    """i // by of no negative i; shift: log2 of by where it has one."""
    if by == 1:
        q = i
    elif shift is not None:
        q = i >> shift
    else:
        q = i // by
    return q


@triton.jit
def codes(w, r, c, mask):
    """i32 of rows r and columns c, which broadcast to the shape of mask."""
    if w.axis == "parts":
        r = r.to(tl.int32)
        at = w.at + (r % w.lead).to(tl.int64) * w.s0 + c * w.s1
        shift = r // w.lead * w.bits
    elif w.axis == "rows":
        at = w.at + (r * w.bits >> w.log_word) * w.s0 + c * w.s1
        shift = (r * w.bits & (w.word - 1)).to(tl.int32)
    else:
        at = w.at + r * w.s0 + (c * w.bits >> w.log_word) * w.s1
        shift = (c * w.bits & (w.word - 1)).to(tl.int32)
    v = tl.load(at, mask=mask, other=0)
    if w.bits == w.word:
        q = v.to(tl.int32)
    else:
        u = v.to(tl.uint32)
        if w.high:
            u = u >> (-shift + (w.word // w.bits - 1) * w.bits).to(tl.uint32)
        elif w.awq:
            u = u >> (shift >> 3 << 2 | (shift & 4) << 2).to(tl.uint32)
        else:
            u = u >> shift.to(tl.uint32)
        if w.step is not None:
            # the rest of a code that began in the word before
            over = mask & (shift + w.bits > w.word)
            rest = tl.load(at + w.step, mask=over, other=0).to(tl.uint32)
            u = u | rest << (-shift & (w.word - 1)).to(tl.uint32)
        q = (u.to(tl.int32) + w.add) & w.last
    return q


@triton.jit
def within(k, n_columns, EVEN: tl.constexpr):
    """Columns there are. Of all of them Triton must know it, to read many at once."""
    if EVEN:
        inside = tl.full(k.shape, 1, tl.int1)
    else:
        inside = k < n_columns
    return inside


@triton.jit
def tile(w, n, k0, n_last, n_columns, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Codes of rows n [BN] and columns k0 .. k0 + BK: i32[BN,BK], or what small floats are."""
    if w.per is not None:
        # each word is read once, and its codes are neighbours
        word = k0 // w.per + tl.arange(0, BK // w.per)
        mask = (n < n_last)[:, None] & within(word * w.per, n_columns, EVEN)[None, :]
        u = tl.load(w.words.at + n[:, None] * w.words.s0 + word[None, :] * w.words.s1, mask=mask, other=0).to(tl.uint32)
        shift = tl.arange(0, w.per) * w.words.bits
        if w.words.high:
            shift = -shift + (w.words.word - w.words.bits)
        q = (u[:, :, None] >> shift.to(tl.uint32)[None, None, :]) & w.words.last
        q = tl.reshape(q, (BN, BK)).to(tl.int32)
    else:
        k = k0 + tl.arange(0, BK)
        mask = (n < n_last)[:, None] & within(k, n_columns, EVEN)[None, :]
        r, c = place(w, n[:, None], k[None, :])
        if w.words.axis is None:
            q = tl.load(w.words.at + r * w.words.s0 + c * w.words.s1, mask=mask, other=0)
        else:
            q = codes(w.words, r, c, mask)
    return q


@triton.jit
def place(w, n, k):
    """Row and column in the matrix that was quantized, without a division of each weight's index where one can do without."""
    if w.reshape == "none":
        r, c = n, k
    elif w.reshape == "one row":
        c = n * w.n_columns + k
        r = c * 0
    elif w.reshape == "rows within rows":
        r = n * w.ratio + quotient(k, w.width, w.log_width)
        c = k % w.width + n * 0
    elif w.reshape == "rows across rows":
        r = n // w.ratio + k * 0
        c = n % w.ratio * w.n_columns + k
    else:
        flat = n * w.n_columns + k
        r = flat // w.width
        c = flat % w.width
    return r, c


@triton.jit
def level(w, q):
    """f32: what codes stand for, less the zero point that all share."""
    if w.table is not None:
        v = tl.load(w.table + q)
    else:
        v = real(q, w.kind)
    if w.centre is not None:
        v = v - w.centre
    return v


@triton.jit
def number(m, r, c, mask):
    """f32: metadata of blocks r, c, which broadcast to the shape of mask."""
    if m.words.axis is None:
        v = tl.load(m.words.at + r * m.words.s0 + c * m.words.s1, mask=mask, other=0)
    else:
        v = codes(m.words, r, c, mask)
    if m.second is None:
        v = real(v, m.kind)
    else:
        s = m.second
        j = quotient(r * s.s0 + c * s.s1, s.group, s.log_group) % s.n
        if s.table is not None:
            f = tl.load(s.table + v.to(tl.int32), mask=mask, other=0)
        else:
            f = real(v, m.kind)
        if s.zero is not None:
            f = f - tl.load(s.zero + j, mask=mask, other=0)
        v = f * tl.load(s.scale + j, mask=mask, other=0) + s.offset
    if m.divisor is not None:
        v = tl.div_rn(v, tl.full(v.shape, m.divisor, tl.float32))
    return v


@triton.jit
def block_of(w, n, k):
    """The block of metadata of weight n, k."""
    r, c = place(w, n, k)
    if w.g_idx is not None:
        c = tl.load(w.g_idx + k, mask=k < w.n_columns, other=0)
    elif w.columns is None:
        c = c * 0
    else:
        c = quotient(c, w.columns, w.log_columns)
    return quotient(r, w.rows, w.log_rows), c


@triton.jit
def weights(w, q, n, k, mask):
    """f32[BN,BK] of codes, each with its own metadata."""
    v = level(w, q)
    r, c = block_of(w, n, k)
    if w.zero is not None:
        v = v - number(w.zero, r, c, mask)
    if w.scale is not None:
        v = v * number(w.scale, r, c, mask)
    if w.offset is not None:
        v = v + number(w.offset, r, c, mask)
    return v


@triton.jit
def scaled(w, part, total, n, k, mask, INTEGERS: tl.constexpr):
    """s (part - z total) + m total: of sums of codes by x and of x alone, over weights that share metadata."""
    if INTEGERS and w.rest is not None:
        part = part + total * w.rest
    r, c = block_of(w, n, k)
    if w.zero is not None:
        part = part - number(w.zero, r, c, mask) * total
    if w.scale is not None:
        part = part * number(w.scale, r, c, mask)
    if w.offset is not None:
        part = part + number(w.offset, r, c, mask) * total
    return part


@triton.jit
def dequantize(out, out_stride, w, n_first, n_last, n_columns, BN: tl.constexpr, BK: tl.constexpr):
    n = (n_first + tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    k0 = tl.program_id(1) * BK
    k = k0 + tl.arange(0, BK)
    mask = (n < n_last)[:, None] & (k < n_columns)[None, :]
    q = tile(w, n, k0, n_last, n_columns, False, BN, BK)
    if out.dtype.element_ty == tl.int32:
        v = q.to(tl.int32)
    else:
        v = weights(w, q, n[:, None], k[None, :], mask)
    tl.store(out + (n - n_first)[:, None] * out_stride + k[None, :], v, mask=mask)


@triton.jit
def gemv(
    x, x_stride, t, w, low, out, out_stride, n_first, n_last, n_columns, RUN: tl.constexpr, WHOLE: tl.constexpr,
    T_GROUP: tl.constexpr, INTEGERS: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Row program_id(1) of x. RUN neighbours share metadata: a power of 2, 1 where each weight is made first.

    WHOLE: all of a row does. x: floats, or i8 with INTEGERS; t: their scales, one for T_GROUP of a row (0: for all of it).
    EVEN: BK divides n_columns. Sums of runs stay where they are until the end.
    """
    row = tl.program_id(1)
    n = (n_first + tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows = (n < n_last)[:, None]
    kind: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    acc = tl.full((BN, BK // RUN), 0, tl.int32 if INTEGERS and WHOLE else tl.float32)
    total = tl.full((1, BK // RUN), 0, kind)
    for k0 in range(0, n_columns, BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + row * x_stride + k, mask=within(k, n_columns, EVEN), other=0).to(kind)
        q = tile(w, n, k0, n_last, n_columns, EVEN, BN, BK)
        if INTEGERS:
            v = (q.to(tl.int32) - w.integer_centre) * xs[None, :]
        elif RUN == 1:
            v = weights(w, q, n[:, None], k[None, :], rows & within(k, n_columns, EVEN)[None, :]) * xs[None, :]
        elif w.grid == "binary":
            v = tl.where(q == 1, xs[None, :], 0.0)
        elif w.grid == "ternary":
            v = tl.where(q == 2, xs[None, :], tl.where(q == 0, -xs[None, :], 0.0))
        else:
            v = level(w, q) * xs[None, :]
        if RUN == 1:
            acc += v
        else:
            part = sums(tl.reshape(v, (BN, BK // RUN, RUN)), 2)
            all_x = sums(tl.reshape(xs, (BK // RUN, RUN)), 1)[None, :]
            if WHOLE:
                acc += part
                total += all_x
            else:
                first = (k0 + tl.arange(0, BK // RUN) * RUN)[None, :]
                inside = within(first, n_columns, EVEN)
                part = part.to(tl.float32)
                all_x = all_x.to(tl.float32)
                if t is not None and T_GROUP > 0:
                    scale = number(t, row, first // T_GROUP, inside)
                    part = part * scale
                    all_x = all_x * scale
                acc += scaled(w, part, all_x, n[:, None], first, rows & inside, INTEGERS)
    y = sums(acc, 1)
    if out.dtype.element_ty != tl.int32:
        zero = tl.full((1, 1), 0, tl.int32)
        y = y.to(tl.float32)
        if WHOLE:
            y = sums(scaled(w, y[:, None], sums(total, 1).to(tl.float32)[:, None], n[:, None], zero, rows, INTEGERS), 1)
        if t is not None and T_GROUP == 0:
            y = y * sums(number(t, row, tl.full((1,), 0, tl.int32), tl.full((1,), 1, tl.int1)), 0)
        if low is not None:
            rank = tl.arange(0, low.padded)
            h = tl.load(low.h + row * low.rank + rank, mask=rank < low.rank, other=0)
            b = number(low.b, n[:, None], rank[None, :], rows & (rank < low.rank)[None, :])
            y += low.scale * sums(h[None, :] * b, 1)
    tl.store(out + row * out_stride + n - n_first, y, mask=n < n_last)


@triton.jit
def gemm(
    x, x_stride, t, w, low, out, out_stride, n_first, n_last, n_columns, n_rows,
    RUN: tl.constexpr, WHOLE: tl.constexpr, T_GROUP: tl.constexpr, INTEGERS: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BN rows of w by BM of x: y^T, for the factor that is made in registers may stay there. As gemv, RUN 1 or BK."""
    row = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (n_first + tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows, here = (n < n_last)[:, None], (row < n_rows)[None, :]
    zero = tl.full((1, 1), 0, tl.int32)
    kind: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    acc = tl.full((BN, BM), 0, tl.int32 if INTEGERS and WHOLE else tl.float32)
    total = tl.full((BM,), 0, kind)
    for k0 in range(0, n_columns, BK):
        k = k0 + tl.arange(0, BK)
        inside = within(k, n_columns, EVEN)[None, :]
        xs = tl.load(x + row[:, None] * x_stride + k[None, :], mask=(row < n_rows)[:, None] & inside, other=0)
        q = tile(w, n, k0, n_last, n_columns, EVEN, BN, BK)
        if INTEGERS:
            v = (q.to(tl.int32) - w.integer_centre).to(tl.int8)
        elif RUN == 1:
            v = weights(w, q, n[:, None], k[None, :], rows & inside).to(xs.dtype)
        else:
            v = level(w, q).to(xs.dtype)
        if RUN == 1 or WHOLE:
            acc = tl.dot(v, tl.trans(xs), acc, input_precision="ieee", out_dtype=kind)
            if WHOLE:
                total += sums(xs.to(kind), 1)
        else:
            part = tl.dot(v, tl.trans(xs), input_precision="ieee", out_dtype=kind).to(tl.float32)
            all_x = sums(xs.to(kind), 1).to(tl.float32)[None, :]
            if t is not None and T_GROUP > 0:
                scale = number(t, row[None, :], zero + k0 // T_GROUP, here)
                part = part * scale
                all_x = all_x * scale
            acc += scaled(w, part, all_x, n[:, None], zero + k0, rows, INTEGERS)
    if out.dtype.element_ty == tl.int32:
        y = acc
    else:
        y = acc.to(tl.float32)
        if WHOLE:
            y = scaled(w, y, total.to(tl.float32)[None, :], n[:, None], zero, rows, INTEGERS)
        if t is not None and T_GROUP == 0:
            y = y * number(t, row[None, :], zero, here)
        if low is not None:
            rank = tl.arange(0, low.padded)
            h = tl.load(low.h + row[None, :] * low.rank + rank[:, None], mask=here & (rank < low.rank)[:, None], other=0)
            b = number(low.b, n[:, None], rank[None, :], rows & (rank < low.rank)[None, :])
            y += low.scale * tl.dot(b, h, input_precision="ieee")
    tl.store(out + row[None, :] * out_stride + (n - n_first)[:, None], y, mask=rows & here)


@triton.jit
def nearest(v):
    """Integers, halves to even: beside 1.5 * 2^23 an f32 has no bits left for a fraction."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def quantize_rows(x, x_stride, out, t, n_columns, group, STEPS: tl.constexpr, STATIC: tl.constexpr, BK: tl.constexpr):
    """x f32 to i8, or to values of e4m3 in f32, by a scale a group of a row: max |x| / STEPS, or t as it is with STATIC.

    Halves go to even.
    """
    row = tl.program_id(0)
    first = tl.program_id(1) * group
    at = t + row * tl.num_programs(1) + tl.program_id(1)
    if STATIC:
        scale = tl.load(t)
    else:
        peak = tl.full((BK,), 0.0, tl.float32)
        for k0 in range(0, group, BK):
            k = k0 + tl.arange(0, BK)
            mask = (k < group) & (first + k < n_columns)
            peak = tl.maximum(peak, tl.abs(tl.load(x + row * x_stride + first + k, mask=mask, other=0).to(tl.float32)))
        scale = tl.div_rn(tl.reduce(peak, 0, larger), tl.full((), STEPS, tl.float32))
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(at, scale)
    for k0 in range(0, group, BK):
        k = k0 + tl.arange(0, BK)
        mask = (k < group) & (first + k < n_columns)
        v = tl.load(x + row * x_stride + first + k, mask=mask, other=0).to(tl.float32)
        v = tl.div_rn(v, tl.full((BK,), 1.0, tl.float32) * scale)
        if out.dtype.element_ty == tl.int8:
            v = nearest(tl.minimum(tl.maximum(v, -128.0), 127.0)).to(tl.int8)
        else:
            v = tl.minimum(tl.maximum(v, -448.0), 448.0)
            # 3 bits below the leading one, which counts as no less than 2^-6
            exponent = tl.maximum(v.to(tl.uint32, bitcast=True) >> 23 & 255, 121)
            v = nearest(v * (257 - exponent << 23).to(tl.float32, bitcast=True))
            v = v * (exponent - 3 << 23).to(tl.float32, bitcast=True)
        tl.store(out + row * n_columns + first + k, v, mask=mask)
