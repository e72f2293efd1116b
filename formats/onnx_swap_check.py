"""Prove adapters in their slots: each alone, active in onnxruntime and in genai, against the model trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS, Tokens
from qconvert.formats.onnx_genai_check import adapter_row
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.formats.onnx_swap import SUFFIX, read
from qconvert.passes.adapter_slots import alone, filling
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.swap_check import attached_and_slotted, filled_rows
from qconvert.swapped import names_of_swapped
from qconvert.target import Lowered
from qconvert.weights import Weights


def swap_rows(
    path: Path, lowered: Lowered, weights: Weights, reals: Reals, prompts: Tokens, n_cached: int, n_new: int, threads: int
) -> list[Row]:
    """Of each adapter: its file, its slots against the adapter beside its linears, the price of the bits, the runtime."""
    rows, graph, names = list[Row](), lowered.graph, names_of_swapped(lowered.graph, SUFFIX)
    for alias, values in filling(graph).items():
        file = path.parent / names[alias]
        rows.append(file_row(file, weights, values))
        if rows[-1].verdict == "fail":
            break
        attached, slotted = attached_and_slotted(lowered)
        more, quantized = filled_rows(file.stem, alone(attached, alias), slotted, graph, weights, reals, values, prompts)
        rows += more
        if not OnnxRuntime().missing():
            rows += runtime_rows(path, file, quantized, prompts, n_cached, threads)
            rows.append(adapter_row(path, file, prompts[0], n_new, threads))
    return rows


def file_row(file: Path, weights: Weights, values: Mapping[str, str]) -> Row:
    """What onnxruntime finds in the file is what the graph says, bit by bit."""
    what = f"adapter file {file.name}"
    if reason := OnnxRuntime().missing():
        return Row(what, "not read", None, None, "skip", reason)
    try:
        found = read(file)
    except Exception as e:  # onnxruntime's exceptions have no common class of their own
        return judged(what, "onnxruntime does not read it", 1.0, 0.0, str(e))
    wrong = [slot for slot, value in values.items() if not equal(found.get(slot), weights.real(value).T)]
    wrong += found.keys() - values.keys()
    return judged(what, f"of {len(values)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def equal(found: np.ndarray | None, want: np.ndarray) -> bool:
    return found is not None and found.dtype == want.dtype and np.array_equal(found, want)


def runtime_rows(
    path: Path, file: Path, want: torch.Tensor, prompts: Tokens, n_cached: int, threads: int
) -> list[Row]:
    """onnxruntime with the adapter active, activations in f32: prompts at once, the first one's last tokens by the cache."""
    model = OnnxRuntime().open(path, len(prompts[0]), threads, exact=True, adapter=file)
    try:
        at_once = np.max([check.relative(model.logits(p), w) for p, w in zip(prompts, want, strict=True)])
        cached = check.relative(model.decoded(prompts[0], n_cached), want[0])
    finally:
        model.close()
    limit, _ = LIMITS["runtime onnxruntime"]
    what = f"runtime onnxruntime, {file.stem}"
    return [
        judged(f"{what}, prompts", "relative error", float(at_once), limit),
        judged(f"{what}, {n_cached} cached steps", "relative error", cached, limit),
    ]
