"""adapter_config.json: which settings change the result, and what each module's rank and alpha are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from qconvert.errors import AdapterError, Place, UnsupportedError, located
from qconvert.patterns import matcher
from qconvert.sources import read_json

CONFIG = "adapter_config.json"

# Keys that change the result, each read below.
CONSUMED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "target_modules",
    "layers_to_transform", "exclude_modules", "base_model_name_or_path", "revision", "use_qalora", "qalora_group_size",
}  # fmt: skip
# Keys that do not change what a saved adapter computes.
HARMLESS = {
    "auto_mapping": "which class trained it",
    "bias": "the saved biases are in the file",
    "corda_config": "only read with init_lora_weights",
    "eva_config": "only read with init_lora_weights",
    "fan_in_fan_out": "how the base stores its weight, which the model's family knows",
    "inference_mode": "whether it trains",
    "layers_pattern": "the layers are named in the file",
    "loftq_config": "only read with init_lora_weights",
    "lora_dropout": "off outside training",
    "lora_ga_config": "only read with init_lora_weights",
    "megatron_core": "only read with megatron_config",
    "peft_version": "who wrote it",
    "runtime_config": "how it is executed",
    "task_type": "a head for another task has tensors of its own",
    "velora_config": "changes the backward pass only",
}
# Initialisations that leave the base weights as they are.
PLAIN_INITS = ("gaussian", "orthogonal", "mica")
MUTATING_INITS = {
    "loftq": "trained on a base that LoftQ had quantized, whose error the adapter corrects",
    "pissa": "trained on a base from which the adapter's initial part had been subtracted",
    "olora": "trained on a base from which the adapter's initial part had been subtracted",
    "corda": "trained on a base from which the adapter's initial part had been subtracted",
    "lora_ga": "trained on a base from which the adapter's initial part had been subtracted",
    "eva": "started from the base's activations; nothing here says that its base was left as it was (PEFT leaves it)",
}


def read_config(folder: Path, own_base: bool = False) -> dict[str, object]:
    """adapter_config.json, refused where something in it would change the result and is not understood.

    own_base: the model that it is read for is the one that it was trained on.
    """
    if not (folder / CONFIG).is_file():
        whole = (folder / "config.json").is_file()
        hint = "this is a whole model, not an adapter" if whole else "PEFT's save_pretrained writes such a folder"
        raise AdapterError(f"{folder}: has no {CONFIG}", hint=hint)
    config = read_json(folder / CONFIG)
    with located(Place(str(folder / CONFIG), key="peft_type")):
        _check_keys(folder, config)
    with located(Place(str(folder / CONFIG), key="init_lora_weights")):
        if not own_base:
            _check_init(folder, config.get("init_lora_weights", True))
    return config


def _check_keys(folder: Path, config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{folder}: is a {kind} adapter; LoRA is supported, with rsLoRA, DoRA, modules_to_save and trained tokens",
            hint="merge it with PEFT (merge_and_unload) and convert the result",
        )
    for key, value in config.items():
        if key not in CONSUMED and key not in HARMLESS and value:
            raise UnsupportedError(
                f"{folder}/{CONFIG}: {key} = {str(value)[:80]} is not supported and may change the result",
                hint="merge it with PEFT (merge_and_unload) and convert the result",
                place=Place(str(folder / CONFIG), key=key),
            )


def _check_init(folder: Path, init: object) -> None:
    if init is None or isinstance(init, bool) or init in PLAIN_INITS:
        return
    name = str(init).lower()
    reason = next((why for key, why in MUTATING_INITS.items() if name.startswith(key)), "unknown: its base may differ")
    raise AdapterError(
        f"{folder}: init_lora_weights is {init!r}: {reason}; on the unmodified base it would be silently wrong",
        hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it; where MODEL is the "
        f"base that it left, --trained-on model; where that was unmodified, init_lora_weights = true in {CONFIG}",
    )


def kind_of(config: Mapping[str, object]) -> str:
    flags = (("qalora", "use_qalora"), ("dora", "use_dora"), ("rslora", "use_rslora"))
    return "+".join(name for name, key in flags if config.get(key)) or "lora"


def text_of(config: Mapping[str, object], key: str) -> str | None:
    value = config.get(key)
    return str(value) if value else None


def names_of(config: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = config.get(key) or ()
    if isinstance(value, list | tuple):
        return tuple(map(str, value))
    raise AdapterError(f"{CONFIG}: {key}: a list of names was wanted, not {str(value)[:80]}")


def pattern_value(patterns: object, module: str, default: object, what: str) -> float:
    """rank_pattern or alpha_pattern for a module: the first key that matches it whole or after a dot, as in PEFT."""
    value = default
    if patterns is not None and not isinstance(patterns, Mapping):
        raise AdapterError(f"{CONFIG}: {what}_pattern: pattern -> number was wanted, not {str(patterns)[:80]}")
    for pattern, each in (patterns or {}).items():
        try:
            matches = matcher(pattern).match(module)
        except (re.error, OverflowError, RecursionError) as e:
            raise AdapterError(f"{CONFIG}: {what}_pattern: {pattern!r} is no regular expression: {e}") from e
        if matches:
            value = each
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{CONFIG}: the {what} of {module} is {value!r}; a number was wanted")
    return value


def in_modules_to_save(names: tuple[str, ...], parameter: str) -> bool:
    """Whether a parameter lies in a module that modules_to_save names, by PEFT's rule: the path ends with the name."""
    parts = parameter.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(name) for path in paths for name in names)
