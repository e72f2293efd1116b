"""Encoders: what to ask them, and how far apart two answers are: hidden states and embeddings of padded texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from qconvert import check
from qconvert.check import LIMITS
from qconvert.companions import n_vocab
from qconvert.graph import Graph
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.run import run
from qconvert.sources import Store
from qconvert.target import Stage
from qconvert.tokenizer import hard_corpus
from qconvert.weights import Weights


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


# what to ask --------------------------------------------------------------------------------------


def encoder_of(folder: Path) -> Callable[[str], list[int]]:
    """The folder's own tokenizer, as the `tokenizers` library reads it."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        return lambda _: []
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # a bare Exception is what it raises; its files are carried as they are
        return lambda _: []
    return lambda text: list(tokenizer.encode(text).ids)


def texts(graph: Graph, encode: Callable[[str], list[int]], context: int) -> Texts:
    """Four texts, the later ones shorter and padded; the first two have a second part where the model knows kinds."""
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


def answers(graph: Graph, reals: Reals, some: Texts) -> Answers:
    return kept(run(graph, reals, some.tokens, inputs=some.inputs), some)


def kept(outputs: Mapping[str, torch.Tensor], some: Texts) -> Answers:
    """From the outputs in their order."""
    hidden, *vectors = outputs.values()
    return Answers(hidden[some.inputs["attention_mask"] != 0], vectors[0] if vectors else None)


def stage_rows(stages: Sequence[Stage], store: Store, some: Texts) -> tuple[list[Row], Answers]:
    """A row for each step from what was trained to what will be quantized, and the last one's answers."""
    question = some.tokens.tolist(), [(s.name, s.exact, s.graph) for s in stages]
    rows, last = store.known("stages", question, lambda: _stage_rows(stages, store, some))
    return list(rows), last


def _stage_rows(stages: Sequence[Stage], store: Store, some: Texts) -> tuple[list[Row], Answers]:
    rows = []
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
