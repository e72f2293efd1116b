"""Adapters beside an ONNX model: a file for each, which onnxruntime and onnxruntime-genai put into the model's slots.

In the model a slot is a pair of optional inputs A[K,r] and B[r,N] with initializers of rank 0. A file has the factors of
the slots that its adapter fills, alpha/r and the user's weight multiplied into B. Only one adapter is active at a time:
of two that fill one slot onnxruntime takes the first, without a word.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qconvert.emit import Entry, FilePlan
from qconvert.errors import UnsupportedError
from qconvert.graph import Graph
from qconvert.passes.adapter_slots import MERGE, filling
from qconvert.planes import Plane
from qconvert.scheme import F32
from qconvert.swapped import names_of_swapped

SUFFIX = ".onnx_adapter"
IDENTIFIER = b"TORT"
FORMAT, VERSION = 1, 1  # VERSION: of adapter and model, which onnxruntime stores and does not compare
FLOAT = 1  # TensorProto's
ALIGNMENT = 64
LIMIT = 1 << 31  # flatbuffers' own


def adapter_plans(graph: Graph, folder: Path) -> list[FilePlan]:
    """A file for each adapter: what is known beforehand, and the places of its factors."""
    names, plans = names_of_swapped(graph, SUFFIX), list[FilePlan]()
    for alias, values in filling(graph).items():
        dims = {slot: graph.nodes[value].type.dims[::-1] for slot, value in values.items()}
        known, at, nbytes = skeleton(dims)
        if nbytes >= LIMIT:
            raise UnsupportedError(f"{names[alias]} would take {nbytes} bytes; onnxruntime reads less than {LIMIT}", hint=MERGE)
        entries = []
        for slot, value in values.items():
            n, k = graph.nodes[value].type.dims
            name = f"{names[alias]}: {slot}"
            entries.append(Entry(name, value, "f32", (n, k), 4 * n * k, at[slot], (Plane(at[slot], 4 * k, 32),)))
        plans.append(FilePlan(folder / names[alias], known, tuple(entries), nbytes, lengths(dims, at)))
    return plans


# the file -----------------------------------------------------------------------------------------


def skeleton(dims: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int], int]:
    """The file up to the values of its first tensor, where the values of each tensor begin, and the file's nbytes.

    A flatbuffer of onnxruntime's adapter_schema.fbs: an Adapter of three versions and [Parameter], a Parameter of name,
    dims, type and bytes. Both are four fields of four bytes, so one vtable serves them all. Offsets lead forward from
    where they stand. The values come last, so that they can be streamed into their places.
    """
    table, n = 20, len(dims)
    parameters = 40 + 4 + 4 * n  # after root, vtable, Adapter and the vector of offsets
    strings = parameters + table * n
    texts = {name: name.encode() for name in dims}
    name_at, dims_at, at = dict[str, int](), dict[str, int](), strings
    for name in dims:
        name_at[name] = at
        at += 4 + len(texts[name]) + 1
        at += -at % 4
    for name, shape in dims.items():
        at += -(at + 4) % 8  # i64 after the length
        dims_at[name] = at
        at += 4 + 8 * len(shape)
    data_at, known = dict[str, int](), at
    for name, shape in dims.items():
        at += 4
        at += -at % ALIGNMENT
        data_at[name] = at
        at += 4 * int(np.prod(shape))
    out = bytearray(known)
    struct.pack_into("<I4s6H", out, 0, table, IDENTIFIER, 12, table, 4, 8, 12, 16)
    struct.pack_into("<i4I", out, table, table - 8, FORMAT, VERSION, VERSION, 4)
    struct.pack_into("<I", out, 40, n)
    for i, (name, shape) in enumerate(dims.items()):
        here = parameters + table * i
        struct.pack_into("<I", out, 44 + 4 * i, here - (44 + 4 * i))
        offsets = (name_at[name] - (here + 4), dims_at[name] - (here + 8), FLOAT, data_at[name] - 4 - (here + 16))
        struct.pack_into("<i4I", out, here, here - 8, *offsets)
        struct.pack_into(f"<I{len(texts[name])}s", out, name_at[name], len(texts[name]), texts[name])
        struct.pack_into(f"<I{len(shape)}q", out, dims_at[name], len(shape), *shape)
    return bytes(out), data_at, at


def lengths(dims: Mapping[str, tuple[int, ...]], at: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
    """What stands before the values of each tensor: their nbytes."""
    return tuple((at[name] - 4, struct.pack("<I", 4 * int(np.prod(shape)))) for name, shape in dims.items())


def read(path: Path) -> dict[str, F32]:
    """The factors in a file, by onnxruntime's own reader."""
    from onnxruntime import AdapterFormat

    return {name: value.numpy() for name, value in AdapterFormat.read_adapter(str(path)).get_parameters().items()}
