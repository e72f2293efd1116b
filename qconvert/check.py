"""Prove an output: the same prompts through every stage, each stage against the one before it.

    unmerged (as trained) -> merged -> quantized (interpreted) -> file (read by others' code) -> runtime (its own kernels)

Only merged -> quantized may lose anything: it is the price of the bits. Every other step is arithmetic, so its bound is
tight, and the first step that breaks it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from qconvert.graph import Graph
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.run import RoundInput, run
from qconvert.sources import Store
from qconvert.target import Stage
from qconvert.weights import Weights

Tokens = list[list[int]]
LogProbs = torch.Tensor


class RuntimeModel(Protocol):
    """An opened artifact."""

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]: ...

    def close(self) -> None: ...


class Runtime(Protocol):
    """Something that runs an artifact by its own kernels."""

    name: str

    def missing(self) -> str | None: ...

    def version(self) -> str: ...

    def open(self, path: Path, n_ctx: int, threads: int) -> Any: ...


# what -> (limit, the measurement it came from)
LIMITS: dict[str, tuple[float, str]] = {
    "merge": (
        1e-6,
        "f32 noise: the shipped adapters merge at KL 1e-12 to 1e-10; a dropped or misscaled delta is > 1e-3",
    ),
    "file": (1e-9, "the same codes through gguf-py: equal values, so equal logits but for the order of sums"),
    "runtime f32": (1e-5, "llama.cpp against the interpreter, f32 files: KL <= 6e-7"),
    "runtime f16": (1e-4, "f16 and bf16 files: KL <= 2.5e-6; every known mismatch of conversion is > 1.7e-3"),
    # With activations rounded as ggml rounds them. What is left are roundings that fall the other way, which another
    # order of sums decides: noise of 1e-6 on the activations alone moves golden/tiny by KL 4e-4. So the kernels are
    # held tightly, the logits loosely.
    "runtime blocks of 256": (2e-3, "Q8_K activations (K-quants, IQ4_XS): KL 7e-6 to 3e-5 on three trained models"),
    "runtime blocks of 32": (4e-3, "Q8_0 and Q8_1 activations: KL 2e-5 to 1.3e-3, most where rows of 64 fall back to Q4_1"),
    "runtime onnxruntime": (1e-4, "logits, relative: f32 sums in another order, 2e-7 to 8e-7"),
    "runtime onnxruntime f16": (1e-2, "verify: f16 weights 2e-4, with room for f16 activations; a model that is another: 0.3"),
    "runtime transformers": (1e-4, "logits in f32, relative, weights rounded as it loads them: 2e-7 to 1e-6"),
    "runtime transformers, 8-bit tokens": (2e-2, "the same, activations rounded in the graph too: a code may be a neighbour"),
    "runtime mlx-lm": (4e-3, "logits in f32, relative: 4e-7 to 1e-6; gemma's rounded root 1e-3; a setting not read > 3e-2"),
    "price": (4.0, "verify: mean KL over that of our own quantizer: genai's builder 0.7 to 1.2, a wrong model over 13"),
    "runtime 8-bit activations": (4e-3, "activations rounded by weight group in the graph too: KL 6e-6 to 3e-4 on golden/tiny"),
    "merge, hidden states": (1e-5, "relative: f32 noise of an encoder's merge; a dropped or misscaled delta is > 1e-3"),
    "runtime 8-bit activations, hidden states": (
        3e-3, "relative, rounded in the graph too: 7e-4 on two layers; on MiniLM's six 2e-2, as rounding itself (2.3e-2)"
    ),
    "greedy": (1e-3, "a token that is not the best but for rounding; the second best is mostly 0.1 to 2 spreads below"),
    "kernel": (1e-5, "one product by the runtime's kernel against f64: sums of f32, 6e-8 to 3e-7"),
    "kernel, rounded": (0.01, "codes of 8 bits that differ: none; a product within 1e-7 of a code's end may fall either way"),
    "kernel, 8-bit activations": (5e-3, "experts, inner activations rounded too: 3e-7, 1e-3 where one falls the other way"),
    "kernel, f16 offset": (5e-3, "q4_1 and q5_1 multiply their offset by a sum of activations in f16: 4e-4 to 1.1e-3"),
    "weights": (3.0, "verify: error over that of ggml's quantizer; importance matrices and other solvers stay below 1.5"),
}


def log_probs(graph: Graph, weights: Reals, prompts: Tokens, round_input: RoundInput | None = None) -> LogProbs:
    """Log-probabilities f32[B,T,V] of prompts of one length."""
    (logits,) = run(graph, weights, prompts, round_input=round_input).values()
    return torch.log_softmax(logits, -1)


def runtime_log_probs(model: RuntimeModel, prompts: Tokens) -> LogProbs:
    return torch.log_softmax(torch.stack([torch.from_numpy(np.array(model.logits(p))) for p in prompts]), -1)


class Distance(NamedTuple):
    """How far q is from p: mean and largest KL(p||q) in nats over positions, and the share of equal top tokens."""

    mean_kl: float
    max_kl: float
    top1: float
    delta_nll: float


def distance(p: LogProbs, q: LogProbs, prompts: Tokens) -> Distance:
    kl = torch.stack([(a.double().exp() * (a.double() - b.double())).sum(-1) for a, b in zip(p, q, strict=True)])
    nexts = torch.tensor(prompts)[:, 1:, None]
    nll_p, nll_q = (-x[:, :-1].gather(-1, nexts).mean().item() for x in (p, q))
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    # rounding can leave a mean a hair below zero
    return Distance(abs(kl.mean().item()), kl.max().item(), top1, nll_q - nll_p)


def relative(got: npt.NDArray[np.float32], want: torch.Tensor) -> float:
    """Of one prompt: |got - want| / |want|; NaN stays NaN, which fails."""
    return float((torch.from_numpy(got) - want).norm() / want.norm().clamp_min(1e-30))


def arithmetic_row(what: str, kind: str, d: Distance) -> Row:
    limit, _ = LIMITS[kind]
    return judged(what, "mean KL", d.mean_kl, limit)


def price_rows(d: Distance) -> list[Row]:
    """What the bits cost: reported, not judged; gates are the user's to set."""
    return [
        Row("price of the bits", "mean KL", d.mean_kl, None, "info"),
        Row("price of the bits", "top-1 changed", 1 - d.top1, None, "info"),
        Row("price of the bits", "NLL change", d.delta_nll, None, "info"),
    ]


