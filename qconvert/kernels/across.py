"""Operations on vectors that cross lanes: reductions, masks as bits, transposition, table look-ups."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qconvert.kernels.lanes import (
    I32,
    LanesType,
    Vector,
    _constant,
    absolute,
    count,
    load,
    maximum,
    pointer,
    scratch,
    splat,
    square_root,
    store,
)

U64 = np.uint64


def _shuffle(builder: Any, v: Any, indices: list[int]) -> Any:
    return builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, len(indices)), indices))


def _across(sign: str) -> Any:
    @intrinsic
    def function(typingctx, v):  # type: ignore[no-untyped-def]
        """The least (greatest) of all lanes, a scalar."""

        def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
            value, n = args[0], v.n
            while n > 1:
                n //= 2
                low, high = _shuffle(builder, value, list(range(n))), _shuffle(builder, value, list(range(n, 2 * n)))
                value = builder.select(builder.fcmp_ordered(sign, low, high), low, high)
            return builder.extract_element(value, I32(0)) if v.n > 1 else value

        return types.float32(v), emit

    return function


lowest, highest = _across("<"), _across(">")


@intrinsic
def mask_bits(typingctx, mask):  # type: ignore[no-untyped-def]
    """Bit i of the result is lane i of the mask."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.zext(builder.bitcast(args[0], ir.IntType(mask.n)), ir.IntType(64))

    return types.uint64(mask), emit


@intrinsic
def first_bit(typingctx, bits):  # type: ignore[no-untyped-def]
    """The place of the lowest bit that is set, 64 where none is."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.intp(types.uint64), emit


@intrinsic
def pairs(typingctx, lanes, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 2 * n] of a contiguous f32 array, as its even and its odd places."""
    vector = Vector(array.dtype, lanes.n)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        both = Vector(array.dtype, 2 * lanes.n)
        value = builder.load(pointer(context, builder, array, args[1], args[2], both.llvm()))
        value.align = 4
        if lanes.n == 1:
            halves = [builder.extract_element(value, I32(i)) for i in (0, 1)]
        else:
            halves = [_shuffle(builder, value, list(range(i, 2 * lanes.n, 2))) for i in (0, 1)]
        return context.make_tuple(builder, sig.return_type, halves)

    return types.UniTuple(vector, 2)(lanes, array, types.intp), emit


@njit(forceinline=True)
def peak_of(lanes, x, at, size):  # type: ignore[no-untyped-def]
    """The first of x[at : at + size] with the greatest magnitude, +0 where all are zero; size at most 64."""
    n = count(lanes)
    largest = splat(lanes, np.float32(0))
    for i in range(0, size, n):
        largest = maximum(absolute(load(lanes, x, at + i)), largest)
    peak = highest(largest)
    plus = minus = U64(0)
    for i in range(0, size, n):
        v = load(lanes, x, at + i)
        plus |= mask_bits(v == peak) << U64(i)
        minus |= mask_bits(v == -peak) << U64(i)
    first_plus, first_minus = plus & (U64(0) - plus), minus & (U64(0) - minus)
    return -peak if first_minus - U64(1) < first_plus - U64(1) else peak


@njit(forceinline=True)
def transpose(lanes, x, first, size, X):  # type: ignore[no-untyped-def]
    """One block of `size` values per lane: X[i * n + j] = x[(first + j) * size + i]. Lanes beyond x repeat its last.

    x f32, or u16 bits of bf16: then size is of a multiple of 32.
    """
    tile, n, last = tile_of(lanes), count(lanes), x.size // size - 1
    for j in range(0, n, tile):
        for i in range(0, size, tile * values_of(x)):
            _transpose_tile(lanes, x, first + j, last, size, i, X, i * n + j, n)


@njit(forceinline=True)
def put_words(lanes, W, first, n_words, n_groups, words):  # type: ignore[no-untyped-def]
    """Lanes of words, W[w * n + j], as rows of them; lanes past the last group are left out."""
    n, tile = count(lanes), tile_of(lanes)
    if n_words % tile == 0 and first + n <= n_groups:
        for j in range(0, n, tile):
            for w in range(0, n_words, tile):
                _transpose_tile(lanes, W, w, n_words, n, j, words, (first + j) * n_words + w, n_words)
        return
    if n_words == 4 and tile > 4 and first + n <= n_groups:
        for j in range(0, n, tile):
            _interleave(lanes, W, n, j, words, (first + j) * 4)
        return
    for j in range(min(n, n_groups - first)):
        for w in range(n_words):
            words[(first + j) * n_words + w] = W[w * n + j]


