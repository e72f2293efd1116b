"""SIMD vectors as values inside numba functions: one LLVM vector per variable, kept in registers.

A kernel takes a `Lanes` as its first argument and makes vectors of that many lanes with `splat` and `load`. + - * / & | << >>
and comparisons work lane by lane; a number beside a vector takes its element type. Nothing here reorders or contracts a*b+c
(fused.py does, by name), so each lane computes what scalar C code would. With one lane a vector is a plain scalar: the path for
machines without AVX2.

The lane count is part of the argument's type, hence of numba's cache key. So is a digest of this package's sources, because
numba looks only at the file that a function stands in and would go on using code that was compiled from an older lanes.py.
"""

from __future__ import annotations

import hashlib
import operator
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import (
    NativeValue,
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
    typeof_impl,
    unbox,
)

SOURCES = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:16]


@dataclass(frozen=True)
class Lanes:
    """How many lanes the vectors of a kernel have: 1 (scalars), 8, 16 or 32; `wide`: 16 fit one AVX-512 register."""

    n: int
    wide: bool


@cache
def host() -> tuple[bool, bool]:
    """Whether vectors pay on the CPU that numba compiles for: (AVX2 with F16C, AVX-512). NUMBA_CPU_NAME is honoured."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False, False
    if config.CPU_NAME is not None:
        return config.CPU_NAME in ("x86-64-v3", "x86-64-v4"), config.CPU_NAME == "x86-64-v4"
    features = binding.get_host_cpu_features()
    avx2 = all(features.get(f) for f in ("avx2", "f16c", "fma"))
    return avx2, avx2 and all(features.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq"))


def choose(on_avx2: int, on_avx512: int, lanes: int | None = None) -> Lanes:
    """Lanes for this machine; `lanes` or QCONVERT_LANES overrides the count (1: no vectors anywhere)."""
    avx2, avx512 = host()
    if lanes is None and "QCONVERT_LANES" in os.environ:
        lanes = int(os.environ["QCONVERT_LANES"])
    if not avx2:
        return Lanes(1, False)
    n = lanes or (on_avx512 if avx512 else on_avx2)
    return Lanes(n, avx512 and n % 16 == 0)


class LanesType(types.Type):  # type: ignore[misc]
    def __init__(self, n: int, wide: bool) -> None:
        self.n, self.wide = n, wide
        super().__init__(f"Lanes({n}, {wide}, {SOURCES})")


class Vector(types.Type):  # type: ignore[misc]
    """n lanes of float32, float64, int32, uint16, uint8 or boolean (a mask). One lane is the bare LLVM scalar."""

    def __init__(self, element: types.Type, n: int) -> None:
        self.element, self.n = element, n
        super().__init__(f"Vector({element}, {n})")

    def llvm(self) -> ir.Type:
        scalar = _LLVM[self.element]
        return scalar if self.n == 1 else ir.VectorType(scalar, self.n)

    def of(self, element: types.Type) -> Vector:
        return Vector(element, self.n)


_LLVM = {
    types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: ir.IntType(32), types.uint8: ir.IntType(8),
    types.boolean: ir.IntType(1), types.uint16: ir.IntType(16),
}  # fmt: skip
I32 = ir.IntType(32)
register_model(LanesType)(models.OpaqueModel)


@typeof_impl.register(Lanes)  # type: ignore[untyped-decorator]
def _typeof(value: Lanes, c: object) -> LanesType:
    return LanesType(value.n, value.wide)


@unbox(LanesType)  # type: ignore[untyped-decorator]
def _unbox(typ: LanesType, obj: object, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, typ: Vector) -> None:
        super().__init__(manager, typ, typ.llvm())


def _splat(builder: Any, scalar: Any, n: int) -> Any:
    if n == 1:
        return scalar
    undefined = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, n), [0] * n))


def _constant(vector: Vector, value: float) -> Any:
    scalar = ir.Constant(_LLVM[vector.element], value)
    return scalar if vector.n == 1 else ir.Constant(vector.llvm(), [scalar] * vector.n)


def vector_of(context: Any, builder: Any, typ: types.Type, value: Any, vector: Vector) -> Any:
    """A vector as it is; a number as a vector of the element type."""
    if isinstance(typ, Vector):
        return value
    return _splat(builder, context.cast(builder, value, typ, vector.element), vector.n)


def _operator(op: Callable[..., object], emit: Callable[[Any, Vector, Any, Any], Any], *, mask: bool = False) -> None:
    """Make `op` work on two vectors of one type, or on a vector and a number."""

    def result(a: types.Type, b: types.Type) -> Vector | None:
        vectors = [t for t in (a, b) if isinstance(t, Vector)]
        others = [t for t in (a, b) if not isinstance(t, Vector | types.Number)]
        if not vectors or others or vectors[0] != vectors[-1]:
            return None
        return vectors[0]

    @type_callable(op)  # type: ignore[untyped-decorator]
    def typing(context: object) -> Callable[[types.Type, types.Type], Vector | None]:
        def typer(a: types.Type, b: types.Type) -> Vector | None:
            vector = result(a, b)
            return vector.of(types.boolean) if vector is not None and mask else vector

        return typer

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = result(*sig.args)
        assert vector is not None
        a, b = (vector_of(context, builder, t, v, vector) for t, v in zip(sig.args, args, strict=True))
        return emit(builder, vector, a, b)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, *pair)(lower)


def _is_float(v: Vector) -> bool:
    return v.element in (types.float32, types.float64)


def _comparison(sign: str) -> Callable[[Any, Vector, Any, Any], Any]:
    def emit(b: Any, v: Vector, x: Any, y: Any) -> Any:
        if _is_float(v):
            return b.fcmp_unordered(sign, x, y) if sign == "!=" else b.fcmp_ordered(sign, x, y)
        return b.icmp_signed(sign, x, y)

    return emit


_operator(operator.add, lambda b, v, x, y: b.fadd(x, y) if _is_float(v) else b.add(x, y))
_operator(operator.sub, lambda b, v, x, y: b.fsub(x, y) if _is_float(v) else b.sub(x, y))
_operator(operator.mul, lambda b, v, x, y: b.fmul(x, y) if _is_float(v) else b.mul(x, y))
_operator(operator.truediv, lambda b, v, x, y: b.fdiv(x, y))
_operator(operator.and_, lambda b, v, x, y: b.and_(x, y))
_operator(operator.or_, lambda b, v, x, y: b.or_(x, y))
_operator(operator.lshift, lambda b, v, x, y: b.shl(x, y))
_operator(operator.rshift, lambda b, v, x, y: b.lshr(x, y))
for _op, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    _operator(getattr(operator, _op), _comparison(_sign), mask=True)


def _unary(intrinsic_name: str) -> Any:
    """A function of one float vector that is an LLVM intrinsic."""

    @intrinsic
    def function(typingctx, v):  # type: ignore[no-untyped-def]
        def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
            llvm = v.llvm()
            suffix = "f32" if v.n == 1 else f"v{v.n}f32"
            callee = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(llvm, [llvm]), f"llvm.{intrinsic_name}.{suffix}"
            )
            return builder.call(callee, args)

        return v(v), emit

    return function


absolute, square_root, rounded = _unary("fabs"), _unary("sqrt"), _unary("roundeven")


@intrinsic
def count(typingctx, lanes):  # type: ignore[no-untyped-def]
    """The number of lanes, a constant."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, lanes.n)

    return types.intp(lanes), emit