def stage_rows(stages: Sequence[Stage], store: Store, prompts: Tokens) -> tuple[list[Row], LogProbs]:
    """A row for each step from what was trained to what will be quantized, and the last one's log-probabilities."""
    question = prompts, [(s.name, s.exact, s.graph) for s in stages]
    rows, last = store.known("stages", question, lambda: _stage_rows(stages, store, prompts))
    return list(rows), last


def _stage_rows(stages: Sequence[Stage], store: Store, prompts: Tokens) -> tuple[list[Row], LogProbs]:
    rows: list[Row] = []
    before = log_probs(stages[0].graph, Weights(stages[0].graph, store), prompts)
    if not bool((before != before[:, :, :1]).any()):  # what says nothing is equal to whatever else says nothing
        rows.append(judged("the model as it was trained", "all logits are alike", 1.0, 0.0, "are its weights zeros?"))
    for old, new in pairwise(stages):
        after = log_probs(new.graph, Weights(new.graph, store), prompts)
        d = distance(before, after, prompts)
        row = arithmetic_row(new.name, "merge", d) if new.exact else Row(new.name, "mean KL", d.mean_kl, None, "info")
        if row.verdict == "fail":
            row = row._replace(reason=f"first difference at {first_difference(old.graph, new.graph, store, prompts[0])}")
        rows.append(row)
        before = after
    return rows, before


def first_difference(a: Graph, b: Graph, store: Store, prompt: Sequence[int], tolerance: float = 1e-3) -> str | None:
    """The first linear or embed, in order, whose results differ relatively by more than `tolerance`, with its weight."""
    names = [n for n, node in b.nodes.items() if node.op in ("linear", "embed") and n in a.nodes]
    left, right = (run(g, Weights(g, store), [list(prompt)], want=names) for g in (a, b))
    for name in names:
        peak = left[name].abs().max().clamp_min(1e-12)
        if ((left[name] - right[name]).abs().max() / peak).item() > tolerance:
            return f"%{name} ({b.nodes[name].inputs[1]})"
    return None


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """torch on n threads, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompts_for(
    encode: Callable[[str], list[int]], corpus: Sequence[str], n_vocab: int, context: int, texts: Sequence[str] = ()
) -> Tokens:
    """Four prompts of one length: two of the mixed-script corpus, one of `texts` or plain English, one of random ids."""
    length = max(2, min(96, context, max(16, (1 << 23) // n_vocab)))
    rng = np.random.default_rng(0)
    cut = len(corpus) // 2
    sources = ["\n".join(corpus[:cut]), "\n".join(corpus[cut:]), "\n".join(texts) or " ".join(corpus[:6])]
    prompts = []
    for text in sources:
        ids = [i for i in encode(text) if i < n_vocab][:length]
        fill = rng.integers(0, n_vocab, length - len(ids)).tolist()
        prompts.append(ids + fill)
    return [*prompts, rng.integers(0, n_vocab, length).tolist()]


def equal_ids_row(what: str, pairs: Sequence[tuple[str, list[int], list[int]]]) -> Row:
    """pairs: text, the tokenizer's ids, the runtime's ids."""
    wrong = [(text, want, got) for text, want, got in pairs if want != got]
    reason = ""
    if wrong:
        text, want, got = wrong[0]
        reason = f"{text[:40]!r}: {want[:8]} became {got[:8]}"
    return judged(what, f"of {len(pairs)} texts differ", float(len(wrong)), 0.0, reason)
