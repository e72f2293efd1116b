"""The second oracle: the file as standard nodes alone, run by the onnx package's reference implementation.

Functions are inlined by the onnx package too, so nothing of onnxruntime takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qconvert.check import LIMITS, distance
from qconvert.formats.onnx_proto import CONTRIB
from qconvert.formats.onnx_runtime import Model
from qconvert.report import Row, judged
from qconvert.scheme import Array

MOST_NBYTES = 1 << 28  # of weights: it keeps all of them, and several copies of each as it goes
N_TOKENS, N_CACHED = 8, 2
WHAT = "onnx.reference"


class Expected(NamedTuple):
    """Logits f32[T,V]; most_kl: how far off they may be where nodes round activations, None where they do not."""

    logits: torch.Tensor
    most_kl: float | None


def reference_rows(path: Path, prompt: Sequence[int], want: Callable[[Sequence[int], int], Expected]) -> list[Row]:
    """Logits of a prompt's first tokens, some at once and the last by the cache, against want(tokens, those by the cache)."""
    session = interpreted(path)
    if isinstance(session, Row):
        return [session]
    tokens = prompt[:N_TOKENS]
    n = min(N_CACHED, len(tokens) - 1)
    got, (logits, most_kl) = Model(path, len(tokens), session).decoded(tokens, n), want(tokens, n)
    if most_kl is not None:
        p, q = (torch.log_softmax(x[None], -1) for x in (logits, torch.from_numpy(got)))
        return [judged(WHAT, "mean KL", distance(p, q, [list(tokens)]).mean_kl, most_kl, f"{len(got)} tokens")]
    wanted = logits.numpy()
    error = float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
    return [judged(WHAT, "relative error", error, LIMITS["runtime onnxruntime"][0], f"{len(got)} tokens")]


def interpreted(path: Path) -> Interpreted | Row:
    """The model as standard nodes alone; a row that says why not, where it cannot be."""
    nbytes = sum(f.stat().st_size for f in path.parent.iterdir())
    if nbytes > MOST_NBYTES:
        return Row(WHAT, "not run", None, None, "skip", f"{nbytes >> 20} MB are too much for it")
    import onnx
    import onnx.inliner

    model = onnx.load(path)
    if not model.functions and any(node.domain == CONTRIB for node in model.graph.node):
        return Row(WHAT, "not run", None, None, "skip", "the file has no bodies for onnxruntime's nodes (--form ort has)")
    return Interpreted(onnx.inliner.inline_local_functions(model))


class Interpreted:
    """A model of standard nodes, with the two methods of an onnxruntime session that a decoder is run by."""

    def __init__(self, model: Any) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(model)
        self._inputs = model.graph.input

    def get_inputs(self) -> list[Input]:
        return [Input(i.name, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in self._inputs]

    def run(self, wanted: None, feeds: Mapping[str, Array]) -> list[Array]:
        out: list[Array] = self._evaluator.run(wanted, dict(feeds))
        return out


class Input(NamedTuple):
    name: str
    shape: list[int]
