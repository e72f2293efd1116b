"""What config.json says of a model, read by its family's table: each key is used, known to change nothing, or an error.

llama.cpp's converter and transformers both ignore keys that they do not know; a model that needs one is then silently
another model. Here such a key is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from qconvert.config_reader import Reader, positive
from qconvert.errors import InputError, UnsupportedError
from qconvert.families import Family
from qconvert.graph import Attr

MAX_LAYERS = 10_000  # more is a damaged file, not a model
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

# What each scaling needs, and what else it reads. Source: transformers 5.23, modeling_rope_utils.py
ROPE_SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
# transformers ignores these where the type does not read them
ROPE_HARMLESS = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned"} | {
    k for keys in ROPE_SCALINGS.values() for k in keys[0] + keys[1]
}


class Experts(NamedTuple):
    """A mixture of experts: how many there are, how many a token takes, and in which layers."""

    n: int
    used: int
    ffn: int
    normalize: bool  # the taken experts' shares add up to 1
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """A model's numbers under our names. windows: each layer's sliding window; None sees everything before it."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    eps: float
    act: str
    tied: bool
    rope: dict[str, Attr] | None
    window_rope: dict[str, Attr] | None  # of layers with a window, where it is another
    windows: tuple[int | None, ...]
    attn_scale: float
    attn_softcap: float | None
    softcap: float | None  # of the logits
    experts: Experts | None
    token_types: int | None  # kinds of text that a token may be of
    flags: Mapping[str, bool]  # attention_bias, mlp_bias …
    used: tuple[str, ...]  # keys of config.json
    dropped: Mapping[str, str]  # key -> why it changes nothing

    def meta(self) -> dict[str, Attr]:
        """As graph.meta["config"] holds it; window and window_layers are there only where a layer has a window."""
        names = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "eps", "act", "tied")
        out: dict[str, Attr] = {name: getattr(self, name) for name in names} | dict(self.flags)
        if self.rope is not None:
            out["rope"] = self.rope
        if self.window_rope is not None:
            out["window_rope"] = self.window_rope
        if not math.isclose(self.attn_scale, self.head_dim**-0.5):
            out["attn_scale"] = self.attn_scale
        out |= {k: v for k in ("attn_softcap", "softcap") if (v := getattr(self, k)) is not None}
        if self.experts is not None:
            e = self.experts
            out |= {"experts": e.n, "experts_used": e.used, "expert_ffn": e.ffn, "normalize_experts": e.normalize}
            out["expert_layers"] = list(e.layers)
        if self.token_types is not None:
            out["token_types"] = self.token_types
        layers: list[Attr] = [i for i, w in enumerate(self.windows) if w is not None]
        if layers:
            out |= {"window": max(w for w in self.windows if w is not None), "window_layers": layers}
        return out


def read_settings(family: Family, config: Mapping[str, object], where: str) -> Settings:
    """InputError for a key that is missing, malformed or unknown; UnsupportedError for a value that no graph has."""
    reader = Reader(family, config, where)
    layers, width, heads = (reader.count(name) for name in ("layers", "width", "heads"))
    if layers > MAX_LAYERS:
        raise reader.wrong(reader.key("layers"), f"at most {MAX_LAYERS}")
    kv_heads = reader.count("kv_heads", heads)
    head_dim = reader.count("head_dim", 0) or _quotient(width, heads, where)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} heads do not divide into {kv_heads} key/value heads")
    context = reader.count("context")
    rope, window_rope = _ropes(reader, context) if family.position == "rope" else (None, None)
    if rope and head_dim % 2:
        raise UnsupportedError(f"{where}: rope rotates pairs of values, and head_dim {head_dim} is odd")
    windows = _windows(reader, layers)
    ffn = reader.count("ffn", 4 * width)
    return Settings(
        layers, width, heads, kv_heads, head_dim,
        ffn=ffn, vocab=reader.count("vocab"), context=context, eps=reader.number("eps"),
        act=reader.activation(),
        tied="tied" in family.config and reader.flag("tied"), rope=rope, window_rope=window_rope, windows=windows,
        attn_scale=(reader.optional("attn_scalar") or head_dim) ** -0.5,
        attn_softcap=reader.optional("attn_softcap"), softcap=reader.optional("softcap"),
        experts=_experts(reader, layers, ffn) if "experts" in family.config else None,
        token_types=reader.count("token_types") if "token_types" in family.config else None,
        flags={name: reader.flag(name) for name in dict.fromkeys(family.biases.values()) if isinstance(name, str)},
        used=tuple(sorted(reader.used)), dropped=reader.rest(),
    )  # fmt: skip


