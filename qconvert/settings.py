"""What config.json says of a model, read by its family's table: each key is used, known to change nothing, or an error.

llama.cpp's converter and transformers both ignore keys that they do not know; a model that needs one is then silently
another model. Here such a key is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from qconvert.errors import InputError, UnsupportedError
from qconvert.families import REQUIRED, Family
from qconvert.graph import Attr

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


def _reasons(**keys: str) -> dict[str, str]:
    return {key: reason.replace("_", " ") for reason, text in keys.items() for key in text.split()}


# Keys of transformers' configuration classes (4.x and 5.23) and of fine-tuning tools that change no logits.
HARMLESS: Mapping[str, str] = _reasons(
    for_training_only="initializer_range attention_dropout hidden_dropout activation_dropout dropout "
    "classifier_dropout attn_pdrop resid_pdrop embd_pdrop summary_first_dropout gradient_checkpointing",
    says_which_program_wrote_it="transformers_version _name_or_path name_or_path _commit_hash unsloth_version "
    "unsloth_fixed unsloth_tiled_mlp",
    every_tensor_carries_its_own="torch_dtype dtype use_bfloat16",
    chooses_an_implementation="attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _experts_implementation _experts_implementation_internal _flash_attn_2_enabled "
    "torchscript use_cache tf_legacy_loss chunk_size_feed_forward",
    chooses_what_else_is_returned="return_dict output_hidden_states output_attentions tie_last_hidden_states",
    for_the_tokenizer="bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id "
    "decoder_start_token_id prefix tokenizer_class model_max_length max_sequence_length",
    for_other_tasks="id2label label2id num_labels problem_type finetuning_task task_specific_params summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels is_decoder",
    for_generation="max_length max_new_tokens min_length do_sample early_stopping num_beams temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff "
    "eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind num_beam_groups diversity_penalty",
    a_copy_of_n_positions="n_ctx",
)

# Keys that are understood at these values only; null is always one of them. Families add their own.
NEUTRAL: Mapping[str, tuple[Attr, ...]] = {
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "quantization_config": ({},),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
}
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
    windows: tuple[int | None, ...]
    flags: Mapping[str, bool]  # attention_bias, mlp_bias …
    used: tuple[str, ...]  # keys of config.json
    dropped: Mapping[str, str]  # key -> why it changes nothing

    def meta(self) -> dict[str, Attr]:
        """As graph.meta["config"] holds it; window and window_layers are there only where a layer has a window."""
        names = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "eps", "act", "tied")
        out: dict[str, Attr] = {name: getattr(self, name) for name in names} | dict(self.flags)
        if self.rope is not None:
            out["rope"] = self.rope
        layers: list[Attr] = [i for i, w in enumerate(self.windows) if w is not None]
        if layers:
            out |= {"window": max(w for w in self.windows if w is not None), "window_layers": layers}
        return out


def read_settings(family: Family, config: Mapping[str, object], where: str) -> Settings:
    """InputError for a key that is missing, malformed or unknown; UnsupportedError for a value that no graph has."""
    reader = _Reader(family, config, where)
    layers, width, heads = (reader.count(name) for name in ("layers", "width", "heads"))
    if layers > MAX_LAYERS:
        raise reader.wrong(reader.key("layers"), f"at most {MAX_LAYERS}")
    kv_heads = reader.count("kv_heads", heads)
    head_dim = reader.count("head_dim", 0) or _quotient(width, heads, where)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} heads do not divide into {kv_heads} key/value heads")
    context = reader.count("context")
    rope = _rope(reader, context) if family.position == "rope" else None
    if rope and head_dim % 2:
        raise UnsupportedError(f"{where}: rope rotates pairs of values, and head_dim {head_dim} is odd")
    windows = _windows(reader, layers)
    return Settings(
        layers, width, heads, kv_heads, head_dim,
        ffn=reader.count("ffn", 4 * width), vocab=reader.count("vocab"), context=context, eps=reader.number("eps"),
        act=reader.activation(), tied=reader.flag("tied"), rope=rope, windows=windows,
        flags={name: reader.flag(name) for name in dict.fromkeys(family.biases.values()) if isinstance(name, str)},
        used=tuple(sorted(reader.used)), dropped=reader.rest(),
    )  # fmt: skip


def _quotient(width: int, heads: int, where: str) -> int:
    if width % heads:
        raise InputError(f"{where}: hidden_size {width} does not divide into {heads} heads, and head_dim is not given")
    return width // heads


class _Reader:
    """config.json by our names; remembers which keys were used."""

    def __init__(self, family: Family, config: Mapping[str, object], where: str) -> None:
        self.family, self.config, self.where = family, config, where
        self.used: set[str] = {"architectures", "model_type"} & config.keys()

    def value(self, name: str) -> object:
        """The setting `name`, its default where config.json has none, None where the family has none."""
        if name not in self.family.config:
            return None
        spellings, default = self.family.config[name]
        found = [k for k in spellings if k in self.config]
        self.used |= set(found)
        for other in found[1:]:
            if self.config[other] != self.config[found[0]]:
                raise self.wrong(other, f"the same as {found[0]} = {self.config[found[0]]!r}")
        if not found and default is REQUIRED:
            raise InputError(f"{self.where}: has no {spellings[0]}", hint="is the file complete?")
        return self.config[found[0]] if found else default

    def key(self, name: str) -> str:
        spellings = self.family.config[name].spellings
        return next((k for k in spellings if k in self.config), spellings[0])

    def wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.where}: {key} = {self.config[key]!r}; {wanted} was wanted")

    def count(self, name: str, otherwise: int | None = None) -> int:
        """A positive whole number; `otherwise` where it is null or the family does not have it."""
        value = self.value(name)
        if value is None and otherwise is not None:
            return otherwise
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(self.key(name), "a positive whole number")
        return value

    def index(self, name: str) -> int:
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(self.key(name), "a whole number")
        return value

    def number(self, name: str) -> float:
        return _positive(self, self.value(name), self.key(name))

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.wrong(self.key(name), "true or false")
        return value

    def activation(self) -> str:
        value = self.value("act")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            message = f"{self.where}: {self.key('act')} = {value!r} is not supported"
            raise UnsupportedError(message, hint=f"there are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def rest(self) -> dict[str, str]:
        """Keys that were not used and why they need not be. An error for the first of which that is not known."""
        dropped = {}
        for k, value in self.config.items():
            if k not in self.used:
                dropped[k] = self._reason(k, value)
        return dropped

    def _reason(self, key: str, value: object) -> str:
        if value is None:
            return "null"
        if key in HARMLESS:
            return HARMLESS[key]
        if key == "auto_map" and isinstance(value, dict) and not any("Model" in k for k in value):
            return "code is never run, and the model needs none"
        neutral = {**NEUTRAL, **self.family.neutral}
        if key not in neutral:
            raise InputError(
                f"{self.where}: {key} = {str(value)[:80]} is a setting that {self.family.name} models do not have; "
                "it may change what this one computes",
                hint=f"if the model is a plain {self.family.name}, remove the key from config.json",
            )
        if value not in neutral[key]:
            raise UnsupportedError(
                f"{self.where}: {key} = {str(value)[:80]} is not supported for {self.family.name}",
                hint=f"{key} = {neutral[key][0]} is",
            )
        return "has no effect at this value"


def _positive(reader: _Reader, value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{reader.where}: {key} = {value!r}; a positive number was wanted")
    return float(value)


def _windows(reader: _Reader, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, as transformers decides it."""
    if reader.family.windows == "none":
        kinds = _layer_types(reader, layers)
        if kinds and "sliding_attention" in kinds:
            raise UnsupportedError(f"{reader.where}: layer_types has sliding_attention, {reader.family.name} has not")
        return (None,) * layers
    window: int | None = reader.count("window", 0) or None
    first = 0
    if reader.family.windows == "by_layer":
        window = window if reader.flag("use_window") else None
        first = reader.index("first_window_layer")
    sliding = [window is not None and i >= first for i in range(layers)]
    kinds = _layer_types(reader, layers)
    if kinds is not None:
        listed = [kind == "sliding_attention" for kind in kinds]
        if (any(listed) and window is None) or (reader.family.windows == "all" and listed != sliding):
            raise InputError(
                f"{reader.where}: layer_types and {reader.key('window')} = {window} contradict each other",
                hint="list full_attention for every layer where there is no window",
            )
        sliding = listed
    return tuple(window if s else None for s in sliding)


