"""A scheme as one scale and one offset for each group of a row, and back: what solvers choose and what a scheme keeps of it.

    weight = scale * level + offset;  the levels are those of a Grid, one group is the finest of the scheme
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qconvert.kernels.feedback import E4M3, INTEGERS, TABLE, Grid
from qconvert.scheme import E4M3_TABLE, F32, SCHEMES, Level, Scheme
from qconvert.solvers import rounded_to

F = np.float32
NONE = np.zeros(1, F)


class Steps(NamedTuple):
    """scales, offsets f32[N,G] of groups of `group` weights."""

    group: int
    scales: F32
    offsets: F32


def grid_of(scheme: Scheme) -> Grid | None:
    """None for a table that kernels do not round to."""
    if scheme.table == E4M3_TABLE:
        return Grid(E4M3, 0, 0, np.array([-448, 448], F), NONE)
    if scheme.table:
        levels, at = np.unique(np.array(scheme.table, F) + F(0), return_index=True)  # -0 is 0
        return Grid(TABLE, 0, 0, levels, at.astype(F)) if len(levels) <= 16 else None
    low = lowest(scheme)
    return Grid(INTEGERS, low, low + (1 << scheme.bits) - 1, NONE, NONE)


def lowest(scheme: Scheme) -> int:
    """The least code. ggml's begin at 0 where there is a minimum or an offset."""
    from_zero = scheme.name in SCHEMES and any(level.role in ("offset", "min") for level in scheme.levels)
    return 0 if from_zero else -scheme.centre


def finest(scheme: Scheme, k: int) -> int:
    return min(level.group or k for level in scheme.levels)


def steps_of(scheme: Scheme, levels: tuple[F32, ...], k: int) -> Steps:
    """Of rows of k weights."""
    group = finest(scheme, k)
    made: dict[str, F32] = {}
    for level, v in zip(scheme.levels, levels, strict=True):
        entries = np.repeat(v, (level.group or k) // group, axis=1)
        before = made.get(level.role)
        made[level.role] = entries if before is None else before + entries if level.adds else before * entries
    scales = made["scale"] / made["divisor"] if "divisor" in made else made["scale"]
    offsets = np.zeros_like(scales)
    if "zero" in made:
        offsets = offsets - scales * made["zero"]
    if "offset" in made:
        offsets = offsets + made["offset"]
    if "min" in made:
        offsets = offsets - made["min"]
    return Steps(group, np.ascontiguousarray(scales, F), np.ascontiguousarray(offsets, F))


def kept(scheme: Scheme, scales: F32, offsets: F32) -> tuple[F32, ...]:
    """The levels nearest to scales and offsets f32[N,G], offsets of the least code; scales are as good as kept first."""
    levels: list[F32] = []
    wanted = {"scale": scales, "offset": offsets - scales * F(lowest(scheme)), "min": np.maximum(-offsets, 0)}
    for role in dict.fromkeys(level.role for level in scheme.levels):
        mine = [level for level in scheme.levels if level.role == role]
        if role == "zero":
            flat = scales == 0  # a constant: code 0 stands one above its zero point
            zeros = np.where(flat, F(-1), -offsets / np.where(flat, F(1), scales))
            levels[0] = np.where(flat, offsets, levels[0]) if scheme.zero_point == "float" else levels[0]
            limit = F((1 << scheme.bits) - 1)
            of_codes = np.where(flat, F(0), np.rint(zeros)).clip(0, limit)
            levels.append(rounded_to(mine[0].dtype, zeros.astype(F)) if scheme.zero_point == "float" else of_codes.astype(F))
        elif len(mine) == 1:
            levels.append(rounded_to(mine[0].dtype, wanted[role].astype(F)))
        else:
            levels += _product(mine, wanted[role])
    return tuple(levels)


def _product(levels: list[Level], v: F32) -> list[F32]:
    """A factor for each super-block, of which the greatest magnitude is a whole number, and numbers of few bits."""
    coarse, fine = levels
    n, signed = len(v), fine.dtype.startswith("i")
    lines = v.reshape(n, -1, (coarse.group or 1) // (fine.group or 1))
    top = -(1 << (fine.bits - 1)) if signed else (1 << fine.bits) - 1
    peak = np.take_along_axis(lines, np.abs(lines).argmax(2)[..., None], 2)[..., 0]
    above = rounded_to(coarse.dtype, (peak / F(top)).astype(F))
    codes = np.rint(lines / np.where(above, above, 1)[..., None]).clip(top if signed else 0, -top - 1 if signed else top)
    return [above, np.where(above[..., None] != 0, codes, 0).astype(F).reshape(n, -1)]
