"""Which files a folder's tensors lie in, their headers, and the index that says where each is.

Entries and constants come in the graph's order; a weight's tensors lie in one file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qconvert.dtypes import DTYPES
from qconvert.emit import Entry, FilePlan
from qconvert.graph import Type
from qconvert.layouts import layout_of
from qconvert.placement import ALIGNMENT as ARENA
from qconvert.planes import Plane
from qconvert.tensor_layouts import ITEMSIZE, Tensors

INDEX = "model.safetensors.index.json"
MAX_NBYTES = 5_000_000_000  # of a shard, as transformers writes them
ALIGNMENT = 64


class Tensor(NamedTuple):
    """One tensor of a file. plane: how rows of the entry lie in it; data: what is known beforehand."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    plane: Plane | None = None
    data: bytes = b""


class Stored(NamedTuple):
    """A weight or vector and the tensors that hold it."""

    entry: Entry
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class Shard(NamedTuple):
    name: str
    stored: tuple[Stored, ...]


def stored(name: str, value: str, kind: Type, transposed: bool = False) -> Stored:
    """`name` is the file's, of a parameter [N,K] or a vector; transposed: it lies there as [K,N]."""
    n, k, found = kind.rows, kind.dims[-1], list[Tensor]()
    if "." in kind.dtype:
        layout = layout_of(kind.dtype)
        assert isinstance(layout, Tensors)
        module = name.removesuffix(".weight")
        for part, plane in zip(layout.parts, layout.planes(k), strict=True):
            shape = part.shape(layout.scheme, n, k)
            assert math.prod(shape) * ITEMSIZE[part.dtype] == plane.file_nbytes(n), (name, part.name, shape)
            found.append(Tensor(f"{module}.{part.name}", part.dtype, shape, plane.file_nbytes(n), plane))
        found += constants_of(layout, module, n, k)
    else:
        dtype = DTYPES[kind.dtype]
        width = math.prod(kind.dims) // n * dtype.nbytes
        plane = Plane(0, width, 8 * dtype.nbytes if transposed else None)
        shape = kind.dims[::-1] if transposed else kind.dims
        found.append(Tensor(name, dtype.safetensors, shape, plane.file_nbytes(n), plane))
    planes = tuple(t.plane for t in found if t.plane is not None)
    return Stored(Entry(name, value, kind.dtype, kind.dims, sum(p.file_nbytes(n) for p in planes), 0, planes), tuple(found))


def constants_of(layout: Tensors, module: str, n: int, k: int) -> Iterator[Tensor]:
    for each in layout.constants:
        data = each.data(n, k)
        yield Tensor(f"{module}.{each.name}", each.dtype, each.dims(n, k), len(data), None, data)


def shards(all_stored: Sequence[Stored], max_nbytes: int = MAX_NBYTES, stem: str = "model") -> list[Shard]:
    """In order, in files of at most max_nbytes of tensors; a weight that is larger has a file of its own."""
    groups: list[list[Stored]] = [[]]
    filled = 0
    for each in all_stored:
        if groups[-1] and filled + each.nbytes > max_nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(each)
        filled += each.nbytes
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", tuple(groups[0]))]
    names = (f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups)))
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def file_plan(folder: Path, shard: Shard, metadata: Mapping[str, str], together: bool = False) -> FilePlan:
    """The header, and every piece of every entry behind it.

    The format allows no gap, and torch reads a tensor only at a multiple of its item, so wide items come first: of the file,
    or where tensors of a `Stored` are to lie together, and that allows it, of each.
    """
    each = [sorted(s.tensors, key=lambda t: -ITEMSIZE[t.dtype]) for s in shard.stored]
    fits = all(sum(t.nbytes for t in tensors) % 8 == 0 for tensors in each)
    ordered = [t for tensors in each for t in tensors]
    if not (together and fits):
        ordered = sorted((t for s in shard.stored for t in s.tensors), key=lambda t: -ITEMSIZE[t.dtype])
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, at = {}, 0
    for t in ordered:
        table[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        begins[t.name] = at
        at += t.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % (ARENA if together else ALIGNMENT))
    header = len(text).to_bytes(8, "little") + text
    entries, between = [], []
    for s in shard.stored:
        planes = tuple(t.plane._replace(offset=len(header) + begins[t.name]) for t in s.tensors if t.plane)
        if planes:
            entries.append(s.entry._replace(offset=planes[0].offset, planes=planes))
        between += [(len(header) + begins[t.name], t.data) for t in s.tensors if t.plane is None]
    return FilePlan(folder / shard.name, header, tuple(entries), len(header) + at, tuple(between))


def index(files: Sequence[Shard]) -> bytes:
    where = {t.name: shard.name for shard in files for s in shard.stored for t in s.tensors}
    total = sum(s.nbytes for shard in files for s in shard.stored)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n").encode()


def stored_beside(name: str, layout: Tensors, shape: tuple[int, int], values: Mapping[str, Type]) -> list[Stored]:
    """Tensors of the weight `name` that hold other values of the graph, and constants where nothing else has them."""
    found, module = [], name.removesuffix(".weight")
    constants = tuple(constants_of(layout, module, *shape)) if not layout.parts else ()
    for each in layout.beside:
        value = f"{name}~{each.suffix}"
        kind, dims = values[value], each.dims(*shape)
        nbytes = math.prod(dims) * ITEMSIZE[each.dtype]
        assert math.prod(kind.dims) == math.prod(dims), (value, kind, dims)
        plane = Plane(0, nbytes // kind.rows)
        tensor = Tensor(f"{module}.{each.name}", each.dtype, dims, nbytes, plane)
        found.append(Stored(Entry(tensor.name, value, kind.dtype, kind.dims, nbytes, 0, (plane,)), (tensor, *constants)))
        constants = ()
    return found


# read by the safetensors library ------------------------------------------------------------------


class Opened:
    """All tensors of a folder by name, as torch tensors."""

    def __init__(self, files: Sequence[Any]) -> None:
        self.where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Any:
        return self.where[name].get_tensor(name)


@contextmanager
def opened_tensors(folder: Path) -> Iterator[Opened]:
    from safetensors import safe_open

    yield Opened([safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))])
