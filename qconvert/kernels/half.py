"""f16: by F16C where kernels have vectors, else in integer arithmetic, so that no compiled code calls a library for it."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from qconvert.kernels.lanes import I32, count, pointer

U = np.uint32
EXPONENT_OF_HALF = U(0x38000000)  # the difference between the exponents' biases, 127 - 15, in place


@njit(forceinline=True)
def to_half(x):  # type: ignore[no-untyped-def]
    """f32 -> the bits of the nearest f16, ties to even; beyond 65520 infinity."""
    bits = np.float32(x).view(U)
    size = U(bits & U(0x7FFFFFFF))
    rebased = U(size - EXPONENT_OF_HALF)
    odd = (rebased >> U(13)) & U(1)
    normal = U(rebased + U(0xFFF) + odd) >> U(13)
    # below the least normal f16 the ulp of 0.5 is f16's own, so the addition rounds
    subnormal = np.float32(size.view(np.float32) + np.float32(0.5)).view(U) - U(0x3F000000)
    half = U(subnormal if size < U(0x38800000) else normal)
    special = U(0x7E00 if size > U(0x7F800000) else 0x7C00)
    return U((special if size >= U(0x47800000) else half) | ((bits >> U(16)) & U(0x8000)))


@njit(forceinline=True)
def from_half(half):  # type: ignore[no-untyped-def]
    """The bits of an f16 -> f32, exact."""
    size = U((half & U(0x7FFF)) << U(13))
    scaled = np.float32(size.view(np.float32) * np.float32(2.0**112)).view(U)
    if size >= U(0x0F800000):  # infinity and NaN keep the exponent of all ones
        scaled = U(size | U(0x7F800000))
    return U(scaled | ((half & U(0x8000)) << U(16))).view(np.float32)


@intrinsic
def hardware_half(typingctx, lanes, x):  # type: ignore[no-untyped-def]
    """f32 -> the bits of the nearest f16; 0 in kernels without vectors."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if lanes.n == 1:
            return I32(0)
        return builder.zext(builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), ir.IntType(16)), I32)

    return types.uint32(lanes, types.float32), emit


@intrinsic
def hardware_single(typingctx, lanes, half):  # type: ignore[no-untyped-def]
    """The bits of an f16 -> f32; 0 in kernels without vectors."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if lanes.n == 1:
            return ir.Constant(ir.FloatType(), 0.0)
        return builder.fpext(builder.bitcast(builder.trunc(args[1], ir.IntType(16)), ir.HalfType()), ir.FloatType())

    return types.float32(lanes, types.uint32), emit


@intrinsic
def halves(typingctx, v):  # type: ignore[no-untyped-def]
    """Lanes of f32 -> the bits of the nearest f16 as int32; 0 in kernels without vectors."""
    bits = v.of(types.int32)

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if v.n == 1:
            return I32(0)
        half = builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), v.n))
        return builder.zext(builder.bitcast(half, ir.VectorType(ir.IntType(16), v.n)), bits.llvm())

    return bits(v), emit


@intrinsic
def put_four(typingctx, out, at, value):  # type: ignore[no-untyped-def]
    """Write an int32 into out u8[at : at + 4], little-endian; not checked."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], pointer(context, builder, out, args[0], args[1], I32)).align = 1
        return context.get_dummy_value()

    return types.void(out, types.intp, types.int32), emit


@njit(forceinline=True)
def put_half(lanes, out, at, x):  # type: ignore[no-untyped-def]
    """Write f32 x as f16 into out[at : at + 2], little-endian; returns the value that was written."""
    if count(lanes) > 1:  # kernels with vectors run where F16C is
        half = hardware_half(lanes, x)
        value = hardware_single(lanes, half)
    else:
        half = to_half(x)
        value = from_half(half)
    out[at] = np.uint8(half & U(255))
    out[at + 1] = np.uint8(half >> U(8))
    return value


@njit(forceinline=True)
def nearest_int(x):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even. Beyond 2**22 and for NaN it gives what ggml's nearest_int gives, as bytes need that."""
    bits = np.float32(np.float32(x) + np.float32(12582912)).view(np.int32)
    return np.int32((bits & 0x7FFFFF) - 0x400000)
