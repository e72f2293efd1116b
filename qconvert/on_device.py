"""What --device cuda does of a conversion: whether it can, which weights it quantizes, and proof that they are the CPU's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import cast, get_args

import numpy as np

from qconvert.errors import UsageError
from qconvert.graph import Graph, Node
from qconvert.kernels.gpu import quantize
from qconvert.report import Row, judged
from qconvert.request import Request
from qconvert.scheme import Device, QTensor
from qconvert.solved_weights import GPU_SOLVERS, left_to_cpu, on_gpu
from qconvert.weights import Weights, rows_per_block

COMPARED = 1 << 16  # weights of each kind that the CPU quantizes again


def demand(request: Request) -> None:
    """UnsupportedError where a GPU was asked for and is not there; a dry run needs none."""
    if request.device not in get_args(Device):
        raise UsageError(f"--device {request.device}", hint="cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU")
    if request.device == "cuda" and not request.dry_run:
        quantize.device()


def has(node: Node) -> bool:
    """Whether a GPU quantizes it."""
    return quantize.has(node) or on_gpu(node)


def notes(request: Request, graph: Graph) -> list[str]:
    """How many weights are quantized on the GPU, what of them is not made there, and what is left to the CPU."""
    if request.device == "cpu":
        return []
    nodes = {name: node for name, node in graph.nodes.items() if node.op == "quantize"}
    left = [(f"{node.type.dtype} by {node.attrs.get('solver')}", name) for name, node in nodes.items() if not has(node)]
    apart = [(what, name) for name, node in nodes.items() if on_gpu(node) for what in left_to_cpu(node)]
    said = f"--device cuda: {len(nodes) - len(left)} of {len(nodes)} weights are quantized on the GPU"
    if apart:
        said += f"; of them the CPU makes {counted(apart)}"
    if left:
        said += f"; on the CPU, for want of a kernel: {counted(left)}"
    return [said]


def counted(kinds: list[tuple[str, str]]) -> str:
    """Each kind, of how many weights it is, and the first of them."""
    first = {kind: name.partition("~")[0] for kind, name in reversed(kinds)}
    return ", ".join(f"{kind} ({n}, first {first[kind]})" for kind, n in Counter(kind for kind, _ in kinds).items())


def rows(weights: Weights) -> list[Row]:
    """The first rows of one weight of each kind, quantized on both."""
    if weights.device == "cpu":
        return []
    there, here = weights, replace(weights, device="cpu")
    nodes = {name: node for name, node in weights.graph.nodes.items() if node.op == "quantize" and has(node)}
    kinds = {(node.type.dtype, str(node.attrs["solver"])): name for name, node in nodes.items()}
    found = []
    for (dtype, solver), name in kinds.items():
        kind = weights.graph.nodes[name].type
        n = min(kind.rows, rows_per_block(kind.dims[-1], COMPARED))
        both = zip(*(parts(cast(QTensor, w.rows(name, 0, n))) for w in (there, here)), strict=True)
        wrong = sum(int((a != b).sum()) for a, b in both)
        what = f"device {weights.device} {dtype}" + (f" by {solver}" if solver in GPU_SOLVERS else "")
        found.append(judged(what, "codes and scales unlike the CPU's", wrong, 0))
    return found


def parts(q: QTensor) -> list[np.ndarray]:
    return [q.codes, *(np.ascontiguousarray(level).view(np.uint32) for level in q.levels)]
