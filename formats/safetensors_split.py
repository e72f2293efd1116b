"""A folder whose offloaded bytes lie in shards of their own: model-meta-*.safetensors beside model-*.safetensors.

`__metadata__` of such a shard says class, device and how far ahead its bytes are to be copied; the index's weight_map leads
every loader to them. A shard has whole arenas (all metadata of a block), which a copy moves at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qconvert.emit import Entry, FilePlan
from qconvert.formats.safetensors_files import Shard, Stored, Tensor, file_plan, index, shards
from qconvert.placement import Class, Device, Placement, told


def split_plans(
    folder: Path, all_stored: Sequence[Stored], placed: Placement, max_nbytes: int, metadata: Mapping[str, str]
) -> tuple[list[FilePlan], bytes]:
    """The shards, resident ones first, and their index."""
    by_value = {s.entry.value: s for s in all_stored}
    away: dict[tuple[Class, Device], list[Stored]] = {}
    for (kind, device), arenas in placed.elsewhere().items():
        for arena in arenas:
            found = [(s, planes(s)[b.piece]) for b in arena if (s := by_value.get(b.weight))]
            if found:
                away.setdefault((kind, device), []).append(Stored(found[0][0].entry, tuple(t for _, t in found)))
    moved = {t.name for units in away.values() for unit in units for t in unit.tensors}
    home = [Stored(s.entry, kept) for s in all_stored if (kept := tuple(t for t in s.tensors if t.name not in moved))]
    split, plans = numbered(shards(home, max_nbytes), "model"), list[FilePlan]()
    plans += [file_plan(folder, shard, metadata) for shard in split]
    for (kind, device), units in away.items():
        stem = f"model-{'meta' if kind == 'meta1' else kind}"
        more = numbered(shards(units, max_nbytes, stem), stem)
        says = {**metadata, **told(kind, device, placed.ahead)}
        plans += [file_plan(folder, shard, says, together=True) for shard in more]
        split += more
    return whole_entries(all_stored, plans), index(split)


def planes(s: Stored) -> list[Tensor]:
    """Tensors that hold rows, in the order of the layout's pieces."""
    return [t for t in s.tensors if t.plane is not None]


def numbered(split: list[Shard], stem: str) -> list[Shard]:
    """A file called model.safetensors would be taken for the whole model."""
    return [Shard(f"{stem}-00001-of-00001.safetensors", split[0].stored)] if len(split) == 1 else split


def whole_entries(all_stored: Sequence[Stored], plans: Sequence[FilePlan]) -> list[FilePlan]:
    """The plans, with each entry once, in the file of its first plane, and its planes where they lie."""
    where = {name: (plan.path.name, offset) for plan in plans for name, offset in offsets(plan.header)}
    entries: dict[str, list[Entry]] = {}
    for s in all_stored:
        files, places = zip(*(where[t.name] for t in planes(s)), strict=True)
        found = tuple(p._replace(offset=at) for p, at in zip(s.entry.planes, places, strict=True))
        apart = files if len(set(files)) > 1 else ()
        entries.setdefault(files[0], []).append(s.entry._replace(offset=places[0], planes=found, files=apart))
    return [plan._replace(entries=tuple(entries.get(plan.path.name, ()))) for plan in plans]


def offsets(header: bytes) -> Iterator[tuple[str, int]]:
    """Each tensor of a file and where it begins."""
    for name, said in json.loads(header[8:]).items():
        if name != "__metadata__":
            yield name, len(header) + said["data_offsets"][0]