def _quotient(width: int, heads: int, where: str) -> int:
    if width % heads:
        raise InputError(f"{where}: hidden_size {width} does not divide into {heads} heads, and head_dim is not given")
    return width // heads


def _experts(reader: Reader, layers: int, ffn: int) -> Experts:
    n, used = reader.count("experts"), reader.count("experts_used")
    if used > n:
        raise InputError(f"{reader.where}: {reader.key('experts_used')} = {used}, but there are {n} experts")
    normalize = reader.flag("normalize_experts") if "normalize_experts" in reader.family.config else True
    dense = reader.value("dense_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise reader.wrong(reader.key("dense_layers"), "a list of layers")
    step = reader.count("sparse_step", 1)
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    return Experts(n, used, reader.count("expert_ffn", ffn), normalize, sparse)


def _windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, as transformers decides it."""
    if reader.family.windows == "none":
        kinds = _layer_types(reader, layers)
        if kinds and "sliding_attention" in kinds:
            raise UnsupportedError(f"{reader.where}: layer_types has sliding_attention, {reader.family.name} has not")
        return (None,) * layers
    window: int | None = reader.count("window", 0) or None
    first = 0
    if "use_window" in reader.family.config and not reader.flag("use_window"):
        window = None
    if reader.family.windows == "by_layer":
        first = reader.index("first_window_layer")
    sliding = [window is not None and i >= first for i in range(layers)]
    if reader.family.windows == "pattern":
        period = reader.count("window_period", 2)  # the last layer of each period sees everything
        sliding = [(i + 1) % period > 0 for i in range(layers)]
    kinds = _layer_types(reader, layers)
    if kinds is not None:
        listed = [kind == "sliding_attention" for kind in kinds]
        if (any(listed) and window is None) or (reader.family.windows == "all" and listed != sliding):
            raise InputError(
                f"{reader.where}: layer_types and {reader.key('window')} = {window} contradict each other",
                hint="list full_attention for every layer where there is no window",
            )
        sliding = listed
    if any(sliding) and window is None:
        raise InputError(f"{reader.where}: has layers with a sliding window, but no {reader.key('window')}")
    return tuple(window if s else None for s in sliding)


def _layer_types(reader: Reader, layers: int) -> list[str] | None:
    reader.used |= {"layer_types"} & reader.config.keys()
    kinds = reader.config.get("layer_types")
    if kinds is None:
        return None
    reader.used |= {"_sliding_window_pattern"} & reader.config.keys()  # transformers 5 writes both, and reads the list
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise reader.wrong("layer_types", f"a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            hint = "full_attention and sliding_attention are"
            raise UnsupportedError(f"{reader.where}: layer_types: {kind!r} is not supported", hint=hint)
    return cast(list[str], kinds)


Rope = dict[str, Attr]  # {"theta", "scaling"?: {"type", "factor", "original_context", ...}}


def _ropes(reader: Reader, context: int) -> tuple[Rope, Rope | None]:
    """The rope of all layers, and of those with a window where they have their own; transformers 4's spelling or 5's."""
    config, family = reader.config, reader.family
    reader.used |= {k for k in ROPE_KEYS if k in config}
    if family.window_theta is None:
        given = [config.get("rope_scaling"), config.get("rope_parameters"), {"rope_theta": config.get("rope_theta")}]
        return _rope(reader, given, family.theta, context), None
    kinds = config.get("rope_parameters") or {}
    if not isinstance(kinds, dict) or not kinds.keys() <= {"full_attention", "sliding_attention"}:
        hint = "full_attention and sliding_attention have a set each"
        raise UnsupportedError(f"{reader.where}: rope_parameters = {kinds!r} is not supported", hint=hint)
    reader.used |= {"rope_local_base_freq"} & config.keys()
    given = [kinds.get("full_attention"), config.get("rope_scaling"), {"rope_theta": config.get("rope_theta")}]
    local = [kinds.get("sliding_attention"), {"rope_theta": config.get("rope_local_base_freq")}]
    return _rope(reader, given, family.theta, context), _rope(reader, local, family.window_theta, context)


def _rope(reader: Reader, parts: list[object], default_theta: float, context: int) -> Rope:
    where = reader.where
    given = [p for p in parts if p]
    if any(not isinstance(p, dict) or any(isinstance(v, dict) for v in p.values()) for p in given):
        raise UnsupportedError(f"{where}: rope_parameters = {given[0]!r}: one set for all layers is supported")
    params: dict[str, object] = {}
    for part in given:
        for k, value in cast(dict[str, object], part).items():
            if value is None:
                continue
            if params.setdefault(k, value) != value:
                raise InputError(f"{where}: {k} is both {params[k]!r} and {value!r}")
    kind = params.get("rope_type", params.get("type", "default"))
    if params.get("type", kind) != kind:
        raise InputError(f"{where}: rope_type is {kind!r}, but type is {params['type']!r}")
    theta = positive(reader, params.get("rope_theta", default_theta), "rope_theta")
    known = ("default", *(ROPE_SCALINGS if reader.family.rope_types is None else reader.family.rope_types))
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"{where}: rope scaling {kind!r} is not supported", hint=f"known here: {', '.join(known)}")
    for k, value in params.items():
        if k not in ROPE_HARMLESS and not (k == "partial_rotary_factor" and value == 1):
            raise UnsupportedError(f"{where}: {k} = {value!r} in the rope settings is not supported")
    if kind == "default":
        return {"theta": theta}
    return {"theta": theta, "scaling": _scaling(reader, kind, params, context)}


def _scaling(reader: Reader, kind: str, params: Mapping[str, object], context: int) -> dict[str, Attr]:
    needs, reads = ROPE_SCALINGS[kind]
    for k in needs:
        if k not in params:
            raise InputError(f"{reader.where}: rope scaling {kind!r} has no {k}")
    out: dict[str, Attr] = {"type": kind}
    for k in (*needs, *reads):
        if k == "truncate":
            if params.get(k, True) is not True:
                out[k] = False
        elif k in params:
            out[k] = positive(reader, params[k], k)
    original = reader.config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    if kind in ("yarn", "llama3", "dynamic"):
        original = context if kind == "dynamic" else original or context
        out["original_context"] = int(positive(reader, original, "original_max_position_embeddings"))
    return _yarn(out, context) if kind == "yarn" else out


def _yarn(scaling: dict[str, Attr], context: int) -> dict[str, Attr]:
    """factor from the contexts where it is not given; attention_factor from mscale and mscale_all_dim (DeepSeek's)."""
    original = cast(int, scaling["original_context"])
    factor = cast(float, scaling.setdefault("factor", context / original))
    mscale, all_dim = (cast(float | None, scaling.pop(k, None)) for k in ("mscale", "mscale_all_dim"))
    if "attention_factor" not in scaling and mscale and all_dim and factor > 1:
        log = 0.1 * math.log(factor)
        scaling["attention_factor"] = (mscale * log + 1) / (all_dim * log + 1)
    return scaling
