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
    codes = kernels.ternary_codes(x, float(np.float32(1) / max(mean, LEAST)))
    return to_bits((codes + 1).view(np.uint8), 2), (np.full((len(x), 1), max(mean, LEAST), np.float32),)


LEAST = np.float32(1e-5)  # a weight of less has this mean
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
    return np.array([total / (n * k)], np.float32)


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


def _note(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    number = float(w.whole(node.inputs[0])[0])
    text = json.dumps({**cast(dict[str, object], node.attrs["json"]), str(node.attrs["key"]): number})
    return np.frombuffer(text.encode().ljust(node.type.dims[0]), np.uint8)[begin:end]


OPS: dict[str, Callable[[Values, str, Node, int, int], Array | QTensor]] = {
    "block_peaks": _block_peaks, "mean_magnitude": _mean_magnitude, "nest": _nest, "nested": _nested, "halves": _halves,
    "note": _note,
}  # fmt: skip
