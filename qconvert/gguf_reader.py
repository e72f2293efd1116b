"""GGUF headers, read fast: key/values, and where each tensor lies.

Source: ggml/docs/gguf.md, versions 2 and 3, little endian; ggml.h. gguf-py needs about a second for what this reads in
milliseconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qconvert.errors import InputError
from qconvert.scheme import GGML_SCHEMES

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_DEPTH = 4  # of arrays within arrays; llama.cpp has none
STRING, ARRAY = 8, 9
# type id -> numpy spelling
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class GGMLType(NamedTuple):
    """ggml's number of a tensor type; `block` weights take `nbytes` bytes. Source: ggml.h, enum ggml_type."""

    id: int
    block: int
    nbytes: int


def _quantized(name: str, number: int) -> GGMLType:
    scheme = GGML_SCHEMES[name]
    return GGMLType(number, scheme.block, int(scheme.block * scheme.bits_per_weight) // 8)


_IDS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "q1_0": 41, "q2_0": 42,
    "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq3_s": 21, "iq2_s": 22, "iq1_m": 29,
}  # fmt: skip
GGML_TYPES: dict[str, GGMLType] = {
    "f32": GGMLType(0, 1, 4), "f16": GGMLType(1, 1, 2), "bf16": GGMLType(30, 1, 2),
    **{name: _quantized(name, i) for name, i in _IDS.items()},
}  # fmt: skip
NAMES_BY_ID = {number: name for name, (number, _, _) in GGML_TYPES.items()}


class Info(NamedTuple):
    """One tensor: dtype is ours (q4_k, f32 …; type42 where unknown), shape [N,K], offset from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    kv: dict[str, object]
    tensors: tuple[Info, ...]
    data_offset: int
    file_nbytes: int


def row_nbytes(dtype: str, k: int) -> int:
    _, block, nbytes = GGML_TYPES[dtype]
    return k // block * nbytes


def begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(4) == MAGIC


def read_header(path: Path) -> Header:
    """Key/values and tensor infos of a GGUF file. InputError where the file is cut, lies about itself, or is none."""
    file_nbytes = path.stat().st_size
    with path.open("rb") as f:
        if f.read(4) != MAGIC:
            raise InputError(f"{path} is not a GGUF file: it does not begin with {MAGIC!r}")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, path).header(file_nbytes)
            except (struct.error, IndexError, ValueError, OverflowError, MemoryError) as e:
                raise InputError(f"{path}: damaged GGUF: {e}", hint="download or convert it again") from e


def end_of_keys(header: bytes, path: Path) -> int:
    """Where the tensor infos begin, in a header that is whole."""
    reader = _Reader(header, path)
    reader.unpack("<IQ")
    for _ in range(reader.unpack("<Q")[0]):
        reader.name("key")
        reader.value(reader.unpack("<I")[0])
    return reader.at


class _Reader:
    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 4

    def header(self, file_nbytes: int) -> Header:
        (version,) = self.unpack("<I")
        if version in (2 << 24, 3 << 24):
            hint = "gguf-py's gguf-convert-endian turns it"
            raise InputError(f"{self.path} is a big-endian GGUF; little-endian ones are read", hint=hint)
        if version not in (2, 3):
            raise InputError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read")
        n_tensors, n_kv = self.unpack("<QQ")
        if max(n_tensors, n_kv) > file_nbytes // 12:
            raise ValueError(f"{n_tensors} tensors and {n_kv} keys do not fit {file_nbytes} bytes")
        kv: dict[str, object] = {}
        for _ in range(n_kv):
            key = self.name("key")
            if key in kv:
                raise ValueError(f"the key {key!r} occurs twice")
            kv[key] = self.value(self.unpack("<I")[0])
        raw = [self.info() for _ in range(n_tensors)]
        alignment = kv.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}")
        if odd := next((i for i in raw if i.offset % alignment), None):
            raise ValueError(f"{odd.name} begins at byte {odd.offset} of the data, no multiple of {alignment}")
        start = -(-self.at // alignment) * alignment
        infos = [self.checked(i._replace(offset=start + i.offset), file_nbytes) for i in raw]
        self.refuse_overlaps(infos)
        return Header(kv, tuple(infos), start, file_nbytes)

    def unpack(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self) -> str:
        (n,) = self.unpack("<Q")
        if n > len(self.data) - self.at:
            raise ValueError(f"a string of {n} bytes at {self.at} passes the end")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8", "surrogateescape")

    def name(self, what: str) -> str:
        text = self.string()
        if not text.isprintable():  # it ends up on terminals and in other files
            raise ValueError(f"the {what} {text[:80]!a} is not printable")
        return text

    def value(self, kind: int, depth: int = 0) -> object:
        if kind == STRING:
            text = self.string()
            if depth == 0 and not text.isascii():
                text.encode("utf-8")  # a token alone, in an array, may be bytes that are no text
            return text
        if kind == ARRAY:
            inner, n = self.unpack("<IQ")
            if depth == MAX_DEPTH:
                raise ValueError(f"arrays nested more than {MAX_DEPTH} deep at {self.at}")
            if n > len(self.data) - self.at:
                raise ValueError(f"an array of {n} entries at {self.at} passes the end")
            if inner in (STRING, ARRAY):
                return [self.value(inner, depth + 1) for _ in range(n)]
            scalar = np.dtype(self.scalar(inner))
            if n * scalar.itemsize > len(self.data) - self.at:
                raise ValueError(f"an array of {n} entries at {self.at} passes the end")
            values = np.frombuffer(self.data, scalar, n, self.at)
            self.at += values.nbytes
            return values.tolist()
        dtype = np.dtype(self.scalar(kind))
        self.at += dtype.itemsize
        return np.frombuffer(self.data, dtype, 1, self.at - dtype.itemsize)[0].item()

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"value type {kind} at {self.at} is unknown")
        return SCALARS[kind]

    def info(self) -> Info:
        name = self.name("tensor")
        (n_dims,) = self.unpack("<I")
        if n_dims > 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        dims = self.unpack(f"<{n_dims}Q")
        if math.prod(max(d, 1) for d in dims) >= 1 << 56:
            raise ValueError(f"{name}: the shape {list(dims)} is not a list of counts")
        number, offset = self.unpack("<IQ")
        return Info(name, NAMES_BY_ID.get(number, f"type{number}"), dims[::-1], offset, 0)

    def checked(self, info: Info, file_nbytes: int) -> Info:
        if info.dtype not in GGML_TYPES:
            return info  # a type we do not know: listed, never read
        k = info.shape[-1] if info.shape else 1
        rows = math.prod(info.shape[:-1])
        if k % GGML_TYPES[info.dtype][1]:
            raise ValueError(f"{info.name}: rows of {k} are no whole {info.dtype} blocks")
        nbytes = rows * row_nbytes(info.dtype, k)
        if info.offset + nbytes > file_nbytes:
            raise ValueError(f"{info.name} ends at byte {info.offset + nbytes} of {file_nbytes}: the file is cut short")
        return info._replace(nbytes=nbytes)

    def refuse_overlaps(self, infos: list[Info]) -> None:
        names: set[str] = set()
        end = 0
        for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
            if info.name in names:
                raise ValueError(f"the tensor {info.name!r} occurs twice")
            if info.offset < end:
                raise ValueError(f"{info.name} overlaps the tensor before it: it begins at {info.offset}, which ends at {end}")
            names.add(info.name)
            end = info.offset + info.nbytes
