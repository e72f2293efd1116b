"""general.* keys: what the model is called and where it came from; and the file's name, by the same facts.

Source: ggml/docs/gguf.md (general metadata, naming convention). Names only: no path of the machine it was made on.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import cast

from qconvert.formats.gguf_kv import KV
from qconvert.graph import Attr, Graph
from qconvert.target import Source


def describe(source: Source, graph: Graph) -> tuple[KV, ...]:
    name = model_name(source)
    bases = [(name, source.checkpoint.revision, repo_of(source.name))]
    adapters = adapter_records(graph)
    bases += [(str(a["name"]), cast(str | None, a.get("revision")), None) for a in adapters]
    kvs = [KV("general.name", "str", " + ".join([name, *(str(a["name"]) for a in adapters)]))]
    kvs.append(KV("general.basename", "str", base_name(name)))
    if adapters:
        kvs.append(KV("general.finetune", "str", "+".join(str(a["name"]) for a in adapters)))
    kvs.append(KV("general.size_label", "str", size_label(graph)))
    kvs.append(KV("general.base_model.count", "u32", len(bases)))
    for i, (base, revision, repo) in enumerate(bases):
        kvs.append(KV(f"general.base_model.{i}.name", "str", base))
        if revision:
            kvs.append(KV(f"general.base_model.{i}.version", "str", revision))
        if repo:
            kvs.append(KV(f"general.base_model.{i}.organization", "str", repo.partition("/")[0]))
            kvs.append(KV(f"general.base_model.{i}.repo_url", "str", f"https://huggingface.co/{repo}"))
    for i, a in enumerate(adapters):
        kvs.append(KV(f"qconvert.adapter.{i}.kind", "str", str(a.get("kind", ""))))
        kvs.append(KV(f"qconvert.adapter.{i}.weight", "f32", cast(float, a.get("weight", 1.0))))
    return tuple(kvs)


def file_name(source: Source, graph: Graph, mix: str) -> str:
    """gguf-py's naming convention: BaseName-SizeLabel-FineTune-Encoding.gguf."""
    import gguf

    name, label = model_name(source), size_label(graph)
    finetune = "+".join(str(a["name"]) for a in adapter_records(graph)) or None
    return str(gguf.naming_convention(None, base_name(name), finetune, None, label, mix)) + ".gguf"


def model_name(source: Source) -> str:
    if repo := repo_of(source.name):
        return repo.partition("/")[2]
    return Path(source.name).resolve().name.removesuffix(".gguf")


def repo_of(name: str) -> str | None:
    """org/name, where the model was named so and no folder is called that."""
    text = name.partition("@")[0]
    return text if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).exists() else None


def base_name(name: str) -> str:
    """The name without a size at its end: novels-13m -> novels; the size has a place of its own."""
    return re.sub(r"[-_.](\d+(\.\d+)?)[kmbtKMBT]$", "", name) or name


def adapter_records(graph: Graph) -> list[dict[str, Attr]]:
    listed = graph.meta.get("adapters", [])
    return [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []


def size_label(graph: Graph) -> str:
    """13M, 1.5B: all parameters, rounded to two digits at least."""
    import gguf

    n = sum(math.prod(graph.nodes[p].type.dims) for p in graph.parameters())
    return str(gguf.size_label(n, n, 0, 0))
