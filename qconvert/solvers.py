"""Codes and metadata of least squared error for f32[N,K], as a scheme keeps them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, cast

import numpy as np

from qconvert import kernels
from qconvert.scheme import F32, U16, Bytes, Scheme

if TYPE_CHECKING:
    from qconvert.kernels.affine_quants import Affine


def line(scheme: Scheme, x: F32) -> tuple[Bytes, tuple[F32, ...]]:
    """Scales and offsets of least squared error, as the scheme keeps them, and the codes that suit those."""
    group, shift = scheme.levels[0].group or x.shape[1], np.float32(scheme.centre)
    found = kernels.affine(x, group, scheme.bits, "float")
    scales = rounded_to(scheme.levels[0].dtype, found.scales)
    offsets = rounded_to(scheme.levels[1].dtype, found.scales * (shift - found.zeros))
    return kernels.line_codes(x, group, scheme.bits, scales, offsets - shift * scales), (scales, offsets)


def reads_bf16(scheme: Scheme) -> bool:
    """Whether least_squares takes the bits of bf16 as they are; a weight that is not finite then gives the scale NaN."""
    plain = not scheme.table and scheme.zero_point == "none" and [level.role for level in scheme.levels] == ["scale"]
    return plain and (scheme.levels[0].group or 1) % 32 == 0


def least_squares(scheme: Scheme, x: F32 | U16, on_gpu: bool = False) -> Affine:
    """Codes, scales and zero points of least squared error; x f32[N,K], or u16[N,K] where `reads_bf16`."""
    group = scheme.levels[0].group or x.shape[1]
    source = import_module("qconvert.kernels.gpu.solve") if on_gpu else kernels
    if scheme.table:
        return cast("Affine", source.table_codes(x, group, scheme.table))
    found: Affine = source.affine(x, group, scheme.bits, scheme.zero_point)
    return found if scheme.levels[0].dtype == "f32" else _with_kept_scales(x, group, scheme, found, source.affine_codes)


def _with_kept_scales(x: F32 | U16, group: int, scheme: Scheme, found: Affine, codes: Callable[..., Bytes]) -> Affine:
    """Scales as f16 or bf16 has them, and codes of 8 bits that suit those; of 4 bits no weight moves by 1/64 of a code."""
    kept = scheme.levels[0].dtype
    scales = rounded_to(kept, found.scales)
    zeros = rounded_to(kept, found.zeros) if scheme.zero_point == "float" else found.zeros
    if scheme.bits < 8:
        return found._replace(scales=scales, zeros=zeros)
    return found._replace(packed=codes(x, group, scheme.bits, scales, zeros), scales=scales, zeros=zeros)


def rounded_to(dtype: str, v: F32) -> F32:
    """As f32, f16 or bf16 keeps it; an f16 that would be infinite is its largest number."""
    if dtype == "bf16":
        return kernels.widen_bf16(kernels.narrow_bf16(np.ascontiguousarray(v)))
    if dtype == "f32":
        return v
    return np.clip(v, -65504, 65504).astype(np.float16).astype(np.float32)
