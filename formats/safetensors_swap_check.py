"""Prove adapters beside a folder of safetensors: their files, what was trained, and PEFT with each on the folder's model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS, Tokens
from qconvert.formats.safetensors_dialects import Loading
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.formats.safetensors_swap import keys_of
from qconvert.formats.safetensors_transformers import Model, quiet
from qconvert.graph import Graph
from qconvert.passes.adapter_slots import alone, filling
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.run import run
from qconvert.swap_check import attached_and_slotted, filled_rows
from qconvert.swapped import names_of_swapped
from qconvert.target import Lowered
from qconvert.weights import Weights


def swap_rows(folder: Path, lowered: Lowered, weights: Weights, reals: Reals, prompts: Tokens) -> list[Row]:
    """Of each adapter: its file against the graph, its slots against the adapter beside its linears, the price of the bits."""
    rows, graph, names = list[Row](), lowered.graph, names_of_swapped(lowered.graph)
    for alias, values in filling(graph).items():
        keys, name = keys_of(graph, values), names[alias]
        with opened_tensors(folder / name) as tensors:
            have = set(tensors)
            wrong = [k for slot, k in keys.items() if k not in have or not same(tensors.tensor(k), weights.real(values[slot]))]
        wrong += have - set(keys.values())
        what = f"of {len(keys)} tensors differ"
        rows.append(judged(f"adapter file of {name}", what, float(len(wrong)), 0.0, min(wrong, default="")))
        attached, slotted = attached_and_slotted(lowered)
        rows += filled_rows(name, alone(attached, alias), slotted, graph, weights, reals, values, prompts)[0]
    return rows


def same(found: torch.Tensor, want: np.ndarray) -> bool:
    return found.dtype == torch.float32 and np.array_equal(found.numpy(), want)


def unasked_rows(graph: Graph, why: str) -> list[Row]:
    """Of adapters whose base nothing runs here."""
    names = names_of_swapped(graph)
    return [Row(f"runtime PEFT, {names[alias]}", "not run", None, None, "skip", why) for alias in filling(graph)]


def peft_rows(folder: Path, graph: Graph, model: Model, reals: Reals, loading: Loading, prompts: Tokens) -> list[Row]:
    """Logits of the folder's model with each adapter put on it by PEFT, against the graph with the file's factors in slots."""
    if find_spec("peft") is None:
        return unasked_rows(graph, "peft is not installed: pip install peft")
    rows, names = list[Row](), names_of_swapped(graph)
    for alias, values in filling(graph).items():
        what = f"runtime PEFT, {names[alias]}"
        with opened_tensors(folder / names[alias]) as tensors:
            slots = {slot: tensors.tensor(key) for slot, key in keys_of(graph, values).items()}
        (want,) = run(graph, reals, prompts, inputs=slots, round_input=loading.round_input).values()
        try:
            worst = max(check.relative(g, w) for g, w in zip(answers(model, folder / names[alias], prompts), want, strict=True))
        except Exception as e:  # whatever it is, PEFT does not load what was written
            told = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
            rows.append(judged(what, "errors as it loads", 1.0, 0.0, told))
            continue
        rows.append(judged(what, "logits, relative", worst, LIMITS[loading.kind][0]))
    return rows


def answers(model: Model, folder: Path, prompts: Tokens) -> list[np.ndarray]:
    """f32[T,V] of each prompt, with the adapter in the folder; the model is left as it was."""
    with quiet():
        from peft import PeftModel

        put = PeftModel.from_pretrained(model.model, folder)
        try:
            return [Model(put.eval(), [], model.eager).logits(p) for p in prompts]
        finally:
            model.model = put.unload()
