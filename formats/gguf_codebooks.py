"""ggml's types whose codes are entries of a codebook: four or eight weights to an index, their signs apart.

A code here is what the entry holds, signed; of iq1_s and iq1_m eight times that and its offset of an eighth. The codebooks
are gguf-py's. Source: ggml/src/ggml-common.h, block_iq{1,2,3}_*.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.codebooks import EVEN, LEAST, entries
from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_planes import Blocks, Struct, unweave, weave
from qconvert.scheme import F32, Array

U8 = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer]
SEVENS = np.array([0, 7, 14, 21], np.uint32)
THREES = np.array([0, 3, 6, 9], np.uint16)


class Codebook(NamedTuple):
    """Where a block keeps 256 / width indices, the signs (or offsets: one bit) of each 8 weights, and levels."""

    fields: list[tuple[str, str] | tuple[str, str, int]]
    indices: Callable[[Blocks], Integers]
    signs: Callable[[Blocks], Integers]
    put: Callable[[Blocks, Integers, Integers], None]  # indices and signs
    fine: Callable[[Blocks], Array]
    put_fine: Callable[[Blocks, Integers], None]


@cache
def _sorted_keys(name: str) -> tuple[Integers, Integers]:
    keys = _keys(entries(name))
    order = np.argsort(keys)
    return keys[order], order


def _keys(points: npt.NDArray[np.int8]) -> Integers:
    """A number for each point that no other has."""
    powers = 64 ** np.arange(points.shape[-1], dtype=np.uint64)
    keys: Integers = ((points.astype(np.int64) + 1).astype(np.uint64) * powers).sum(-1, dtype=np.uint64)
    return keys


def _find(name: str, points: npt.NDArray[np.int8]) -> Integers:
    """The indices of entries [..., width]. UnsupportedError where one is none of the codebook's."""
    keys, order = _sorted_keys(name)
    wanted = _keys(points)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    if not np.array_equal(keys[at], wanted):
        raise UnsupportedError(f"codes that {name} has no entry for", hint="quantize to another type")
    found: Integers = order[at]
    return found


def read_codes(name: str, blocks: Blocks) -> U8:
    """u8[N, K/256, 256]: the bits of i8 codes."""
    book = CODEBOOKS[name]
    value = entries(name)[book.indices(blocks)].reshape(*blocks.shape, 32, 8)
    signs = book.signs(blocks)
    if name.startswith("iq1"):
        value = 8 * value + np.where(signs, -1, 1)[..., None].astype(np.int8)
    else:
        bits = signs[..., None] >> np.arange(8, dtype=signs.dtype) & 1
        value = np.where(bits.astype(bool), -value, value)
    return value.astype(np.int8).view(np.uint8).reshape(*blocks.shape, 256)


