"""Codes of least squared error on a GPU, or interpreted: those of kernels.affine, affine_codes and table_codes, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qconvert import kernels
from qconvert.errors import require
from qconvert.kernels.affine_quants import ENDS, ENDS_OF_LARGE, LARGE, SHIFTS, SPANS, Affine
from qconvert.kernels.gpu.quantize import INTERPRETED_LANES, LANES, STAGE, device
from qconvert.kernels.table_quants import ENDS as TABLE_ENDS
from qconvert.scheme import F32, Array, Bytes, ZeroPoint

if TYPE_CHECKING:
    import torch

    from qconvert.kernels.gpu.launch import Launch

F = np.float32


class Solving(NamedTuple):
    """Where words i32, scales and zeros f32 of each group will be, and the launch that finds them."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    launch: Launch


def solving(
    kernel: str, x: torch.Tensor, group: int, bits: int, given: Sequence[Array | torch.Tensor], interpreted: bool,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, **switches: object,
) -> Solving:  # fmt: skip
    """x f32 of any shape, in groups; given: the kernel's arguments between the outputs and n, tables as arrays."""
    torch = require("torch", "--device cuda")
    from qconvert.kernels.gpu.launch import Launch, up
    from qconvert.kernels.gpu.loading import loaded

    n = x.numel() // group
    turned = x.reshape(n, group).T.contiguous()
    words = torch.empty((n, group * bits // 32), dtype=torch.int32, device=x.device)
    scales = torch.empty(n, device=x.device) if scales is None else scales
    zeros = torch.full((n,), float(1 << (bits - 1)), device=x.device) if zeros is None else zeros
    outputs = (words, scales, zeros) if kernel in WITH_ZEROS else (words, scales)
    tables = (v if isinstance(v, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(v, F)).to(x.device) for v in given)
    lanes = min(INTERPRETED_LANES, max(16, up(n))) if interpreted else LANES
    rest = (F(1) / F(group),) if kernel == "with_float_zero" else ()
    args = (turned, *outputs, *tables, n, group, *map(float, rest))
    function = getattr(loaded(interpreted, "lane_kernels", "affine_kernels")[1], kernel)
    launch = Launch(function, (-(-n // lanes),), args, {**switches, "LANES": lanes, "enable_fp_fusion": False})
    return Solving(words, scales, zeros, launch)


WITH_ZEROS = ("with_zero", "with_float_zero", "of_given_levels")


def fits(group: int, k: int) -> bool:
    """Whether groups of a row of k fill whole words, as kernels here want; the others are the CPU's."""
    return group % 16 == 0 and k % group == 0


def affine(x: F32, group: int, bits: int, zero_point: ZeroPoint = "none") -> Affine:
    n, k = x.shape
    if not fits(group, k) or not x.size:
        return kernels.affine(x, group, bits, zero_point)
    with STAGE.stream():
        found = solving_affine(STAGE.up(np.asarray(x, F)), group, bits, zero_point, device() == "cpu")
        return _solved(found, n)


def solving_affine(x: torch.Tensor, group: int, bits: int, zero_point: ZeroPoint, interpreted: bool) -> Solving:
    spans = SPANS[bits]
    if zero_point == "none":
        ends = ENDS_OF_LARGE.get(bits, ENDS[bits]) if group >= LARGE else ENDS[bits]
        return solving("symmetric", x, group, bits, [np.array(ends)], interpreted, N_ENDS=len(ends), BITS=bits)
    if zero_point == "int":
        return solving("with_zero", x, group, bits, [np.array(spans)], interpreted, N_SPANS=len(spans), BITS=bits)
    offsets = F((1 << bits) - 1) * F(0.5) + np.array(SHIFTS, F)
    tables = [np.array(spans), offsets]
    return solving("with_float_zero", x, group, bits, tables, interpreted, N_SPANS=len(spans), N_OFFSETS=len(SHIFTS), BITS=bits)


def table_codes(x: F32, group: int, table: Sequence[float]) -> Affine:
    n, k = x.shape
    if not fits(group, k) or not x.size:
        return kernels.table_codes(x, group, table)
    with STAGE.stream():
        found = _solved(solving_table(STAGE.up(np.asarray(x, F)), group, table, device() == "cpu"), n)
        return found._replace(zeros=np.empty((n, 0), F))


def solving_table(x: torch.Tensor, group: int, table: Sequence[float], interpreted: bool) -> Solving:
    levels, at = np.unique(np.array(table, F), return_index=True)
    mirrored = np.array_equal(levels, -levels[::-1])
    ends = [end for end in TABLE_ENDS if end > 0 or not mirrored]
    given = [levels, (levels[1:] + levels[:-1]) * F(0.5), at, np.array(ends)]
    return solving("of_table", x, group, 4, given, interpreted, N_LEVELS=len(levels), N_ENDS=len(ends))


def affine_codes(x: F32, group: int, bits: int, scales: F32, zeros: F32) -> Bytes:
    n, k = x.shape
    if not fits(group, k) or not x.size:
        return kernels.affine_codes(x, group, bits, scales, zeros)
    with STAGE.stream():
        levels = [STAGE.up(np.ascontiguousarray(v, F).reshape(-1)) for v in (scales, zeros)]
        found = solving("of_given_levels", STAGE.up(np.asarray(x, F)), group, bits, [], device() == "cpu", *levels, BITS=bits)
        return _solved(found, n).packed


def _solved(found: Solving, n: int) -> Affine:
    found.launch.run()
    words, scales, zeros = (STAGE.down(v).reshape(n, -1) for v in found[:3])
    return Affine(words.view(np.uint8), scales, zeros)
