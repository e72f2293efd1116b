"""What is measured of outputs on a text: what was trained reads it once for all that are held against it.

outputs -> groups of one reference and one text -> quality.quality, side by side -> facts of each, or why there are none
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qconvert.companions import gives_logits, tokenizer_of
from qconvert.errors import QConvertError, uninterrupted
from qconvert.evaluation import affordable, evaluation_text, overlap
from qconvert.lowering import torch_threads_of
from qconvert.request import Request
from qconvert.target import Lowered, Source
from qconvert.weights import Weights

Found = Mapping[str, Any] | QConvertError


class Asked(NamedTuple):
    """An output. weights: of its graph."""

    request: Request
    source: Source
    lowered: Lowered
    weights: Weights


def measured(outputs: Mapping[int, Asked]) -> dict[int, Found]:
    """The quality of each quantized graph, by its number. An --eval that is no text is the error of those that name it."""
    found: dict[int, Found] = {}
    groups: dict[tuple[object, ...], dict[int, Asked]] = {}
    for i, each in outputs.items():
        if why := not_measured(each):
            found[i] = {"skipped": why}
        else:
            key = id(each.lowered.stages[0].graph), each.request.eval, each.request.eval_tokens
            groups.setdefault(key, {})[i] = each
    for group in groups.values():
        found |= measured_together(group)
    return found


def not_measured(output: Asked) -> str | None:
    reference, final = output.lowered.stages[0].graph, output.lowered.graph
    if not gives_logits(final):
        return "the model gives no logits"
    if tokenizer_of(output.source, reference) is None:
        return "the model has no tokenizer that could cut a text"
    return "--eval-tokens 0" if output.request.eval_tokens == 0 else None


def measured_together(outputs: Mapping[int, Asked]) -> Mapping[int, Found]:
    """Of outputs with one reference and one text; where that fails, of each by itself."""
    with uninterrupted():
        from qconvert.quality import Model, quality  # loads torch
    request, source, lowered, _ = next(iter(outputs.values()))
    reference, tuned = lowered.stages[0].graph, bool(source.adapters) and not source.swap
    try:
        tokenizer, n = tokenizer_of(source, reference), request.eval_tokens or affordable(reference, 3 if tuned else 2)
        assert tokenizer is not None
        text = evaluation_text(request.eval, tokenizer, reference, n)
        base = Model(source.base, Weights(source.base, source.store)) if tuned else None
        with torch_threads_of(request):
            models = [Model(each.lowered.graph, each.weights) for each in outputs.values()]
            found = quality(Model(reference, Weights(reference, source.store)), models, base, text)
    except QConvertError as e:
        if len(outputs) == 1:
            return dict.fromkeys(outputs, e)
        return {i: facts for i, each in outputs.items() for facts in measured_together({i: each}).values()}
    for facts, each in zip(found, outputs.values(), strict=True):
        if each.lowered.calibrated.texts:
            facts["read_by_calibration"] = overlap(each.lowered.calibrated.texts, text.sequences)
    return dict(zip(outputs, found, strict=True))
