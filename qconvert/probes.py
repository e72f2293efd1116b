"""A handful of prompts and the largest logits that models gave to them: enough to know a model again.

logits f32[T,V] -> Top (ids, values, logsumexp) -> base64          other logits against a Top: KL, relative error
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import misshapen
from qconvert.scheme import Array

TOP = 64
LENGTH = 32  # tokens of a prompt
PROMPTS = 4
MOST = 4096  # tokens of prompts that a file is asked for
NBYTES = 2 * PROMPTS * (LENGTH * (8 * TOP + 8) * 4 // 3 + 4) + 12 * PROMPTS * LENGTH  # of both models' answers as text


class Top(NamedTuple):
    """ids i32[T,k] and logits f32[T,k] of the k likeliest tokens, the likeliest first; lse f64[T] over all tokens."""

    ids: NDArray[np.int32]
    values: NDArray[np.float32]
    lse: NDArray[np.float64]


class Probes(NamedTuple):
    """tokens: ids of each prompt. reference: the model as trained; expected: what the output should answer in its runtime.

    kind: a row of check.LIMITS; metric: "mean KL", or "relative".
    """

    tokens: list[list[int]]
    kind: str
    metric: str
    reference: list[Top]
    expected: list[Top]

    def data(self) -> dict[str, Any]:
        tops = {"reference": list(map(spelled, self.reference)), "expected": list(map(spelled, self.expected))}
        return {"tokens": self.tokens, "kind": self.kind, "metric": self.metric, **tops}


def probes_of(data: Mapping[str, Any], where: str) -> Probes:
    """InputError where the data are not what data() gives."""
    with misshapen(f"{where}: its certificate's probes"):
        tokens = [[int(i) for i in prompt] for prompt in data["tokens"]]
        reference, expected = ([read(t, len(p)) for t, p in zip(data[side], tokens, strict=True)]
                               for side in ("reference", "expected"))  # fmt: skip
        if data["metric"] not in METRICS:
            raise ValueError(f"no metric is called {data['metric']!r}")
        if not 0 < sum(map(len, tokens)) <= MOST or min(map(min, tokens)) < 0:
            raise ValueError(f"prompts of {sum(map(len, tokens))} tokens")
        return Probes(tokens, str(data["kind"]), str(data["metric"]), reference, expected)


def top_of(logits: Array, k: int = TOP) -> Top:
    """Of f32[T,V]."""
    x = np.asarray(logits, np.float32)
    ids = np.argsort(-x, axis=-1, kind="stable")[:, :k].astype(np.int32)
    return Top(ids, np.take_along_axis(x, ids, -1), log_sum_exp(x))


def log_sum_exp(x: Array) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    out: NDArray[np.float64] = np.log(np.exp(wide - peak).sum(-1)) + peak[:, 0]
    return out


def spelled(top: Top) -> str:
    pieces = (top.ids.astype("<i4"), top.values.astype("<f4"), top.lse.astype("<f8"))
    return base64.b64encode(b"".join(p.tobytes() for p in pieces)).decode()


def read(text: str, n: int) -> Top:
    data = base64.b64decode(text, validate=True)
    k, left = divmod(len(data) - 8 * n, 8 * n)
    if left or k < 1:
        raise ValueError(f"{len(data)} bytes are no answers to {n} tokens")
    cut = 4 * n * k
    ids = np.frombuffer(data[:cut], "<i4").reshape(n, k)
    return Top(ids, np.frombuffer(data[cut : 2 * cut], "<f4").reshape(n, k), np.frombuffer(data[2 * cut :], "<f8"))


# how far --------------------------------------------------------------------------------------------


def mean_kl(tops: Sequence[Top], logits: Sequence[Array]) -> float:
    """KL(top || logits) in nats over all positions; the tokens outside of a top count as one. NaN where it is undefined."""
    return float(np.concatenate([kl(t, x) for t, x in zip(tops, logits, strict=True)]).mean())


def kl(top: Top, logits: Array) -> NDArray[np.float64]:
    p, q = (values.astype(np.float64) - lse[:, None] for values, lse in ((top.values, top.lse), answered(top, logits)))
    both = [np.exp(x).sum(-1) for x in (p, q)]
    rest_p, rest_q = (np.maximum(1 - s, 1e-12) for s in both)  # what is less is rounding
    rest = rest_p * (np.log(rest_p) - np.log(rest_q)) if top.ids.shape[1] < logits.shape[1] else 0.0
    out: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1) + rest
    return out


def relative(tops: Sequence[Top], logits: Sequence[Array]) -> float:
    """|other - top| / |top| of the worst prompt; NaN stays NaN."""
    return float(np.max([np.linalg.norm(answered(t, x)[0] - t.values) / max(float(np.linalg.norm(t.values)), 1e-30)
                         for t, x in zip(tops, logits, strict=True)]))  # fmt: skip


def answered(top: Top, logits: Array) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Another model's logits of the tokens of a top, and its logsumexp. ValueError where it has fewer tokens."""
    if logits.shape[0] != len(top.ids) or (top.ids.size and not 0 <= top.ids.min() <= top.ids.max() < logits.shape[1]):
        raise ValueError(f"logits {list(logits.shape)} have not the tokens that were asked for")
    return np.take_along_axis(np.asarray(logits, np.float32), top.ids, -1), log_sum_exp(logits)


METRICS = {"mean KL": mean_kl, "relative": relative}