@intrinsic
def splat(typingctx, lanes, value):  # type: ignore[no-untyped-def]
    """A float in every lane."""
    vector = Vector(types.float32, lanes.n)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return vector_of(context, builder, sig.args[1], args[1], vector)

    return vector(lanes, value), emit


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, llvm: ir.Type) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), llvm.as_pointer())


@intrinsic
def load(typingctx, lanes, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + n] of a contiguous 1-D array; not checked."""
    vector = Vector(array.dtype, lanes.n)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = builder.load(pointer(context, builder, array, args[1], args[2], vector.llvm()))
        value.align = array.dtype.bitwidth // 8
        return value

    return vector(lanes, array, types.intp), emit


@intrinsic
def spread(typingctx, lanes, array, index):  # type: ignore[no-untyped-def]
    """array[index] in every lane; not checked."""
    vector = Vector(array.dtype, lanes.n)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = builder.load(pointer(context, builder, array, args[1], args[2], _LLVM[array.dtype]))
        return _splat(builder, value, lanes.n)

    return vector(lanes, array, types.intp), emit


@intrinsic
def store(typingctx, array, index, v):  # type: ignore[no-untyped-def]
    """array[index : index + n] = v of a contiguous 1-D array; not checked. int32 lanes go into bytes by their low 8 bits."""
    target = v.of(array.dtype)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = args[2] if target == v else builder.trunc(args[2], target.llvm())
        builder.store(value, pointer(context, builder, array, args[0], args[1], target.llvm())).align = (
            array.dtype.bitwidth // 8
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, v), emit


@intrinsic
def select(typingctx, mask, a, b):  # type: ignore[no-untyped-def]
    """a where the mask is set, else b; either may be a number."""
    vector = a if isinstance(a, Vector) else b if isinstance(b, Vector) else Vector(types.int32, mask.n)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        x, y = (vector_of(context, builder, t, v, vector) for t, v in zip(sig.args[1:], args[1:], strict=True))
        return builder.select(args[0], x, y)

    return vector(mask, a, b), emit


def _extreme(sign: str) -> Any:
    @intrinsic
    def function(typingctx, a, b):  # type: ignore[no-untyped-def]
        """a if a < b (a > b) else b: a NaN in a gives b."""
        vector = a if isinstance(a, Vector) else b

        def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
            x, y = (vector_of(context, builder, t, v, vector) for t, v in zip(sig.args, args, strict=True))
            return builder.select(_comparison(sign)(builder, vector, x, y), x, y)

        return vector(a, b), emit

    return function


minimum, maximum = _extreme("<"), _extreme(">")


@intrinsic
def any_lane(typingctx, mask):  # type: ignore[no-untyped-def]
    """Whether the mask is set in any lane."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        bits = ir.IntType(mask.n)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(mask), emit


