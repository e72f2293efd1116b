"""Whether an adapter fits the model it is attached to, and if not, why: for attach-adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Sequence

from qconvert.adapter_config import CONFIG, in_modules_to_save
from qconvert.adapters import Adapter
from qconvert.errors import AdapterError, MissingAdapterKey, Place, UnusedAdapterKey
from qconvert.graph import Graph
from qconvert.passes.untie_head import sites, vocabulary_weights

log = logging.getLogger("qconvert")


def key_of(ref: str) -> str:
    return ref.partition("#")[2]


def check_unused(graph: Graph, adapter: Adapter, unused: Sequence[str], any_used: bool, allowed: bool) -> None:
    if not unused:
        return
    if any_used and allowed:
        first = key_of(unused[0])
        log.warning("%s: left out %d tensors that match no weight, first: %s", adapter.name, len(unused), first)
        return
    raise UnusedAdapterKey(
        f"{adapter.name}: {len(unused)} adapter tensors match no weight, first: {key_of(unused[0])}",
        hint=_likely_reason(graph, adapter, unused[0]),
        place=adapter.place(unused[0]),
    )


def _likely_reason(graph: Graph, adapter: Adapter, ref: str) -> str:
    key = key_of(ref)
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", key)
    n_layers = _layers(graph)
    if layer and int(layer[1]) >= n_layers:
        return f"it is for layer {layer[1]}, the model has {n_layers} layers; {other_base(graph, adapter)}"
    if layer and (tail := key[layer.start() :].rpartition(".lora_")[0]):
        known = next((n for n in graph.nodes if n.endswith(tail + ".weight")), None)
        if known is not None:
            want, have = known.removesuffix(tail + ".weight"), key.partition(tail)[0]
            return f"its prefix is {have!r}, where 'base_model.model.{want}' was wanted; rename the adapter's keys"
    if ref in adapter.unknown:
        return "it is no part of a LoRA that is known here; --allow-unused-adapter-keys leaves it out"
    return other_base(graph, adapter)


def _layers(graph: Graph) -> int:
    return 1 + max((v for n in graph.nodes.values() if isinstance(v := n.attrs.get("layer"), int)), default=-1)


def other_base(graph: Graph, adapter: Adapter) -> str:
    config = graph.meta.get("config")
    width = config.get("width") if isinstance(config, dict) else "?"
    this = f"this is a {graph.meta.get('family', 'model')} of {_layers(graph)} layers, width {width}"
    return f'was it trained on another model? {CONFIG} says "{adapter.base}", {this}'


def check_missing(graph: Graph, adapter: Adapter, have: Container[str | None], allowed: bool) -> None:
    """Modules that the config names and the model has, but the file does not."""
    for op, weight in sites(graph):
        module = weight.removesuffix(".weight")
        targeted = any(module == t or module.endswith(f".{t}") for t in adapter.targets)
        saved = in_modules_to_save(adapter.modules_to_save, weight)
        if (targeted or saved) and weight not in have:
            what = f"{adapter.name}: {CONFIG} names {module} ({op}), but the file has nothing for it"
            if not allowed:
                place = Place(str(adapter.folder / CONFIG), key=module)
                raise MissingAdapterKey(what, hint=f"the file is incomplete, or {other_base(graph, adapter)}", place=place)
            log.warning("%s", what)


def check_vocabulary(graph: Graph, adapter: Adapter) -> None:
    counts = [graph.nodes[weight].type.dims[0] for weight in vocabulary_weights(graph)]
    if len(set(counts)) > 1:
        raise AdapterError(
            f"{adapter.name}: the embedding has {counts[0]} rows, the head {counts[1]}",
            hint="the vocabulary was resized, but only one of them was saved; train with save_embedding_layers=True",
            place=Place(str(adapter.folder)),
        )
