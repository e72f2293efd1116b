"""How ggml lays quantized weights out in bytes: one numpy struct per C struct of ggml/src/ggml-common.h.

Codes lie in bit planes. A plane of `bits` bits and run `r` packs chunks of r * 8 / bits codes into r bytes: byte j of a
chunk holds code j of each run of r codes, the first run in the low bits. So block_q4_0 (byte j: codes j and j + 16) is
one plane of 4 bits and run 16, and block_q3_K is a plane of 2 bits and one of 1 bit, both of run 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from qconvert import scheme as schemes
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_codebooks import CODEBOOKS, struct_of
from qconvert.formats.gguf_planes import U8, Blocks, Plane, Struct, unweave, weave
from qconvert.scheme import E8M0_TABLE, F32, SCHEMES, Array, Bytes, Layout, QTensor, Scheme

U4 = np.uint8(15)


def _pack(name: str, q: QTensor) -> Bytes:
    """QTensor of the layout's scheme -> u8[N, row nbytes]. Levels must be values that their dtypes hold."""
    layout = LAYOUTS[name]
    if (why := layout.accepts(q.scheme)) is not None:
        raise UnsupportedError(why, hint=f"quantize to {layout.scheme.name}, or pack as gguf.{q.scheme.name}")
    struct = STRUCTS[q.scheme.name]
    n, k = q.codes.shape
    blocks: Blocks = np.zeros((n, k // layout.scheme.block), layout.block)
    stored = (q.codes.astype(np.int16) + struct.zero).astype(np.uint8).reshape(*blocks.shape, -1)
    if struct.write_codes is not None:
        struct.write_codes(blocks, stored)
    shift = 0
    for field, bits, run in struct.planes:
        blocks[field] = weave((stored >> np.uint8(shift)) & np.uint8((1 << bits) - 1), bits, run)
        shift += bits
    struct.write_levels(blocks, [np.asarray(v).reshape(*blocks.shape, -1) for v in q.levels])
    return blocks.view(np.uint8).reshape(n, -1)


def _unpack(name: str, packed: Bytes) -> QTensor:
    """u8[N, row nbytes] -> QTensor. InputError where the bytes are no whole number of blocks."""
    layout = LAYOUTS[name]
    n, nbytes = packed.shape
    if nbytes % layout.block.itemsize:
        raise InputError(f"{name}: rows of {nbytes} bytes are no multiple of the block's {layout.block.itemsize}")
    struct = STRUCTS[layout.scheme.name]
    blocks: Blocks = np.ascontiguousarray(packed).view(layout.block)
    stored = struct.read_codes(blocks) if struct.read_codes else np.zeros((*blocks.shape, layout.scheme.block), np.uint8)
    shift = 0
    for field, bits, run in struct.planes:
        stored |= unweave(blocks[field], bits, run) << np.uint8(shift)
        shift += bits
    codes = (stored - np.uint8(struct.zero)).view(np.int8).reshape(n, -1)
    levels = tuple(v.astype(np.float32).reshape(n, -1) for v in struct.read_levels(blocks))
    return QTensor(layout.scheme, codes, levels)


def _read_fields(names: tuple[str, ...], blocks: Blocks) -> list[Array]:
    return [blocks[name] for name in names]


def _write_fields(names: tuple[str, ...], blocks: Blocks, levels: list[F32]) -> None:
    for name, v in zip(names, levels, strict=True):
        blocks[name] = v.reshape(blocks[name].shape)


def _fields(*names: str) -> tuple[Callable[[Blocks], list[Array]], Callable[[Blocks, list[F32]], None]]:
    """Levels that are whole struct fields, in the scheme's order."""
    return partial(_read_fields, names), partial(_write_fields, names)


def _read_q2_k(blocks: Blocks) -> list[Array]:
    scales: U8 = blocks["scales"]
    return [blocks["d"], scales & 15, blocks["dmin"], scales >> 4]


def _write_q2_k(blocks: Blocks, levels: list[F32]) -> None:
    d, scales, dmin, mins = levels
    _write_fields(("d", "dmin"), blocks, [d, dmin])
    blocks["scales"] = scales.astype(np.uint8) | mins.astype(np.uint8) << 4


def _read_q3_k(blocks: Blocks) -> list[Array]:
    low, high = unweave(blocks["scales"][..., :8], 4, 8), unweave(blocks["scales"][..., 8:], 2, 4)
    return [blocks["d"], (low | high << 4).astype(np.int8) - np.int8(32)]


def _write_q3_k(blocks: Blocks, levels: list[F32]) -> None:
    d, scales = levels
    stored: U8 = (scales + 32).astype(np.uint8)
    _write_fields(("d",), blocks, [d])
    blocks["scales"] = np.concatenate([weave(stored & U4, 4, 8), weave(stored >> np.uint8(4), 2, 4)], axis=-1)


def _read_q4_k(blocks: Blocks) -> list[Array]:
    """Six-bit scales s and mins m in 12 bytes: s0-s3 below the tops of s4-s7; m likewise; the rest of s4-s7, m4-m7."""
    first_s, first_m, low = np.split(blocks["scales"], 3, axis=-1)
    scales = np.concatenate([first_s & 63, (low & 15) | (first_s >> 6) << 4], axis=-1)
    mins = np.concatenate([first_m & 63, (low >> 4) | (first_m >> 6) << 4], axis=-1)
    return [blocks["d"], scales, blocks["dmin"], mins]


def _write_q4_k(blocks: Blocks, levels: list[F32]) -> None:
    d, scales, dmin, mins = levels
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    _write_fields(("d", "dmin"), blocks, [d, dmin])
    parts = [
        s[..., :4] | (s[..., 4:] >> 4) << 6,
        m[..., :4] | (m[..., 4:] >> 4) << 6,
        (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
    ]
    blocks["scales"] = np.concatenate(parts, axis=-1)


def _read_iq4_xs(blocks: Blocks) -> list[Array]:
    low, high = unweave(blocks["scales_l"], 4, 1), unweave(blocks["scales_h"], 2, 1)
    return [blocks["d"], (low | high << 4).astype(np.int8) - np.int8(32)]


def _write_iq4_xs(blocks: Blocks, levels: list[F32]) -> None:
    d, scales = levels
    stored: U8 = (scales + 32).astype(np.uint8)
    _write_fields(("d",), blocks, [d])
    blocks["scales_l"] = weave(stored & U4, 4, 1)
    blocks["scales_h"] = weave(stored >> np.uint8(4), 2, 1)


def _read_trits(blocks: Blocks) -> U8:
    """Bytes of five trits: byte * 3**i mod 256, times 3, has trit i above its low 8 bits."""
    parts = []
    for field, begin, run, n in TRITS:
        powers = np.uint8(3) ** np.arange(n, dtype=np.uint8)[:, None]
        moved: U8 = blocks[field][..., None, begin : begin + run] * powers
        parts.append((moved.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape, -1))
    return np.concatenate(parts, axis=-1)


def _write_trits(blocks: Blocks, codes: U8) -> None:
    at = 0
    for field, begin, run, n in TRITS:
        trits = codes[..., at : at + n * run].reshape(*blocks.shape, n, run).astype(np.uint16)
        value = (trits * (3 ** np.arange(4, 4 - n, -1, dtype=np.uint16))[:, None]).sum(-2, dtype=np.uint16)
        blocks[field][..., begin : begin + run] = (value * np.uint32(256) + np.uint32(242)) // 243
        at += n * run


def _read_exponent(blocks: Blocks) -> list[Array]:
    return [np.asarray(E8M0_TABLE, np.float32)[blocks["e"]]]


def _write_exponent(blocks: Blocks, levels: list[F32]) -> None:
    blocks["e"] = (np.frexp(levels[0].reshape(blocks.shape))[1] + 126).astype(np.uint8)


TRITS = (("qs", 0, 32, 5), ("qs", 32, 16, 5), ("qh", 0, 4, 4))  # field, first byte, bytes, and trits in each
NIBBLES_16 = (Plane("qs", 4, 16),)
NIBBLES_32 = (Plane("qs", 4, 32),)

STRUCTS: dict[str, Struct] = {
    "q8_0": Struct([("d", "<f2"), ("qs", "u1", 32)], (Plane("qs", 8, 1),), 0, *_fields("d")),
    "q4_0": Struct([("d", "<f2"), ("qs", "u1", 16)], NIBBLES_16, 8, *_fields("d")),
    "q4_1": Struct([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)], NIBBLES_16, 0, *_fields("d", "m")),
    "q5_0": Struct(
        [("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)],
        (*NIBBLES_16, Plane("qh", 1, 1)), 16, *_fields("d"),
    ),
    "q5_1": Struct(
        [("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)],
        (*NIBBLES_16, Plane("qh", 1, 1)), 0, *_fields("d", "m"),
    ),
    "q2_k": Struct(
        [("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")],
        (Plane("qs", 2, 32),), 0, _read_q2_k, _write_q2_k,
    ),
    "q3_k": Struct(
        [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")],
        (Plane("qs", 2, 32), Plane("hmask", 1, 32)), 4, _read_q3_k, _write_q3_k,
    ),
    "q4_k": Struct(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)],
        NIBBLES_32, 0, _read_q4_k, _write_q4_k,
    ),
    "q5_k": Struct(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)],
        (*NIBBLES_32, Plane("qh", 1, 32)), 0, _read_q4_k, _write_q4_k,
    ),
    "q6_k": Struct(
        [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")],
        (Plane("ql", 4, 64), Plane("qh", 2, 32)), 32, *_fields("d", "scales"),
    ),
    "tq1_0": Struct(
        [("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")], (), 0, *_fields("d"), _read_trits, _write_trits,
    ),
    "tq2_0": Struct([("qs", "u1", 64), ("d", "<f2")], (Plane("qs", 2, 32),), 0, *_fields("d")),
    "q1_0": Struct([("d", "<f2"), ("qs", "u1", 16)], (Plane("qs", 1, 1),), 0, *_fields("d")),
    "q2_0": Struct([("d", "<f2"), ("qs", "u1", 16)], (Plane("qs", 2, 1),), 0, *_fields("d")),
    "mxfp4": Struct([("e", "u1"), ("qs", "u1", 16)], NIBBLES_16, 0, _read_exponent, _write_exponent),
    "iq4_nl": Struct([("d", "<f2"), ("qs", "u1", 16)], NIBBLES_16, 0, *_fields("d")),
    "iq4_xs": Struct(
        [("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)],
        NIBBLES_16, 0, _read_iq4_xs, _write_iq4_xs,
    ),
}  # fmt: skip


STRUCTS |= {name: struct_of(name) for name in CODEBOOKS}


def _layout(scheme: Scheme) -> Layout:
    name = f"gguf.{scheme.name}"
    block = np.dtype(STRUCTS[scheme.name].fields)
    return Layout(name, scheme, block, partial(_pack, name), partial(_unpack, name))


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in map(_layout, (*SCHEMES.values(), *schemes.CODEBOOKS.values()))}
