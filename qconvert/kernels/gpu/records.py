"""Operands as kernels take them: records of pointers, strides and what is known when a kernel is compiled."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch

from qconvert.errors import require
from qconvert.kernels.gpu.operand import Codes, Metadata, Operand, Second, check
from qconvert.scheme import Array


class WordsRecord(NamedTuple):
    """Where numbers lie, a row and a column apart, and how codes do in words: None where a word is a number."""

    at: torch.Tensor
    s0: int
    s1: int
    axis: object = None
    bits: object = None
    word: object = None
    log_word: object = None
    last: object = None  # the greatest code
    high: object = None
    awq: object = None
    add: object = None
    lead: int | None = None  # rows of a part
    step: int | None = None  # to the next word, where codes lie across two


class SecondRecord(NamedTuple):
    scale: torch.Tensor
    zero: torch.Tensor | None
    table: torch.Tensor | None
    offset: float
    group: object
    log_group: object
    n: int
    s0: int
    s1: int


class NumberRecord(NamedTuple):
    words: WordsRecord
    kind: object
    second: SecondRecord | None = None
    divisor: float | None = None


class WeightRecord(NamedTuple):
    words: WordsRecord
    per: object  # codes a word, where whole words are read
    kind: object
    grid: object
    table: torch.Tensor | None
    centre: object
    integer_centre: object
    rest: object  # integer_centre - centre
    n_columns: int
    reshape: object  # how rows of the matrix that was quantized lie in those of the weight
    ratio: int  # of their lengths
    width: object
    log_width: object
    rows: object
    log_rows: object
    columns: object
    log_columns: object
    g_idx: torch.Tensor | None
    scale: NumberRecord | None
    zero: NumberRecord | None
    offset: NumberRecord | None


class LowRankRecord(NamedTuple):
    h: torch.Tensor  # A x, f32[M,rank]
    b: NumberRecord | None
    scale: float
    rank: int
    padded: object  # rank as a power of 2


class Placed(NamedTuple):
    """An operand whose arrays lie on a device, and its low-rank pair."""

    operand: Operand
    record: WeightRecord
    device: str
    per: int | None
    a: Placed | None
    b: NumberRecord | None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def constant(value: object) -> object:
    """Known when the kernel is compiled."""
    return None if value is None else require("triton.language", "multiplying by packed weights").constexpr(value)


def log2(value: int | None) -> int | None:
    return None if value is None or value & (value - 1) else value.bit_length() - 1


def tensor(a: Array, device: str) -> torch.Tensor:
    """The array's own memory on a CPU; kernels write none of their operands, so it may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(a).to(device)


def numbers_at(at: torch.Tensor) -> WordsRecord:
    """Numbers [R,C]; an axis of length 1 is shared by all."""
    s0, s1 = (0 if length == 1 else stride for length, stride in zip(at.shape, at.stride(), strict=True))
    return WordsRecord(at, s0, s1)


def words(codes: Codes | Array, device: str) -> WordsRecord:
    if not isinstance(codes, Codes):
        return numbers_at(tensor(codes, device))
    plain = numbers_at(tensor(codes.words, device))
    axis, _, variant = codes.order.partition("-")
    step = {"columns": plain.s1, "rows": plain.s0}.get(axis) if codes.word % codes.bits else None
    return plain._replace(
        axis=constant(axis),
        bits=constant(codes.bits),
        word=constant(codes.word),
        log_word=constant(log2(codes.word)),
        last=constant((1 << codes.bits) - 1),
        high=constant(variant == "high"),
        awq=constant(variant == "awq"),
        add=constant(codes.add),
        lead=len(codes.words) if axis == "parts" else None,
        step=step,
    )


def number(m: Metadata, device: str) -> NumberRecord:
    shape = (m.data.words if isinstance(m.data, Codes) else m.data).shape
    second = None if m.second is None else second_level(m.second, shape, device)
    divisor = None if m.divisor == 1 else float(np.float32(m.divisor))
    return NumberRecord(words(m.data, device), constant(m.kind), second, divisor)


