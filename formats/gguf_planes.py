"""The parts that layouts of GGUF are made of: C structs of blocks, and planes of bits in their fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.scheme import F32, Array

U8 = npt.NDArray[np.uint8]
Blocks = npt.NDArray[np.void]  # of a C struct, [N, K/block]


class Plane(NamedTuple):
    """One struct field that holds `bits` bits of every code."""

    field: str
    bits: int
    run: int


class Struct(NamedTuple):
    """A C struct: its fields, its bit planes (low bits first), and what is added to a code to store it unsigned."""

    fields: list[tuple[str, str] | tuple[str, str, int]]
    planes: tuple[Plane, ...]
    zero: int
    read_levels: Callable[[Blocks], list[Array]]  # one array[N, K/block, entries] per level
    write_levels: Callable[[Blocks, list[F32]], None]
    read_codes: Callable[[Blocks], U8] | None = None  # -> u8[N, K/block, block], where codes lie in no planes
    write_codes: Callable[[Blocks, U8], None] | None = None


def weave(codes: U8, bits: int, run: int) -> U8:
    """u8[..., m] codes of `bits` bits -> u8[..., m * bits / 8]: see the head of this file."""
    per_byte = 8 // bits
    fields = codes.reshape(*codes.shape[:-1], -1, per_byte, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: U8 = np.bitwise_or.reduce(fields << shifts, axis=-2)
    return packed.reshape(*codes.shape[:-1], -1)


def unweave(packed: U8, bits: int, run: int) -> U8:
    """The inverse of weave: u8[..., nbytes] -> u8[..., nbytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(*packed.shape[:-1], -1, 1, run) >> shifts
    return (fields & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
