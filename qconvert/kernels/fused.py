"""Products that are added and rounded once, for kernels whose bits may come from no other code that rounds twice."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qconvert.kernels.lanes import Vector, vector_of


def _fused(builder: Any, vector: Vector, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    bits = "f32" if vector.element == types.float32 else "f64"
    name = f"llvm.fma.{bits}" if vector.n == 1 else f"llvm.fma.v{vector.n}{bits}"
    kind = ir.FunctionType(vector.llvm(), [vector.llvm()] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


@intrinsic
def exact_sum(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c where a * b is exact, as of whole numbers below 4096: fused, it rounds as if it were not. b may be a number."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        x, y, z = (vector_of(context, builder, t, v, a) for t, v in zip(sig.args, args, strict=True))
        if a.n == 1:  # not every CPU of that path has the instruction
            return builder.fadd(builder.fmul(x, y), z)
        return _fused(builder, a, x, y, z)

    return a(a, b, c), emit


@intrinsic
def less_product(typingctx, c, a, b):  # type: ignore[no-untyped-def]
    """c - a * b, rounded once: the same bits with the instruction and without."""

    def emit(context, builder, sig, args):  # type: ignore[no-untyped-def]
        z, x, y = args
        return _fused(builder, c, builder.fneg(x), y, z)

    return c(c, a, b), emit
