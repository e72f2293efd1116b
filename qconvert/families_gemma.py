"""Gemma 2 and 3 as rows of the family table.

Norms are stored minus one, embeddings scaled, branches normed on their way out too, logits capped; most layers see a
window only.  Source: transformers 5.23, models/gemma2, models/gemma3.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.families import LLAMA, SELF_ATTENTION, key, keys_of, table

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    model_type="gemma2",
    hf=("Gemma2ForCausalLM", "Gemma2Model"),
    names=MappingProxyType(
        {
            **LLAMA.names,
            "post_attention_norm": "model.layers.{i}.post_attention_layernorm",
            "ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
            "post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
        }
    ),
    config=keys_of(
        LLAMA,
        "mlp_bias",
        kv_heads=key("num_key_value_heads", default=4),
        head_dim=key("head_dim", default=256),
        context=key("max_position_embeddings", default=8192),
        act=key("hidden_activation", default="gelu_pytorch_tanh"),
        tied=key("tie_word_embeddings", default=True),
        window=key("sliding_window", default=4096),
        attn_scalar=key("query_pre_attn_scalar", default=256),
        attn_softcap=key("attn_logit_softcapping", default=50.0),
        softcap=key("final_logit_softcapping", default=30.0),
    ),
    biases=MappingProxyType(dict.fromkeys(SELF_ATTENTION, "attention_bias")),
    norm_offset=1.0,
    scaled_embedding=True,
    windows="pattern",
    neutral=table(use_bidirectional_attention=(False,), hidden_act=("gelu_pytorch_tanh",)),
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_type="gemma3_text",
    hf=("Gemma3ForCausalLM", "Gemma3TextModel"),
    names=MappingProxyType(
        {
            **GEMMA2.names,
            "attn_q_norm": "model.layers.{i}.self_attn.q_norm",
            "attn_k_norm": "model.layers.{i}.self_attn.k_norm",
        }
    ),
    config=keys_of(
        GEMMA2,
        "attn_softcap",
        context=key("max_position_embeddings", default=131072),
        softcap=key("final_logit_softcapping", default=None),
        window_period=key("sliding_window_pattern", default=6),
    ),
    qk_norm=True,
    theta=1e6,
    window_theta=10000.0,
    rope_types=("linear",),
    neutral=table(
        use_bidirectional_attention=(False,),
        hidden_act=("gelu_pytorch_tanh",),
        attn_logit_softcapping=(),  # transformers has the key, and does not read it
    ),
)
