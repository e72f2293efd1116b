"""Weights that a source stores quantized: their codes and metadata as they are, and other orders of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from qconvert import kernels
from qconvert.errors import InputError
from qconvert.gptq_words import Codes, Words, unpacked, zero_words
from qconvert.graph import Graph, Node
from qconvert.layouts import layout_of
from qconvert.moves import moved
from qconvert.scheme import Array, Bytes, QTensor, Scheme, scheme_of
from qconvert.sources import Store
from qconvert.tensor_layouts import Tensors, rows_of


class Values(Protocol):
    """What an op reads: weights.Weights."""

    graph: Graph
    store: Store

    def rows(self, name: str, begin: int, end: int) -> Array | QTensor: ...

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...

    def whole(self, name: str) -> Array: ...


def _permute_rope(w: Values, name: str, node: Node, begin: int, end: int) -> Array | QTensor:
    return _reordered(w, node, begin, end, lambda at, half: at.reshape(-1, 2, half))


def _unpermute_rope(w: Values, name: str, node: Node, begin: int, end: int) -> Array | QTensor:
    return _reordered(w, node, begin, end, lambda at, half: at.reshape(-1, half, 2))


def _reordered(w: Values, node: Node, begin: int, end: int, pairs: Callable[[Array, int], Array]) -> Array | QTensor:
    """Rows of each head with the two axes that `pairs` makes of them exchanged."""
    n = node.type.dims[0]
    head_dim = n // cast(int, node.attrs["heads"])
    low, high = begin // head_dim * head_dim, min(n, -(-end // head_dim) * head_dim)
    order = pairs(np.arange(high - low), head_dim // 2).swapaxes(1, 2).reshape(-1)[begin - low : end - low]
    value = w.rows(node.inputs[0], low, high)
    if isinstance(value, QTensor):
        return QTensor(value.scheme, value.codes[order], tuple(v[order] for v in value.levels))
    return value[order]


def _unpack(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    source = w.graph.nodes[node.inputs[0]]
    q = layout_of(source.type.dtype).unpack(cast(Bytes, w.rows(node.inputs[0], begin, end)))
    return _finite(q, source.attrs["tensor"], begin)


def _assemble(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    layout = cast(Tensors, layout_of(str(node.attrs["layout"])))
    tensors = [str(w.graph.nodes[i].attrs["tensor"]) for i in node.inputs]
    n, k = node.type.dims
    packed = rows_of(layout, w.store, tensors, n, k, begin, end)
    scales = next(i for i, part in enumerate(layout.parts) if part.level is not None)
    return _finite(layout.unpack(packed), tensors[scales], begin)


def _finite(q: QTensor, tensor: object, begin: int) -> QTensor:
    for v in q.levels:
        if not kernels.all_finite(v):
            row, group = np.argwhere(~np.isfinite(v))[0]
            where = f"{v[row, group]} in row {begin + row}"
            raise InputError(f"{tensor}: {where}", hint="the file is damaged; nothing can be converted from it")
    return q


def _gptq(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    """GPTQ's words of some outputs: columns of what is stored."""
    tensors = [str(w.graph.nodes[i].attrs["tensor"]) for i in node.inputs]
    bits, group, k = cast(int, node.attrs["bits"]), cast(int, node.attrs["group"]), node.type.dims[1]
    first_word, last_word, first = zero_words(bits, begin, end, w.graph.nodes[node.inputs[1]].type.dims[1])
    qzeros = w.store.read_columns(tensors[1], first_word, last_word)
    scales = w.store.read_columns(tensors[2], begin, end)
    if w.graph.nodes[node.inputs[2]].type.dtype == "bf16":
        scales = kernels.widen_bf16(scales)
    words = Words(w.store.read_columns(tensors[0], begin, end), qzeros, scales, first)
    found, columns = unpacked(words, bits, begin, end, bool(node.attrs["minus_one"])), np.arange(k) // group
    codes = found.codes
    if len(node.inputs) > 3:
        g_idx = cast(Array, w.rows(node.inputs[3], 0, k))
        order = np.argsort(g_idx, kind="stable")
        if not node.attrs["sorted"] or not np.array_equal(g_idx[order], columns):
            order = np.arange(k)
            if not np.array_equal(g_idx, columns):
                raise InputError(
                    f"{tensors[3]}: columns are not in groups of {group}", hint='config.json should say "desc_act": true'
                )
        codes = np.ascontiguousarray(codes[:, order])
    return _finite(_centred(found._replace(codes=codes), node, group, tensors[1]), tensors[2], begin)


def _centred(found: Codes, node: Node, group: int, where: str) -> QTensor:
    """As the node's scheme has it: its group divides the stored one; signed codes have their zero point in the middle."""
    scheme = cast(Scheme, scheme_of(node.type.dtype))
    times, bits = group // scheme.block, cast(int, node.attrs["bits"])
    scales, zeros = (np.repeat(v.astype(np.float32), times, axis=1) for v in (found.scales, found.zeros))
    if len(scheme.levels) > 1:
        codes: Array = found.codes if scheme.bits == 8 else found.codes.view(np.int8)
        return QTensor(scheme, codes, (scales, zeros))
    half = 1 << (bits - 1)
    if not (zeros == half).all():
        wrong = int(zeros[zeros != half][0])
        raise InputError(
            f"{where}: a zero point is {wrong}, but config.json says sym, where each is {half}",
            hint='is "checkpoint_format" gptq where it should be gptq_v2, or the other way round? else "sym" is false',
        )
    return QTensor(scheme, (found.codes.astype(np.int16) - half).astype(np.int8), (scales,))


def _order(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    k = node.type.dims[0]
    return np.argsort(cast(Array, w.rows(node.inputs[0], 0, k)), kind="stable").astype(np.int64)[begin:end]


def _unsort(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    value, order = w.real(node.inputs[0], begin, end), w.whole(node.inputs[1])
    out = np.empty_like(value)
    out[:, order] = value
    return out


def _transcode(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    return moved(cast(QTensor, w.rows(node.inputs[0], begin, end)), cast(Scheme, scheme_of(node.type.dtype)))


Op = Callable[[Values, str, Node, int, int], Array | QTensor]
OPS: dict[str, Op] = {
    "permute_rope": _permute_rope,
    "unpermute_rope": _unpermute_rope,
    "unpack": _unpack,
    "assemble": _assemble,
    "gptq": _gptq,
    "order": _order,
    "unsort": _unsort,
    "transcode": _transcode,
}
