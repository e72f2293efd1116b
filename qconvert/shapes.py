"""Shapes of weights by their roles, in terms of the settings of a model."""

from __future__ import annotations

from collections.abc import Mapping

# A weight's shape by its role, in terms of our settings. A bias has the first dimension.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "token_embd": ("vocab", "width"),
    "position_embd": ("context", "width"),
    "token_types": ("token_types", "width"),
    "token_embd_norm": ("width",),
    "output_norm": ("width",),
    "output": ("vocab", "width"),
    "attn_norm": ("width",),
    "attn_q": ("heads * head_dim", "width"),
    "attn_k": ("kv_heads * head_dim", "width"),
    "attn_v": ("kv_heads * head_dim", "width"),
    "attn_qkv": ("(heads + 2 * kv_heads) * head_dim", "width"),
    "attn_output": ("width", "heads * head_dim"),
    "attn_q_norm": ("head_dim",),
    "attn_k_norm": ("head_dim",),
    "post_attention_norm": ("width",),
    "attn_output_norm": ("width",),
    "layer_output_norm": ("width",),
    "ffn_norm": ("width",),
    "post_ffw_norm": ("width",),
    "ffn_gate": ("ffn", "width"),
    "ffn_up": ("ffn", "width"),
    "ffn_gate_up": ("2 * ffn", "width"),
    "ffn_gate_inp": ("experts", "width"),
    "ffn_gate_exps": ("expert_ffn", "width"),  # of each expert
    "ffn_up_exps": ("expert_ffn", "width"),
    "ffn_down_exps": ("width", "expert_ffn"),
    "ffn_down": ("width", "ffn"),
}
# The same where all experts are one tensor: its name, its shape, and which half of it the role has.
FUSED_EXPERTS: Mapping[str, tuple[str, tuple[str, ...], int | None]] = {
    "ffn_gate_exps": ("gate_up_proj", ("experts", "2 * expert_ffn", "width"), 0),
    "ffn_up_exps": ("gate_up_proj", ("experts", "2 * expert_ffn", "width"), 1),
    "ffn_down_exps": ("down_proj", ("experts", "width", "expert_ffn"), None),
}


def product(dim: str, sizes: Mapping[str, int]) -> int:
    """The number that a dimension of SHAPES says."""
    if dim.startswith("("):
        return (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["head_dim"]
    out = 1
    for factor in dim.split(" * "):
        out *= int(factor) if factor.isdigit() else sizes[factor]
    return out
