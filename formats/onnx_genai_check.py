"""The folder in onnxruntime-genai: it loads, cuts text into the same ids, and chooses the tokens of the highest logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.check import LIMITS, equal_ids_row
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.report import Row, judged
from qconvert.tokenizer import hard_corpus


def genai_rows(
    path: Path, encode: Callable[[str], list[int]] | None, prompt: list[int], n: int, threads: int
) -> list[Row]:
    """path: of model.onnx; encode: the tokenizer, if there is one; n: how many tokens follow the prompt."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return [Row("genai", "not run", None, None, "skip", "onnxruntime-genai is not installed")]
    try:
        model = genai.Model(os.fspath(path.parent))
        new = generated(genai, model, prompt, n)
    except Exception as e:  # a bare Exception is what genai raises
        return [judged("genai greedy tokens", "cannot be run", float("inf"), 0.0, str(e))]
    rows = [greedy_row(path, prompt, new, n, threads)]
    return [*rows, ids_row(genai, model, encode)] if encode else rows


def ids_row(genai: Any, model: Any, encode: Callable[[str], list[int]]) -> Row:
    """Told, not judged, where ids differ: the tokenizer's files are the model's own, and onnxruntime itself reads none."""
    what = "genai token ids"
    try:
        tokenizer = genai.Tokenizer(model)
        pairs = [(text, encode(text), [int(t) for t in tokenizer.encode(text)]) for text in hard_corpus()]
    except Exception as e:
        return Row(what, "not run", None, None, "skip", f"onnxruntime-genai reads no such tokenizer: {e}")
    row = equal_ids_row(what, pairs)
    return row if row.verdict == "pass" else row._replace(verdict="info", limit=None)


def adapter_row(path: Path, adapter: Path, prompt: list[int], n: int, threads: int) -> Row:
    """The tokens that follow with an adapter active; none are judged where genai is missing."""
    what = f"genai greedy tokens, {adapter.stem}"
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return Row(what, "not run", None, None, "skip", "onnxruntime-genai is not installed")
    try:
        new = generated(genai, genai.Model(os.fspath(path.parent)), prompt, n, adapter)
    except Exception as e:  # a bare Exception is what genai raises
        return judged(what, "cannot be run", float("inf"), 0.0, str(e))
    return greedy_row(path, prompt, new, n, threads, adapter)._replace(what=what)


def greedy_row(
    path: Path, prompt: list[int], new: list[int], n: int, threads: int, adapter: Path | None = None
) -> Row:
    """genai's tokens are those of the highest logits in onnxruntime, but for ties within rounding."""
    model = OnnxRuntime().open(path, len(prompt) + n, threads, adapter=adapter)
    try:
        logits = model.decoded([*prompt, *new], len(new))[len(prompt) - 1 :]
    finally:
        model.close()
    stops = [stop_tokens(path.parent)] if len(new) < n else []  # it stops without a word
    chosen = [*([token] for token in new), *stops]
    gaps = [(row.max() - row[ids].max()) / row.std() for row, ids in zip(logits, chosen, strict=False)]
    gap, (limit, _) = float(np.max(gaps)), LIMITS["greedy"]
    return judged("genai greedy tokens", "logit below the best / spread", gap, limit, f"{len(new)} tokens")


def stop_tokens(folder: Path) -> list[int]:
    ids = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"].get("eos_token_id", 0)  # its default
    return ids if isinstance(ids, list) else [ids]


def generated(genai: Any, model: Any, prompt: list[int], n: int, adapter: Path | None = None) -> list[int]:
    """At most n tokens; a stop token ends them and is not among them. adapter: a file of factors for the model's slots."""
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + n, do_sample=False)
    generator, adapters = genai.Generator(model, params), None
    if adapter is not None:
        adapters = genai.Adapters(model)
        adapters.load(os.fspath(adapter), adapter.stem)
        generator.set_active_adapter(adapters, adapter.stem)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)[len(prompt) :]]
