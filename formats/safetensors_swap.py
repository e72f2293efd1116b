"""Adapters beside a folder of safetensors: each a folder in it that PEFT loads onto the quantized model.

    out/config.json, out/model.safetensors …    out/ADAPTER/adapter_config.json, out/ADAPTER/adapter_model.safetensors

Factors are f32. alpha/r and the user's weight are multiplied into B, so every module's scale is 1: also for a reader that
does not know of alpha_pattern. The base that the config names is the folder: refitted factors belong to its codes alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from qconvert.adapter_config import CONFIG
from qconvert.adapters import PREFIX
from qconvert.emit import FilePlan
from qconvert.errors import UnsupportedError
from qconvert.formats.safetensors_dialects import Dialect, FixedRanges
from qconvert.formats.safetensors_files import Shard, file_plan, stored
from qconvert.formats.safetensors_names import stored_transposed
from qconvert.graph import Graph
from qconvert.passes.adapter_slots import MERGE, filling
from qconvert.passes.untie_head import has_head
from qconvert.swapped import names_of_swapped

FILE = "adapter_model.safetensors"
SLOTS = (".lora_A.weight", ".lora_B.weight")


def refuse_swapping(graph: Graph, dialect: Dialect) -> None:
    """UnsupportedError where nothing would load the adapters, or they would change what was fixed without them."""
    if dialect.layouts == "mlx":
        raise UnsupportedError(f"--adapters swap: {dialect.name} is for mlx, whose adapters are not PEFT's", hint=MERGE)
    if isinstance(dialect, FixedRanges) and dialect.fixed is not None:
        raise UnsupportedError(f"--adapters swap: {dialect.name} fixes ranges, which each adapter changes", hint=MERGE)
    if not has_head(graph):
        raise UnsupportedError("--adapters swap: this model is an encoder", hint=MERGE)


def adapter_plans(graph: Graph, folder: Path) -> list[FilePlan]:
    """The two files of each adapter."""
    names, plans = names_of_swapped(graph), list[FilePlan]()
    for alias, values in filling(graph).items():
        keys, at = keys_of(graph, values), folder / names[alias]
        found = (stored(keys[slot], value, graph.nodes[value].type) for slot, value in values.items())
        tensors = tuple(s._replace(entry=s.entry._replace(name=f"{names[alias]}/{s.entry.name}")) for s in found)
        text = (json.dumps(config_of(graph, values, folder.name), indent=2, ensure_ascii=False) + "\n").encode()
        plans.append(FilePlan(at / CONFIG, text, (), len(text)))
        plans.append(file_plan(at, Shard(FILE, tensors), {"format": "pt"}))
    return plans


def keys_of(graph: Graph, values: Mapping[str, str]) -> dict[str, str]:
    """Slot -> its name in the file: of the module as the adapter that came in names it."""
    return {slot: f"{PREFIX}{module_of(graph, value)}{SLOTS[not slot.endswith(SLOTS[0])]}" for slot, value in values.items()}


def module_of(graph: Graph, value: str) -> str:
    """The module whose factor it is."""
    key = str(graph.root(value).attrs["tensor"]).partition("#")[2]
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def config_of(graph: Graph, values: Mapping[str, str], base: str) -> dict[str, object]:
    """adapter_config.json: every module by its whole name, alpha equal to its rank."""
    ranks = {module_of(graph, v): graph.nodes[v].type.dims[0] for slot, v in values.items() if slot.endswith(SLOTS[0])}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    turned = any(f"{slot.removesuffix(SLOTS[0])}.weight" in stored_transposed(graph) for slot in values)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": turned, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
