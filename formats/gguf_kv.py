"""GGUF metadata: one key with a typed value, and its bytes.

Source: the GGUF specification (ggml's docs/gguf.md), version 3, little-endian.  Oracle: gguf.GGUFReader.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Type = Literal[
    "str", "bool", "u8", "u16", "i32", "u32", "f32", "u64",
    "arr_str", "arr_bool", "arr_u8", "arr_i32", "arr_u32", "arr_f32",
]  # fmt: skip
CODES = {"u8": 0, "u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10}
ARRAY = 9
STRUCTS = {"u8": "B", "u16": "H", "u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q"}


class KV(NamedTuple):
    key: str
    type: Type
    value: str | int | float | bool | bytes | Sequence[Any]


def header(kvs: Sequence[KV], n_tensors: int = 0) -> bytes:
    """A GGUF file up to its tensor infos: magic, version, counts, metadata. Without tensors it is a whole file."""
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(kvs)) + b"".join(map(encode, kvs))


def encode(kv: KV) -> bytes:
    """Key (u64 length, bytes), value type u32, value; an array's value is element type u32, count u64, elements."""
    key = _string(kv.key)
    if not kv.type.startswith("arr_"):
        return key + struct.pack("<I", CODES[kv.type]) + _elements(kv.type, [kv.value])
    element = kv.type.removeprefix("arr_")
    assert not isinstance(kv.value, (str, int, float))
    return key + struct.pack("<IIQ", ARRAY, CODES[element], len(kv.value)) + _elements(element, kv.value)


def _elements(element: str, values: Sequence[Any]) -> bytes:
    if element == "str":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{STRUCTS[element]}", *values)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data
