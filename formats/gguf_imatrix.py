"""llama.cpp's importance matrix as a file, in both forms that it has had.

GGUF: NAME.in_sum2 f32[E or 1, K], sums of x * x over tokens by input channel, and NAME.counts f32[E or 1, 1], the tokens.
.dat, before that: i32 n, then n entries of i32 length, name, i32 calls, i32 n values, f32 means * calls; then i32 chunks,
i32 length, the text's name. It has no magic, and one count for all experts.
Source: llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp.  Oracle: llama-imatrix, llama-quantize, gguf-py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.errors import InputError, ResourceError
from qconvert.formats import gguf_header
from qconvert.formats.gguf_kv import KV
from qconvert.gguf_reader import ALIGNMENT, begins_as_gguf, read_header
from qconvert.scheme import F32
from qconvert.tensor_files import GGUFFile

HINT = "llama-imatrix writes such files, and --save-imatrix does"
MAX_NAME = 1 << 10


class Entry(NamedTuple):
    """Of one tensor: means of x * x, f32[E or 1,K]; tokens i64[E or 1], calls in the old form. No tokens: means are 1."""

    moments: F32
    counts: npt.NDArray[np.int64]


class IMatrix(NamedTuple):
    """Entries by GGUF name; of which texts; of how many sequences of how many tokens, 0 where a file does not say."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    length: int


def read(path: Path) -> IMatrix:
    """InputError where it is damaged, names the tensor; numbers as llama-quantize has them, bit for bit."""
    try:
        return _read_gguf(path) if begins_as_gguf(path) else _read_dat(path)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}", hint=HINT) from e


def _read_gguf(path: Path) -> IMatrix:
    header = read_header(path)
    kv, names = header.kv, {t.name for t in header.tensors}
    if kv.get("general.type") != "imatrix":
        raise InputError(f"{path}: a GGUF of {kv.get('general.type', 'a model')!r}, not an imatrix", hint=HINT)
    facts = [kv.get(f"imatrix.{k}") for k in ("datasets", "chunk_count", "chunk_size")]
    datasets, chunks, length = facts
    if not isinstance(datasets, list) or not isinstance(chunks, int) or not isinstance(length, int):
        raise InputError(f"{path}: imatrix.datasets, chunk_count or chunk_size is missing", hint=HINT)
    file, out = GGUFFile(path), {}
    try:
        for name in sorted(n.removesuffix(".in_sum2") for n in names if n.endswith(".in_sum2")):
            out[name] = _entry(path, file, name)
    finally:
        file.close()
    if left := sorted(n for n in names if n.removesuffix(".counts") not in out and n.removesuffix(".in_sum2") not in out):
        raise InputError(f"{path}: {left[0]} has no in_sum2 beside it", hint=HINT)
    if not out:
        raise InputError(f"{path}: no entries", hint=HINT)
    return IMatrix(out, tuple(map(str, datasets)), chunks, length)


def _entry(path: Path, file: GGUFFile, name: str) -> Entry:
    kinds = {part: file.infos.get(f"{name}.{part}") for part in ("in_sum2", "counts")}
    for part, info in kinds.items():
        if info is None or info.dtype != "f32":
            raise InputError(f"{path}: {name}.{part} is {info.dtype if info else 'missing'}; f32 was wanted", hint=HINT)
    sums, counts = (file.read_stacked(f"{name}.{part}", 0, _n_rows(info.shape)) for part, info in kinds.items() if info)
    numbers = np.rint(counts.reshape(-1)).astype(np.int64)
    if sums.size % max(1, len(numbers)) or not sums.size:
        raise InputError(f"{path}: {name}: {sums.size} sums of {len(numbers)} counts", hint=HINT)
    return Entry(_means(path, name, sums.reshape(len(numbers), -1), numbers), numbers)


def _n_rows(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[:-1]))


def _means(path: Path, name: str, sums: F32, counts: npt.NDArray[np.int64]) -> F32:
    if not np.isfinite(sums).all() or (sums < 0).any() or (counts < 0).any():
        raise InputError(f"{path}: {name}: sums of squares that are negative or not finite", hint="calibrate again")
    means: F32 = sums / np.maximum(counts, 1).astype(np.float32)[:, None]
    means[counts == 0] = 1
    return means


