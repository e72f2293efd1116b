"""Weights that adapters change, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from qconvert import kernels
from qconvert.graph import Graph, Node
from qconvert.moves import shifted, with_offsets
from qconvert.scheme import Array, QTensor, Scheme, scheme_of

BLOCK = 1 << 19  # values of a block of rows
EXACT = 512  # rows or columns of which all singular values are found


class Values(Protocol):
    """What an op reads: weights.Weights."""

    @property
    def graph(self) -> Graph: ...
    @property
    def dtype(self) -> type[np.floating]: ...

    def rows(self, name: str, begin: int, end: int) -> Array | QTensor: ...

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...

    def whole(self, name: str) -> Array: ...

    def once(self, key: tuple[str, ...], make: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]: ...


def _merge(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    base, a, b = node.inputs
    return _low_rank_sum(w, w.real(base, begin, end), a, b, begin, end, _number(node, "scale"))


def _merge_pooled(w: Values, name: str, node: Node, begin: int, end: int) -> Array | QTensor:
    base, a, b = node.inputs
    group, columns = int(_number(node, "group")), w.graph.nodes[a].type.dims[1]
    delta = _low_rank_sum(w, np.zeros((end - begin, columns), w.dtype), a, b, begin, end, _number(node, "scale"))
    scheme = scheme_of(node.type.dtype)
    if scheme is None:
        total: Array = w.real(base, begin, end) + np.repeat(delta, group, axis=1)
        return total
    q = with_offsets(cast(QTensor, w.rows(base, begin, end)), scheme)
    scale, offset = q.levels
    return q._replace(levels=(scale, offset + np.repeat(delta, group // scheme.block, axis=1).astype(np.float32)))


def _add_blocks(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    m, scale = node.inputs
    p, q = node.type.dims
    rows, columns, r = np.arange(begin, end)[:, None], np.arange(q)[None], min(p, q)
    on = rows * r // p == columns * r // q
    out: Array = w.real(m, begin, end) + on * (_number(node, "value") * float(w.whole(scale)[0]))
    return out.astype(w.dtype)


def _spread_columns(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    return np.repeat(w.real(node.inputs[0], begin, end), int(_number(node, "times")), axis=1)


def _refit(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    a, b, real, quantized, *hessian = node.inputs

    def pair() -> tuple[Array, Array]:
        lost, rank = w.real(real).astype(np.float64) - w.real(quantized), w.graph.nodes[a].type.dims[0]
        return refitted(lost + w.real(b).astype(np.float64) @ w.real(a), rank, w.real(hessian[0]) if hessian else None)

    factors = w.once(node.inputs, pair)
    return factors["ab".index(str(node.attrs["part"]))][begin:end].astype(w.dtype)


def _unshifted(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    scheme, q = cast(Scheme, scheme_of(node.type.dtype)), _offset(w, node, begin, end)
    half = 1 << (scheme.bits - 1)
    return QTensor(scheme, (q.codes.astype(np.int16) - half).astype(np.int8), (q.levels[0],))


def _shift(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    q = _offset(w, node, begin, end)
    return (q.levels[1] + (1 << (q.scheme.bits - 1)) * q.levels[0]).astype(w.dtype)


def _offset(w: Values, node: Node, begin: int, end: int) -> QTensor:
    q = cast(QTensor, w.rows(node.inputs[0], begin, end))
    return with_offsets(q, cast(Scheme, shifted(q.scheme)))


def _shift_factor(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    rank = int(_number(node, "rank"))
    left, right = w.once(node.inputs, lambda: top_factors(w.real(node.inputs[0]).astype(np.float64), rank))
    whole = np.repeat(right, int(_number(node, "group")), axis=1) if node.attrs["part"] == "a" else left
    return whole[begin:end].astype(w.dtype)


def refitted(target: Array, rank: int, hessian: Array | None) -> tuple[Array, Array]:
    """A f64[r,K] and B f64[N,r] whose product is nearest to target f64[N,K]; errors weighted by a mean of x x^T, f[K,K] or
    its diagonal f[K]."""
    if hessian is None:
        left, right = top_factors(target, rank)
        return right, left
    h = hessian.astype(np.float64)
    if h.ndim == 1:
        scale = np.sqrt(h + max(1e-2 * float(h.mean()), 1e-12))
        left, right = top_factors(target * scale, rank)
        return right / scale, left
    lower = np.linalg.cholesky(h + max(1e-2 * float(np.trace(h)) / len(h), 1e-12) * np.eye(len(h)))
    left, right = top_factors(target @ lower, rank)
    return np.linalg.solve(lower.T, right.T).T, left


def top_factors(m: Array, rank: int) -> tuple[Array, Array]:
    """f64[N,r] and f64[r,K] of the largest singular values, which both have the roots of; of large m by subspace iteration."""
    if min(m.shape) <= EXACT:
        u, s, v = np.linalg.svd(m, full_matrices=False)
    else:
        basis = np.linalg.qr(m @ np.random.default_rng(0).standard_normal((m.shape[1], rank + 16)))[0]
        for _ in range(6):
            basis = np.linalg.qr(m @ np.linalg.qr(m.T @ basis)[0])[0]
        u, s, v = np.linalg.svd(basis.T @ m, full_matrices=False)
        u = basis @ u
    root = np.zeros(rank)
    root[: len(s)] = np.sqrt(s[:rank])
    left, right = np.zeros((len(m), rank)), np.zeros((rank, m.shape[1]))
    left[:, : len(s)], right[: len(s)] = u[:, :rank] * root[: len(s)], root[: len(s), None] * v[:rank]
    return left, right


def _dora(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    base, base0, a, b, m = node.inputs[:5]
    weight, magnitude = _number(node, "weight"), w.whole(m).astype(np.float64)
    v0 = w.real(base0, begin, end)
    v = _low_rank_sum(w, v0, a, b, begin, end, _number(node, "scale"))
    if len(node.inputs) == 6:
        factor = (magnitude / w.whole(node.inputs[5]))[None]
    else:
        norms = np.linalg.norm(v, axis=1) if w.dtype is np.float64 else kernels.row_norms(v)
        factor = (magnitude[begin:end] / norms)[:, None]
    out = v * factor
    if weight != 1 or base != base0:
        out = w.real(base, begin, end) + weight * (out - v0)
    return out.astype(w.dtype)


def _low_rank_sum(w: Values, value: Array, a: str, b: str, begin: int, end: int, scale: float) -> Array:
    """value + scale * B[begin:end] @ A, without changing value; in f32 the same bits on every machine."""
    if w.dtype is np.float64:
        return value + scale * (w.real(b, begin, end) @ w.whole(a))
    return kernels.add_low_rank(np.array(value, np.float32), w.whole(a), w.real(b, begin, end), scale)


def _column_norm(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    base, a, b = node.inputs
    n, k = w.graph.nodes[base].type.dims
    total = np.zeros(k)
    step = max(1, BLOCK // k)
    for i in range(0, n, step):
        j = min(n, i + step)
        v = _low_rank_sum(w, w.real(base, i, j), a, b, i, j, _number(node, "scale"))
        total += np.square(v.astype(np.float64)).sum(0)
    return np.sqrt(total)[begin:end].astype(w.dtype)


def _number(node: Node, attr: str) -> float:
    value = node.attrs[attr]
    assert isinstance(value, int | float)
    return value


OPS: dict[str, Callable[[Values, str, Node, int, int], Array | QTensor]] = {
    "merge": _merge, "merge_pooled": _merge_pooled, "add_blocks": _add_blocks, "spread_columns": _spread_columns,
    "unshifted": _unshifted, "shift": _shift, "shift_factor": _shift_factor, "refit": _refit,
    "dora": _dora, "column_norm": _column_norm,
}  # fmt: skip
