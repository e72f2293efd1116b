"""A folder of hqq's tensors: each linear loaded by hqq, its weights and, in transformers' model, its answers."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qconvert.formats.safetensors_compared import exact_rows
from qconvert.formats.safetensors_dialects import Loading, Written
from qconvert.formats.safetensors_files import Opened, opened_tensors
from qconvert.formats.safetensors_transformers import Model, quiet, short_of_memory
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Array

WHAT = "hqq's dequantization"


def dequantized_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """Every weight whose scheme and shape are new, exactly, as hqq computes in f32."""
    if find_spec("hqq") is None:
        return [Row(WHAT, "not run", None, None, "skip", "hqq is not installed: pip install hqq")]
    with opened_tensors(folder) as tensors:

        def shape(name: str) -> tuple[int, ...]:
            return tuple(tensors.tensor(f"{name.removesuffix('weight')}shape").tolist())

        def theirs(name: str, _: str) -> Array:
            out: Array = linear(tensors, name.removesuffix(".weight")).dequantize().detach().numpy()
            return out

        return exact_rows(WHAT, written, shape, theirs, reals.real)


def linear(tensors: Opened, module: str) -> Any:
    """hqq's own linear, computing in f32."""
    import torch

    own = import_module("hqq.core.quantize").HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    state = {key.removeprefix(f"{module}."): tensors.tensor(key) for key in tensors if key.startswith(f"{module}.")}
    own.load_state_dict(state)
    return own


def unavailable(folder: Path) -> str | None:
    missing = [package for package in ("hqq", "transformers") if find_spec(package) is None]
    return f"{missing[0]} is not installed" if missing else short_of_memory(folder)


def load(folder: Path, loading: Loading) -> Model:
    """transformers' model in f32 with hqq's linears: neither of them loads such a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with quiet(), opened_tensors(folder) as tensors:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        modules = {key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")}
        for module in modules:
            model.set_submodule(module, linear(tensors, module))
        plain = {key: tensors.tensor(key).float() for key in tensors if key.rpartition(".")[0] not in modules}
        missing, unexpected = model.load_state_dict(plain, strict=False, assign=True)
        model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lost = [key for key in missing if key.rpartition(".")[0] not in modules and key not in tied]
    complaints = [f"missing: {key}" for key in lost] + [f"unexpected: {key}" for key in unexpected]
    return Model(model.eval(), complaints, False, about())


def about() -> dict[str, str]:
    from importlib.metadata import version

    return {"name": "hqq", "version": version("hqq")}