@njit(forceinline=True)
def mean_squares(lanes, x, size, factor, divisor):  # type: ignore[no-untyped-def]
    """Of each block of `size` values the sum of x * x, added in order, times factor / divisor; n entries more than blocks."""
    n, tile, blocks = count(lanes), tile_of(lanes), x.size // size
    X, means = scratch(tile * n), np.zeros(blocks + n, np.float32)
    for first in range(0, blocks, n):
        total = splat(lanes, np.float32(0))
        for column in range(0, size, tile):
            for j in range(0, n, tile):
                _transpose_tile(lanes, x, first + j, blocks - 1, size, column, X, j, n)
            for i in range(tile):
                v = load(lanes, X, i * n)
                total = total + v * v
        store(means, first, total * np.float32(factor) / np.float32(divisor))
    return means


@njit(forceinline=True)
def weigh(lanes, X, first, size, k, importance, means, span, S, W):  # type: ignore[no-untyped-def]
    """W = importance * sqrt(mean square + x * x) of each lane's block of `size`, from block `first` on; their sums.

    X, W f32[size * n]; means: one entry for each `span` values; S f32[n] is scratch. importance f32[>= k + size * n] begins
    again after k values: rows are of k.
    """
    n = count(lanes)
    transpose(lanes, importance, first % (k // size), size, W)
    for j in range(n):
        S[j] = means[(first + j) * size // span]
    mean, total = load(lanes, S, 0), splat(lanes, np.float32(0))
    for i in range(size):
        x = load(lanes, X, i * n)
        w = load(lanes, W, i * n) * square_root(mean + x * x)
        store(W, i * n, w)
        total = total + w
    return total


@intrinsic
def tile_of(typingctx, lanes):  # type: ignore[no-untyped-def]
    """The lanes of one register: the side of the squares that `transpose` turns."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, _tile(lanes))

    return types.intp(lanes), emit


def _tile(lanes: LanesType) -> int:
    return 1 if lanes.n == 1 else 16 if lanes.wide else 8


@intrinsic
def values_of(typingctx, x):  # type: ignore[no-untyped-def]
    """How many values of x lie in 32 bits, a constant."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, 32 // x.dtype.bitwidth)

    return types.intp(x), emit


@intrinsic
def _transpose_tile(typingctx, lanes, x, first, last, size, column, X, at, stride):  # type: ignore[no-untyped-def]
    tile = _tile(lanes)
    row, pairs = Vector(types.float32, tile).llvm(), Vector(types.int32, tile).llvm()

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        _, source, start, end, length, offset, target, to, step = args
        rows = []
        for j in range(tile):
            block = builder.add(start, start.type(j))
            block = builder.select(builder.icmp_signed("<", block, end), block, end)
            index = builder.add(builder.mul(block, length), offset)
            rows.append(builder.load(pointer(context, builder, x, source, index, row)))
            rows[-1].align = x.dtype.bitwidth // 8
        found = _transposed(builder, rows)
        if x.dtype == types.uint16:  # two of bf16: the first is the low half
            both = [builder.bitcast(v, pairs) for v in found]
            sixteen, high = (_constant(Vector(types.int32, tile), i) for i in (16, 0xFFFF0000))
            found = [builder.bitcast(v, row) for w in both for v in (builder.shl(w, sixteen), builder.and_(w, high))]
        for i, v in enumerate(found):
            index = builder.add(to, builder.mul(step, to.type(i)))
            builder.store(v, pointer(context, builder, X, target, index, row)).align = 4
        return context.get_dummy_value()

    return types.void(lanes, x, *[types.intp] * 4, X, types.intp, types.intp), emit


@intrinsic
def _interleave(typingctx, lanes, W, n, j, words, at):  # type: ignore[no-untyped-def]
    """words[at + 4 * i + w] = W[w * n + j + i] of a register's lanes i; nothing where lanes are scalars."""
    row = Vector(types.int32, _tile(lanes)).llvm()

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        _, source, step, offset, target, to = args
        rows = []
        if lanes.n == 1:
            return context.get_dummy_value()
        for w in range(4):
            index = builder.add(offset, builder.mul(step, step.type(w)))
            rows.append(builder.load(pointer(context, builder, W, source, index, row)))
            rows[-1].align = 4
        while len(rows) > 1:
            width, half = rows[0].type.count, len(rows) // 2
            both = ir.Constant(ir.VectorType(I32, 2 * width), [i + k * width for i in range(width) for k in range(2)])
            rows = [builder.shuffle_vector(rows[i], rows[i + half], both) for i in range(half)]
        builder.store(rows[0], pointer(context, builder, words, target, to, rows[0].type)).align = 4
        return context.get_dummy_value()

    return types.void(lanes, W, types.intp, types.intp, words, types.intp), emit


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """A square of values turned over its diagonal: halves of it swapped, then quarters within them, and so on."""
    n = len(rows)
    distance = n // 2
    while distance:
        turned = list(rows)
        for i in (i for i in range(n) if not i & distance):
            a, b = rows[i], rows[i + distance]
            low = [k if not k & distance else n + k - distance for k in range(n)]
            high = [k + distance if not k & distance else n + k for k in range(n)]
            for place, lanes in ((i, low), (i + distance, high)):
                turned[place] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, n), lanes))
        rows, distance = turned, distance // 2
    return rows


