"""Codes as the quantizers of other libraries choose them, and statistics of whole weights, by streaming over their rows.

Solvers, each bit for bit: absmax (bitsandbytes: the greatest magnitude of a block or row), mlx (mx.quantize), absmean (BitNet:
the mean magnitude of the weight).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from qconvert import kernels
from qconvert.bits import to_bits
from qconvert.graph import Node
from qconvert.scheme import F32, Array, Bytes, QTensor, Scheme, scheme_of
from qconvert.stored_weights import Values

NESTED = 256  # scales that share one of the second level
Solved = tuple[Bytes, tuple[F32, ...]]  # codes in bits, the first low, and the scheme's levels


def absmax(scheme: Scheme, x: F32, others: Sequence[Array]) -> Solved:
    """others: the scales that are kept, where they are quantized once more; codes are those of the greatest magnitudes."""
    if scheme.bits == 8:
        codes, peaks = kernels.int8_rows(x)
        return codes.view(np.uint8) ^ np.uint8(128), (peaks[:, None],)
    found = kernels.block_codes(x, cast(int, scheme.levels[0].group), scheme.table, high_first=False)
    return found.packed, (others[0] if others else found.scales,)


def mlx(scheme: Scheme, x: F32, others: Sequence[Array]) -> Solved:
    found = kernels.mlx_affine(x, cast(int, scheme.levels[0].group), scheme.bits)
    return found.packed, (found.scales, found.biases)


def absmean(scheme: Scheme, x: F32, others: Sequence[Array]) -> Solved:
    """others: the mean magnitude."""
    mean = np.float32(others[0][0])
    codes = kernels.ternary_codes(x, float(np.float32(1) / mean))
    return to_bits((codes + 1).view(np.uint8), 2), (np.full((len(x), 1), mean, np.float32),)


SOLVERS: dict[str, Callable[[Scheme, F32, Sequence[Array]], Solved]] = {"absmax": absmax, "mlx": mlx, "absmean": absmean}


# of whole weights ---------------------------------------------------------------------------------


def _in_blocks(w: Values, name: str) -> list[tuple[int, int]]:
    """(begin, end) of blocks of rows of the value `name`."""
    n, k = w.graph.nodes[name].type.rows, w.graph.nodes[name].type.dims[-1]
    step = max(1, (1 << 19) // k)
    return [(i, min(n, i + step)) for i in range(0, n, step)]


def _block_peaks(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    group, n = cast(int, node.attrs["group"]), end - begin
    out = np.empty((n, node.type.dims[1]), np.float32)
    for i, j in ((i, j) for i, j in _in_blocks(w, node.inputs[0]) if i < end and j > begin):
        low, high = max(i, begin), min(j, end)
        value = np.ascontiguousarray(w.real(node.inputs[0], low, high), np.float32)
        out[low - begin : high - begin] = kernels.block_peaks(value, group)
    return out


def _mean_magnitude(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    total = 0.0
    for i, j in _in_blocks(w, node.inputs[0]):
        for row in kernels.magnitude_sums(np.ascontiguousarray(w.real(node.inputs[0], i, j), np.float32)):
            total += float(row)
    n, k = w.graph.nodes[node.inputs[0]].type.dims
    return np.array([max(total / (n * k), cast(float, node.attrs.get("least", 0.0)))], np.float32)


def _nest(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """Rows of codes, or all scales of the second level: NESTED scales share one, across rows."""
    scales, mean = w.whole(node.inputs[0]), np.float32(w.whole(node.inputs[1])[0])
    flat, levels = scales.reshape(-1), kernels.dynamic_map()
    if node.type.dtype == "f32":
        return kernels.nested_codes(flat - mean, levels).scales[begin:end]
    first, last = begin * scales.shape[1], end * scales.shape[1]
    low = first // NESTED * NESTED
    codes = kernels.nested_codes(flat[low : -(-last // NESTED) * NESTED] - mean, levels).codes
    return codes[first - low : last - low].reshape(end - begin, -1)


def _nested(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    codes, scales, mean, *own = node.inputs
    per = node.type.dims[1]
    first, last = begin * per, end * per
    flat = len(w.graph.nodes[codes].type.dims) == 1
    found = cast(Array, w.rows(codes, first, last) if flat else w.rows(codes, begin, end)).reshape(-1)
    levels = w.whole(own[0]) if own else kernels.dynamic_map()
    second = w.whole(scales)[np.arange(first, last) // NESTED]
    return ((levels[found] * second).astype(np.float32) + np.float32(w.whole(mean)[0])).reshape(end - begin, per)


def _halves(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    """Codes u8[N*K/2,1], the first in the high half, beside scales f32[N,G]."""
    scheme, per = cast(Scheme, scheme_of(node.type.dtype)), node.type.dims[1] // 2
    packed = cast(Array, w.rows(node.inputs[0], begin * per, end * per)).reshape(end - begin, per)
    codes = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], -1).reshape(end - begin, -1)
    return QTensor(scheme, codes, (np.ascontiguousarray(w.real(node.inputs[1], begin, end), np.float32),))


def _shifts(node: Node, bits: int) -> list[np.uint8]:
    """Where in a byte the codes of a row lie, of the first part of rows, the second …"""
    parts = cast(int, node.attrs["parts"])
    order = range(parts)[::-1] if node.attrs["high_first"] else range(parts)
    return [np.uint8(bits * i) for i in order]


def _fold(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    n, out = node.type.dims[0], np.zeros((end - begin, node.type.dims[1]), np.uint8)
    scheme = cast(Scheme, scheme_of(w.graph.nodes[node.inputs[0]].type.dtype))
    for part, shift in enumerate(_shifts(node, scheme.bits)):
        codes = cast(QTensor, w.rows(node.inputs[0], part * n + begin, part * n + end)).codes
        out |= (codes.view(np.uint8) + np.uint8(scheme.centre)) << shift
    return out


def _unfold(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    scheme, (n, k) = cast(Scheme, scheme_of(node.type.dtype)), node.type.dims
    codes, *levels = node.inputs
    shifts = _shifts(node, scheme.bits)
    per_part = n // len(shifts)
    lines, pieces = w.graph.nodes[codes].type.dims[0] // per_part, []
    for part, shift in enumerate(shifts):
        low, high = max(begin, part * per_part) - part * per_part, min(end, (part + 1) * per_part) - part * per_part
        if low < high:
            found = cast(Array, w.rows(codes, low * lines, high * lines)).reshape(high - low, k)
            pieces.append(found >> shift & np.uint8((1 << scheme.bits) - 1))
    entries = [_entries_of(w, level, n, begin, end, bool(node.attrs.get("inverse"))) for level in levels]
    return QTensor(scheme, np.concatenate(pieces), tuple(entries))


def _across(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """Values i * M to (i + 1) * M of the weight, counted through, are the codes i of all groups."""
    scheme, parts, k = cast(Scheme, scheme_of(str(node.attrs["scheme"]))), cast(int, node.attrs["parts"]), node.type.dims[1]
    codes, (scale, zero) = node.inputs[0], (w.whole(i).reshape(-1).astype(np.float32) for i in node.inputs[1:])
    low, high, m, out = begin * k, end * k, len(scale), list[Array]()
    for i in range(low // m, -(-high // m)):
        first, last = max(low - i * m, 0), min(high - i * m, m)
        part, line = divmod(i, w.graph.nodes[codes].type.dims[0])
        found = cast(Array, w.rows(codes, line, line + 1))[0, first:last]
        code = found >> np.uint8(scheme.bits * (parts - 1 - part)) & np.uint8((1 << scheme.bits) - 1)
        out.append((code - zero[first:last]) * scale[first:last])
    return np.concatenate(out).reshape(end - begin, k)


def _entries_of(w: Values, name: str, n: int, begin: int, end: int, inverse: bool) -> F32:
    """Of each row: of all rows one and the same (or its inverse), or as many as there are."""
    dims = w.graph.nodes[name].type.dims
    if np.prod(dims) == 1:
        value = np.float32(w.whole(name).reshape(-1)[0])
        return np.full((end - begin, 1), np.float32(1) / value if inverse else value)
    per = dims[0] // n
    return np.ascontiguousarray(w.real(name, begin * per, end * per), np.float32).reshape(end - begin, per)


def _note(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    number = float(w.whole(node.inputs[0])[0])
    text = json.dumps({**cast(dict[str, object], node.attrs["json"]), str(node.attrs["key"]): number})
    return np.frombuffer(text.encode().ljust(node.type.dims[0]), np.uint8)[begin:end]


OPS: dict[str, Callable[[Values, str, Node, int, int], Array | QTensor]] = {
    "block_peaks": _block_peaks, "mean_magnitude": _mean_magnitude, "nest": _nest, "nested": _nested, "halves": _halves,
    "fold": _fold, "unfold": _unfold, "across": _across,
    "note": _note,
}  # fmt: skip
