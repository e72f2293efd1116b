"""Read and check the header of a safetensors file. Nothing in the file is trusted.

File: n u64le, JSON of n bytes {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from qconvert.byte_files import ByteFile, LocalFile, fill
from qconvert.errors import InputError, Place, located

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library

# Every dtype of the format and its bits, so that sizes can be checked where the values cannot be read.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

DAMAGED = "the file is damaged or its download was cut short; fetch it again"


def damaged(path: Path | str, what: str) -> InputError:
    return InputError(f"{path}: {what}", hint=DAMAGED)


class Entry(NamedTuple):
    """One tensor: safetensors dtype, shape, first byte and number of bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(file: ByteFile) -> dict[str, Entry]:
    """All tensors of the file, begins counted from its start. InputError names the file and the key."""
    raw, n, file_nbytes = _read_table(file)
    raw.pop("__metadata__", None)
    entries = {}
    for name, value in raw.items():
        with located(Place(file.name, key=name)):
            entries[name] = _entry(name, value, file.name)
    _check_spans(entries, file_nbytes - 8 - n, file.name)
    return {name: e._replace(begin=e.begin + 8 + n) for name, e in entries.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that are no tensors."""
    with closing(LocalFile(path)) as file:
        raw, _, _ = _read_table(file)
    return cast(dict[str, str], raw.get("__metadata__", {}))


def _read_table(file: ByteFile) -> tuple[dict[str, object], int, int]:
    """The header, its own bytes, those of the file."""
    path, file_nbytes = file.name, file.nbytes
    if file_nbytes < 8:
        raise damaged(path, f"{file_nbytes} bytes are too few for a safetensors file")
    n = int.from_bytes(fill(file, np.empty(8, np.uint8), 0, "header").tobytes(), "little")
    if n > MAX_HEADER_NBYTES:
        raise InputError(
            f"{path}: a header of {n} bytes, more than the {MAX_HEADER_NBYTES} allowed",
            hint="is this a safetensors file?",
        )
    if 8 + n > file_nbytes:
        raise damaged(path, f"a header of {n} bytes in a file of {file_nbytes}")
    text = fill(file, np.empty(n, np.uint8), 8, "header").tobytes()
    raw = _parse_json(text, path)
    metadata = raw.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "__metadata__ is not a table of strings")
    return raw, n, file_nbytes


def _parse_json(text: bytes, path: str) -> dict[str, object]:
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise damaged(path, f"the header is not valid JSON: {e}") from e
    if not isinstance(raw, dict):
        raise damaged(path, "the header is not a JSON object")
    return cast(dict[str, object], raw)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return out


def _entry(name: str, value: object, path: str) -> Entry:
    if not name.isprintable():  # it ends up on terminals and in other files
        raise damaged(path, f"the tensor name {name[:80]!a} is not printable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name}: an entry has dtype, shape and data_offsets, not {ascii(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{path}: {name}: unknown dtype {ascii(dtype)[:40]}", hint=f"known are {', '.join(BITS)}")
    if not _counts(shape) or math.prod(max(d, 1) for d in shape) >= 1 << 56:
        raise damaged(path, f"{name}: the shape {ascii(shape)[:80]} is not a list of counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{name}: data_offsets {ascii(offsets)[:80]} are not [begin, end]")
    n_bits = math.prod(shape) * BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if n_bits != 8 * nbytes:
        raise damaged(path, f"{name}: {dtype} {shape} takes {-(-n_bits // 8)} bytes, data_offsets give {nbytes}")
    return Entry(dtype, tuple(shape), offsets[0], nbytes)


def _counts(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_spans(entries: dict[str, Entry], data_nbytes: int, path: str) -> None:
    """The tensors fill the data exactly: no overlap, no hole, nothing after the last."""
    at = 0
    for name, e in sorted(entries.items(), key=lambda item: item[1][2:]):
        end = e.begin + e.nbytes
        if end > data_nbytes:
            raise damaged(path, f"{name} ends at byte {end} of the data, which has {data_nbytes}")
        if e.begin != at:
            what = "overlaps the tensor before it" if e.begin < at else f"leaves a hole of {e.begin - at} bytes"
            raise damaged(path, f"{name} {what} (begins at {e.begin}, expected {at})")
        at = end
    if at != data_nbytes:
        raise damaged(path, f"{data_nbytes - at} bytes after the last tensor belong to none")
