"""Which schemes hold another's weights value for value, and codes carried from the one to the other without rounding.

A weight is scale * (code - zero), so a finer grid, smaller groups and a table of integers only need other codes; the
scale is the same product of the same numbers. What has an offset or a minimum moves to float zero points alone, and not bit
for bit: scale * code + offset is rounded as scale * (code - zero) is not.
"""

from __future__ import annotations

import numpy as np

from qconvert.scheme import F32, Array, Level, QTensor, Scheme, scheme_of


def moves(source: Scheme, target: Scheme) -> bool:
    """Whether every weight of `source` is one of `target`, bit for bit, by the schemes alone."""
    scales = [level for level in target.levels if level.role == "scale"]
    group = scales[0].group
    plain = {"scale", "zero"}.issuperset(level.role for level in (*source.levels, *target.levels))
    if not plain or target.table or len(scales) > 1 or not keeps(source, scales[0].dtype) or has_float_zeros(target):
        return False
    if group is None:
        return False
    if any(level.group is None or level.group % group for level in source.levels) or has_float_zeros(source):
        return False
    if any(not float(v).is_integer() for v in source.table):
        return False
    (low, high), (lowest, highest) = code_range(source), code_range(target)
    if has_zeros(source) and not has_zeros(target):
        return lowest <= -high  # codes less their zero points
    shift = target_shift(source, target)
    return lowest <= low + shift and high + shift <= highest


def keeps(source: Scheme, dtype: str) -> bool:
    """Whether scales of a source are exact in `dtype`: f32 holds every product of its levels."""
    return dtype == "f32" or [level.dtype for level in source.levels if level.role == "scale"] == [dtype]


def first_code(scheme: Scheme) -> int:
    """The least that a code can be."""
    return 0 if scheme.unsigned or has_zeros(scheme) or scheme.name in ("q4_1", "q5_1") else -(1 << (scheme.bits - 1))


def shifted(scheme: Scheme) -> Scheme | None:
    """The same codes and scales with an offset f32 for each group, so that any number can be added to a group; None where
    there is not one scale a group along the row, with no zero point, one of its own or an offset.
    """
    (scale, *shift), group = scheme.levels, scheme.levels[0].group
    plain = scale.role == "scale" and scale.dtype in ("f32", "f16", "bf16") and not scheme.table and group is not None
    one = len(shift) < 2 and all(s.role in ("zero", "offset") and s.group == group and s.rows == 1 for s in shift)
    if not plain or not one or scale.rows != 1:
        return None
    dtype = "" if scale.dtype == "f32" else f"_{scale.dtype}_f32"
    return scheme_of(f"uint{scheme.bits}o_g{group}{dtype}")


def centred(scheme: Scheme) -> Scheme | None:
    """The same codes about zero, with the same scales and nothing else; None where there is no such scheme."""
    dtype = scheme.levels[0].dtype
    return scheme_of(f"int{scheme.bits}_g{scheme.block}" + ("" if dtype == "f32" else f"_{dtype}"))


def with_offsets(q: QTensor, target: Scheme) -> QTensor:
    """A weight as `shifted` has it, or as another scheme with offsets, whose dtype they are rounded to."""
    scale, first = at_group([(v, level.group or 1) for v, level in _levels(q, "scale")], target.block), first_code(q.scheme)
    less = first_code(target) - first  # what codes are more by in the target
    offset = -less * scale
    for role, factor in (("zero", -scale), ("offset", np.ones_like(scale))):
        for v, level in _levels(q, role):
            offset = offset + factor * at_group([(v, level.group or 1)], target.block)
    codes: Array = q.codes.astype(np.int16) + less
    codes = codes.astype(np.int8 if first_code(target) < 0 or target.bits < 8 else np.uint8)
    return QTensor(target, codes, (scale, narrowed(offset, target.levels[1].dtype)))


