"""Which files an ONNX folder's weights lie in: one beside model.onnx, shards of it, or safetensors that it points into.

Weights come placed one behind another, as if in one file; here every piece gets its file and its offset there, in the
initializers and in the entries alike. A weight (codes, scales, zero points) lies in one file, but for what is offloaded:
that has files of its own by class and device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

from onnx import TensorProto, helper

from qconvert.emit import Entry
from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.onnx_proto import Model
from qconvert.formats.onnx_storage import Storage
from qconvert.placement import ALIGNMENT as ARENA
from qconvert.placement import Placement, told

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
Unit = Sequence[int]  # offsets of pieces that lie together
Group = tuple[str, dict[str, str], list[Unit]]  # a class ("" is what is not offloaded), what its files say, and what lies there


def data_files(
    model: Model, entries: Sequence[Entry], storage: Storage, metadata: Mapping[str, str], placement: Placement
) -> list[DataFile]:
    """Place every entry, and point the model's initializers there. An error where no browser could load the files."""
    pieces, where = pieces_of(model.initializers.values()), dict[int, tuple[str, int]]()
    files, home = list[DataFile](), [[p.offset for p in e.planes] for e in entries]
    away = offloaded_units(entries, placement)
    moved_away = {offset for _, _, units in away for unit in units for offset in unit}
    stay: list[Unit] = [unit for offsets in home if (unit := [o for o in offsets if o not in moved_away])]
    groups: list[Group] = [("", {}, stay), *away]
    for kind, more, units in groups:
        said = {**metadata, **more}
        shards = list(split(units, pieces, storage, len(json.dumps(said))))
        if storage.browser_dtype and len(shards) > BROWSER_MAX_FILES:
            raise UsageError(f"--split-max-size: {len(shards)} files; transformers.js reads {BROWSER_MAX_FILES}", hint="1.9G")
        for i, shard in enumerate(shards):
            own = [[pieces[offset] for offset in unit] for unit in shard]
            header, moved, end = in_safetensors(own, said, bool(kind)) if storage.safetensors else in_order(own, bool(kind))
            if storage.browser_dtype and end >= 1 << 31:
                raise UnsupportedError(
                    f"{own[0][0].first.name} alone takes {end / 1e9:.1f} GB; a browser takes less than 2 GiB in one piece",
                    hint="fewer bits: --bits 4",
                )
            name = storage.data_name(i, len(shards), kind)
            for piece in chain.from_iterable(own):
                point(piece, name, moved[piece.offset])
                where[piece.offset] = (name, moved[piece.offset])
            files.append(DataFile(name, header, (), end, tuple(p.first.name for p in chain.from_iterable(own))))
    done = [placed(entry, where) for entry in entries]
    return [file._replace(entries=tuple(e for name, e in done if name == file.name)) for file in files]


def offloaded_units(entries: Sequence[Entry], placement: Placement) -> list[Group]:
    planes, found = {e.value: e.planes for e in entries}, list[Group]()
    for (kind, device), arenas in placement.elsewhere().items():
        units: list[Unit] = [[planes[b.weight][b.piece].offset for b in arena if b.weight in planes] for arena in arenas]
        if any(units):
            found.append((kind, told(kind, device, placement.ahead), [unit for unit in units if unit]))
    return found


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


def placed(entry: Entry, where: Mapping[int, tuple[str, int]]) -> tuple[str, Entry]:
    """The file that an entry is in, and the entry as it lies there."""
    names, offsets = zip(*(where[plane.offset] for plane in entry.planes), strict=True)
    planes = tuple(plane._replace(offset=offset) for plane, offset in zip(entry.planes, offsets, strict=True))
    files = () if len(set(names)) == 1 else names
    return names[0], entry._replace(offset=offsets[0], planes=planes, files=files)


# files --------------------------------------------------------------------------------------------


def split(
    units: Sequence[Unit], pieces: Mapping[int, Piece], storage: Storage, metadata_nbytes: int
) -> Iterator[list[Unit]]:
    """Units in order, in files of at most max_nbytes; one that is larger has a file of its own."""
    shard: list[Unit] = []
    nbytes = empty = metadata_nbytes + 2 * ARENA if storage.safetensors else 0
    for unit in units:
        more = sum(room(pieces[offset], storage.safetensors) for offset in unit)
        if storage.max_nbytes and shard and nbytes + more > storage.max_nbytes:
            yield shard
            shard, nbytes = [], empty
        shard.append(unit)
        nbytes += more
    yield shard


def room(piece: Piece, safetensors: bool) -> int:
    """What a piece takes of a file, at most."""
    if safetensors:
        return piece.nbytes + len(json.dumps(described(piece, 10**15)))
    return piece.nbytes + -piece.nbytes % ALIGNMENT


def in_order(units: Sequence[Sequence[Piece]], arenas: bool) -> tuple[bytes, Moved, int]:
    """No header, where each piece goes, and the file's end. arenas: units are such, and begin where those do."""
    moved, at = {}, 0
    for unit in units:
        at += -at % ARENA if arenas else 0
        for piece in unit:
            moved[piece.offset] = at
            at += piece.nbytes + -piece.nbytes % ALIGNMENT
    return b"", moved, at


def in_safetensors(units: Sequence[Sequence[Piece]], metadata: Mapping[str, str], arenas: bool) -> tuple[bytes, Moved, int]:
    """The header, where each piece goes behind it, and the file's end. arenas: pieces of a unit stay together.

    The format allows no gap, and torch reads a tensor only at a multiple of its item size: so wide items come first.
    """
    pieces = list(chain.from_iterable(units))
    begins = one_behind_another(chain.from_iterable(map(wide_first, units)) if arenas else wide_first(pieces))
    if any(begins[p.offset] % itemsize(p.first) for p in pieces):
        begins = one_behind_another(wide_first(pieces))
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for piece in pieces:
        table |= described(piece, begins[piece.offset])
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % (ARENA if arenas else ALIGNMENT))
    header = len(text).to_bytes(8, "little") + text
    end = len(header) + sum(p.nbytes for p in pieces)
    return header, {offset: len(header) + begin for offset, begin in begins.items()}, end


def one_behind_another(pieces: Iterable[Piece]) -> dict[int, int]:
    """A piece's offset as it came -> where it begins."""
    order = list(pieces)
    return {p.offset: begin for p, begin in zip(order, accumulate((p.nbytes for p in order), initial=0), strict=False)}


def wide_first(pieces: Sequence[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda p: -itemsize(p.first))


def described(piece: Piece, begin: int) -> dict[str, object]:
    tensor = piece.first
    known = tensor.data_type in SAFETENSORS
    shape = list(tensor.dims) if known else [piece.nbytes]
    dtype = SAFETENSORS.get(tensor.data_type, "U8")
    return {tensor.name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + piece.nbytes]}}


def itemsize(tensor: TensorProto) -> int:
    known = tensor.data_type in SAFETENSORS
    return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) if known else 1
