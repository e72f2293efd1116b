"""adapter_config.json and adapter weights that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import make_adapter, make_model
from safetensors.numpy import load_file, save_file

from abuses import Maker, hostile

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def made(folder: Path, text: str | None = None, **keys: Any) -> str:
    """MODEL+ADAPTER whose adapter_config.json has these keys, or is this text."""
    make_model(folder / "base")
    make_adapter(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(text if text is not None else json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")
    return f"{folder / 'base'}+{folder / 'adapter'}"


def named(name: str, keys: dict[str, Any]) -> Maker:
    def make(folder: Path) -> str:
        return made(folder, **keys)

    make.__name__, make.__module__ = name, __name__
    return make


VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "rank_of_zero": ("A has rank 8", {"r": 0}),
    "rank_that_is_negative": ("A has rank 8", {"r": -8}),
    "rank_that_is_huge": ("A has rank 8", {"r": 10**12}),
    "rank_beyond_a_double": ("of 401 digits", {"r": 10**400}),
    "rank_that_is_text": ("a number was wanted", {"r": "8"}),
    "alpha_that_is_not_a_number": ("a number was wanted", {"lora_alpha": float("nan")}),
    "alpha_that_is_infinite": ("a number was wanted", {"lora_alpha": float("inf")}),
    "alpha_beyond_a_double": ("of 401 digits", {"lora_alpha": 10**400}),
    "alpha_that_is_an_object": ("a number was wanted", {"lora_alpha": {}}),
    "alpha_beyond_a_float": ("overflows", {"lora_alpha": 1e300}),
    "pattern_that_never_ends": ("repeats within repeats", {"alpha_pattern": {"(a+)+\\d": 4, "(.*.*)*x": 2}}),
    "pattern_that_takes_long": ("repeats", {"rank_pattern": {".*.*.*.*.*.*.*.*x": 4}}),
    "pattern_that_is_none": ("is no regular expression", {"alpha_pattern": {"(": 4}}),
    "pattern_that_is_vast": ("is no regular expression", {"alpha_pattern": {"a{99999999999}": 4}}),
    "pattern_that_is_nested": ("is no regular expression", {"alpha_pattern": {"(" * 5000 + ")" * 5000: 4}}),
    "patterns_that_are_a_list": ("pattern -> number was wanted", {"rank_pattern": [1]}),
    "modules_to_save_that_is_a_number": ("a list of names was wanted", {"modules_to_save": 3}),
    "method_of_another_kind": ("is a LOHA adapter", {"peft_type": "LOHA"}),
    "method_that_is_a_list": ("adapter", {"peft_type": ["LORA"]}),
    "initialisation_that_is_an_object": ("init_lora_weights", {"init_lora_weights": {"a": []}}),
    "setting_from_the_future": ("is not supported", {"use_telepathy": True}),
}
for name, (words, keys) in VALUES.items():
    hostile(words)(named(name, keys))


@hostile("not valid JSON")
def config_cut_short(folder: Path) -> str:
    return made(folder, text='{"peft_type": "LO')


@hostile("not valid JSON")
def config_deeply_nested(folder: Path) -> str:
    return made(folder, text='{"a": ' + "[" * 200_000)


@hostile("a JSON object was wanted")
def config_that_is_a_list(folder: Path) -> str:
    return made(folder, text="[]")


@hostile("", harmless=True)
def base_that_leaves_the_folder(folder: Path) -> str:
    """What the adapter calls its base is shown, never opened."""
    return made(folder, base_model_name_or_path="../../../../etc/passwd")


@hostile("leads out of the folder")
def weights_that_are_a_link_elsewhere(folder: Path) -> str:
    source, path = made(folder), folder / "adapter" / "adapter_model.safetensors"
    path.rename(folder / "elsewhere.safetensors")
    path.symlink_to(folder / "elsewhere.safetensors")
    return source


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    source, path = made(folder), folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return source


@hostile("nan")
def factor_that_is_not_a_number(folder: Path) -> str:
    return changed(folder, lambda t: t.update({Q: np.full_like(t[Q], np.nan)}))


@hostile("partner lora_A")
def factor_without_its_partner(folder: Path) -> str:
    return changed(folder, lambda t: t.pop(Q))


@hostile("q_proj")
def factor_of_another_width(folder: Path) -> str:
    return changed(folder, lambda t: t.update({Q: np.zeros((8, 128), np.float32)}))


@hostile("matrices were wanted")
def factor_that_is_flat(folder: Path) -> str:
    return changed(folder, lambda t: t.update({Q: np.zeros(0, np.float32)}))
