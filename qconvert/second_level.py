"""Metadata of metadata: scales and zero points of groups as small integers, with a level of their own above them.

affine (u8): an entry is step * code + low, step and low f16 for up to 128 entries of a row. product (u6, i6): an entry is
super * code, super f16 for 8 entries, as in Q4_K (scales that are never negative) and Q3_K (others). Codes of the weights
stay. Integer zero points are small already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from qconvert.scheme import F32, QTensor, Scheme, is_real

Kind = Literal["u8", "u6"]
ENTRIES: Mapping[Kind, int] = {"u8": 128, "u6": 8}
F16_MAX = 65504.0


class Error(NamedTuple):
    """|new - old| / |old| of each role's entries, and of the weights that they make."""

    levels: dict[str, float]
    weights: float


def second_level_name(scheme: Scheme, k: int, kind: Kind) -> str:
    """Of `scheme` with a second level, for rows of k weights: as many entries share it as divide a row's, at most ENTRIES."""
    n = k // scheme.block
    entries = max(e for e in range(1, ENTRIES[kind] + 1) if n % e == 0)
    return f"{scheme.name}_{kind}x{entries}"


def with_second_level(q: QTensor, scheme: Scheme) -> QTensor:
    """The same codes, entries as `scheme` (of second_level_of) holds them; each at most half a step away, as f16 is."""
    levels: list[F32] = []
    for level, v in zip(q.scheme.levels, q.levels, strict=True):
        if not is_real(level):
            levels.append(v)
            continue
        mine = [new for new in scheme.levels if new.role == level.role]
        entries = (mine[0].group or 1) // (level.group or 1)
        lines = v.reshape(len(v), -1, entries)
        steps = affine(lines) if len(mine) == 3 else product(lines, mine[1].dtype)
        levels += [part.reshape(len(v), -1) for part in steps]
    return QTensor(scheme, q.codes, tuple(levels))


def affine(v: F32) -> tuple[F32, F32, F32]:
    """[N,S,entries] -> step [N,S], codes [N,S,entries] of 0..255, low [N,S]; step * code + low is at most step / 2 away."""
    low = rounded_f16(v.min(2), np.float16(-np.inf))
    step = rounded_f16((v.max(2) - low) / np.float32(255), np.float16(np.inf))
    codes = np.rint((v - low[..., None]) / np.where(step, step, 1)[..., None]).clip(0, 255)
    return step, codes.astype(np.float32), low


def product(v: F32, dtype: str) -> tuple[F32, F32]:
    """[N,S,entries] -> super [N,S], codes [N,S,entries] of 0..63, or of -32..31, whose far end takes the larger sign."""
    peak = np.take_along_axis(v, np.abs(v).argmax(2)[..., None], 2)[..., 0]
    lowest, highest = (0, 63) if dtype == "u6" else (-32, 31)
    wanted = peak / np.float32(highest if dtype == "u6" else lowest)
    above = np.copysign(rounded_f16(np.abs(wanted), np.float16(np.inf)), wanted)
    codes = np.rint(v / np.where(above, above, 1)[..., None]).clip(lowest, highest)
    return above, codes.astype(np.float32)


def rounded_f16(v: F32, towards: np.float16) -> F32:
    """To f16, up or down to the next one `towards`; what f16 cannot reach is its largest number."""
    v = np.clip(v, -F16_MAX, F16_MAX)
    half = v.astype(np.float16)
    passed = half.astype(np.float32) < v if towards > 0 else half.astype(np.float32) > v
    return np.where(passed, np.nextafter(half, towards), half).astype(np.float32)


def error(q: QTensor, new: QTensor) -> Error:
    """What the second level costs: of real entries by role, and of the weights."""
    old_levels = {level.role: v for level, v in zip(q.scheme.levels, q.levels, strict=True) if is_real(level)}
    levels = {str(role): relative(entries(new, role), v) for role, v in old_levels.items()}
    return Error(levels, relative(new.dequantize(), q.dequantize()))


def entries(q: QTensor, role: str) -> F32:
    """Of a role, all its levels together: one f32 for each group."""
    k = q.codes.shape[1]
    levels = [(level, v) for level, v in zip(q.scheme.levels, q.levels, strict=True) if level.role == role]
    fine = min(level.group or k for level, _ in levels)
    out = np.ones((len(q.codes), k // fine), np.float32)
    for level, v in levels:
        spread = np.repeat(v, (level.group or k) // fine, axis=1)
        out = out + spread if level.adds else out * spread
    return out


def relative(new: F32, old: F32) -> float:
    distance, size = (float(np.linalg.norm(v)) for v in (new - old.astype(np.float64), old.astype(np.float64)))
    return distance / max(size, 1e-30)
