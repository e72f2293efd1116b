"""What a conversion cost, on text: how far the quantized model's answers are from those of what was trained, in f32.

One float a token is kept, never the logits of all. Where adapters were merged it also says which share of what they taught
is left: 1 - KL(tuned, quantized) / KL(tuned, base).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qconvert.evaluation import Text
from qconvert.graph import Graph, Node
from qconvert.reals import Reals
from qconvert.run import run
from qconvert.scheme import F32, scheme_of
from qconvert.weights import Weights, rows_per_block

VALUES = 1 << 25  # logits at a time: 128 MB
CUT = "norm"  # the last value before the head
MAKING = ("part", "transpose", "shifted")  # ops by which a checkpoint's tensor becomes a weight
BINS = 48  # of the histogram of KL, ten to a power of ten from 1e-8 on
Batch = list[list[int]]


class Model(NamedTuple):
    graph: Graph
    weights: Reals


class Answers(NamedTuple):
    """Over all positions: KL to the reference in nats, whether the top token is its; of each next token the two NLL."""

    kl: F32
    same_top: F32
    nll: F32
    nll_reference: F32


class Told(NamedTuple):
    """How a model answers. hidden: the relative error of the residual stream after each layer; moments: by weight, the mean
    square of each input channel of its linears. Both are empty where it was not looked at closely."""

    answers: Answers
    hidden: dict[str, float]
    moments: dict[str, F32]


def answers(reference: Model, other: Model, text: Text) -> Answers:
    """How `other` answers, held against `reference`."""
    return all_answers(reference, [(other, False)], text)[0].answers


def all_answers(reference: Model, others: Sequence[tuple[Model, bool]], text: Text) -> list[Told]:
    """How each answers, held against `reference`, which reads the text once for all. True: look at it closely."""
    found = [_Listening(reference, other, closely) for other, closely in others]
    for batch in batches(text.sequences, width(reference.graph)):
        want = trunk(reference, batch, list(dict.fromkeys(name for each in found for name in each.layers)))
        cuts = [each.hears(batch, want) for each in found]
        want = {CUT: want[CUT]} if CUT in want else {}
        for i, sequence in enumerate(batch):
            p, nexts = logits(reference, sequence, want, i), torch.tensor([*sequence[1:], 0])
            for each, cut in zip(found, cuts, strict=True):
                each.parts.append(distances(p, logits(each.model, sequence, cut, i), nexts))
    return [each.told(text.n_tokens) for each in found]


class _Listening:
    """What is known so far of one model."""

    def __init__(self, reference: Model, model: Model, closely: bool) -> None:
        self.model, self.closely, self.parts = model, closely, list[Answers]()
        self.layers = layer_outputs(reference.graph, model.graph) if closely else []
        self.errors, self.norms = dict.fromkeys(self.layers, 0.0), dict.fromkeys(self.layers, 0.0)
        self.squares: dict[str, Tensor] = {}

    def hears(self, batch: Batch, want: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is before its head; its layers against those that are wanted."""
        state = trunk(self.model, batch, self.layers, self.squares if self.closely else None)
        for name in self.layers:
            right, got = want[name].double(), state[name].double()
            self.errors[name] += float((got - right).square().sum())
            self.norms[name] += float(right.square().sum())
        return {CUT: state[CUT]} if CUT in state else {}

    def told(self, n_tokens: int) -> Told:
        hidden = {name: math.sqrt(self.errors[name] / max(self.norms[name], 1e-30)) for name in self.layers}
        moments = {name: (total / n_tokens).float().numpy() for name, total in self.squares.items()}
        return Told(Answers(*(np.concatenate(each) for each in zip(*self.parts, strict=True))), hidden, moments)


def width(graph: Graph) -> int:
    """Values of the widest activation of a token before the head."""
    sizes = [node.type.shape[-1] for node in graph.nodes.values() if node.op == "linear"]
    return max(int(n) for n in sizes[:-1] or sizes)


