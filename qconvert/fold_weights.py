"""Scales of input channels, and what they leave of weights, norms and statistics. Ops of passes/fold.py.

Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np

from qconvert import kernels
from qconvert.graph import Graph, Node, Type
from qconvert.scheme import F32, Array

ROWS = 512  # of each weight that the search tries, spread over it
POWERS = 20
LEAST = 1e-4  # of a scale


class Values(Protocol):
    """What an op reads: weights.Weights."""

    graph: Graph
    dtype: type[np.floating]

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...

    def whole(self, name: str) -> Array: ...


def awq_scales(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """rms(x) ** p for the p of 0, 1/20 … 1 with which the quantized weights change what they make least: f32[K/times]."""
    moments, *weights = node.inputs
    m = w.whole(moments).astype(np.float64)
    dtypes = cast(list[str], node.attrs["dtypes"])
    tried = [(dtype, _some_rows(w, each)) for dtype, each in zip(dtypes, weights, strict=True)]
    best, found = np.inf, np.ones(node.type.dims, np.float32)
    size = np.sqrt(_pooled(node, m))
    size /= max(float(size.max()), 1e-30)
    for power in range(POWERS):
        s = _centred(np.maximum(size, LEAST) ** (power / POWERS))
        wide = _wide(node, s)
        error = sum(_error(w, dtype, str(node.attrs["solver"]), x, wide, m) for dtype, x in tried)
        if error < best:
            best, found = error, s
    return found[begin:end]


def smooth_scales(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """max|x| ** alpha / max|w| ** (1 - alpha) of each channel: f32[K/times]."""
    peaks, *weights = node.inputs
    alpha = float(cast(float, node.attrs["alpha"]))
    greatest = np.maximum.reduce([_column_peaks(w, each) for each in weights])
    x, y = (np.maximum(_pooled(node, v, np.max).astype(np.float64), 1e-5) for v in (w.whole(peaks), greatest))
    return _centred(np.clip(x**alpha / y ** (1 - alpha), LEAST, None))[begin:end]


def held_scales(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """The scales next to `scales` by which a norm's weights divide without a rounding in dtype."""
    scales, norm = (w.whole(i).astype(np.float32) for i in node.inputs)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        kept = norm / scales
        kept = kept.astype(np.float16).astype(np.float32) if node.attrs["dtype"] == "f16" else _bf16(kept)
        held = norm / kept
    usable = np.isfinite(held) & (held > 0)
    return np.where(usable, held, np.float32(1))[begin:end]


def scale_columns(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    value, scales = node.inputs
    return (w.real(value, begin, end) * _wide(node, w.whole(scales))).astype(w.dtype)


def divide_rows(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    value, scales = node.inputs
    x, s = w.real(value, begin, end), w.whole(scales)[begin:end]
    return (x / (s if x.ndim == 1 else s[:, None])).astype(w.dtype)


def folded_statistic(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """Of x / s from that of x: moments and Hessians are of products, peaks of single values."""
    value, scales = node.inputs
    x, s = w.real(value, begin, end), _wide(node, w.whole(scales))
    if node.attrs["of"] == "hessian":
        by = s[begin:end, None] * s
    else:
        by = (s * s if node.attrs["of"] == "moments" else s)[begin:end]
    return cast(Array, (x / by).astype(w.dtype))


def _wide(node: Node, s: F32) -> F32:
    """Each head's scales for all heads that read it."""
    if "times" not in node.attrs:
        return s
    head_dim, times = (cast(int, node.attrs[a]) for a in ("head_dim", "times"))
    return s.reshape(-1, 1, head_dim).repeat(times, axis=1).reshape(-1)


def _pooled(node: Node, v: Array, over: Callable[..., Array] = np.mean) -> Array:
    """One value where several heads of the reader are one of the maker's."""
    if "times" not in node.attrs:
        return v
    head_dim, times = (cast(int, node.attrs[a]) for a in ("head_dim", "times"))
    return over(v.reshape(-1, times, head_dim), axis=1).reshape(-1)


def _centred(s: Array) -> F32:
    """Greatest times least is 1."""
    return cast(F32, (s / np.sqrt(s.max() * s.min())).astype(np.float32))


def _some_rows(w: Values, name: str) -> F32:
    n = w.graph.nodes[name].type.rows
    if n <= ROWS:
        return w.real(name).astype(np.float32)
    at = np.linspace(0, n - 16, ROWS // 16).astype(int)
    return np.concatenate([w.real(name, int(i), int(i) + 16) for i in at]).astype(np.float32)


def _column_peaks(w: Values, name: str) -> F32:
    n, k = w.graph.nodes[name].type.dims
    step = max(1, (1 << 19) // k)
    peaks = np.maximum.reduce([np.abs(w.real(name, i, min(n, i + step))).max(0) for i in range(0, n, step)])
    return cast(F32, peaks)


def _error(w: Values, dtype: str, solver: str, x: F32, s: F32, m: Array) -> float:
    """Mean square of what the quantized rows make wrong, for channels whose mean squares are m."""
    scaled = np.ascontiguousarray(x * s)
    trial = Graph(
        {
            "x": Node("constant", (), Type("f32", x.shape), {"values": cast(list, scaled)}),  # type: ignore[type-arg]
            "q": Node("quantize", ("x",), Type(dtype, x.shape), {"solver": solver}),
        },
        ("q",),
    )
    weights: Any = w
    got = replace(weights, graph=trial, dtype=np.float32, _whole={}).real("q")
    return float((np.square((got / s - x).astype(np.float64)) * m).sum())


def _bf16(v: F32) -> F32:
    return kernels.widen_bf16(kernels.narrow_bf16(np.ascontiguousarray(v, np.float32)))


OPS = {
    "awq_scales": awq_scales, "smooth_scales": smooth_scales, "held_scales": held_scales,
    "scale_columns": scale_columns, "divide_rows": divide_rows, "folded_statistic": folded_statistic,
}  # fmt: skip
