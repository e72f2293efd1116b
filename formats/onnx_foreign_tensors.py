"""An ONNX file that others made, read without the bytes of its tensors: the protobuf, and where those bytes lie.

skeleton(file)   -> the same protobuf, in which a tensor of MIN_NBYTES or more names its place in the file
place_of(tensor) -> where its bytes lie, checked; nothing large stays in memory
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, StringStringEntryProto, TensorProto, numpy_helper

from qconvert.byte_files import LocalFile
from qconvert.dtypes import DTYPES
from qconvert.errors import InputError
from qconvert.formats.onnx_proto import bits_of
from qconvert.safetensors_header import Entry
from qconvert.scheme import Array
from qconvert.sources import Store, inside
from qconvert.tensor_files import SafetensorsFile

MIN_NBYTES = 1024  # what is smaller lies in the protobuf
STRIPE_NBYTES = 1 << 25
MAX_DEPTH = 100  # of messages within messages, as protobuf's own parsers have it
INCOMPLETE = "the download is not complete, or the two files do not belong together"
DAMAGED = "the file is damaged or not ONNX; fetch it again"
# message -> field -> the message in it, where that leads to tensors. Source: onnx.proto3
INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 11: "graph"},
}
DATA_TYPE, EXTERNAL_DATA, DATA_LOCATION = 2, 13, 14
# fields of a tensor whose payload is its bytes as they lie in memory -> data_type, where only one has them so
RAW = {9: None, 4: TensorProto.FLOAT, 10: TensorProto.DOUBLE}
FLOATS = {TensorProto.FLOAT: "f32", TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "f64"}


class Place(NamedTuple):
    """Bytes of a tensor: in a file of the model's folder, or (file is "") in memory: small, or written number by number."""

    file: str
    offset: int
    nbytes: int
    data: bytes | None = None


# the protobuf -------------------------------------------------------------------------------------


class Field(NamedTuple):
    number: int
    wire: int
    begin: int  # of the key
    payload: int
    end: int


def skeleton(path: Path) -> bytes:
    """The protobuf without its large tensors. InputError where the file ends too early or is none."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{path}: not an ONNX model: it is empty", hint=DAMAGED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _stripped(path, data, 0, len(data), "model", 0)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e


def _stripped(path: Path, data: mmap.mmap, begin: int, end: int, kind: str, depth: int) -> bytes:
    if depth > MAX_DEPTH:
        raise InputError(f"{path}: not an ONNX model: its messages are nested too deep", hint=DAMAGED)
    if kind == "tensor":
        return _stripped_tensor(path, data, begin, end)
    parts, kept = [], begin
    for field in _fields(path, data, begin, end):
        inner = INSIDE[kind].get(field.number)
        if inner is None or field.wire != 2 or field.end - field.payload < MIN_NBYTES:
            continue
        body = _stripped(path, data, field.payload, field.end, inner, depth + 1)
        parts += [data[kept : field.begin], varint(field.number << 3 | 2), varint(len(body)), body]
        kept = field.end
    return b"".join([*parts, data[kept:end]])


def _stripped_tensor(path: Path, data: mmap.mmap, begin: int, end: int) -> bytes:
    """Without its bytes, with their offset and length as external_data that no file is named for."""
    fields = list(_fields(path, data, begin, end))
    said = {f.number: _read_varint(path, data, f.payload, end)[0] for f in fields if f.wire == 0}
    if said.get(DATA_LOCATION) == TensorProto.EXTERNAL:
        return data[begin:end]
    fields = [f for f in fields if f.number != EXTERNAL_DATA]  # not said to count
    large = [f for f in fields if f.number in RAW and f.wire == 2 and f.end - f.payload >= MIN_NBYTES]
    if len(large) == 1 and RAW[large[0].number] in (None, said.get(DATA_TYPE)):
        (bytes_,) = large
        fields.remove(bytes_)
        place = b"".join(_pair(k, v) for k, v in (("offset", bytes_.payload), ("length", bytes_.end - bytes_.payload)))
    else:
        place = b""
    return b"".join([*(data[f.begin : f.end] for f in fields), place])


def _pair(key: str, value: int) -> bytes:
    body: bytes = StringStringEntryProto(key=key, value=str(value)).SerializeToString()
    return varint(EXTERNAL_DATA << 3 | 2) + varint(len(body)) + body


def _fields(path: Path, data: mmap.mmap, begin: int, end: int) -> Iterator[Field]:
    at = begin
    while at < end:
        key, payload = _read_varint(path, data, at, end)
        number, wire = key >> 3, key & 7
        match wire:
            case 0:
                stop = _read_varint(path, data, payload, end)[1]
            case 1 | 5:
                stop = payload + (8 if wire == 1 else 4)
            case 2:
                n, payload = _read_varint(path, data, payload, end)
                stop = payload + n
            case _:
                raise InputError(f"{path}: not an ONNX model: no field begins as byte {at} does", hint=DAMAGED)
        if stop > end or number == 0:
            where = f"field {number} at byte {at} ends at byte {stop}, past {end}"
            raise InputError(f"{path}: not a whole ONNX model: {where}", hint=DAMAGED)
        yield Field(number, wire, at, payload, stop)
        at = stop


def _read_varint(path: Path, data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise InputError(f"{path}: not a whole ONNX model: it ends within a number, at byte {at}", hint=DAMAGED)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# the model ----------------------------------------------------------------------------------------


def read(path: Path) -> ModelProto:
    """The model without large tensors; `place_of` gives them. InputError for what is no ONNX model."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = ModelProto.FromString(skeleton(path))
    except DecodeError as e:
        raise InputError(f"{path}: not an ONNX model: {e}", hint=DAMAGED) from e
    if not model.HasField("graph") or not model.opset_import or not model.ir_version:
        raise InputError(f"{path}: not an ONNX model: it has no graph, no opset or no version", hint=DAMAGED)
    return model


