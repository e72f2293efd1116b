"""Model families as tables: the names of their tensors by role, the keys of their config.json, a few switches.

build.py has the one block builder that reads them; settings.py reads a config.json by them. A new family is a new row.
Roles are GGUF's stem names. Defaults are those of transformers 5.23's configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeVar, cast

from qconvert import registry
from qconvert.errors import InputError, UnsupportedError
from qconvert.graph import Attr

T = TypeVar("T")
REQUIRED: Final = "required"


class Key(NamedTuple):
    """Where a setting stands in config.json: its spellings, and its value where the file does not say."""

    spellings: tuple[str, ...]
    default: Attr = REQUIRED


def key(*spellings: str, default: Attr = REQUIRED) -> Key:
    return Key(spellings, default)


def table(**items: T) -> Mapping[str, T]:
    return MappingProxyType(items)


@dataclass(frozen=True)
class Family:
    name: str
    model_type: str
    hf: tuple[str, ...]  # `architectures` in config.json; the first is the one with a head
    prefix: str  # of all tensors but the head, in a checkpoint that has a head
    names: Mapping[str, str]  # role -> module, {i} is the layer, {e} the expert
    config: Mapping[str, Key]  # our name -> key of config.json
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    mlp: Literal["gated", "plain"] = "gated"
    position: Literal["rope", "learned"] = "rope"
    fused_qkv: bool = False
    fused_mlp: bool = False  # gate and up are one linear
    rope_types: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3")  # scalings of rope that are known here
    partial_rope: bool = False  # config.json may say that only a part of each head rotates
    causal: bool = True  # a token sees only those before it
    qk_norm: bool = False  # q and k are normed, each head by itself, before they rotate
    biases: Mapping[str, str | bool] = field(default_factory=dict)  # role -> always, or where this setting is true
    stored_transposed: frozenset[str] = frozenset()  # roles of weights that lie as [in, out]
    norm_offset: float = 0.0  # what is added to the stored weights of norms
    scaled_embedding: bool = False  # tokens' vectors are multiplied by sqrt(width)
    windows: Literal["none", "all", "by_layer", "pattern"] = "none"  # which layers have a sliding window
    theta: float = 10000.0  # of rope, where config.json has none
    window_theta: float | None = None  # the same for layers with a window, where they have a rope of their own
    neutral: Mapping[str, tuple[Attr, ...]] = field(default_factory=dict)  # keys understood at these values only
    harmless: Mapping[str, str] = field(default_factory=dict)  # keys that transformers does not read here, and why
    ignorable: Mapping[str, str] = field(default_factory=dict)  # tensors (a regex) that hold nothing learned, and why

    renamed: tuple[tuple[str, str], ...] = ()  # parts of names, and what other checkpoints have in their place
    trained_as: Family | None = None  # where weights are not stored as a checkpoint has them: the family that has
    fused_experts: str | None = None  # where newer checkpoints have all experts in one tensor: {this}.gate_up_proj

    def in_gguf(self) -> Family:
        """How a GGUF stores the same weights."""
        known = {r"rope_freqs\.weight": "read as the rope's scaling"}
        return replace(self, norm_offset=0.0, stored_transposed=frozenset(), ignorable=known, trained_as=self)

    def module(self, role: str, layer: int | None) -> str:
        return self.names[role].format(i=layer, e="{e}")


_ROPE_IGNORABLE = MappingProxyType({r".*rotary_emb\.inv_freq": "computed from rope_theta"})
SELF_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")

LLAMA = Family(
    name="llama",
    model_type="llama",
    hf=("LlamaForCausalLM", "LlamaModel"),
    prefix="model.",
    names=table(
        token_embd="model.embed_tokens",
        output_norm="model.norm",
        output="lm_head",
        attn_norm="model.layers.{i}.input_layernorm",
        attn_q="model.layers.{i}.self_attn.q_proj",
        attn_k="model.layers.{i}.self_attn.k_proj",
        attn_v="model.layers.{i}.self_attn.v_proj",
        attn_output="model.layers.{i}.self_attn.o_proj",
        ffn_norm="model.layers.{i}.post_attention_layernorm",
        ffn_gate="model.layers.{i}.mlp.gate_proj",
        ffn_up="model.layers.{i}.mlp.up_proj",
        ffn_down="model.layers.{i}.mlp.down_proj",
    ),
    config=table(
        layers=key("num_hidden_layers"),
        width=key("hidden_size"),
        heads=key("num_attention_heads"),
        kv_heads=key("num_key_value_heads", default=None),  # None: as many as heads
        head_dim=key("head_dim", default=None),  # None: width / heads
        ffn=key("intermediate_size"),
        vocab=key("vocab_size"),
        context=key("max_position_embeddings", default=2048),
        eps=key("rms_norm_eps", default=1e-6),
        act=key("hidden_act", default="silu"),
        tied=key("tie_word_embeddings", default=False),
        attention_bias=key("attention_bias", default=False),
        mlp_bias=key("mlp_bias", default=False),
    ),
    biases=MappingProxyType(
        dict.fromkeys(SELF_ATTENTION, "attention_bias") | dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "mlp_bias")
    ),
    ignorable=_ROPE_IGNORABLE,
)


def keys_of(family: Family, *without: str, **keys: Key) -> Mapping[str, Key]:
    """The keys of another family, some left out, some added or changed."""
    return MappingProxyType({k: v for k, v in family.config.items() if k not in without} | keys)


MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_type="mistral",
    hf=("MistralForCausalLM", "MistralModel"),
    config=keys_of(
        LLAMA,
        "attention_bias",
        "mlp_bias",
        kv_heads=key("num_key_value_heads", default=8),
        context=key("max_position_embeddings", default=131072),
        window=key("sliding_window", default=4096),
    ),
    biases=table(),
    windows="all",
    neutral=table(attention_bias=(False,), mlp_bias=(False,)),
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_type="qwen2",
    hf=("Qwen2ForCausalLM", "Qwen2Model"),
    config=keys_of(
        LLAMA,
        "attention_bias",
        "mlp_bias",
        kv_heads=key("num_key_value_heads", default=32),
        context=key("max_position_embeddings", default=32768),
        window=key("sliding_window", default=4096),
        use_window=key("use_sliding_window", default=False),
        first_window_layer=key("max_window_layers", default=28),
    ),
    biases=table(attn_q=True, attn_k=True, attn_v=True),
    windows="by_layer",
    neutral=table(mlp_bias=(False,)),
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_type="qwen3",
    hf=("Qwen3ForCausalLM", "Qwen3Model"),
    names=MappingProxyType(
        {
            **LLAMA.names,
            "attn_q_norm": "model.layers.{i}.self_attn.q_norm",
            "attn_k_norm": "model.layers.{i}.self_attn.k_norm",
        }
    ),
    config=keys_of(
        QWEN2, head_dim=key("head_dim", default=128), attention_bias=key("attention_bias", default=False)
    ),
    biases=MappingProxyType(dict.fromkeys(SELF_ATTENTION, "attention_bias")),
    qk_norm=True,
)

# auto_map of the published models: code that transformers took over
PHI3_CODE: dict[str, Attr] = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
PHI3 = replace(
    LLAMA,
    name="phi3",
    model_type="phi3",
    hf=("Phi3ForCausalLM", "Phi3Model"),
    names=MappingProxyType(
        {role: name for role, name in LLAMA.names.items() if role not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
        | {
            "attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
            "ffn_gate_up": "model.layers.{i}.mlp.gate_up_proj",
        }
    ),
    config=keys_of(
        LLAMA,
        "attention_bias",
        "mlp_bias",
        context=key("max_position_embeddings", default=4096),
        eps=key("rms_norm_eps", default=1e-5),
        window=key("sliding_window", default=None),
    ),
    biases=table(),
    fused_qkv=True,
    fused_mlp=True,
    windows="all",
    rope_types=("longrope",),
    partial_rope=True,
    neutral=table(
        attention_bias=(False,),
        mlp_bias=(False,),
        full_attn_mod=(1,),
        interpolate_factor=(1,),
        lm_head_bias=(False,),
        auto_map=(PHI3_CODE, {**PHI3_CODE, "AutoTokenizer": "Xenova/gpt-4o"}),
    ),
)

_GPT2_LINEAR = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    hf=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    names=table(
        token_embd="transformer.wte",
        position_embd="transformer.wpe",
        output_norm="transformer.ln_f",
        output="lm_head",
        attn_norm="transformer.h.{i}.ln_1",
        attn_qkv="transformer.h.{i}.attn.c_attn",
        attn_output="transformer.h.{i}.attn.c_proj",
        ffn_norm="transformer.h.{i}.ln_2",
        ffn_up="transformer.h.{i}.mlp.c_fc",
        ffn_down="transformer.h.{i}.mlp.c_proj",
    ),
    config=table(
        layers=key("n_layer", "num_hidden_layers"),
        width=key("n_embd", "hidden_size"),
        heads=key("n_head", "num_attention_heads"),
        ffn=key("n_inner", default=None),  # None: 4 * width
        vocab=key("vocab_size"),
        context=key("n_positions", "max_position_embeddings", default=1024),
        eps=key("layer_norm_epsilon", default=1e-5),
        act=key("activation_function", default="gelu_new"),
        tied=key("tie_word_embeddings", default=True),
    ),
    norm="layer_norm",
    mlp="plain",
    position="learned",
    fused_qkv=True,
    biases=MappingProxyType(dict.fromkeys((*_GPT2_LINEAR, "attn_norm", "ffn_norm", "output_norm"), True)),
    stored_transposed=frozenset(_GPT2_LINEAR),
    neutral=table(
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        reorder_and_upcast_attn=(False,),
        add_cross_attention=(False,),
    ),
    ignorable=table(**{r".*\.attn\.(bias|masked_bias)": "the causal mask, which old transformers saved"}),
)


def family_of(config: Mapping[str, object], where: str) -> Family:
    """The family that config.json's architectures (else its model_type) names.

    UnsupportedError with the nearest there is; InputError where the two contradict each other or say nothing.
    """
    families = [cast(Family, registry.find("families", name)) for name in registry.entries("families")]
    model_type, listed = config.get("model_type"), config.get("architectures")
    if not listed:
        return _by_model_type(families, model_type, where)
    if not isinstance(listed, list) or not isinstance(listed[0], str):
        raise InputError(f"{where}: architectures = {listed!r}; a list of names was wanted")
    for family in families:
        if listed[0] in family.hf:
            if model_type not in (None, family.model_type):
                raise InputError(f"{where}: architectures says {listed[0]}, but model_type says {model_type!r}")
            return family
    known = [name for family in families for name in family.hf]
    raise UnsupportedError(
        f"{where}: the architecture {listed[0]} is not supported; there are {', '.join(f.hf[0] for f in families)}",
        hint=f"nearest: {get_close_matches(listed[0], known, n=1, cutoff=0)[0]}",
    )


def _by_model_type(families: list[Family], model_type: object, where: str) -> Family:
    if not isinstance(model_type, str):
        raise InputError(f"{where}: names neither architectures nor model_type", hint="is this a model's config.json?")
    known = {family.model_type: family for family in families}
    if model_type not in known:
        raise UnsupportedError(
            f"{where}: the model_type {model_type!r} is not supported; there are {', '.join(known)}",
            hint=f"nearest: {get_close_matches(model_type, known, n=1, cutoff=0)[0]}",
        )
    return known[model_type]
