"""Prove the folder of an encoder: hidden states and embeddings of padded texts, against the graph's, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert import check, encoder_check
from qconvert.check import LIMITS
from qconvert.encoder_check import Answers, Texts, encoder_of, judged_rows, kept, price_rows, relative, stage_rows, texts
from qconvert.formats import onnx_int8_check as int8
from qconvert.formats.onnx_arch import context_length
from qconvert.formats.onnx_check import (
    RUNTIME,
    FileReals,
    file_rows,
    first_rows,
    is_rounded,
    round_activations,
)
from qconvert.formats.onnx_kernels import kernel_rows, kernels_of
from qconvert.formats.onnx_lowering import INPUTS
from qconvert.formats.onnx_reference import interpreted
from qconvert.formats.onnx_runtime import OnnxRuntime, session
from qconvert.graph import Graph
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.run import RoundInput, run
from qconvert.target import Lowered, Source
from qconvert.weights import Weights

N_REFERENCE = 8  # tokens of each text that the onnx package's own reference runs


def prove(
    source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks in the order of the stages, and the runtime that ran (None where there is none)."""
    path, graph = parts[0], lowered.graph
    rows, reals = file_rows(path, lowered, weights, threads)
    if any(row.verdict == "fail" for row in rows[1:]):
        return rows, None
    some = texts(graph, encoder_of(path.parent), context_length(graph)[0])
    with check.torch_threads(threads):
        steps, merged = stage_rows(lowered.stages, source.store, some)
        exact = answers(graph, reals, some)
        rows += [*steps, *price_rows("price of the bits", merged, exact)]
        rows += reference_rows(path, some.part(N_REFERENCE), graph, reals)
        if reason := OnnxRuntime().missing():
            return [*rows, Row(RUNTIME, "not verified", None, None, "skip", reason)], None
        rows += kernel_rows(kernels_of(first_rows(graph, reals.planes)))
        rows += int8.kernel_rows(graph, lambda name, n: reals.packed(name, 0, n))
        rows += runtime_rows(path, graph, reals, some, exact, threads, lowered.options.accuracy_level)
    return rows, {"name": OnnxRuntime.name, "version": OnnxRuntime().version()}


# the graph ----------------------------------------------------------------------------------------


def answers(graph: Graph, reals: Reals, some: Texts, other: RoundInput | None = None) -> Answers:
    """other: how activations are rounded where the graph does not say it itself; None: nowhere at all."""
    if other is None:
        return encoder_check.answers(graph, reals, some)
    return kept(run(graph, reals, some.tokens, inputs=some.inputs, **int8.hooks(None, other)), some)


# the runtimes -------------------------------------------------------------------------------------


def of_session(opened: Any, some: Texts, apart: bool) -> Answers:
    """What an onnxruntime session, or the like, says to all texts at once; or to each apart, where a range is of all."""
    values = {"tokens": some.tokens, **some.inputs}
    named = {INPUTS[name]: value.numpy() for name, value in values.items()}
    feeds = {i.name: named[i.name] for i in opened.get_inputs()}
    step = 1 if apart else len(some.tokens)
    parts = [opened.run(None, {k: v[i : i + step] for k, v in feeds.items()}) for i in range(0, len(some.tokens), step)]
    return kept({str(i): torch.from_numpy(np.concatenate(x)) for i, x in enumerate(zip(*parts, strict=True))}, some)


def reference_rows(path: Path, some: Texts, graph: Graph, reals: Reals) -> list[Row]:
    """It rounds what the graph says, and nothing else."""
    opened, limit = interpreted(path), LIMITS[RUNTIME][0]
    if isinstance(opened, Row):
        return [opened]
    want = answers(graph, reals, some, lambda _, x: x)
    if integer := int8.is_integer(graph):
        limit = rounding_limit(answers(graph, reals, some), want)
    return judged_rows("onnx.reference", of_session(opened, some, integer), want, limit)


def runtime_rows(
    path: Path, graph: Graph, reals: FileReals, some: Texts, exact: Answers, threads: int, level: int
) -> list[Row]:
    """All texts with activations in f32, and as the file is, where its kernels round them to 8 bits."""
    rows = judged_rows(f"{RUNTIME}, texts", of_session(session(path, threads, True), some, False), exact, LIMITS[RUNTIME][0])
    if not is_rounded(graph) or level != 4:
        return rows
    got = of_session(session(path, threads, False), some, int8.is_integer(graph))
    want = answers(graph, reals, some, lambda node, x: round_activations(graph, node, x))
    rows += judged_rows(f"{RUNTIME}, 8-bit activations, texts", got, want, rounding_limit(exact, want))
    return [*rows, *price_rows("price of 8-bit activations", exact, got)]


def rounding_limit(exact: Answers, rounded: Answers) -> float:
    """How far apart two that round alike may be: a little more than two that have nothing to do with each other.

    That is sqrt(2) times their distance from exact arithmetic: one value that falls the other way moves all after it.
    """
    return max(LIMITS["runtime 8-bit activations, hidden states"][0], 2 * relative(rounded.hidden, exact.hidden))