def second_level(s: Second, shape: tuple[int, ...], device: str) -> SecondRecord:
    flat = [None if a is None else np.ascontiguousarray(a, np.float32).reshape(-1) for a in (s.scale, s.zero, s.table)]
    scale, zero, table = (None if a is None else tensor(a, device) for a in flat)
    assert scale is not None
    s0, s1 = (shape[1] if shape[0] > 1 else 0), (1 if shape[1] > 1 else 0)
    return SecondRecord(
        scale, zero, table, float(np.float32(s.offset)), constant(s.group), constant(log2(s.group)), scale.numel(), s0, s1
    )


def integer_centre(w: Operand) -> int:
    """What codes are less where they are i8: their zero point if all share it, or half the range of 8 bits."""
    if isinstance(w.codes, Codes) and w.codes.bits == 8 and w.codes.words.dtype != np.int8:
        return 128
    return int(w.centre)


def by_rows(w: Operand) -> Codes | Array:
    """The codes as words [N, K * bits / word], if whole words are a row's: what was one stream is cut."""
    codes, (n, k) = w.codes, w.shape
    if isinstance(codes, Codes) and w.width == n * k and k * codes.bits % codes.word == 0 and codes.words.flags.c_contiguous:
        return codes._replace(words=codes.words.reshape(-1)[: n * k * codes.bits // codes.word].reshape(n, -1))
    return codes


def codes_a_word(w: Operand, codes: Codes | Array) -> int | None:
    """Where no code lies across words, and rows of words are rows of the weight."""
    if not isinstance(codes, Codes) or codes.order not in ("columns", "columns-high") or codes.add:
        return None
    if (w.width is not None and codes is w.codes) or codes.word % codes.bits or codes.word == codes.bits:
        return None
    return codes.word // codes.bits


def reshaping(w: Operand) -> tuple[str, int]:
    n, k = w.shape
    if w.width is None:
        return "none", 1
    if w.width == n * k:
        return "one row", 1
    if k % w.width == 0:
        return "rows within rows", k // w.width
    return ("rows across rows", w.width // k) if w.width % k == 0 else ("any", 1)


def place(w: Operand, device: str | None = None) -> Placed:
    """Check an operand and bring its arrays to the device."""
    check(w)
    device = device or default_device()
    codes, centre, (rows, columns) = by_rows(w), integer_centre(w), w.block
    per, (reshape, ratio) = codes_a_word(w, codes), reshaping(w)
    record = WeightRecord(
        words=words(codes if per else w.codes, device),
        per=constant(per),
        kind=constant(w.kind),
        grid=constant(w.grid),
        table=tensor(np.array(w.table, np.float32), device) if w.table else None,
        centre=constant(w.centre or None),
        integer_centre=constant(centre),
        rest=constant(centre - w.centre or None),
        n_columns=w.shape[1],
        reshape=constant(reshape),
        ratio=ratio,
        width=constant(w.width) if reshape == "rows within rows" else w.width,
        log_width=constant(log2(w.width)),
        rows=constant(rows),
        log_rows=constant(log2(rows)),
        columns=constant(columns),
        log_columns=constant(log2(columns)),
        g_idx=None if w.g_idx is None else tensor(w.g_idx, device),
        scale=None if w.scale is None else number(w.scale, device),
        zero=number(w.zero, device) if isinstance(w.zero, Metadata) else None,
        offset=None if w.offset is None else number(w.offset, device),
    )
    if w.low_rank is None:
        return Placed(w, record, device, per, None, None)
    a, b, _, kind = w.low_rank
    first = place(Operand(f"{w.name} (A)", (a.shape[0], a.shape[1]), a, "float", kind), device)
    return Placed(w, record, device, per, first, number(Metadata(b, kind), device))
