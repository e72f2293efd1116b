"""Adapters that stay beside the model, each in a file or folder of its own: their names, and what is said of them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from qconvert.errors import UsageError
from qconvert.graph import Graph
from qconvert.target import Source, tokenizer_folder


def swapped(graph: Graph) -> list[tuple[str, float]]:
    """Name and weight of each."""
    listed = graph.meta.get("slots", [])
    found = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
    return [(str(a["name"]), float(str(a["weight"]))) for a in found]


def names_of_swapped(graph: Graph, suffix: str = "") -> dict[str, str]:
    """Adapter -> its file or folder. UsageError where two would have one name."""
    names: dict[str, str] = {}
    for i, (adapter, _) in enumerate(swapped(graph)):
        name = PurePosixPath(adapter).name + suffix
        if name.casefold() in (other.casefold() for other in names.values()):
            raise UsageError(f"two adapters would be {name}", hint="rename the folder of one")
        names[f"adapter{i}"] = name
    return names


def notes_of_swapped(source: Source, graph: Graph) -> tuple[str, ...]:
    """On weights, and on what an adapter brings that the folder, which serves them all, has from the model."""
    weighted = ((name, weight) for name, weight in swapped(graph) if weight != 1)
    notes = [f"{name}: its weight {weight:g} is in the factors of its file" for name, weight in weighted]
    ours = tokenizer_folder(source)
    for adapter in source.adapters if source.swap else ():
        theirs = source.store.roots[adapter.alias]
        others = [n for n in ("tokenizer.json", "chat_template.jinja") if differs(theirs / n, ours / n)]
        if others:
            notes.append(f"{adapter.name}: its own {' and '.join(others)} is not what the folder has, which is the model's")
    return tuple(notes)


def differs(theirs: Path, ours: Path) -> bool:
    return theirs.is_file() and not (ours.is_file() and ours.read_bytes() == theirs.read_bytes())
