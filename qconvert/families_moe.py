"""Mixtures of experts as rows of the family table.

Older checkpoints (and transformers 5's by default) have a tensor for each expert, newer ones may have all in one.
Source: transformers 5.23, models/mixtral, models/qwen3_moe, conversion_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.families import MISTRAL, QWEN3, key, keys_of, table

_DENSE = ("ffn_gate", "ffn_up", "ffn_down")

MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    model_type="mixtral",
    hf=("MixtralForCausalLM", "MixtralModel"),
    names=MappingProxyType(
        {role: name for role, name in MISTRAL.names.items() if role not in _DENSE}
        | {
            "ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
            "ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
            "ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
            "ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
        }
    ),
    config=keys_of(
        MISTRAL,
        eps=key("rms_norm_eps", default=1e-5),
        window=key("sliding_window", default=None),
        experts=key("num_local_experts", "num_experts", default=8),
        experts_used=key("num_experts_per_tok", default=2),
    ),
    theta=1e6,
    renamed=((".block_sparse_moe.", ".mlp."),),
    fused_experts="model.layers.{i}.mlp.experts",
)

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3-moe",
    model_type="qwen3_moe",
    hf=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    names=MappingProxyType(
        {
            **QWEN3.names,  # layers without experts are those of qwen3
            "ffn_gate_inp": "model.layers.{i}.mlp.gate",
            "ffn_gate_exps": "model.layers.{i}.mlp.experts.{e}.gate_proj",
            "ffn_up_exps": "model.layers.{i}.mlp.experts.{e}.up_proj",
            "ffn_down_exps": "model.layers.{i}.mlp.experts.{e}.down_proj",
        }
    ),
    config=keys_of(
        QWEN3,
        "first_window_layer",
        kv_heads=key("num_key_value_heads", default=4),
        head_dim=key("head_dim", default=None),
        experts=key("num_experts", "num_local_experts", default=128),
        experts_used=key("num_experts_per_tok", default=8),
        expert_ffn=key("moe_intermediate_size", default=768),
        normalize_experts=key("norm_topk_prob", default=False),
        dense_layers=key("mlp_only_layers", default=None),
        sparse_step=key("decoder_sparse_step", default=1),
    ),
    windows="all",
    harmless=table(max_window_layers="not read by transformers in this family"),
    fused_experts="model.layers.{i}.mlp.experts",
)
