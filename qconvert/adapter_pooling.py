"""QA-LoRA: an adapter that reads groups of inputs pooled to one number each, A[r,K/g]. What "pooled" means is convention.

    y = W x + scale * B A P(x),  P(x) = k * the sum of each g inputs

Sources: PEFT 0.21, tuners/lora/variants.py; yuhuixu1993/qa-lora, peft_utils.py and merge.py; arXiv 2309.14717, algorithm 1;
htqin/IR-QLoRA, "integer quantizer".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from qconvert.adapter_config import CONFIG
from qconvert.errors import AdapterError, UnsupportedError, UsageError
from qconvert.sources import TensorInfo

# convention -> k of groups of g inputs out of K
FACTORS: Mapping[str, Callable[[int, int], float]] = {
    "peft": lambda g, k: k / g / g,  # the mean, times how many groups there are
    "repo": lambda g, k: 1 / g,  # the mean
    "paper": lambda g, k: 1.0,  # the sum
    "sum": lambda g, k: 1.0,  # the same: the mean, times g
}
# IR-QLoRA's elastic connections: what multiplies the means of inputs beside A, the ranks beside B
ELASTIC = ("lora_default_A_scale", "lora_default_B_scale")


class Pooled(NamedTuple):
    """convention: a key of FACTORS; group: how many inputs, where the config says so; elastic: numbers of ELASTIC, [1]."""

    convention: str
    group: int | None = None
    elastic: tuple[TensorInfo, ...] = ()


def pooled_of(
    folder: Path, config: Mapping[str, object], module: str, parts: Mapping[str, TensorInfo], told: str | None
) -> Pooled | None:
    """How a module's inputs are pooled; None for a plain LoRA. told: the user's word.

    UsageError where the config says another thing; UnsupportedError for what cannot be pooled.
    """
    elastic = tuple(parts[name] for name in ELASTIC if name in parts)
    if len(elastic) == 1:
        raise AdapterError(f"{elastic[0].ref}: its partner of {module} is missing", hint="the file is incomplete")
    own = "peft" if config.get("use_qalora") else "sum" if elastic else None
    if told is not None and told not in FACTORS:
        raise UsageError(f"--pooling {told}: there are {', '.join(FACTORS)}")
    if own and told and FACTORS[own] is not FACTORS[told] and {own, told} != {"sum", "paper"}:
        what = "use_qalora, which is PEFT's own" if own == "peft" else "IR-QLoRA's scales, which go with sums"
        raise UsageError(f"--pooling {told}: {folder} has {what}", hint="leave --pooling out")
    convention = told or own
    if convention is None:
        return None
    if "lora_embedding_A" in parts:
        raise UnsupportedError(f"{folder}: {module} is an embedding: the groups of QA-LoRA lie along inputs (v)")
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise UnsupportedError(
                f"{folder}: QA-LoRA with {key}: what it adds is not one number for each group (iv)",
                hint="PEFT computes no such adapter either",
            )
    group = config.get("qalora_group_size", 16) if own == "peft" else None
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise AdapterError(f"{folder}/{CONFIG}: qalora_group_size is {group!r}; a whole number was wanted")
    return Pooled(convention, group, elastic)
