"""Read and check the header of a safetensors file. Nothing in the file is trusted.

File: n u64le, JSON of n bytes {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple, cast

from qconvert.errors import InputError, Place, located

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library

# Every dtype of the format and its bits, so that sizes can be checked where the values cannot be read.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

DAMAGED = "the file is damaged or its download was cut short; fetch it again"


def damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}", hint=DAMAGED)


class Entry(NamedTuple):
    """One tensor: safetensors dtype, shape, first byte and number of bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(fd: int, path: Path) -> dict[str, Entry]:
    """All tensors of the open file, begins counted from the file's start. InputError names the file and the key."""
    raw, n, file_nbytes = _read_table(fd, path)
    raw.pop("__metadata__", None)
    entries = {}
    for name, value in raw.items():
        with located(Place(str(path), key=name)):
            entries[name] = _entry(name, value, path)
    _check_spans(entries, file_nbytes - 8 - n, path)
    return {name: e._replace(begin=e.begin + 8 + n) for name, e in entries.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that are no tensors."""
    try:
        with path.open("rb") as file:
            raw, _, _ = _read_table(file.fileno(), path)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e
    return cast(dict[str, str], raw.get("__metadata__", {}))


def _read_table(fd: int, path: Path) -> tuple[dict[str, object], int, int]:
    """The header, its own bytes, those of the file."""
    file_nbytes = os.fstat(fd).st_size
    if file_nbytes < 8:
        raise damaged(path, f"{file_nbytes} bytes are too few for a safetensors file")
    n = int.from_bytes(os.pread(fd, 8, 0), "little")
    if n > MAX_HEADER_NBYTES:
        raise InputError(
            f"{path}: a header of {n} bytes, more than the {MAX_HEADER_NBYTES} allowed",
            hint="is this a safetensors file?",
        )
    if 8 + n > file_nbytes:
        raise damaged(path, f"a header of {n} bytes in a file of {file_nbytes}")
    text = b""
    while len(text) < n:
        part = os.pread(fd, n - len(text), 8 + len(text))
        if not part:
            raise damaged(path, "the file ended in its header")
        text += part
    raw = _parse_json(text, path)
    metadata = raw.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "__metadata__ is not a table of strings")
    return raw, n, file_nbytes


def _parse_json(text: bytes, path: Path) -> dict[str, object]:
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


def _entry(name: str, value: object, path: Path) -> Entry:
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


def _check_spans(entries: dict[str, Entry], data_nbytes: int, path: Path) -> None:
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
