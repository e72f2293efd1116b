"""What a user asks for, as said on the command line or to convert(): parsed, not yet looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Literal, NamedTuple

from qconvert.errors import UsageError
from qconvert.pipeline import Function, Pass
from qconvert.scheme import Device, ZeroPoint

Fallback = Literal["error", "warn", "allow"]
# options that limit an output: `gates` of a recipe
GATES = (
    "gate", "max_kl", "p999_kl", "min_top1", "max_ppl_ratio", "max_size", "max_bpw", "max_new_fallbacks", "require_verified",
    "baseline", "baseline_tolerance",
)  # fmt: skip


class AdapterSpec(NamedTuple):
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Request:
    """One conversion. Fields are named like the flags; None means: choose for me."""

    model: str
    adapters: tuple[AdapterSpec, ...] = ()
    to: str = "gguf"
    quant: str | None = None
    bits: int | None = None
    group: int | None = None
    zero_point: ZeroPoint | None = None
    solver: str | None = None  # name{option=value}: how codes are chosen
    accuracy_level: int | None = None
    form: str = "ort"  # of ONNX
    adapters_as: Literal["merge", "swap"] = "merge"
    operators: str | None = None
    calibrate: Path | None = None  # a text, or a folder of texts
    calibrate_tokens: int | None = None
    activation_range: str | None = None  # of fixed ranges of integers: mse, minmax, percentile:99.9
    imatrix: Path | None = None
    statistics: Path | None = None
    save_imatrix: Path | None = None
    save_statistics: Path | None = None
    no_data: Literal["search", "error"] = "search"
    eval: Path | None = None
    eval_tokens: int | None = None  # 0: quality is not measured
    target_size: str | None = None
    target_bpw: float | None = None
    gate: bool = False  # the type's default limits
    max_kl: float | None = None  # with a type a gate; without, the smallest file that keeps it
    p999_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    max_size: str | None = None
    max_bpw: float | None = None  # of the whole file
    max_new_fallbacks: int | None = None
    baseline: Path | None = None  # the last release's report
    baseline_tolerance: float = 0.05
    tokenizer: Path | None = None  # its folder, where it is not the model's
    output: Path | str | None = None  # text: a URL
    manifest: Path | None = None  # a file; SHA256SUMS lies beside it
    certify: bool = False
    target: str | None = None  # a name of qconvert.targets.TARGETS
    passes: tuple[Pass | Function | str | EllipsisType, ...] = (...,)
    inputs: Path | None = None  # .npz of an ONNX model's inputs
    dry_run: bool = False
    rehearse: bool = False  # the first layers alone; nothing is kept
    check: bool = True
    require_verified: bool = False
    force: bool = False
    threads: int | None = None
    dump_ir: Path | None = None
    allow_unused_adapter_keys: bool = False
    pooling: str | None = None  # of QA-LoRA adapters, a name of adapter_pooling.FACTORS
    refit_adapters: bool = False  # those that are swapped take up what quantization lost
    merge_base: str | None = None  # auto, original, dequantized
    trained_on: str | None = None  # what the base was when its adapters were trained: a name of merge_base.TRAINED
    allow_lossy: bool = False  # round what an adapter changed, though that may undo it
    fallback: Fallback = "warn"
    tensor_types: tuple[str, ...] = ()  # REGEX=TYPE
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    split_max_size: str | None = None
    card: bool = False  # README.md beside the output
    license: str | None = None  # that the card says, where what the output was made from does not
    modelfile: bool = False  # for Ollama
    layout: str | None = None
    weights_in: str | None = None
    offload_meta: str | None = None  # a device of placement.DEVICES, or cpu
    vram: str | None = None
    prefetch: int | None = None
    link_bandwidth: float | None = None  # GB/s
    memory_bandwidth: float | None = None
    pre_tokenizer: str | None = None
    device: Device = "cpu"  # that quantizes
    executor: Literal["threads", "ray"] = "threads"  # who evaluates the weights that are written
    places: Mapping[str, str] = field(default_factory=dict, compare=False)  # option -> recipe.yaml:7, where a recipe said it

    @property
    def keeps_graph(self) -> bool:
        """Whether the model is a file of a runtime's graph, of which the weights alone change."""
        return self.model.endswith(".onnx")

    @property
    def chooses_types(self) -> bool:
        """Whether each weight's type is chosen by what it costs."""
        by_kl = self.max_kl is not None and self.quant is None and self.bits is None
        return by_kl or self.target_size is not None or self.target_bpw is not None


def parse_model(text: str) -> tuple[str, tuple[AdapterSpec, ...]]:
    """`model+a:0.7+b` to model and adapters. A path that contains + and exists is taken whole."""
    if exists(text):
        return text, ()
    parts = [p.replace("\0", "+") for p in _keep_existing(text).split("+")]
    if not all(parts):
        raise UsageError(f"cannot read {text!r}: an empty name beside a +", hint="MODEL+ADAPTER[:WEIGHT]")
    return parts[0], tuple(parse_adapter(p) for p in parts[1:])


def _keep_existing(text: str) -> str:
    """Mark with NUL the + signs inside the longest leading or following paths that exist."""
    pieces, out, i = text.split("+"), [], 0
    while i < len(pieces):
        for j in range(len(pieces), i + 1, -1):
            candidate = "+".join(pieces[i:j])
            if exists(parse_adapter(candidate).path):
                out.append(candidate.replace("+", "\0"))
                i = j
                break
        else:
            out.append(pieces[i])
            i += 1
    return "+".join(out)


def exists(text: str) -> bool:
    """Whether it is a path; a text too long for one is none."""
    try:
        return Path(text).exists()
    except OSError:
        return False


def parse_adapter(text: str) -> AdapterSpec:
    """`path[:weight]`; a path that exists is taken whole."""
    m = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    if m and not exists(text):
        return AdapterSpec(m[1], float(m[2]))
    return AdapterSpec(text)


def parse_target(to: str, quant: str | None) -> tuple[str, str | None]:
    """`gguf:Q4_K_M` says format and type at once."""
    name, colon, kind = to.partition(":")
    if colon and quant and kind.lower() != quant.lower():
        raise UsageError(f"--to {to} and --quant {quant} disagree", hint="say the type once")
    return name.lower(), (kind if colon else quant)


def adapters_of(adapters: Sequence[str | AdapterSpec]) -> tuple[AdapterSpec, ...]:
    return tuple(a if isinstance(a, AdapterSpec) else parse_adapter(str(a)) for a in adapters)


def parse_nbytes(text: str) -> int:
    """500M, 2G, 1.5g: decimal units, as llama-gguf-split reads them. UsageError for anything else."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if not m or not 0 < float(m[1]) < 1e15:
        raise UsageError(f"cannot read {text!r} as a file size", hint="500M or 2G")
    return int(float(m[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[m[2]])