def _read_dat(path: Path) -> IMatrix:
    data, at, out = path.read_bytes(), 0, {}

    def take(nbytes: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= nbytes <= len(data) - at:
            raise InputError(f"{path}: {what} passes the end; is it an imatrix?", hint=HINT)
        at += nbytes
        return data[at - nbytes : at]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    n = number("the number of entries")
    if not 1 <= n <= len(data) // 12:
        raise InputError(f"{path}: {n} entries in {len(data)} bytes; is it an imatrix?", hint=HINT)
    for i in range(n):
        length = number(f"entry {i}")
        if not 0 < length <= MAX_NAME:
            raise InputError(f"{path}: entry {i} has a name of {length} bytes; is it an imatrix?", hint=HINT)
        name = take(length, f"entry {i}").decode("utf-8", "replace")
        calls, n_values = number(name), number(name)
        if n_values < 1:
            raise InputError(f"{path}: {name} has {n_values} values", hint=HINT)
        sums = np.frombuffer(take(4 * n_values, name), "<f4").reshape(1, -1)
        counts = np.array([max(1, calls)])
        out[name] = Entry(_means(path, name, sums, counts), np.array([calls]))
    if at == len(data):
        return IMatrix(out, (), 0, 0)
    chunks = number("the number of chunks")
    dataset = take(number("the text's name"), "the text's name").decode("utf-8", "replace") if at < len(data) else ""
    return IMatrix(out, (dataset,) if dataset else (), chunks, 0)


def write(path: Path, imatrix: IMatrix) -> None:
    """In the old form where it is called .dat, else as GGUF. ResourceError where it cannot be written."""
    parts = _dat(imatrix) if path.suffix == ".dat" else _gguf(imatrix)
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
    except OSError as e:
        raise ResourceError(f"{path}: {e.strerror}", hint="--save-imatrix names a place to write") from e


def _gguf(imatrix: IMatrix) -> Iterator[bytes]:
    kvs = [
        KV("general.type", "str", "imatrix"), KV("imatrix.datasets", "arr_str", imatrix.datasets),
        KV("imatrix.chunk_count", "u32", imatrix.chunks), KV("imatrix.chunk_size", "u32", imatrix.length),
    ]  # fmt: skip
    tensors: list[tuple[str, F32]] = []
    for name, entry in sorted(imatrix.entries.items()):
        counts = entry.counts.astype(np.float32)[:, None]
        tensors += [(f"{name}.in_sum2", sums_of(entry)), (f"{name}.counts", counts)]
    infos, end = [], 0
    for name, values in tensors:
        infos.append((name, "f32", values.shape, end))
        end += values.nbytes + -values.nbytes % ALIGNMENT
    yield gguf_header.encode(kvs, infos)
    for _, values in tensors:
        yield values.astype("<f4").tobytes() + bytes(-values.nbytes % ALIGNMENT)


def sums_of(entry: Entry) -> F32:
    """Sums that divided by their counts give these means again, where an f32 does."""
    counts = np.maximum(entry.counts, 1).astype(np.float32)[:, None]
    first: F32 = entry.moments * counts
    out = np.array(first)
    for near in (np.nextafter(first, np.float32(0)), np.nextafter(first, np.float32(np.inf))):
        out = np.where((out / counts != entry.moments) & (near / counts == entry.moments), near, out)
    out[entry.counts == 0] = 0
    return out


def _dat(imatrix: IMatrix) -> Iterator[bytes]:
    """Means times calls, with 1 call for each `length` tokens begun; experts without tokens have mean 1."""
    entries = {name: e for name, e in sorted(imatrix.entries.items()) if e.counts.any()}
    yield struct.pack("<i", len(entries))
    for name, entry in entries.items():
        calls = -(-int(entry.counts.max()) // max(1, imatrix.length))
        data = name.encode()
        yield struct.pack("<i", len(data)) + data + struct.pack("<ii", calls, entry.moments.size)
        yield (entry.moments * np.float32(calls)).astype("<f4").tobytes()
    dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    yield struct.pack("<ii", imatrix.chunks, len(dataset)) + dataset
