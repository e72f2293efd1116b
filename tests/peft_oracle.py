"""Tiny random models with PEFT adapters, trained by noise: what transformers and PEFT themselves compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.adapter_delta import check_delta
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.graph import Graph
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.pipeline import Pipeline
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

VOCAB = 40
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}),
    "gemma3": ("Gemma3", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4}),
    "gemma2": ("Gemma2", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(family: str, folder: Path, tied: bool = False, layers: int = 2, width: int = 32) -> Path:
    """Save a random model of width 32; its norms and biases are not the ones of initialisation."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=4, n_positions=32, tie_word_embeddings=tied, **ids
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        kind, more = KINDS[family]
        config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=None, **ids, **more,
        )  # fmt: skip
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                p += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, resized: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if resized is not None:
        model.resize_token_embeddings(resized)
    return model.eval()


def tiny_adapter(base: Path, folder: Path, resized: int | None = None, seed: int = 1, **config: Any) -> Any:
    """Save an adapter whose trainable parameters were moved by noise; the PeftModel, with the adapter beside it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(load(base, resized), LoraConfig(**config))
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=noise)
        model.save_pretrained(folder)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    """Rewrite adapter_model.safetensors as change(tensors) gives it."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def tokens(vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, vocab: int = VOCAB) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=tokens(vocab)).logits
    return out


class Converted:
    """Our graphs of a base and its adapters: attached and merged."""

    def __init__(self, base: Path, *adapters: Path | tuple[Path, float], allow_unused: bool = False) -> None:
        self.store = Store()
        self.base = build(read_checkpoint(base, self.store))
        pairs: Sequence[tuple[Path, float]] = [a if isinstance(a, tuple) else (a, 1.0) for a in adapters]
        self.adapters = [read_adapter(p, self.store, f"adapter{i}", w) for i, (p, w) in enumerate(pairs)]
        self.attached = Pipeline(tuple(AttachAdapter(a, allow_unused) for a in self.adapters)).run(self.base)
        for adapter in self.adapters:
            check_delta(adapter, self.store, self.attached)
        self.merged = Pipeline((MergeAdapters(),)).run(self.attached)

    def logits(self, graph: Graph, vocab: int = VOCAB) -> torch.Tensor:
        return run(graph, Weights(graph, self.store, np.float32), tokens(vocab))["logits"]

    def exact(self, graph: Graph) -> torch.Tensor:
        """Logits in f64."""
        return run(graph, Weights(graph, self.store, np.float64), tokens(), dtype=torch.float64)["logits"]
