"""What kernels with one sub-block a lane share: the arithmetic of qconvert/kernels/lanes.py in Triton, bit for bit.

A sub-block's values stay in registers, one vector of lanes a place, so that sums run as scalar C code's do. Nothing may
contract a*b+c (enable_fp_fusion=False) or divide approximately. A NaN, where sums overflow, counts as on x86.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
import triton
import triton.language as tl

add = tl.standard._sum_combine  # the interpreter sums by numpy only where it meets this one
larger = tl.standard._elementwise_max
smaller = tl.standard._elementwise_min
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: beside it an f32 has no bits left for a fraction
TINY = tl.constexpr(1e-15)  # ggml takes smaller values for zero
KERNELS = ()


@triton.jit
def sums(v, axis: tl.constexpr):
    return tl.reduce(v, axis, add)


@triton.jit
def positive_peak(v):
    """Of each row the greatest, at least 0."""
    return tl.reduce(tl.where(v > 0, v, 0.0), 1, larger)


@triton.jit
def first_of_rows(v, N: tl.constexpr):
    """Of each row of N the first with the greatest magnitude, +0 where all are zero."""
    v = tl.where(v == v, v, 0.0)
    size = tl.abs(v)
    place = tl.arange(0, N)[None, :]
    first = tl.reduce(tl.where(size == tl.reduce(size, 1, larger)[:, None], place, N), 1, smaller)
    return sums(tl.where((place == first[:, None]) & (size > 0), v, 0.0), 1)


@triton.jit
def values(x, n, SIZE: tl.constexpr, LANES: tl.constexpr):
    """The SIZE values of each lane's sub-block, f32[LANES] a place; zeros in lanes from n on."""
    first = tl.program_id(0).to(tl.int64) * LANES
    lane = tl.arange(0, LANES)
    out = ()
    for i in tl.static_range(SIZE):
        v = tl.load(x + first * SIZE + lane * SIZE + i, mask=first + lane < n, other=0)
        out = out + (v.to(tl.float32),)
    return out


@triton.jit
def nearest(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The nearest integer within LOW..HIGH, halves to even, as a float; LOW for a NaN."""
    return tl.minimum(tl.maximum((v + MAGIC) - MAGIC, LOW), HIGH)


@triton.jit
def nearest_any(v):
    """ggml's nearest_int, i32: beyond 2^22 its bytes need the same nonsense, and 0 for a NaN."""
    bits = (v + MAGIC).to(tl.int32, bitcast=True)
    return tl.where(v == v, (bits & 0x7FFFFF) - 0x400000, 0)


@triton.jit
def half(v):
    """The bits of the nearest f16, i32, and what it stands for."""
    h = v.to(tl.float16)
    return h.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, h.to(tl.float32)


@triton.jit
def inverse_of(v):
    """1 / v, and 0 of 0."""
    return tl.where(v != 0, tl.div_rn(tl.full(v.shape, 1.0, tl.float32), v), 0.0)


@triton.jit
def words_of(codes, first: tl.constexpr, shift: tl.constexpr):
    """i32: the low bits of byte i are code first + i above its lowest `shift` bits."""
    word = codes[first] >> shift
    for i in tl.static_range(1, 4):
        word = word | (codes[first + i] >> shift) << 8 * i
    return word


@triton.jit
def byte_pairs(codes, k: tl.constexpr):
    """i32: four bytes from 4 k on; byte i holds code i low and code i + 16 high."""
    return words_of(codes, 4 * k, 0) & 0x0F0F0F0F | (words_of(codes, 16 + 4 * k, 0) & 0x0F0F0F0F) << 4


@triton.jit
def shifted(v, N: tl.constexpr, step: tl.constexpr):
    """i32[...]: the N numbers of each row side by side, `step` bits apart."""
    return sums(v << (tl.arange(0, N) * step)[None, :], 1)


@triton.jit
def peak(xs, SIZE: tl.constexpr):
    """Of each lane's values the first with the greatest magnitude, and that magnitude."""
    value = tl.full(xs[0].shape, 0.0, tl.float32)
    size = value
    for i in tl.static_range(SIZE):
        more = tl.abs(xs[i]) > size
        size = tl.where(more, tl.abs(xs[i]), size)
        value = tl.where(more, xs[i], value)
    return value, size


@triton.jit
def put_words(out, word, offset, BLOCK: tl.constexpr, EACH: tl.constexpr, n, LANES: tl.constexpr):
    """A word for each of EACH parts of a block of BLOCK words, word[i] at `offset` of its part (offset i32[i] or a number)."""
    first = tl.program_id(0).to(tl.int64) * LANES
    i = first + tl.arange(0, LANES)
    tl.store(out + i // EACH * BLOCK + offset, word.to(out.dtype.element_ty), mask=i < n)
