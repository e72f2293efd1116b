"""Prove slots: the model with an adapter in them against the model with that adapter beside its linears, as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from qconvert import check
from qconvert.check import Tokens
from qconvert.graph import Graph
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.run import run
from qconvert.target import Lowered
from qconvert.weights import Weights


def attached_and_slotted(lowered: Lowered) -> tuple[Graph, Graph]:
    """The last stage with all adapters beside their linears, and the first with slots."""
    before, after = next((a, b) for a, b in pairwise(lowered.stages) if a.attached and not b.attached)
    assert before.attached is not None
    return before.attached, after.graph


def filled(weights: Weights, values: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Slot -> the factor that an adapter puts there."""
    return {slot: torch.from_numpy(weights.real(value)) for slot, value in values.items()}


def filled_rows(
    name: str, trained: Graph, slotted: Graph, quantized: Graph, weights: Weights, reals: Reals, values: Mapping[str, str],
    prompts: Tokens,
) -> tuple[list[Row], torch.Tensor]:  # fmt: skip
    """Of an adapter alone: slots are what was trained, and the price of the bits; and the logits of the quantized model.

    values: slot -> the weight that the adapter puts there; weights: of all graphs' sources; reals: of the quantized one.
    """
    before, whole = Weights(trained, weights.store), Weights(slotted, weights.store)
    want = check.log_probs(trained, before, prompts)
    (first,) = run(slotted, whole, prompts, inputs=filled(whole, values)).values()
    between = check.distance(want, torch.log_softmax(first, -1), prompts)
    rows = [check.arithmetic_row(f"slots filled by {name}", "merge", between)]
    (logits,) = run(quantized, reals, prompts, inputs=filled(weights, values)).values()
    (mean_kl, *_) = check.price_rows(check.distance(want, torch.log_softmax(logits, -1), prompts))
    return [*rows, mean_kl._replace(what=f"price of the bits, {name}")], logits
