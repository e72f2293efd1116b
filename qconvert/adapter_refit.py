"""Adapters refitted to a quantized base, where that brings the model nearer to what was trained: judged by KL on other text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qconvert.errors import UsageError, uninterrupted
from qconvert.graph import Graph
from qconvert.merge_base import N_SEQUENCES, prompts_of
from qconvert.parallel import default_threads
from qconvert.passes.adapter_slots import alone, filling
from qconvert.passes.refit_adapter import RefitAdapter
from qconvert.request import Request
from qconvert.target import Source
from qconvert.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qconvert")


def refit(request: Request, source: Source, graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """A graph of packed weights with slots, its adapters refitted where KL falls, and notes on each.

    The text is what comes after the sequences that --calibrate is measured on. UsageError where adapters do not stay apart.
    """
    if not request.refit_adapters:
        return graph, ()
    if not source.swap:
        raise UsageError("--refit-adapters: merged adapters have no factors left", hint="--adapters swap")
    if request.dry_run:
        return graph, ()
    with uninterrupted():
        from qconvert.check import torch_threads  # loads torch
    with torch_threads(request.threads or default_threads()):
        prompts, notes = prompts_of(request, source.store, graph, N_SEQUENCES), []
        names = {f"adapter{i}": adapter.name for i, adapter in enumerate(source.adapters)}
        for alias in filling(graph):
            new = RefitAdapter(alias)(graph)
            want = _log_probs(alone(source.graph, alias), source, prompts)
            before, after = (_kl(want, g, alias, source, prompts) for g in (graph, new))
            better = after < before
            graph = new if better else graph
            fate = "refitted" if better else "left as trained: refitting would bring it to"
            told = f"{fate}, mean KL {before:.3g} -> {after:.3g}" if better else f"mean KL {before:.3g}, {fate} {after:.3g}"
            notes.append(f"{names[alias]}: {told} from the model as trained, on text held out")
        return graph, tuple(notes)


def _log_probs(graph: Graph, source: Source, prompts: list[list[int]]) -> Tensor:
    from qconvert.check import log_probs

    return log_probs(graph, Weights(graph, source.store), prompts)


def _kl(want: Tensor, graph: Graph, alias: str, source: Source, prompts: list[list[int]]) -> float:
    """Of the quantized model with an adapter in its slots."""
    import torch

    from qconvert.check import distance
    from qconvert.run import run

    weights = Weights(graph, source.store)
    slots = {slot: torch.from_numpy(weights.real(value)) for slot, value in filling(graph)[alias].items()}
    (logits,) = run(graph, weights, prompts, inputs=slots).values()
    return distance(want, torch.log_softmax(logits, -1), prompts).mean_kl