def _layer_types(reader: _Reader, layers: int) -> list[str] | None:
    reader.used |= {"layer_types"} & reader.config.keys()
    kinds = reader.config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise reader.wrong("layer_types", f"a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            hint = "full_attention and sliding_attention are"
            raise UnsupportedError(f"{reader.where}: layer_types: {kind!r} is not supported", hint=hint)
    return cast(list[str], kinds)


def _rope(reader: _Reader, context: int) -> dict[str, Attr]:
    """{"theta", "scaling"?: {"type", "factor", "original_context", ...}} from transformers 4's spelling or 5's."""
    config, where = reader.config, reader.where
    reader.used |= {k for k in ROPE_KEYS if k in config}
    given = [config[k] for k in ("rope_scaling", "rope_parameters") if config.get(k)]
    if any(not isinstance(p, dict) or any(isinstance(v, dict) for v in p.values()) for p in given):
        raise UnsupportedError(f"{where}: rope_parameters = {given[0]!r}: one set for all layers is supported")
    params: dict[str, object] = {}
    for part in (*given, {"rope_theta": config.get("rope_theta")}):
        for k, value in cast(dict[str, object], part).items():
            if value is None:
                continue
            if params.setdefault(k, value) != value:
                raise InputError(f"{where}: {k} is both {params[k]!r} and {value!r}")
    kind = params.get("rope_type", params.get("type", "default"))
    if params.get("type", kind) != kind:
        raise InputError(f"{where}: rope_type is {kind!r}, but type is {params['type']!r}")
    theta = _positive(reader, params.get("rope_theta", 10000.0), "rope_theta")
    if not isinstance(kind, str) or kind not in ("default", *ROPE_SCALINGS):
        raise UnsupportedError(
            f"{where}: rope scaling {kind!r} is not supported", hint=f"there are default, {', '.join(ROPE_SCALINGS)}"
        )
    for k, value in params.items():
        if k not in ROPE_HARMLESS and not (k == "partial_rotary_factor" and value == 1):
            raise UnsupportedError(f"{where}: {k} = {value!r} in the rope settings is not supported")
    if kind == "default":
        return {"theta": theta}
    return {"theta": theta, "scaling": _scaling(reader, kind, params, context)}


def _scaling(reader: _Reader, kind: str, params: Mapping[str, object], context: int) -> dict[str, Attr]:
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
            out[k] = _positive(reader, params[k], k)
    original = reader.config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    if kind in ("yarn", "llama3", "dynamic"):
        original = context if kind == "dynamic" else original or context
        out["original_context"] = int(_positive(reader, original, "original_max_position_embeddings"))
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
