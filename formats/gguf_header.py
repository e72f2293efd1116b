"""GGUF headers as bytes: key/values and tensor infos. gguf_reader reads them.

Source: ggml/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from qconvert.formats import gguf_kv
from qconvert.formats.gguf_kv import KV
from qconvert.gguf_reader import ALIGNMENT, GGML_TYPES


def encode(kvs: Sequence[KV], infos: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Header bytes, padded to where the data begin. infos: name, dtype, shape [N,K], offset from there."""
    tensors = list(infos)
    out = bytearray(gguf_kv.header(kvs, len(tensors)))
    for name, dtype, shape, offset in tensors:
        data, dims = name.encode(), shape[::-1]
        out += struct.pack("<Q", len(data)) + data
        out += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, GGML_TYPES[dtype][0], offset)
    return bytes(out) + bytes(-len(out) % ALIGNMENT)
