"""Tiny random models of every family, made by transformers, and their logits by both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

from qconvert.build import build
from qconvert.run import run
from qconvert.sources import Checkpoint, Store, TensorInfo, read_checkpoint
from qconvert.weights import Weights

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
SMALL_GPT2: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMALL_GEMMA2 = SMALL | {
    "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}  # fmt: skip
SMALL_GEMMA3 = SMALL | {
    "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
SMALL_QWEN3_MOE = SMALL | {
    "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
}  # fmt: skip
N_TOKENS = 40  # longer than every window and original context below


def rope(kind: str, **more: object) -> dict[str, object]:
    return SMALL | {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama grouped heads": ("Llama", SMALL),
    "llama as many kv heads": ("Llama", SMALL | {"num_key_value_heads": 4}),
    "llama biases": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", SMALL | {"head_dim": 12}),
    "llama gelu": ("Llama", SMALL | {"hidden_act": "gelu"}),
    "llama linear rope": ("Llama", rope("linear", factor=4.0)),
    "llama dynamic rope, short text": ("Llama", rope("dynamic", factor=2.0)),
    "llama dynamic rope, long text": ("Llama", rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    "llama yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama yarn, all options": (
        "Llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0, mscale=0.7,
             mscale_all_dim=1.3, truncate=False),
    ),
    "llama yarn, attention factor": (
        "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5),
    ),
    "llama 3 rope": (
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral window": ("Mistral", SMALL | {"sliding_window": 8}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 window in the upper layer": (
        "Qwen2", SMALL | WINDOW | {"max_window_layers": 1},
    ),
    "qwen2 window in the lower layer": (
        "Qwen2",
        SMALL | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "qwen3 biases and window": (
        "Qwen3",
        SMALL | WINDOW | {"attention_bias": True, "max_window_layers": 0},
    ),
    "gemma2": ("Gemma2", SMALL_GEMMA2),
    "gemma2 tied, biases": ("Gemma2", SMALL_GEMMA2 | {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2 no caps, listed layers": (
        "Gemma2",
        SMALL_GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None,
                        "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3": ("Gemma3", SMALL_GEMMA3),
    "gemma3 tied, biases": ("Gemma3", SMALL_GEMMA3 | {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma3 query scalar of head_dim, capped logits": (
        "Gemma3", SMALL_GEMMA3 | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0},
    ),
    "gemma3 linear scaling": (
        "Gemma3",
        SMALL_GEMMA3 | {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }},
    ),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "mixtral tied, window, one expert a token": (
        "Mixtral",
        SMALL | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("Qwen3Moe", SMALL_QWEN3_MOE),
    "qwen3-moe normalized": ("Qwen3Moe", SMALL_QWEN3_MOE | {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe every other layer, biases, window": (
        "Qwen3Moe", SMALL_QWEN3_MOE | WINDOW | {"decoder_sparse_step": 2, "attention_bias": True},
    ),
    "qwen3-moe a dense layer": ("Qwen3Moe", SMALL_QWEN3_MOE | {"mlp_only_layers": [1]}),
    "phi3": ("Phi3", SMALL),
    "phi3 tied, window": ("Phi3", SMALL | {"tie_word_embeddings": True, "sliding_window": 8}),
    "gpt2": ("GPT2", SMALL_GPT2),
    "gpt2 untied, n_inner, relu": (
        "GPT2", SMALL_GPT2 | {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are several times faster so, and the other cores are for other tests."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def save_random(folder: Path, kind: str, options: dict[str, Any]) -> Path:
    """A transformers model whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, name)(config(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    weights = Weights(graph, store, np.float64 if dtype == torch.float64 else np.float32)
    return run(graph, weights, tokens, dtype=dtype)["logits"]


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: torch.Tensor = model(tokens).logits
    return out


@contextmanager
def no_float32() -> Iterator[None]:
    """transformers computes norms and rope in torch.float32 by name, whatever the model's dtype: make that f64."""
    torch.set_default_dtype(torch.float64)
    try:
        names = mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
        with names, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def their_logits_in_f64(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {name: tensor.double() for name, tensor in loaded.state_dict().items()}
    config = transformers.AutoConfig.from_pretrained(folder)
    with no_float32(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float64, experts_implementation="eager"
        )
        model.load_state_dict(tensors)
        out: torch.Tensor = model.eval()(tokens).logits
    return out


def some_tokens(vocab: int = 61, n: int = N_TOKENS) -> torch.Tensor:
    return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(1))


def edited(folder: Path, **config: object) -> Checkpoint:
    """The checkpoint with other settings in its config.json; ... deletes one."""
    found = read_checkpoint(folder, Store())
    merged = found.config | config
    return found._replace(config={k: v for k, v in merged.items() if v is not ...})


def with_tensors(folder: Path, change: Callable[[dict[str, TensorInfo]], object]) -> Checkpoint:
    found = read_checkpoint(folder, Store())
    tensors = dict(found.tensors)
    change(tensors)
    return found._replace(tensors=tensors)
