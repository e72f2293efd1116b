"""onnxruntime's QMoE on this very file: one row per distinct scheme and row lengths of its experts' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np

from qconvert.check import LIMITS
from qconvert.formats.onnx_experts import SWIGLU
from qconvert.formats.onnx_kernels import N_INPUTS, distance, run_nodes
from qconvert.formats.onnx_layouts import LAYOUTS, MatMulNBits
from qconvert.formats.onnx_proto import CONTRIB
from qconvert.graph import Graph
from qconvert.report import Row, judged
from qconvert.scheme import Array, QTensor

N_EXPERTS, N_GROUPS = 2, 2  # of which a kernel is fed: all rows of the hidden width, few of the inner one
Rows = Callable[[str, int, int], Array]  # weight, begin, end -> packed rows of the file
Weight = tuple[list[Array], Array]  # codes, scales and zero points [E,N,·], and the same as real numbers f64[E,N,K]


class Trial(NamedTuple):
    """Parts of the first experts: gates and ups in turn [E,2F,D], downs [E,D,F]."""

    layout: MatMulNBits
    both: Weight
    down: Weight


def expert_rows(graph: Graph, rows: Rows, level: int | None) -> list[Row]:
    """Each kernel against f64 over the unpacked values, with activations in f32 and as it rounds them to 8 bits."""
    found: dict[tuple[str, int, int], tuple[str, str]] = {}
    for node in graph.nodes.values():
        if node.op == "experts" and (dtype := graph.nodes[node.inputs[2]].type.dtype) in LAYOUTS:
            _, d, f = graph.nodes[node.inputs[3]].type.dims
            found.setdefault((dtype, d, f), (node.inputs[2], node.inputs[3]))
    out = []
    for (dtype, d, f), (both, down) in sorted(found.items()):
        trial, what = trial_of(graph, rows, both, down), f"kernel experts {LAYOUTS[dtype].scheme.name} x {d} x {f}"
        made = [(what, False, "kernel"), (f"{what}, 8-bit activations", True, "kernel, 8-bit activations")]
        for name, rounds, kind in made if level == 4 or LAYOUTS[dtype].scheme.bits != 4 else made[:1]:
            row = judged(name, "relative error", error(trial, rounds), LIMITS[kind][0])
            out.append(row if row.verdict == "pass" else row._replace(reason=f"on {both}"))
    return out


def trial_of(graph: Graph, rows: Rows, both: str, down: str) -> Trial:
    kind = graph.nodes[down].type
    e, d, f = kind.dims
    layout = LAYOUTS[kind.dtype]
    n = min(f, N_GROUPS * layout.scheme.block)
    firsts = range(min(e, N_EXPERTS))
    above = [layout.unpack(rows(both, 2 * f * i, 2 * f * i + 2 * n)) for i in firsts]
    below = [columns(layout.unpack(rows(down, d * i, d * (i + 1))), n) for i in firsts]
    return Trial(layout, weight_of(layout, above), weight_of(layout, below))


def columns(q: QTensor, n: int) -> QTensor:
    """The first n of each row."""
    return q._replace(codes=q.codes[:, :n], levels=tuple(level[:, : n // q.scheme.block] for level in q.levels))


def weight_of(layout: MatMulNBits, experts: list[QTensor]) -> Weight:
    packed = np.stack([layout.pack(q) for q in experts])
    planes = np.split(packed, np.cumsum(layout.planes(experts[0].codes.shape[1]))[:-1], axis=-1)
    codes, scales, *zeros = (np.ascontiguousarray(plane) for plane in planes)
    return [codes, scales.view(np.float32), *zeros], np.stack([q.dequantize().astype(np.float64) for q in experts])


def error(trial: Trial, rounds: bool) -> float:
    """|QMoE(x) - reference| / |reference| with x[4,D] and the router's logits normal; every expert is chosen."""
    (e, d, _), rng = trial.down[1].shape, np.random.default_rng(0)
    x, router = (rng.standard_normal((N_INPUTS, n)).astype(np.float32) for n in (d, e))
    block = trial.layout.scheme.block
    h = rounded(x, block) if rounds else x
    both = np.einsum("td,end->ten", h.astype(np.float64), trial.both[1])
    gate, up = both[..., ::2], both[..., 1::2]
    inner = gate / (1 + np.exp(-gate)) * up
    inner = rounded(inner.astype(np.float32), block) if rounds else inner
    shares = np.exp(router.astype(np.float64))
    shares /= shares.sum(-1, keepdims=True)
    want = np.einsum("te,tef,edf->td", shares, inner.astype(np.float64), trial.down[1])
    return distance(multiplied(trial, x, router, rounds), want)


def multiplied(trial: Trial, x: Array, router: Array, rounds: bool) -> Array:
    """QMoE in onnxruntime. Weights that are no constants take a path that rounds nothing."""
    from onnx import helper, numpy_helper

    scheme, (both, down) = trial.layout.scheme, (trial.both[0], trial.down[0])
    arrays = {f"both{i}": a for i, a in enumerate(both)} | {f"down{i}": a for i, a in enumerate(down)}
    names = ["x", "router", "both0", "both1", "", "down0", "down1"]
    names += ["", "", "", "", "both2", "down2"] if len(both) > 2 else []
    attrs = {"expert_weight_bits": scheme.bits, "block_size": scheme.block}
    if rounds and scheme.bits == 4:
        attrs["accuracy_level"] = 4
    node = helper.make_node("QMoE", names, ["y"], domain=CONTRIB, k=len(both[0]), normalize_routing_weights=1,
                            **cast(Mapping[str, int], SWIGLU), **attrs)  # fmt: skip
    free = {} if rounds else {n: arrays.pop(n) for n in ("both0", "down0")}
    constants = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    return run_nodes([node], {"x": x, "router": router, **free}, constants, x.shape)


def rounded(x: Array, block: int) -> Array:
    """f32[..., K] in 8 bits, a scale for each block."""
    groups = x.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    out: Array = (np.round(groups * inverse) * scale).reshape(x.shape)
    return out
