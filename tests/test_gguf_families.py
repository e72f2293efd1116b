"""Every family as GGUF: llama.cpp's logits against transformers' own, on two-layer random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert import convert
from qconvert.errors import UnsupportedError
from qconvert.formats.llama_cpp import LlamaCpp

transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
TINY = Path(__file__).parents[1] / "golden" / "tiny"
VOCAB = 1024  # of golden/tiny's tokenizer; rows beyond it become padding
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = COMMON | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}  # 40 tokens are asked below
QWEN3_MOE = COMMON | {
    "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "llama-tied-biased": ("Llama", COMMON | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", COMMON | {"head_dim": 32}),
    "llama3-rope": ("Llama", COMMON | {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", COMMON | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("Llama", COMMON | {"rope_parameters": YARN}),
    "llama-yarn-attention-factor": ("Llama", COMMON | {"rope_parameters": YARN | {"attention_factor": 0.9}}),
    "mistral": ("Mistral", COMMON | {"sliding_window": None}),
    "mistral-window": ("Mistral", COMMON | {"sliding_window": 48}),
    "qwen2": ("Qwen2", COMMON),
    "qwen2-yarn": ("Qwen2", COMMON | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 3}),
    "gemma2-gqa-caps": (
        "Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "num_attention_heads": 8},
    ),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
    "gemma3-untied-capped": (
        "Gemma3", GEMMA | {"num_hidden_layers": 7, "tie_word_embeddings": False, "final_logit_softcapping": 3.0},
    ),
    "gemma3-linear": (
        "Gemma3", GEMMA | {"num_hidden_layers": 7, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        }},
    ),
    "gemma3-no-window": ("Gemma3", GEMMA | {"layer_types": ["full_attention"] * 2}),
    "phi3": ("Phi3", COMMON | {"pad_token_id": None}),
    "phi3-tied-window": ("Phi3", COMMON | {"tie_word_embeddings": True, "sliding_window": 48, "pad_token_id": None}),
    "mixtral": ("Mixtral", COMMON | {"num_local_experts": 4}),
    "mixtral-8-experts": ("Mixtral", COMMON | {"num_local_experts": 8, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", QWEN3_MOE),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}  # fmt: skip


def saved(folder: Path, kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    class_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    made = getattr(transformers, class_name)(**config, bos_token_id=0, eos_token_id=0)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(made).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.data += 0.1 * torch.randn_like(p)  # zero or one by default, which would hide a lost one
        elif "experts" in name or "mlp.gate." in name:
            torch.nn.init.normal_(p, std=0.1)  # far from ties of the router
    model.save_pretrained(folder)
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)
    return model


def llama_cpp() -> LlamaCpp:
    runtime = LlamaCpp()
    if reason := runtime.missing():
        pytest.skip(reason)
    return runtime


LOST = {
    "query_pre_attn_scalar = 24": ("Gemma3", GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 24}),
    "query_pre_attn_scalar = 20": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 20}),
    "layer_types": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "attn_logit_softcapping": ("Gemma2", GEMMA | {"attn_logit_softcapping": None}),
    "tie_word_embeddings": ("Gemma2", GEMMA | {"tie_word_embeddings": False}),
    "attention_bias": ("Gemma2", GEMMA | {"attention_bias": True}),
    "norm_topk_prob = false": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": False}),
    "mlp_only_layers": ("Qwen3Moe", QWEN3_MOE | {"mlp_only_layers": [0]}),
    "decoder_sparse_step": ("Qwen3Moe", QWEN3_MOE | {"decoder_sparse_step": 2}),
}


@pytest.mark.parametrize("key", LOST)
def test_a_setting_that_llama_cpp_would_lose_is_refused_by_name(tmp_path: Path, key: str) -> None:
    saved(tmp_path / "model", *LOST[key])
    with pytest.raises(UnsupportedError, match=key):
        convert(tmp_path / "model", quant="F16", output=tmp_path / "out.gguf", dry_run=True)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_quantized_experts_are_verified_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    llama_cpp()
    options = COMMON | {"num_local_experts": 4} if kind == "Mixtral" else QWEN3_MOE
    saved(tmp_path / "model", kind, options | {"hidden_size": 256, "intermediate_size": 256})
    result = convert(tmp_path / "model", quant="Q4_K_M", output=tmp_path / "out.gguf")
    assert result.verified


@pytest.mark.parametrize("name", MODELS)
def test_an_f32_file_gives_transformers_logits(tmp_path: Path, name: str) -> None:
    runtime = llama_cpp()
    model = saved(tmp_path / "model", *MODELS[name])
    result = convert(tmp_path / "model", quant="F32", output=tmp_path / "out.gguf")
    assert result.verified
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
    opened = runtime.open(tmp_path / "out.gguf", 64, 1)
    try:
        got = torch.from_numpy(np.array(opened.logits(tokens)))
    finally:
        opened.close()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0]
    assert (got - want).abs().max() < 1e-3  # sums in another order: 2e-5; gemma: 4e-4, ggml has gelu as a table of f16


def test_a_window_bounds_the_context_that_the_file_declares(tmp_path: Path) -> None:
    saved(tmp_path / "model", *MODELS["mistral-window"])
    result = convert(tmp_path / "model", quant="F16", output=tmp_path / "out.gguf", dry_run=True)
    assert any("context_length is 48" in note for note in result.report.notes)


def test_an_activation_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model", "Llama", COMMON | {"hidden_act": "relu"})
    with pytest.raises(UnsupportedError, match="computes silu, this model has relu"):
        convert(tmp_path / "model", quant="F16", output=tmp_path / "out.gguf")
