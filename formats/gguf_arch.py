"""What llama.cpp must be told of a model, family by family, and what it cannot be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_kv import KV
from qconvert.formats.gguf_mix import Hyper
from qconvert.graph import Attr, Graph

Config = Mapping[str, Attr]


class Arch(NamedTuple):
    """permuted: q and k rows rotate as neighbours. activation: the only one that llama.cpp's graph of it has."""

    name: str
    permuted: bool = False
    activation: str = "silu"
    norm_key: str = "layer_norm_rms_epsilon"
    rotary: bool = True
    output_bias: bool = True  # the attention's output map may have a bias
    window_period: int | None = None  # the last layer of each period sees everything, the others a window
    layers_of_27b: int | None = None  # with that many, attention is scaled by width / heads, else by head_dim
    head: bool = True  # the output head may be another weight than the embedding


ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", permuted=True),
    "mistral": Arch("llama", permuted=True),
    "qwen2": Arch("qwen2"),
    "qwen3": Arch("qwen3", output_bias=False),
    "phi3": Arch("phi3"),
    "mixtral": Arch("llama", permuted=True),
    "qwen3-moe": Arch("qwen3moe", output_bias=False),
    "gemma2": Arch(
        "gemma2", activation="gelu_tanh", output_bias=False, window_period=2, layers_of_27b=46, head=False
    ),
    "gemma3": Arch("gemma3", activation="gelu_tanh", output_bias=False, window_period=6, layers_of_27b=62),
    "gpt2": Arch("gpt2", activation="gelu_tanh", norm_key="layer_norm_epsilon", rotary=False),
}


# our setting -> its key below the architecture's name; gguf_source reads by the same tables
KEYS: Mapping[str, str] = {
    "layers": "block_count",
    "context": "context_length",
    "width": "embedding_length",
    "ffn": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
}
CAPS: Mapping[str, str] = {"attn_softcap": "attn_logit_softcapping", "softcap": "final_logit_softcapping"}


class Description(NamedTuple):
    kvs: tuple[KV, ...]  # the first is general.architecture
    hyper: Hyper
    permuted: bool
    rope_factors: tuple[float, ...]  # rope_freqs.weight, which no checkpoint holds
    notes: tuple[str, ...]  # what GGUF cannot say, and what was done instead


def describe(graph: Graph) -> Description:
    """Key/values of the architecture. UnsupportedError where llama.cpp would compute something else."""
    family = str(graph.meta["family"])
    if family not in ARCHS:
        raise UnsupportedError(f"GGUF has no architecture for the family {family!r}", hint=f"it has {', '.join(ARCHS)}")
    arch, config = ARCHS[family], cast(Config, graph.meta["config"])
    if config.get("act") != arch.activation:
        raise UnsupportedError(f"llama.cpp's {arch.name} computes {arch.activation}, this model has {config.get('act')}")
    refuse_what_is_lost(arch, config)
    context, notes = context_length(graph, config, arch)
    values: list[tuple[str, str, object]] = [
        *((key, "u32", context if name == "context" else config[name]) for name, key in KEYS.items()),
        (f"attention.{arch.norm_key}", "f32", config["eps"]),
    ]
    factors: tuple[float, ...] = ()
    if arch.rotary:
        values += [
            ("attention.key_length", "u32", config["head_dim"]),
            ("attention.value_length", "u32", config["head_dim"]),
            ("rope.dimension_count", "u32", cast(Config, config["rope"]).get("dims", config["head_dim"])),
        ]
        scaling, factors = rope_keys(config)
        values += scaling
    values += window_keys(arch, config) + expert_keys(arch, config)
    for name, key in CAPS.items():
        if config.get(name) is not None:
            values.append((key, "f32", config[name]))
    if arch.name == "llama":
        values.append(("vocab_size", "u32", config["vocab"]))
    kvs = [KV("general.architecture", "str", arch.name), *(KV(f"{arch.name}.{k}", t, v) for k, t, v in values)]  # type: ignore[arg-type]
    experts = cast(int, config.get("experts", 0))
    hyper = Hyper(arch.name, _int(config, "layers"), _int(config, "heads"), _int(config, "kv_heads"), experts)
    return Description(tuple(kvs), hyper, arch.permuted, factors, tuple(notes))


def refuse_what_is_lost(arch: Arch, config: Config) -> None:
    """UnsupportedError for settings of the model that llama.cpp's graph of it has not, and no key can say."""
    if config.get("attention_bias") and not arch.output_bias:
        raise UnsupportedError(f"attention_bias: llama.cpp's {arch.name} has no bias on the attention's output")
    if not config.get("tied") and not arch.head:
        raise UnsupportedError(f"tie_word_embeddings = false: llama.cpp's {arch.name} has no output head of its own")
    if config.get("normalize_experts") is False:
        raise UnsupportedError(
            f"norm_topk_prob = false: llama.cpp's {arch.name} always divides the experts' shares by their sum"
        )
    if "expert_layers" in config and config["expert_layers"] != list(range(_int(config, "layers"))):
        raise UnsupportedError(
            f"mlp_only_layers, decoder_sparse_step: llama.cpp's {arch.name} has experts in every layer"
        )
    if arch.name == "gemma2" and (config.get("attn_softcap") is None or config.get("softcap") is None):
        raise UnsupportedError("attn_logit_softcapping, final_logit_softcapping: llama.cpp's gemma2 always has both")
    squared = attention_scalar(arch, config) if arch.rotary else 1
    scale = config.get("attn_scale", _int(config, "head_dim") ** -0.5 if arch.rotary else 1.0)
    assert isinstance(scale, float)
    if not math.isclose(scale, squared**-0.5):
        raise UnsupportedError(
            f"query_pre_attn_scalar = {scale**-2:.6g}: llama.cpp's {arch.name} of {config['layers']} layers has {squared}"
        )