def _convert(name: str, source: types.Type, target: types.Type) -> Any:
    @intrinsic
    def function(typingctx, v):  # type: ignore[no-untyped-def]
        if v.element != source:
            return None
        result = v.of(target)

        def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return getattr(builder, name)(args[0], result.llvm())

        return result(v), emit

    return function


to_int = _convert("fptosi", types.float32, types.int32)  # towards zero
to_float = _convert("sitofp", types.int32, types.float32)
bits_of = _convert("bitcast", types.float32, types.int32)
float_of = _convert("bitcast", types.int32, types.float32)
ones = _convert("zext", types.boolean, types.int32)  # 1 where the mask is set, else 0
widened = _convert("zext", types.uint16, types.int32)


@intrinsic
def copy_sign(typingctx, magnitude, v):  # type: ignore[no-untyped-def]
    """The number `magnitude` with the sign of each lane of v."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        size = builder.bitcast(vector_of(context, builder, sig.args[0], args[0], v), v.of(types.int32).llvm())
        sign = builder.and_(builder.bitcast(args[1], size.type), _constant(v.of(types.int32), 0x80000000))
        return builder.bitcast(builder.or_(size, sign), v.llvm())

    return v(magnitude, v), emit


@intrinsic
def nearest(typingctx, v, low, high):  # type: ignore[no-untyped-def]
    """The nearest integer within low..high (ints or None), ties to even, as a float; exact for |v| < 2**22.

    Adding 1.5 * 2**23 leaves the integer in the low bits, where it is clamped: integer units are idle in these kernels.
    """

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        integers, magic = v.of(types.int32), _constant(v, 12582912.0)
        bits = builder.bitcast(builder.fadd(args[0], magic), integers.llvm())
        for sign, typ, limit in ((">", sig.args[1], args[1]), ("<", sig.args[2], args[2])):
            if typ == types.none:
                continue
            raw = builder.add(vector_of(context, builder, typ, limit, integers), _constant(integers, 0x4B400000))
            bits = builder.select(builder.icmp_signed(sign, bits, raw), bits, raw)
        return builder.fsub(builder.bitcast(bits, v.llvm()), magic)

    return v(v, low, high), emit


@njit(forceinline=True)
def scratch(n):  # type: ignore[no-untyped-def]
    """f32[n] on a cache line's boundary: a vector that straddles two lines takes twice as long to load."""
    array = np.empty(n + 16, np.float32)
    start = (64 - array.ctypes.data % 64) % 64 // 4
    return array[start : start + n]


@njit(forceinline=True)
def nearest_any(v):  # type: ignore[no-untyped-def]
    """ggml's nearest_int of any float, as an int32: beyond 2**22 and for NaN its bytes need the same nonsense."""
    return (bits_of(v + np.float32(12582912)) & 0x7FFFFF) - 0x400000