def batches(sequences: Sequence[list[int]], width: int) -> Iterator[Batch]:
    step = max(1, VALUES // (len(sequences[0]) * width))
    for i in range(0, len(sequences), step):
        yield list(sequences[i : i + step])


def trunk(
    model: Model, batch: Batch, layers: Sequence[str], squares: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is before the head, and the residual stream after each layer. squares: weight -> sums of squares of its inputs."""
    graph = model.graph

    def observe(name: str, node: Node, inputs: tuple[Tensor, ...]) -> None:
        if squares is not None and node.op == "linear":
            total = inputs[0].double().square().flatten(0, -2).sum(0)
            squares[node.inputs[1]] = squares.get(node.inputs[1], torch.zeros_like(total)) + total

    wanted = [*layers, *([CUT] if CUT in graph.nodes else [])]
    return run(graph, model.weights, batch, want=wanted, observe=observe) if wanted else {}


def distances(p: Tensor, q: Tensor, nexts: Tensor, step: int = 64) -> Answers:
    """Of logits [T,V], f64 where it matters: that of f32 log-probabilities is 1e-8 nats off."""
    parts = []
    for at in range(0, len(p), step):
        a, b = (torch.log_softmax(x[at : at + step].double(), -1) for x in (p, q))
        nll = [-x.gather(-1, nexts[at : at + step, None])[:, 0] for x in (b, a)]
        parts.append([(a.exp() * (a - b)).sum(-1), (a.argmax(-1) == b.argmax(-1)).double(), *nll])
    kl, same, *both = (torch.cat(each).float().numpy() for each in zip(*parts, strict=True))
    return Answers(kl.clip(0), same, *(nll[:-1] for nll in both))  # rounding can leave a divergence a hair below zero


def logits(model: Model, sequence: list[int], state: Mapping[str, Tensor], i: int) -> Tensor:
    """[T,V] of sequence i."""
    known = {CUT: state[CUT][i : i + 1]} if CUT in state else {}
    (found,) = run(model.graph, model.weights, [sequence], known=known).values()
    return found[0]


def layer_outputs(a: Graph, b: Graph) -> list[str]:
    """The residual stream after each layer, in order."""
    found: dict[int, str] = {}
    for name in a.nodes:
        if (m := re.fullmatch(r"l(\d+)\.h2(_norm)?", name)) and name in b.nodes:
            found[int(m[1])] = name
    return [found[i] for i in sorted(found)]


# the report ---------------------------------------------------------------------------------------


def quality(reference: Model, quantized: Sequence[Model], base: Model | None, text: Text) -> list[dict[str, Any]]:
    """All of it as the report has it, of each output. base: the model before its adapters, where they are merged."""
    others = [*((model, True) for model in quantized), *([(base, False)] if base is not None else [])]
    found, out = all_answers(reference, others, text), []
    before = float(found[-1].answers.kl.mean(dtype=np.float64)) if base is not None else None
    for model, (said, hidden, moments) in zip(quantized, found, strict=False):
        facts: dict[str, Any] = {
            "text": text.name, "digest": text.digest, "n_tokens": text.n_tokens, "sequence": len(text.sequences[0]),
            **summary(said), "histogram": histogram(said.kl),
            "layers": [{"layer": i, "relative_error": e} for i, e in enumerate(hidden.values())],
            "tensors": tensor_errors(model, moments),
        }  # fmt: skip
        if before is not None:
            kl = facts["mean_kl"]
            facts["fine_tune"] = {"kl_base": before, "kl_quantized": kl, "share": share(kl, before)}
        out.append(facts)
    return out


def summary(found: Answers) -> dict[str, float]:
    quantized, reference = (float(nll.mean(dtype=np.float64)) for nll in (found.nll, found.nll_reference))
    return {
        "mean_kl": float(found.kl.mean(dtype=np.float64)),
        "p99_kl": float(np.quantile(found.kl, 0.99)), "p999_kl": float(np.quantile(found.kl, 0.999)),
        "max_kl": float(found.kl.max()), "top1": float(found.same_top.mean(dtype=np.float64)),
        "perplexity": exp(quantized), "perplexity_reference": exp(reference), "perplexity_ratio": exp(quantized - reference),
    }  # fmt: skip


def exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def share(kl_quantized: float, kl_base: float) -> float | None:
    """Of a fine-tune, what survives; below 0 where quantization moved the model more than the tuning did."""
    return 1 - kl_quantized / kl_base if kl_base > 0 else None


def histogram(kl: F32) -> list[int]:
    """Counts by log10: bin i is from 10**(i/6 - 8), what is smaller or larger in the outermost."""
    at = np.floor(6 * (np.log10(np.maximum(kl, 1e-30)) + 8)).clip(0, BINS - 1).astype(int)
    return [int(n) for n in np.bincount(at, minlength=BINS)]


def tensor_errors(model: Model, moments: Mapping[str, F32]) -> list[dict[str, Any]]:
    """Of each quantized weight: |W - Q|^2 / |W|^2; and the same with each input channel by its mean square on the text."""
    graph, weights = model.graph, model.weights
    assert isinstance(weights, Weights)
    rows = []
    for name in graph.apart():
        real, kind = before_rounding(graph, name), graph.nodes[name].type
        if real is None or len(kind.dims) < 2 or graph.nodes[real].type.dims != kind.dims:
            continue
        scheme = kind.dtype.rpartition(".")[2]
        moment = moments.get(name)
        plain, weighted = squared_errors(weights, name, real, None if moment is None else np.asarray(moment, np.float64))
        rows.append({"tensor": name, "type": scheme, "quantized": scheme_of(scheme) is not None, "error": plain,
                     "weighted": weighted})  # fmt: skip
    return rows


def before_rounding(graph: Graph, name: str) -> str | None:
    """The value that a weight was before it was quantized or cast; None where it was not."""
    made = graph.nodes[name].op in MAKING  # of what a checkpoint stores
    return None if made else next((r for r in (f"{name}~real", f"{name}~stored") if r in graph.nodes), None)


def squared_errors(weights: Weights, name: str, real: str, moment: Any) -> tuple[float, float | None]:
    kind = weights.graph.nodes[name].type
    step, sums = rows_per_block(kind.dims[-1]), np.zeros(4)
    for i in range(0, kind.rows, step):
        w, q = (weights.real(v, i, min(kind.rows, i + step)).astype(np.float64) for v in (real, name))
        error, norm = np.square(q - w).sum(0), np.square(w).sum(0)
        sums[:2] += error.sum(), norm.sum()
        if moment is not None and len(moment) == len(norm):
            sums[2:] += error @ moment, norm @ moment
    return float(sums[0] / max(sums[1], 1e-30)), float(sums[2] / sums[3]) if sums[3] else None
