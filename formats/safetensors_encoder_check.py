"""What an encoder's folder says to padded texts in transformers, against the graph."""

from __future__ import annotations

from pathlib import Path

from qconvert.check import LIMITS
from qconvert.encoder_check import Answers, Texts, answers, encoder_of, judged_rows, kept, price_rows, stage_rows, texts
from qconvert.formats.safetensors_transformers import Model
from qconvert.graph import Graph
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.target import Lowered, Source

INPUTS = {"token_types": "token_type_ids"}  # where transformers calls an input otherwise


def asked(folder: Path, graph: Graph, context: int) -> Texts:
    return texts(graph, encoder_of(folder), context)


def graph_rows(source: Source, lowered: Lowered, reals: Reals, some: Texts) -> list[Row]:
    """From what was trained to what the folder holds."""
    steps, merged = stage_rows(lowered.stages, source.store, some)
    return [*steps, *price_rows("price of the bits", merged, answers(lowered.graph, reals, some))]


def runtime_rows(what: str, model: Model, graph: Graph, expected: Reals, some: Texts) -> list[Row]:
    """Hidden states alone: pooling is not transformers' part."""
    inputs = {INPUTS.get(name, name): value for name, value in some.inputs.items()}
    got = kept({"hidden": model.hidden(some.tokens, inputs)}, some)
    want = Answers(answers(graph, expected, some).hidden, None)
    return judged_rows(what, got, want, LIMITS["runtime transformers"][0])
