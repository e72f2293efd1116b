"""What --device cuda does of a conversion: whether it can, which weights it quantizes, and proof that they are the CPU's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import cast, get_args

import numpy as np

from qconvert.errors import UsageError
from qconvert.graph import Graph
from qconvert.kernels.gpu import quantize
from qconvert.report import Row, judged
from qconvert.request import Request
from qconvert.scheme import Device, QTensor
from qconvert.weights import Weights, rows_per_block

COMPARED = 1 << 16  # weights of each kind that the CPU quantizes again


def demand(request: Request) -> None:
    """UnsupportedError where a GPU was asked for and is not there; a dry run needs none."""
    if request.device not in get_args(Device):
        raise UsageError(f"--device {request.device}", hint="cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU")
    if request.device == "cuda" and not request.dry_run:
        quantize.device()


def notes(request: Request, graph: Graph) -> list[str]:
    """How many weights are quantized on the GPU, and what is left to the CPU."""
    if request.device == "cpu":
        return []
    nodes = {name: node for name, node in graph.nodes.items() if node.op == "quantize"}
    left = {name: f"{node.type.dtype} by {node.attrs.get('solver')}" for name, node in nodes.items() if not quantize.has(node)}
    said = f"--device cuda: {len(nodes) - len(left)} of {len(nodes)} weights are quantized on the GPU"
    if left:
        first = {kind: name.partition("~")[0] for name, kind in reversed(left.items())}
        kinds = ", ".join(f"{kind} ({n}, first {first[kind]})" for kind, n in Counter(left.values()).items())
        said += f"; on the CPU, for want of a kernel: {kinds}"
    return [said]


def rows(weights: Weights) -> list[Row]:
    """The first rows of one weight of each kind, quantized on both."""
    if weights.device == "cpu":
        return []
    there, here = weights, replace(weights, device="cpu")
    nodes = {name: node for name, node in weights.graph.nodes.items() if node.op == "quantize" and quantize.has(node)}
    found = []
    for dtype, name in {node.type.dtype: name for name, node in nodes.items()}.items():
        kind = weights.graph.nodes[name].type
        n = min(kind.rows, rows_per_block(kind.dims[-1], COMPARED))
        both = zip(*(parts(cast(QTensor, w.rows(name, 0, n))) for w in (there, here)), strict=True)
        wrong = sum(int((a != b).sum()) for a, b in both)
        found.append(judged(f"device {weights.device} {dtype}", "codes and scales unlike the CPU's", wrong, 0))
    return found


def parts(q: QTensor) -> list[np.ndarray]:
    return [q.codes, *(np.ascontiguousarray(level).view(np.uint32) for level in q.levels)]