def dtype_of(tensor: TensorProto) -> str:
    """f32, f16 …, or the type's name in ONNX in lower case."""
    return FLOATS.get(tensor.data_type) or TensorProto.DataType.Name(tensor.data_type).lower()


def place_of(path: Path, tensor: TensorProto) -> Place:
    """Where a tensor's bytes are. InputError where they cannot be there: missing, outside of the folder, too few."""
    what = f"{path}: {tensor.name}"
    texts = [tensor.name, *(text for e in tensor.external_data for text in (e.key, e.value))]
    if odd := next((t for t in texts if not isinstance(t, str) or not t.isprintable()), None):
        raise InputError(f"{path}: the name {odd[:80]!a} of a tensor or its place is not printable", hint=DAMAGED)
    wanted = _nbytes(tensor, what)
    external = tensor.data_location == TensorProto.EXTERNAL
    if not external and not tensor.external_data:
        data = tensor.raw_data if tensor.HasField("raw_data") else _numbers(tensor, what)
        if len(data) != wanted:
            raise InputError(f"{what} has {len(data)} bytes, {list(tensor.dims)} takes {wanted}", hint=DAMAGED)
        return Place("", 0, wanted, data)
    said = {e.key: e.value for e in tensor.external_data}
    name = said.get("location", "") if external else path.name
    offset, nbytes = (_count(said.get(k, str(default)), what) for k, default in (("offset", 0), ("length", wanted)))
    file = inside(path.parent, name, what) if external else path
    if not file.is_file():
        raise InputError(f"{what}: its data file {name} is missing", hint=INCOMPLETE)
    if nbytes != wanted or offset + nbytes > file.stat().st_size:
        found = f"{nbytes} bytes at {offset} of {name}, which has {file.stat().st_size}"
        raise InputError(f"{what}: {list(tensor.dims)} takes {wanted} bytes, there are {found}", hint=INCOMPLETE)
    return Place(name, offset, nbytes)


def bytes_at(path: Path, place: Place) -> bytes:
    """A whole tensor of a model at `path`, which is small."""
    if place.data is not None:
        return place.data
    with (path.parent / place.file).open("rb") as file:
        file.seek(place.offset)
        return file.read(place.nbytes)


