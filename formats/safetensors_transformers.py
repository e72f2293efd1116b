"""A folder run by transformers, on the CPU, in f32."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qconvert.formats.safetensors_dialects import Loading

MEMORY_FACTOR = 4  # of the folder's bytes: codes, weights in the model's dtype, and once more in f32


def unavailable(folder: Path) -> str | None:
    """Why transformers cannot run the folder here, or None."""
    if find_spec("transformers") is None:
        return 'transformers is not installed: pip install "qconvert[safetensors]"'
    return short_of_memory(folder)


def short_of_memory(folder: Path) -> str | None:
    need = MEMORY_FACTOR * sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    free = available()
    if free is None or need <= free:
        return None
    return f"{need / 1e9:.0f} GB of memory are needed, {free / 1e9:.0f} GB are free"


def available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


class Model:
    """complaints: of the load: keys that were missing, unexpected or misshapen."""

    def __init__(self, model: Any, complaints: Sequence[str], eager: bool, about: dict[str, str] | None = None) -> None:
        self.model, self.complaints, self.eager = model, complaints, eager
        import transformers

        self.about = about or {"name": "transformers", "version": str(transformers.__version__)}

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """f32[T,V]"""
        with torch.no_grad(), torch.compiler.set_stance("force_eager" if self.eager else "default"):
            out: npt.NDArray[np.float32] = self.model(torch.tensor([list(tokens)])).logits[0].float().numpy()
        return out

    def hidden(self, tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """tokens i64[B,T] -> f32[B,T,D]"""
        with torch.no_grad():
            out: torch.Tensor = self.model(tokens, **inputs).last_hidden_state
        return out


def load(folder: Path, loading: Loading, head: bool = True) -> Model:
    """Weights are dequantized by transformers' own loader; then all computes in f32. head: it gives logits."""
    import transformers

    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    arguments = {**loading.arguments, **({} if head else {"add_pooling_layer": False})}
    if settings := arguments.pop("dequantize", None):
        arguments["quantization_config"] = getattr(transformers, settings)(dequantize=True)
    with quiet(), torch.compiler.set_stance("force_eager" if loading.eager else "default"):
        model, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **arguments)
        model.eval()
        model.set_experts_implementation("eager")  # others want rows of 16 bytes
        if loading.then:
            model = getattr(model, loading.then)(torch.float32).float()
        with torch.no_grad():
            model(torch.tensor([[0]]))  # some decompress at the first call
        torch.nn.Module.float(model)  # transformers' own refuses what was quantized, even where it is no more
        for module in model.modules():
            if hasattr(module, "scalar_embed_scale"):  # Gemma's, which bf16 has rounded
                module.embed_scale.fill_(module.scalar_embed_scale)
    found = [(kind, key) for kind in KINDS for key in sorted(map(str, told.get(kind, ())))]
    left_out = {(kind, key) for kind, key in found if kind == "unexpected_keys" and key.rpartition(".")[2] in loading.unused}
    complaints = [f"{kind.removesuffix('_keys')}: {key}" for kind, key in found if (kind, key) not in left_out]
    return Model(model, complaints, loading.eager)


KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loaders' words and bars; what they complain of is returned."""
    from transformers.utils import logging as loud

    before, level = loud.is_progress_bar_enabled(), loud.get_verbosity()
    loud.disable_progress_bar()
    loud.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # compressed-tensors has bars that only this stops
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.set_verbosity(level)
        if before:
            loud.enable_progress_bar()
