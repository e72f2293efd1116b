"""onnxruntime-genai's own model builder, and its files in plain onnxruntime: what others make of the same checkpoint.

It needs onnx-ir. GENAI_PYTHON names a Python that has both; else it is this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


def missing() -> str | None:
    """Why the builder cannot be run; None where it can."""
    absent = [name for name in ("onnxruntime_genai", "onnx_ir") if "GENAI_PYTHON" not in os.environ and not find_spec(name)]
    return f"the builder needs {', '.join(absent)}" if absent else None


def command(model: Path, out: Path, precision: str, adapter: Path | None = None) -> list[str]:
    """The builder's command line, offline; precision: fp32 or int4 (block 32, symmetric, accuracy level 4)."""
    words = [os.environ.get("GENAI_PYTHON", sys.executable), "-m", "onnxruntime_genai.models.builder", "-m", "model"]
    words += ["-i", str(model), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out.with_name("builder-cache"))]
    words += ["--extra_options", f"adapter_path={adapter}"] if adapter else []
    return ["env", "HF_HUB_OFFLINE=1", *words]


def build(model: Path, out: Path, precision: str, adapter: Path | None = None) -> Path:
    """Run it; RuntimeError with the last line it said."""
    done = subprocess.run(command(model, out, precision, adapter), cwd=out.parent, capture_output=True, text=True, check=False)
    if done.returncode or not (out / "model.onnx").exists():
        raise RuntimeError(f"the builder ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return out


class Decoder:
    """A folder in plain onnxruntime, whoever made it; a key/value cache that grows by concatenation."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self._session: Any = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        config = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
        self._shape = (1, config["num_key_value_heads"], 0, config["head_size"])
        self._past = [i.name for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        self.cache = self.empty()

    def empty(self) -> list[Logits]:
        return [np.zeros(self._shape, np.float32) for _ in self._past]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Logits f32[T,V] of these tokens, which join the cache."""
        n = self.cache[0].shape[2] + len(tokens)
        feeds = {"input_ids": np.asarray([tokens], np.int64), "attention_mask": np.ones((1, n), np.int64)}
        out, *self.cache = self._session.run(None, feeds | dict(zip(self._past, self.cache, strict=True)))
        logits: Logits = out[0]
        return logits

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Of a fresh sequence, all at once."""
        self.cache = self.empty()
        return self.step(tokens)

    def decoded(self, tokens: Sequence[int], n_steps: int) -> Logits:
        """The same by the cache: all but the last n_steps tokens at once, then one at a time."""
        first = len(tokens) - n_steps
        return np.concatenate([self.logits(tokens[:first]), *(self.step([token]) for token in tokens[first:])])
