"""What a user's words say of a weight-only scheme: zero points, accuracy levels, and what no node has."""

from __future__ import annotations

import re

from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.onnx_arch import Form
from qconvert.request import Request
from qconvert.scheme import ZeroPoint

TABLES = ("nf4", "fp4")


def with_zero_point(quant: str, zero_point: ZeroPoint | None) -> str:
    """int4, uint4 or uint4f: without, with integer and with float zero points."""
    if zero_point is None:
        return quant
    if zero_point not in ("none", "int", "float"):
        raise UsageError(f"--zero-point {zero_point}: there are none, int, float")
    affine = re.fullmatch(r"(u?)int(\d)", quant)
    if affine is None:
        raise UsageError(f"--zero-point {zero_point}: {quant} has no zero points")
    unsigned, bits = affine.groups()
    if zero_point == "none" and unsigned:
        raise UsageError(f"--zero-point none: {quant} has integer zero points", hint=f"--quant int{bits}")
    if zero_point == "float" and bits == "8":
        why = "onnxruntime computes with those of 2 and 4 bits only"
        raise UnsupportedError(f"--zero-point float: {why}", hint="--zero-point int")
    return {"none": f"int{bits}", "int": f"uint{bits}", "float": f"uint{bits}f"}[zero_point]


def accuracy_level(request: Request, form: Form, quant: str) -> int:
    """4: activations are rounded to 8 bits, group by group, for the fast kernels; 0: they stay as they are."""
    level = request.accuracy_level
    if level is None:
        return 4
    if level not in (0, 4):
        raise UsageError(f"--accuracy-level {level}: there are 0 and 4", hint="1 to 3 compute what 0 does")
    if not re.fullmatch(r"u?int\df?", quant):
        raise UsageError(f"--accuracy-level {level}: products with {quant} have none")
    if not form.contrib:
        raise UnsupportedError(f"--accuracy-level {level}: standard nodes have none", hint="--form ort")
    return level


def not_portable(quant: str) -> str | None:
    """Why DequantizeLinear of opset 23 cannot say a scheme."""
    if quant in TABLES:
        return "its levels are a table"
    if quant.endswith("f"):
        return "zero points are codes"
    return "2 bits come with opset 25" if "2" in quant else None


def gathered(quant: str) -> str:
    """What rows of an embedding get in place of a scheme that no node gathers."""
    return "int8" if quant in TABLES else quant.removesuffix("f")


def integers_only(request: Request, quant: str) -> None:
    """UnsupportedError for what the nodes of a model that others made are not given."""
    if quant in TABLES or quant.endswith("f"):
        raise UnsupportedError(f"{quant}: an ONNX model gets integer codes and zero points", hint="--bits 4")
    if request.accuracy_level is not None:
        raise UnsupportedError("--accuracy-level: an ONNX model gets level 4", hint="leave it out")