def attention_scalar(arch: Arch, config: Config) -> int:
    """What llama.cpp divides scores by the root of."""
    large = arch.layers_of_27b == config["layers"]
    return _int(config, "width") // _int(config, "heads") if large else _int(config, "head_dim")


def window_keys(arch: Arch, config: Config) -> list[tuple[str, str, object]]:
    """The sliding window and the rope of its layers, where llama.cpp's graph has them. Which layers those are is fixed."""
    layers = config.get("window_layers", [])
    if arch.window_period is None or (not layers and arch.name == "gemma3"):
        return []
    if layers != [i for i in range(_int(config, "layers")) if (i + 1) % arch.window_period]:
        raise UnsupportedError(
            f"layer_types: llama.cpp's {arch.name} has a window in all layers but every {arch.window_period}th"
        )
    values: list[tuple[str, str, object]] = [("attention.sliding_window", "u32", config["window"])]
    if (rope := config.get("window_rope")) is not None:
        values.append(("rope.freq_base_swa", "f32", cast(Config, rope)["theta"]))
    return values


def expert_keys(arch: Arch, config: Config) -> list[tuple[str, str, object]]:
    if "experts" not in config:
        return []
    values: list[tuple[str, str, object]] = [
        ("expert_count", "u32", config["experts"]),
        ("expert_used_count", "u32", config["experts_used"]),
    ]
    if arch.name != "llama":
        values.append(("expert_feed_forward_length", "u32", config["expert_ffn"]))
    return values


def context_length(graph: Graph, config: Config, arch: Arch) -> tuple[int, list[str]]:
    """The longest text on which llama.cpp computes what the model does.

    Most of llama.cpp's graphs have no sliding window, and none has dynamic rope. Both change nothing up to a length,
    so that length is what the file declares.
    """
    context, notes = _int(config, "context"), []
    windows = [w for n in graph.nodes.values() if n.op == "attention" and isinstance(w := n.attrs.get("window"), int)]
    if windows and arch.window_period is None and min(windows) < context:
        context = min(windows)
        notes.append(f"sliding_window {context}: llama.cpp has none here, so context_length is {context}, where both agree")
    scaling = _scaling(config)
    if scaling.get("type") == "dynamic":
        original = scaling.get("original_context") or config["context"]
        assert isinstance(original, int)
        context = min(context, original)
        notes.append(f"dynamic rope scaling: llama.cpp has none, so context_length is {context}, where both agree")
    return context, notes


def rope_keys(config: Config) -> tuple[list[tuple[str, str, object]], tuple[float, ...]]:
    """rope.* key/values, and the factors of rope_freqs.weight where the scaling is by frequency (llama3)."""
    rope = cast(Config, config["rope"])
    scaling = _scaling(config)
    values: list[tuple[str, str, object]] = [("rope.freq_base", "f32", rope["theta"])]
    match scaling.get("type", "none"):
        case "none" | "default" | "dynamic":
            pass
        case "linear":
            values += [("rope.scaling.type", "str", "linear"), ("rope.scaling.factor", "f32", scaling["factor"])]
        case "yarn":
            values += yarn_keys(scaling, config)
        case "llama3":
            theta, head_dim = _float(rope, "theta"), _int(config, "head_dim")
            return values, tuple(llama3_factors(scaling, theta, head_dim))
        case other:
            raise UnsupportedError(
                f"llama.cpp has no rope scaling {other!r}", hint="linear, yarn, llama3 and dynamic are carried"
            )
    return values, ()


def yarn_keys(scaling: Config, config: Config) -> list[tuple[str, str, object]]:
    factor = _float(scaling, "factor")
    values: list[tuple[str, str, object]] = [
        ("rope.scaling.type", "str", "yarn"),
        ("rope.scaling.factor", "f32", factor),
        ("rope.scaling.original_context_length", "u32", scaling.get("original_context") or config["context"]),
    ]
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key) is not None:
            values.append((f"rope.scaling.yarn_{key}", "f32", scaling[key]))
    own = 0.1 * math.log(factor) + 1  # llama.cpp multiplies this in by itself
    wanted = scaling.get("attention_factor")
    if isinstance(wanted, int | float) and not math.isclose(wanted, own, rel_tol=1e-6):
        values.append(("rope.scaling.attn_factor", "f32", wanted / own))
    if scaling.get("truncate") is False:
        raise UnsupportedError("rope scaling yarn with truncate=false: llama.cpp always rounds the ramp's ends")
    return values


def llama3_factors(scaling: Config, theta: float, head_dim: int) -> list[float]:
    """What each rotary frequency is divided by. Source: transformers, modeling_rope_utils (llama3)."""
    factor, low, high = (_float(scaling, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _float(scaling, "original_context")
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out


def _scaling(config: Config) -> Config:
    rope = config.get("rope")
    scaling = rope.get("scaling") if isinstance(rope, dict) else None
    return scaling if isinstance(scaling, dict) else {}


def _int(config: Config, key: str) -> int:
    value = config[key]
    assert isinstance(value, int), key
    return value


def _float(config: Config, key: str) -> float:
    value = config[key]
    assert isinstance(value, int | float), key
    return float(value)