def _nbytes(tensor: TensorProto, what: str) -> int:
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type in (0, TensorProto.STRING):
        raise InputError(f"{what}: its type {tensor.data_type} has no bytes")
    if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) >= 1 << 56:
        raise InputError(f"{what}: the shape {list(tensor.dims)[:16]} is not one of counts", hint=DAMAGED)
    n_values: int = math.prod(tensor.dims)
    return -(-n_values * bits_of(tensor.data_type) // 8)


def _numbers(tensor: TensorProto, what: str) -> bytes:
    """The bytes of a tensor that is written number by number."""
    try:
        if bits_of(tensor.data_type) < 8:
            return bytes(n & 255 for n in tensor.int32_data)
        return bytes(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes())
    except (ValueError, TypeError) as e:
        raise InputError(f"{what}: its values do not fill {list(tensor.dims)}: {e}", hint=DAMAGED) from e


def _count(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise InputError(f"{what}: its external data says {text[:40]!a} where a count was wanted", hint=DAMAGED)
    return int(text)


# rows ---------------------------------------------------------------------------------------------


class View(NamedTuple):
    """A tensor as rows [N,K] of a dtype; u8 where its bytes are carried over."""

    place: Place
    dtype: str
    shape: tuple[int, int]


def adopt(store: Store, path: Path, views: Mapping[str, View]) -> dict[str, str]:
    """Make the tensors of a model known to `store`; their refs."""
    store.add("base", path.parent)
    for file in {v.place.file for v in views.values()}:
        here = {name: v for name, v in views.items() if v.place.file == file}
        store.adopt("base", file, PlacedFile(path.parent / file, here) if file else MemoryFile(here))
    return {name: f"base/{v.place.file}#{name}" for name, v in views.items()}


class PlacedFile(SafetensorsFile):
    """A file of which views say where tensors lie; read as safetensors are."""

    def __init__(self, path: Path, views: Mapping[str, View]) -> None:
        self.file = LocalFile(path)
        self._stripes: dict[tuple[str, int], Array] = {}
        self._lock = threading.Lock()
        self.types = {n: (v.dtype, v.shape) for n, v in views.items()}
        self.entries = {n: Entry(v.dtype, v.shape, v.place.offset, v.place.nbytes) for n, v in views.items()}

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        """Out of wide stripes: what MatMul multiplies by lies [K,N], and a block of its columns is pieces of a few bytes."""
        n_rows, n_columns = self.entries[name].shape
        width = max(1, STRIPE_NBYTES // max(1, n_rows * np.dtype(self._numpy(name)).itemsize))
        parts = []
        for at in range(begin // width * width, end, width):
            stripe = self._stripe(name, at, min(n_columns, at + width))
            parts.append(stripe[:, max(0, begin - at) : end - at])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _stripe(self, name: str, begin: int, end: int) -> Array:
        """Columns begin..end, kept until two others were read: blocks come in order, from several threads."""
        with self._lock:
            if (name, begin) not in self._stripes:
                while len(self._stripes) > 1:
                    self._stripes.pop(next(iter(self._stripes)))
                self._stripes[name, begin] = super().read_columns(name, begin, end)
            return self._stripes[name, begin]


class MemoryFile:
    """Tensors that the protobuf has number by number."""

    def __init__(self, views: Mapping[str, View]) -> None:
        self.types = {n: (v.dtype, v.shape) for n, v in views.items()}
        self.arrays = {n: np.frombuffer(v.place.data or b"", DTYPES[v.dtype].numpy).reshape(v.shape) for n, v in views.items()}

    def read(self, name: str, begin: int, end: int) -> Array:
        return self.arrays[name][begin:end].copy()

    def read_stacked(self, name: str, begin: int, end: int) -> Array:
        return self.read(name, begin, end)

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        return self.arrays[name][:, begin:end].copy()

    def close(self) -> None:
        self.arrays = {}
