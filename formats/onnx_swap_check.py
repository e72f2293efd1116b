"""Prove adapters in their slots: each alone, active in onnxruntime and in genai, against the model trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from qconvert import check
from qconvert.adapters import Adapter
from qconvert.check import LIMITS, Tokens
from qconvert.formats import onnx_swap
from qconvert.formats.onnx_genai_check import adapter_row
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.passes.adapter_slots import filled, slot_names
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.report import Row, judged
from qconvert.run import Reals, run
from qconvert.scheme import F32
from qconvert.target import Lowered, Source
from qconvert.weights import Weights

Slots = Mapping[str, torch.Tensor]


def swap_rows(
    path: Path, source: Source, lowered: Lowered, reals: Reals, prompts: Tokens, n_cached: int, n_new: int, threads: int
) -> list[Row]:
    """Of each adapter: its file, its slots against the adapter beside its linears, the price of the bits, the runtime."""
    rows: list[Row] = []
    for adapter in source.adapters:
        file = path.parent / onnx_swap.file_name(adapter)
        found = onnx_swap.read(file)
        slots = {name: torch.from_numpy(array.T.copy()) for name, array in found.items()}
        rows.append(file_row(adapter, source, found))
        trained = AttachAdapter(adapter, True)(source.base)
        want = check.log_probs(trained, Weights(trained, source.store), prompts)
        open_graph = lowered.stages[-1].graph
        (slotted,) = run(open_graph, Weights(open_graph, source.store), prompts, inputs=slots).values()
        d = check.distance(want, torch.log_softmax(slotted, -1), prompts)
        rows.append(check.arithmetic_row(f"slots filled by {adapter.name}", "merge", d))
        (quantized,) = run(lowered.graph, reals, prompts, inputs=slots).values()
        (mean_kl, *_) = check.price_rows(check.distance(want, torch.log_softmax(quantized, -1), prompts))
        rows.append(mean_kl._replace(what=f"price of the bits, {adapter.name}"))
        if not OnnxRuntime().missing():
            rows += runtime_rows(path, file, adapter, quantized, prompts, n_cached, threads)
            rows.append(adapter_row(path, file, prompts[0], n_new, threads))
    return rows


def file_row(adapter: Adapter, source: Source, found: Mapping[str, F32]) -> Row:
    """Every factor in the file is the adapter's: A as it is, B times its scale."""
    wrong = []
    for weight, f in filled(source.base, adapter).items():
        a, b = (onnx_swap.values(t, source.store).astype(np.float64) for t in (f.a, f.b))
        for name, want in zip(slot_names(weight), (a.T, f.scale * adapter.weight * b.T), strict=True):
            if name not in found or not np.allclose(found[name], want, rtol=1e-6, atol=0):
                wrong.append(name)
    wrong += found.keys() - {n for w in filled(source.base, adapter) for n in slot_names(w)}
    what = f"adapter file {onnx_swap.file_name(adapter)}"
    return judged(what, f"of {len(found)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def runtime_rows(
    path: Path, file: Path, adapter: Adapter, want: torch.Tensor, prompts: Tokens, n_cached: int, threads: int
) -> list[Row]:
    """onnxruntime with the adapter active, activations in f32: prompts at once, the first one's last tokens by the cache."""
    model = OnnxRuntime().open(path, len(prompts[0]), threads, exact=True, adapter=file)
    try:
        at_once = max(check.relative(model.logits(p), w) for p, w in zip(prompts, want, strict=True))
        cached = check.relative(model.decoded(prompts[0], n_cached), want[0])
    finally:
        model.close()
    limit, _ = LIMITS["runtime onnxruntime"]
    what = f"runtime onnxruntime, {adapter.name}"
    return [
        judged(f"{what}, prompts", "relative error", at_once, limit),
        judged(f"{what}, {n_cached} cached steps", "relative error", cached, limit),
    ]