def narrowed(v: F32, dtype: str) -> F32:
    """As f32, f16 or bf16 holds it; an f16 that would be infinite is its largest number."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(v, np.float32).view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return v if dtype == "f32" else np.clip(v, -65504, 65504).astype(np.float16).astype(np.float32)


def offsets_move(source: Scheme, target: Scheme) -> bool:
    """Whether `target` says scale * code + offset of `source`'s, whose offsets are f32, but for the offset's rounding."""
    if [[level.role for level in s.levels] for s in (source, target)] != [["scale", "offset"]] * 2:
        return False
    scale, offset = source.levels
    fits = target.levels[0].group is not None and (scale.group or 1) % target.block == 0
    return offset.dtype == "f32" and fits and target.bits >= source.bits and keeps(source, target.levels[0].dtype)


def moved_offsets(stored: Scheme, name: str) -> str | None:
    """`name` where that scheme takes codes that are `stored` with offsets f32, by rounding these alone."""
    target = scheme_of(name)
    if target is None or [level.role for level in stored.levels] != ["scale", "offset"] or stored.levels[1].dtype != "f32":
        return None
    return name if nearly_moves(stored, target) else None


def nearly_moves(source: Scheme, target: Scheme) -> bool:
    """Whether codes and scales of `source` are those of `target`, its offsets or minima zero points as f32 has them, or its
    zero points offsets as `target` keeps them.
    """
    if offsets_for_zeros(source, target) or offsets_move(source, target):
        return True
    scales = [level for level in target.levels if level.role == "scale"]
    group = scales[0].group
    shifted = {"offset", "min"} & {level.role for level in source.levels}
    fits = group is not None and not any(level.group is None or level.group % group for level in source.levels)
    plain = len(scales) == 1 and not (target.table or source.table)
    return bool(shifted) and has_float_zeros(target) and fits and plain and source.bits <= target.bits


def offsets_for_zeros(source: Scheme, target: Scheme) -> bool:
    """Whether `target` says scale * code + offset of `source`'s scale * (code - zero), but for the offset's rounding."""
    if target.table or [level.role for level in target.levels] != ["scale", "offset"] or target.bits < source.bits:
        return False
    scale, group = target.levels[0], target.block
    whole = {level.role for level in source.levels} == {"scale", "zero"} and not has_float_zeros(source) and not source.table
    fits = not any(level.group is None or level.group % group or level.rows != 1 for level in source.levels)
    return whole and fits and scale.dtype == target.levels[1].dtype == "f16" and keeps(source, "f16")


def _with_offsets(q: QTensor, target: Scheme) -> QTensor:
    """An offset is -scale * zero, rounded once."""
    scale, zero = (at_group([(v, level.group or 1) for v, level in _levels(q, r)], target.block) for r in ("scale", "zero"))
    offset = np.clip(-scale * zero, -65504, 65504).astype(np.float16).astype(np.float32)
    return QTensor(target, q.codes, (scale, offset))


def _shifted(q: QTensor, target: Scheme) -> QTensor:
    """A group without a scale is one number: code 0, less a zero point."""
    group, role = target.block, "offset" if _levels(q, "offset") else "min"
    scale, shift = (at_group([(v, level.group or 1) for v, level in _levels(q, r)], group) for r in ("scale", role))
    flat = scale == 0
    codes, scale = np.where(np.repeat(flat, group, axis=1), 0, q.codes), np.where(flat, np.float32(1), scale)
    zero = shift / scale if role == "min" else -shift / scale
    kept = [narrowed(scale if level.role == "scale" else zero, level.dtype) for level in target.levels]
    return QTensor(target, codes.astype(np.uint8 if target.bits == 8 else np.int8), tuple(kept))


def moved(q: QTensor, target: Scheme) -> QTensor:
    """The same weights as `target` has them; `moves` or `nearly_moves` must have said that it has."""
    source, group = q.scheme, target.block
    if offsets_for_zeros(source, target):
        return _with_offsets(q, target)
    if offsets_move(source, target):
        return with_offsets(q, target)
    if has_float_zeros(target):
        return _shifted(q, target)
    codes: Array = np.asarray(source.table, np.int16)[q.codes] if source.table else q.codes.astype(np.int16)
    codes += target_shift(source, target)
    scale = at_group([(v, level.group or 1) for v, level in _levels(q, "scale")], group)
    zeros = [at_group([(v, level.group or 1)], group) for v, level in _levels(q, "zero")]
    if zeros and not has_zeros(target):
        codes -= np.repeat(zeros.pop(), group, axis=1).astype(np.int16)
    if has_zeros(target) and not zeros:
        zeros = [np.full_like(scale, target_shift(source, target))]
    wide = has_zeros(target) and target.bits == 8
    by_role = {"scale": scale, **({"zero": zeros[0]} if zeros else {})}
    return QTensor(target, codes.astype(np.uint8 if wide else np.int8), tuple(by_role[level.role] for level in target.levels))


def at_group(levels: list[tuple[F32, int]], group: int) -> F32:
    """The product of levels, coarse ones first, with an entry for each `group` weights."""
    (factor, width), *finer = levels
    for v, g in finer:
        factor, width = np.repeat(factor, width // g, axis=1) * v, g
    return factor if width == group else np.repeat(factor, width // group, axis=1)


def code_range(scheme: Scheme) -> tuple[int, int]:
    if scheme.table:
        return int(min(scheme.table)), int(max(scheme.table))
    half = 0 if has_zeros(scheme) else 1 << (scheme.bits - 1)
    return -half, (1 << scheme.bits) - 1 - half


def target_shift(source: Scheme, target: Scheme) -> int:
    """What is added to codes: those that are centred on 0 get a zero point where the target's begin at 0."""
    return 1 << (target.bits - 1) if has_zeros(target) and not has_zeros(source) else 0


def has_zeros(scheme: Scheme) -> bool:
    return any(level.role == "zero" for level in scheme.levels)


def has_float_zeros(scheme: Scheme) -> bool:
    return any(level.role == "zero" and not level.dtype.startswith("u") for level in scheme.levels)


def _levels(q: QTensor, role: str) -> list[tuple[F32, Level]]:
    return [(v, level) for level, v in zip(q.scheme.levels, q.levels, strict=True) if level.role == role]
