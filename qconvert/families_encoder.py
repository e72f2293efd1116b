"""Encoders as rows of the family table: every token sees all others, and the hidden states are the output.

Source: transformers 5.23, models/bert.
"""

from __future__ import annotations

from types import MappingProxyType

from qconvert.families import SELF_ATTENTION, Family, key, table

BERT = Family(
    name="bert",
    model_type="bert",
    hf=("BertModel",),
    prefix="",
    names=table(
        token_embd="embeddings.word_embeddings",
        token_types="embeddings.token_type_embeddings",
        position_embd="embeddings.position_embeddings",
        token_embd_norm="embeddings.LayerNorm",
        attn_q="encoder.layer.{i}.attention.self.query",
        attn_k="encoder.layer.{i}.attention.self.key",
        attn_v="encoder.layer.{i}.attention.self.value",
        attn_output="encoder.layer.{i}.attention.output.dense",
        attn_output_norm="encoder.layer.{i}.attention.output.LayerNorm",
        ffn_up="encoder.layer.{i}.intermediate.dense",
        ffn_down="encoder.layer.{i}.output.dense",
        layer_output_norm="encoder.layer.{i}.output.LayerNorm",
    ),
    config=table(
        layers=key("num_hidden_layers", default=12),
        width=key("hidden_size", default=768),
        heads=key("num_attention_heads", default=12),
        ffn=key("intermediate_size", default=3072),
        vocab=key("vocab_size", default=30522),
        context=key("max_position_embeddings", default=512),
        token_types=key("type_vocab_size", default=2),
        eps=key("layer_norm_eps", default=1e-12),
        act=key("hidden_act", default="gelu"),
    ),
    norm="layer_norm",
    mlp="plain",
    position="learned",
    causal=False,
    biases=MappingProxyType(
        dict.fromkeys(
            (*SELF_ATTENTION, "ffn_up", "ffn_down", "token_embd_norm", "attn_output_norm", "layer_output_norm"), True
        )
    ),
    neutral=table(is_decoder=(False,), position_embedding_type=("absolute",)),
    harmless=MappingProxyType(
        dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), "for training only")
        | {"tie_word_embeddings": "there is no output head"}
    ),
    renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    ignorable=MappingProxyType(
        {
            r"pooler\.dense\.(weight|bias)": "of a pretraining task; the hidden states are the output",
            r"embeddings\.position_ids": "0, 1, 2 …",
        }
    ),
)
