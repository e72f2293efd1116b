"""Which files an ONNX folder's weights lie in: one beside model.onnx, shards of it, or safetensors that it points into.

Weights come placed one behind another, as if in one file; here every piece gets its file and its offset there, in the
initializers and in the entries alike. A weight (codes, scales, zero points) lies in one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from onnx import TensorProto, helper

from qconvert.emit import Entry
from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.onnx_proto import Model
from qconvert.formats.onnx_storage import Storage

ALIGNMENT = 64
BROWSER_MAX_FILES = 100  # MAX_EXTERNAL_DATA_CHUNKS of transformers.js
INDEX = "model.safetensors.index.json"
# types that safetensors has; tensors of any other are bytes there
SAFETENSORS = {
    TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16", TensorProto.BFLOAT16: "BF16", TensorProto.DOUBLE: "F64",
    TensorProto.UINT8: "U8", TensorProto.INT8: "I8", TensorProto.INT32: "I32", TensorProto.INT64: "I64",
}  # fmt: skip


class DataFile(NamedTuple):
    """A file of weights beside the protobuf; its entries' offsets count from its start. tensors: one name for each piece."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int
    tensors: tuple[str, ...]


class Piece(NamedTuple):
    """Bytes that one or several initializers read, all of them."""

    offset: int
    nbytes: int
    tensors: list[TensorProto]

    @property
    def first(self) -> TensorProto:
        return self.tensors[0]


Moved = Mapping[int, int]  # a piece's offset as it came -> in its file


def data_files(model: Model, entries: Sequence[Entry], storage: Storage, metadata: Mapping[str, str]) -> list[DataFile]:
    """Place every entry, and point the model's initializers there. An error where no browser could load the files."""
    pieces = pieces_of(model.initializers.values())
    shards = list(split(entries, pieces, storage, len(json.dumps(dict(metadata)))))
    if storage.browser_dtype and len(shards) > BROWSER_MAX_FILES:
        raise UsageError(f"--split-max-size: {len(shards)} files; transformers.js reads {BROWSER_MAX_FILES}", hint="1.9G")
    files = []
    for i, shard in enumerate(shards):
        own = [pieces[offset] for entry in shard for offset in offsets(entry)]
        header, moved, end = in_safetensors(own, metadata) if storage.safetensors else one_behind_another(own)
        if storage.browser_dtype and end >= 1 << 31:
            raise UnsupportedError(
                f"{shard[0].name} alone takes {end / 1e9:.1f} GB; a browser takes less than 2 GiB in one piece",
                hint="fewer bits: --bits 4",
            )
        name = storage.data_name(i, len(shards))
        for piece in own:
            point(piece, name, moved[piece.offset])
        files.append(DataFile(name, header, tuple(placed(e, moved) for e in shard), end, tuple(p.first.name for p in own)))
    return files


def index_of(files: Sequence[DataFile]) -> bytes:
    """model.safetensors.index.json, which says in which file a tensor is."""
    total = sum(f.nbytes - len(f.header) for f in files)
    where = {tensor: f.name for f in files for tensor in f.tensors}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n").encode()


# pieces -------------------------------------------------------------------------------------------


def pieces_of(tensors: Iterable[TensorProto]) -> dict[int, Piece]:
    """Offset -> the bytes there and who reads them."""
    found: dict[int, Piece] = {}
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        said = {e.key: int(e.value) for e in tensor.external_data if e.key != "location"}
        piece = found.setdefault(said["offset"], Piece(said["offset"], said["length"], []))
        assert piece.nbytes == said["length"], f"{tensor.name} reads a part of {piece.first.name}"
        piece.tensors.append(tensor)
    return found


def point(piece: Piece, location: str, offset: int) -> None:
    for tensor in piece.tensors:
        for said in tensor.external_data:
            if said.key != "length":
                said.value = location if said.key == "location" else str(offset)


def offsets(entry: Entry) -> list[int]:
    return [plane.offset for plane in entry.planes]


def placed(entry: Entry, moved: Moved) -> Entry:
    planes = tuple(plane._replace(offset=moved[plane.offset]) for plane in entry.planes)
    return entry._replace(offset=planes[0].offset, planes=planes)


# files --------------------------------------------------------------------------------------------


def split(
    entries: Sequence[Entry], pieces: Mapping[int, Piece], storage: Storage, metadata_nbytes: int
) -> Iterator[list[Entry]]:
    """Entries in order, in files of at most max_nbytes; one that is larger has a file of its own."""
    shard: list[Entry] = []
    nbytes = empty = metadata_nbytes + 2 * ALIGNMENT if storage.safetensors else 0
    for entry in entries:
        more = sum(room(pieces[offset], storage.safetensors) for offset in offsets(entry))
        if storage.max_nbytes and shard and nbytes + more > storage.max_nbytes:
            yield shard
            shard, nbytes = [], empty
        shard.append(entry)
        nbytes += more
    yield shard


def room(piece: Piece, safetensors: bool) -> int:
    """What a piece takes of a file, at most."""
    if safetensors:
        return piece.nbytes + len(json.dumps(described(piece, 10**15)))
    return piece.nbytes + -piece.nbytes % ALIGNMENT


def one_behind_another(pieces: Sequence[Piece]) -> tuple[bytes, Moved, int]:
    """No header, where each piece goes, and the file's end."""
    moved, at = {}, 0
    for piece in pieces:
        moved[piece.offset] = at
        at += piece.nbytes + -piece.nbytes % ALIGNMENT
    return b"", moved, at


def in_safetensors(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> tuple[bytes, Moved, int]:
    """The header, where each piece goes behind it, and the file's end.

    The format allows no gap, and torch reads a tensor only at a multiple of its item: so wide items come first.
    """
    begins, at = {}, 0
    for piece in sorted(pieces, key=lambda p: -itemsize(p.first)):
        begins[piece.offset] = at
        at += piece.nbytes
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for piece in pieces:
        table |= described(piece, begins[piece.offset])
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {offset: len(header) + begin for offset, begin in begins.items()}, len(header) + at


def described(piece: Piece, begin: int) -> dict[str, object]:
    tensor = piece.first
    known = tensor.data_type in SAFETENSORS
    shape = list(tensor.dims) if known else [piece.nbytes]
    dtype = SAFETENSORS.get(tensor.data_type, "U8")
    return {tensor.name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + piece.nbytes]}}


def itemsize(tensor: TensorProto) -> int:
    known = tensor.data_type in SAFETENSORS
    return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) if known else 1