def write_codes(name: str, blocks: Blocks, stored: U8) -> None:
    book, value = CODEBOOKS[name], stored.view(np.int8).reshape(*blocks.shape, 32, 8)
    width = entries(name).shape[1]
    if name.startswith("iq1"):
        low = (value & 7) == 7
        signs = low.any(-1)
        points = (value + np.where(low, 1, -1).astype(np.int8)) >> 3
        if not np.array_equal(signs, low.all(-1)):
            raise UnsupportedError(f"codes that {name} has no entry for", hint="quantize to another type")
    else:
        points, bits = np.abs(value), value < 0
        signs = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
        if name in EVEN and (bits.sum(-1) & 1).any():
            raise UnsupportedError(f"an odd number of signs, which {name} cannot keep", hint="quantize to another type")
    book.put(blocks, _find(name, points.reshape(*blocks.shape, 256 // width, width)), signs)


def read_levels(name: str, blocks: Blocks) -> list[Array]:
    book, least = CODEBOOKS[name], np.float32(LEAST[name])
    d = _d_of_iq1_m(blocks) if name == "iq1_m" else blocks["d"]
    return [d, least + 2 * least * book.fine(blocks).astype(np.float32)]


def write_levels(name: str, blocks: Blocks, levels: list[F32]) -> None:
    book, least = CODEBOOKS[name], np.float32(LEAST[name])
    d, fine = levels
    if name == "iq1_m":
        bits = d.reshape(*blocks.shape, 1).astype("<f2").view(np.uint16)
        blocks["scales"] |= (bits >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    else:
        blocks["d"] = d.reshape(blocks.shape)
    book.put_fine(blocks, np.rint((fine - least) / (2 * least)).astype(np.uint32))


def _d_of_iq1_m(blocks: Blocks) -> Array:
    tops = (blocks["scales"] >> 12) << np.array([0, 4, 8, 12], np.uint16)
    return np.bitwise_or.reduce(tops, axis=-1, keepdims=True).astype(np.uint16).view(np.float16)


# signs and a scale in one word of 32 weights -------------------------------------------------------


def _full(sevens: Integers) -> Integers:
    """Seven bits of signs with the eighth, which makes their number even."""
    parity = np.bitwise_xor.reduce(sevens[..., None] >> np.arange(7, dtype=sevens.dtype) & 1, axis=-1)
    full: Integers = sevens | parity << 7
    return full


def _word_signs(word: Integers) -> Integers:
    return _full((word[..., None] >> SEVENS & 127).reshape(*word.shape[:-1], 32))


def _word_of(signs: Integers) -> Integers:
    parts = (signs.astype(np.uint32) & 127).reshape(*signs.shape[:-1], 8, 4) << SEVENS
    word: Integers = np.bitwise_or.reduce(parts, axis=-1)
    return word


def _bytes_of(words: Integers) -> U8:
    return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], -1)


def _put_iq2_xxs(b: Blocks, indices: Integers, signs: Integers) -> None:
    b["qs"][..., 0::2] = np.ascontiguousarray(indices.astype(np.uint8)).view("<u4")
    b["qs"][..., 1::2] = _word_of(signs)


def _put_iq3_xxs(b: Blocks, indices: Integers, signs: Integers) -> None:
    b["qs"], b["words"] = indices, _word_of(signs)


def _put_iq2_xs(b: Blocks, indices: Integers, signs: Integers) -> None:
    b["qs"] = indices | (signs.astype(np.uint16) & 127) << 9


def _put_wide(bits: int, b: Blocks, indices: Integers, signs: Integers) -> None:
    high = (indices >> 8).astype(np.uint8)
    b["qs"], b["qh"], b["signs"] = indices & 255, weave(high, bits, 1), signs


def _put_iq1_s(b: Blocks, indices: Integers, signs: Integers) -> None:
    high, groups = (indices >> 8).astype(np.uint16).reshape(*b.shape, 8, 4), signs.reshape(*b.shape, 8, 4)
    if not np.array_equal(groups.any(-1), groups.all(-1)):
        raise UnsupportedError("codes that iq1_s has no entry for", hint="quantize to iq1_m")
    b["qs"] = indices & 255
    b["qh"] = np.bitwise_or.reduce(high << THREES, axis=-1) | groups[..., 0].astype(np.uint16) << 15


def _put_iq1_m(b: Blocks, indices: Integers, signs: Integers) -> None:
    b["qs"] = indices & 255
    b["qh"] = weave((indices >> 8 | signs.astype(np.int64) << 3).astype(np.uint8), 4, 1)


def _or_into(field: str, step: int, shift: int, b: Blocks, fine: Integers) -> None:
    b[field][..., step - 1 :: step] |= (fine << np.uint32(shift)).astype(b[field].dtype)


def _put_nibbles(b: Blocks, fine: Integers) -> None:
    b["scales"] = weave(fine.astype(np.uint8), 4, 1)


def _put_scales_of_iq1_m(b: Blocks, fine: Integers) -> None:
    b["scales"] |= np.bitwise_or.reduce(fine.astype(np.uint16).reshape(*b.shape, 4, 4) << THREES, axis=-1)


def _nibbles(b: Blocks) -> U8:
    return unweave(b["scales"], 4, 1)


D: tuple[str, str] = ("d", "<f2")
CODEBOOKS: dict[str, Codebook] = {
    "iq2_xxs": Codebook(
        [D, ("qs", "<u4", 16)], lambda b: _bytes_of(b["qs"][..., 0::2]), lambda b: _word_signs(b["qs"][..., 1::2]),
        _put_iq2_xxs, lambda b: b["qs"][..., 1::2] >> 28, partial(_or_into, "qs", 2, 28),
    ),
    "iq3_xxs": Codebook(
        [D, ("qs", "u1", 64), ("words", "<u4", 8)], lambda b: b["qs"], lambda b: _word_signs(b["words"]),
        _put_iq3_xxs, lambda b: b["words"] >> 28, partial(_or_into, "words", 1, 28),
    ),
    "iq2_xs": Codebook(
        [D, ("qs", "<u2", 32), ("scales", "u1", 8)], lambda b: b["qs"] & 511, lambda b: _full(b["qs"] >> 9),
        _put_iq2_xs, _nibbles, _put_nibbles,
    ),
    "iq2_s": Codebook(
        [D, ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)],
        lambda b: b["qs"] | unweave(b["qh"], 2, 1).astype(np.uint16) << 8, lambda b: b["signs"],
        partial(_put_wide, 2), _nibbles, _put_nibbles,
    ),
    "iq3_s": Codebook(
        [D, ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)],
        lambda b: b["qs"] | unweave(b["qh"], 1, 1).astype(np.uint16) << 8, lambda b: b["signs"],
        partial(_put_wide, 1), _nibbles, _put_nibbles,
    ),
    "iq1_s": Codebook(
        [D, ("qs", "u1", 32), ("qh", "<u2", 8)],
        lambda b: b["qs"] | (b["qh"][..., None] >> THREES & 7).reshape(*b.shape, 32) << 8,
        lambda b: (b["qh"] >> 15).repeat(4, axis=-1), _put_iq1_s,
        lambda b: b["qh"] >> 12 & 7, partial(_or_into, "qh", 1, 12),
    ),
    "iq1_m": Codebook(
        [("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)],
        lambda b: b["qs"] | (unweave(b["qh"], 4, 1) & 7).astype(np.uint16) << 8, lambda b: unweave(b["qh"], 4, 1) >> 3,
        _put_iq1_m, lambda b: (b["scales"][..., None] >> THREES & 7).reshape(*b.shape, 16), _put_scales_of_iq1_m,
    ),
}  # fmt: skip


def struct_of(name: str) -> Struct:
    reads, writes = partial(read_levels, name), partial(write_levels, name)
    return Struct(CODEBOOKS[name].fields, (), 0, reads, writes, partial(read_codes, name), partial(write_codes, name))
