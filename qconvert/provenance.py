"""Names of what a folder was made from, without the paths they came from, and what metadata_props say of it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from qconvert import __version__
from qconvert.graph import Graph
from qconvert.target import Source


def adapters_of(graph: Graph) -> list[tuple[str, float]]:
    """Name and weight of each adapter."""
    listed = graph.meta.get("adapters", [])
    found = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
    return [(str(a["name"]), cast(float, a.get("weight", 1.0))) for a in found]


def names_of(source: Source, graph: Graph) -> list[str]:
    """The model and its adapters, without the paths they came from."""
    name = source.name.partition("@")[0]
    base = Path(source.name).resolve().name if Path(source.name).exists() else name.rpartition("/")[2]
    return [base.removesuffix(".gguf"), *(name for name, _ in adapters_of(graph))]


def provenance(source: Source, graph: Graph, quant: str) -> dict[str, str]:
    """What metadata_props say of where the weights come from."""
    base, *_ = names_of(source, graph)
    facts = {"qconvert.version": __version__, "qconvert.quant": quant, "qconvert.base_model": base}
    if source.checkpoint.revision:
        facts["qconvert.base_revision"] = source.checkpoint.revision
    for i, (name, weight) in enumerate(adapters_of(graph)):
        facts[f"qconvert.adapter.{i}"] = name if weight == 1 else f"{name}:{weight:g}"
    return facts