@njit(forceinline=True)
def extremes(lanes, x, first, low, high):  # type: ignore[no-untyped-def]
    """Least and greatest of 32 values per lane: low[j], high[j] of x[(first + j) * 32 :]. A zero may have either sign.

    Lanes beyond x repeat its last block.
    """
    tile = tile_of(lanes)
    for j in range(0, count(lanes), tile):
        _extremes_tile(lanes, x, first + j, x.size // 32 - 1, low, high, j)


@intrinsic
def _extremes_tile(typingctx, lanes, x, first, last, low, high, at):  # type: ignore[no-untyped-def]
    tile = _tile(lanes)
    row = Vector(types.float32, tile).llvm()

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        _, source, start, end, low_array, high_array, to = args
        blocks = []
        for j in range(tile):
            block = builder.add(start, start.type(j))
            block = builder.select(builder.icmp_signed("<", block, end), block, end)
            index = builder.mul(block, start.type(32))
            parts = []
            for i in range(0, 32, tile):
                parts.append(builder.load(pointer(context, builder, x, source, builder.add(index, start.type(i)), row)))
                parts[-1].align = 4
            blocks.append(parts)
        for sign, typ, array in (("<", low, low_array), (">", high, high_array)):
            value = _reduced(builder, [_fold(builder, sign, parts) for parts in blocks], sign)
            builder.store(value, pointer(context, builder, typ, array, to, row)).align = 4
        return context.get_dummy_value()

    return types.void(lanes, x, types.intp, types.intp, low, high, types.intp), emit


def _fold(builder: Any, sign: str, values: list[Any]) -> Any:
    first, *rest = values
    for v in rest:
        first = builder.select(builder.fcmp_ordered(sign, v, first), v, first)
    return first


def _reduced(builder: Any, rows: list[Any], sign: str) -> Any:
    """Lane i of the result is the least (greatest) of rows[i]: a transposition that keeps only what it still compares."""
    n = len(rows)
    while len(rows) > 1:
        distance = len(rows) // 2
        low = [k if not k & distance else n + k - distance for k in range(n)]
        high = [k + distance if not k & distance else n + k for k in range(n)]
        rows = [
            _fold(builder, sign, [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, n), at)) for at in (low, high)])
            for a, b in zip(rows[:distance], rows[distance:], strict=True)
        ]
    return rows[0]


def _picker(size: int) -> Any:
    @intrinsic
    def function(typingctx, lanes, table, offset, index):  # type: ignore[no-untyped-def]
        """table[offset + (index & (size - 1))] in every lane; table is a contiguous f32 array."""
        vector = index.of(types.float32)

        def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
            _, array, start, at = args
            if lanes.n == 1:
                place = builder.add(start, builder.zext(builder.and_(at, I32(size - 1)), start.type))
                return builder.load(pointer(context, builder, table, array, place, ir.FloatType()))
            width = 16 if lanes.wide else 8
            few = builder.load(pointer(context, builder, table, array, start, ir.VectorType(ir.FloatType(), size)))
            few.align = 4
            return _picked(builder, _shuffle(builder, few, [i % size for i in range(width)]), at, size)

        return vector(lanes, table, types.intp, index), emit

    return function


pick4, pick8 = _picker(4), _picker(8)


def _picked(builder: Any, entries: Any, index: Any, size: int) -> Any:
    """One of `size` entries in every lane; they fill a register over and over."""
    width, lanes = entries.type.count, index.type.count
    some = [_shuffle(builder, index, list(range(i, i + width))) for i in range(0, lanes, width)]
    parts = [_permute(builder, entries, at, size) for at in some]
    while len(parts) > 1:
        k = parts[0].type.count
        both = ir.Constant(ir.VectorType(I32, 2 * k), list(range(2 * k)))
        parts = [builder.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


PERMUTES = {
    (4, 8): "llvm.x86.avx.vpermilvar.ps.256", (4, 16): "llvm.x86.avx512.vpermilvar.ps.512",
    (8, 8): "llvm.x86.avx2.permps", (8, 16): "llvm.x86.avx512.permvar.sf.512",
}  # fmt: skip


def _permute(builder: Any, entries: Any, index: Any, size: int) -> Any:
    kind = ir.FunctionType(entries.type, [entries.type, index.type])
    callee = cgutils.get_or_insert_function(builder.module, kind, PERMUTES[size, entries.type.count])
    return builder.call(callee, [entries, index])
