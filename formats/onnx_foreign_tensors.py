"""The tensors of an ONNX model that others made, as a file of tensors: rows on demand, inline or from its external data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.scheme import Array
from qconvert.sources import inside

BYTES = "bytes of "  # before a tensor's name: its bytes as they are, u8[rows, row nbytes]
FLOATS = {1: ("f32", "<f4"), 10: ("f16", "<f2"), 16: ("bf16", "<u2"), 11: ("f64", "<f8")}  # TensorProto's numbers
BITS = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8, "FLOAT16": 16,
    "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "BFLOAT16": 16, "UINT4": 4, "INT4": 4, "UINT2": 2, "INT2": 2,
    "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8, "FLOAT4E2M1": 4, "COMPLEX64": 64, "COMPLEX128": 128,
}  # fmt: skip


class Place(NamedTuple):
    file: Path
    offset: int


class OnnxTensors:
    """`tensors`: every tensor of the model that has bytes, by a name of its own. See sources.Store for how rows are read."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path, self.tensors = path, tensors
        self.places = {name: place for name, t in tensors.items() if (place := external_place(path, name, t))}
        self.types: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, tensor in tensors.items():
            rows = tensor.dims[0] if tensor.dims else 1
            nbytes = tensor_nbytes(path, name, tensor)
            rows = rows if rows and nbytes % rows == 0 else 1
            self.types[BYTES + name] = "u8", (rows, nbytes // rows)
            if tensor.data_type in FLOATS and rows > 0:
                self.types[name] = FLOATS[tensor.data_type][0], (rows, math.prod(tensor.dims[1:]))
        self._fds = {file: os.open(file, os.O_RDONLY) for file in {p.file for p in self.places.values()}}

    def read(self, name: str, begin: int, end: int) -> Array:
        plain = name.removeprefix(BYTES)
        width = self.types[BYTES + plain][1][1]
        data = self._bytes(plain, begin * width, (end - begin) * width)
        if name != plain:
            return data.reshape(end - begin, width)
        return data.view(FLOATS[self.tensors[plain].data_type][1]).reshape(end - begin, -1)

    read_stacked = read

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        n, width = self.types[name][1]
        step = max(1, (1 << 21) // max(1, width))
        parts = [np.array(self.read(name, i, min(n, i + step))[:, begin:end]) for i in range(0, n, step)]
        return np.concatenate(parts)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _bytes(self, name: str, offset: int, nbytes: int) -> Array:
        place = self.places.get(name)
        if place is None:
            return np.frombuffer(inline_bytes(self.tensors[name]), np.uint8, nbytes, offset)
        fd = self._fds.get(place.file)
        if fd is None:
            self._fds[place.file] = fd = os.open(place.file, os.O_RDONLY)
        data = os.pread(fd, nbytes, place.offset + offset)
        while len(data) < nbytes:  # one call reads 2 GB at most
            more = os.pread(fd, nbytes - len(data), place.offset + offset + len(data))
            if not more:
                raise InputError(f"{place.file}: {name}: the file ended", hint="it was changed while it was read")
            data += more
        return np.frombuffer(data, np.uint8)


def inline_bytes(tensor: Any) -> bytes:
    if tensor.HasField("raw_data"):
        raw: bytes = tensor.raw_data
        return raw
    from onnx import helper, numpy_helper

    array = numpy_helper.to_array(tensor)
    made: bytes = helper.make_tensor("x", tensor.data_type, tensor.dims, array, raw=False).raw_data
    return made or numpy_helper.from_array(array).raw_data


def tensor_nbytes(path: Path, name: str, tensor: Any) -> int:
    """InputError where an inline tensor has not the bytes that its shape takes."""
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() else "UNDEFINED"
    if kind not in BITS or any(d < 0 for d in tensor.dims):
        raise UnsupportedError(f"{path}: {name} is {kind.lower()}{list(tensor.dims)}, which is not read here")
    nbytes = -(-math.prod(map(int, tensor.dims)) * BITS[kind] // 8)
    if tensor.HasField("raw_data") and tensor.data_location == TensorProto.DEFAULT and len(tensor.raw_data) != nbytes:
        raise InputError(f"{path}: {name} has {len(tensor.raw_data)} bytes, {kind.lower()}{list(tensor.dims)} takes {nbytes}")
    return nbytes


def external_place(path: Path, name: str, tensor: Any) -> Place | None:
    """Where a tensor's bytes lie; None for one that has them itself. InputError where they cannot be there."""
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    said = {e.key: e.value for e in tensor.external_data}
    file = inside(path.parent, said.get("location", ""), f"{path}: {name}")
    if not file.is_file():
        hint = "keep the data beside the model"
        raise InputError(f"{path}: {name} lies in {said.get('location')}, which is missing", hint=hint)
    try:
        offset, length = int(said.get("offset", 0)), int(said.get("length", tensor_nbytes(path, name, tensor)))
    except ValueError as e:
        raise InputError(f"{path}: {name}: its place is no number: {e}") from e
    size, nbytes = file.stat().st_size, tensor_nbytes(path, name, tensor)
    if length != nbytes or offset < 0 or offset + nbytes > size:
        raise InputError(
            f"{path}: {name} takes {nbytes} bytes; {file.name} has {size}, and says {length} at {offset}",
            hint="the download is not complete, or the two files do not belong together",
        )
    return Place(file, offset)


def named_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a model and of its branches, constants' too, by a name of its own."""
    taken: dict[str, int] = {}
    for name, tensor in _tensors(model.graph):
        n = taken[name] = taken.get(name, -1) + 1
        yield (f"{name}~{n}" if n else name), tensor


def _tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    yield from ((t.name, t) for t in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
