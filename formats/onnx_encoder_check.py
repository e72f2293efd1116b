"""Prove the folder of an encoder: hidden states and embeddings of padded texts, against the graph's, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS
from qconvert.companions import n_vocab
from qconvert.formats import onnx_int8_check as int8
from qconvert.formats.onnx_arch import context_length
from qconvert.formats.onnx_check import (
    RUNTIME,
    FileReals,
    file_rows,
    first_rows,
    is_rounded,
    no_words,
    round_activations,
)
from qconvert.formats.onnx_kernels import kernel_rows, kernels_of
from qconvert.formats.onnx_lowering import INPUTS
from qconvert.formats.onnx_reference import interpreted
from qconvert.formats.onnx_runtime import OnnxRuntime, session
from qconvert.graph import Graph
from qconvert.report import Row, judged
from qconvert.run import Reals, RoundInput, run
from qconvert.target import Lowered, Source, Stage
from qconvert.tokenizer import hard_corpus
from qconvert.weights import Weights

N_REFERENCE = 8  # tokens of each text that the onnx package's own reference runs


class Texts(NamedTuple):
    """Ids i64[B,T] of texts of several lengths, and the graph's other inputs by name: what is padding, which kind of text."""

    tokens: torch.Tensor
    inputs: Mapping[str, torch.Tensor]

    def part(self, n: int) -> Texts:
        """n tokens of each, around the shortest one's end."""
        begin = max(0, int(self.inputs["attention_mask"].sum(1).min()) - n // 2)
        return Texts(self.tokens[:, begin : begin + n], {k: x[:, begin : begin + n] for k, x in self.inputs.items()})


class Answers(NamedTuple):
    """Hidden states f32[tokens,D] without those of padding, and the vector f32[B,D] of each text where the model has one."""

    hidden: torch.Tensor
    embeddings: torch.Tensor | None


def prove(
    source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks in the order of the stages, and the runtime that ran (None where there is none)."""
    path, graph = parts[0], lowered.graph
    rows, reals = file_rows(path, lowered, weights, threads)
    if any(row.verdict == "fail" for row in rows[1:]):
        return rows, None
    some = texts(graph, encoder_of(path.parent))
    with check.torch_threads(threads):
        steps, merged = stage_rows(lowered.stages, source, some)
        exact = answers(graph, reals, some)
        rows += [*steps, *price_rows("price of the bits", merged, exact)]
        rows += reference_rows(path, some.part(N_REFERENCE), graph, reals)
        if reason := OnnxRuntime().missing():
            return [*rows, Row(RUNTIME, "not verified", None, None, "skip", reason)], None
        rows += kernel_rows(kernels_of(first_rows(graph, reals.planes)))
        rows += int8.kernel_rows(graph, lambda name, n: reals.packed(name, 0, n))
        rows += runtime_rows(path, graph, reals, some, exact, threads, lowered.options.accuracy_level)
    return rows, {"name": OnnxRuntime.name, "version": OnnxRuntime().version()}


# what to ask --------------------------------------------------------------------------------------


def encoder_of(folder: Path) -> Callable[[str], list[int]]:
    """The folder's own tokenizer, as the `tokenizers` library reads it."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        return no_words
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # a bare Exception is what it raises; its files are carried as they are
        return no_words
    return lambda text: list(tokenizer.encode(text).ids)


def texts(graph: Graph, encode: Callable[[str], list[int]]) -> Texts:
    """Four texts, the later ones shorter and padded; the first two have a second part where the model knows kinds."""
    context, _ = context_length(graph)
    tokens = torch.tensor(check.prompts_for(encode, hard_corpus(), n_vocab(graph), context))
    n = tokens.shape[1]
    at, lengths = torch.arange(n), torch.tensor([n, n, -(-2 * n // 3), -(-n // 3)])
    kinds = torch.zeros_like(tokens)
    kinds[:2, n // 2 :] = int(n_kinds(graph) > 1)
    return Texts(tokens, {"attention_mask": (at < lengths[:, None]).long(), "token_types": kinds})


def n_kinds(graph: Graph) -> int:
    return max((graph.nodes[node.inputs[1]].type.dims[0] for node in graph.nodes.values()
                if node.op == "embed" and node.inputs[0] == "token_types"), default=1)  # fmt: skip


# the graph ----------------------------------------------------------------------------------------


def answers(graph: Graph, reals: Reals, some: Texts, other: RoundInput | None = None) -> Answers:
    """other: how activations are rounded where the graph does not say it itself; None: nowhere at all."""
    if other is None:
        return kept(run(graph, reals, some.tokens, inputs=some.inputs), some)
    return kept(run(graph, reals, some.tokens, inputs=some.inputs, **int8.hooks(None, other)), some)


def kept(outputs: Mapping[str, torch.Tensor], some: Texts) -> Answers:
    """From the outputs in their order."""
    hidden, *vectors = outputs.values()
    return Answers(hidden[some.inputs["attention_mask"] != 0], vectors[0] if vectors else None)


def stage_rows(stages: tuple[Stage, ...], source: Source, some: Texts) -> tuple[list[Row], Answers]:
    """A row for each step from what was trained to what will be quantized, and the last one's answers."""
    rows, store = [], source.store
    before = answers(stages[0].graph, Weights(stages[0].graph, store), some)
    for old, new in pairwise(stages):
        after = answers(new.graph, Weights(new.graph, store), some)
        error = relative(after.hidden, before.hidden)
        row = Row(new.name, HIDDEN, error, None, "info")
        if new.exact:
            row = judged(new.name, HIDDEN, error, LIMITS["merge, hidden states"][0])
        if row.verdict == "fail":
            where = check.first_difference(old.graph, new.graph, store, some.tokens[0].tolist())
            row = row._replace(reason=f"first difference at {where}")
        rows.append(row)
        before = after
    return rows, before


# distances ----------------------------------------------------------------------------------------

HIDDEN, EMBEDDINGS = "relative error of hidden states", "relative error of embeddings"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def judged_rows(what: str, got: Answers, want: Answers, limit: float) -> list[Row]:
    rows = [judged(what, HIDDEN, relative(got.hidden, want.hidden), limit)]
    if got.embeddings is not None and want.embeddings is not None:
        rows.append(judged(what, EMBEDDINGS, relative(got.embeddings, want.embeddings), limit))
    return rows


def price_rows(what: str, before: Answers, after: Answers) -> list[Row]:
    """Reported, not judged. Cosines of embeddings with what they were: the mean and the worst."""
    rows = [Row(what, HIDDEN, relative(after.hidden, before.hidden), None, "info")]
    if before.embeddings is not None and after.embeddings is not None:
        cosines = torch.nn.functional.cosine_similarity(before.embeddings.double(), after.embeddings.double())
        rows.append(Row(what, "mean cosine of embeddings", float(cosines.mean()), None, "info"))
        rows.append(Row(what, "worst cosine of embeddings", float(cosines.min()), None, "info"))
    return rows


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
