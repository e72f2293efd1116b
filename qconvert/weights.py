"""Evaluate weights a block of rows at a time: what emitting, checking and the reference evaluator all read.

    rows(name, begin, end)   real values f32 or f64 [rows, K] ([rows] for a vector), QTensor, or packed bytes u8[rows, nbytes]
                             stacked experts [E,N,K] have E*N rows: row n of expert e is e*N + n
    encoded(name, ...)       the bytes that a file holds

Nothing is kept but small inputs (adapter factors), so memory does not grow with the tensor or the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np

from qconvert import adapter_weights, float_weights, fold_weights, kernels, lattice_weights, peer_weights, stored_weights
from qconvert.bits import from_bits
from qconvert.dtypes import FLOATS
from qconvert.errors import GraphError, InputError
from qconvert.graph import Graph, Node
from qconvert.hessians import Factors
from qconvert.kernels.gpu import quantize as on_gpu
from qconvert.layouts import layout_of
from qconvert.scheme import F32, GGML_SCHEMES, LATTICES, MINIFLOATS, U16, Array, Bytes, Device, QTensor, Scheme, scheme_of
from qconvert.second_level import with_second_level
from qconvert.shared_rows import Shared
from qconvert.solved_weights import gives_codes, solved
from qconvert.solvers import least_squares, line, reads_bf16, rounded_to
from qconvert.sources import Store

SMALL = 1 << 24  # values: adapter factors and vectors are kept whole up to this many
BLOCK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 22}  # 2 MB of f32, 16 MB: what is worth a launch and fits a few times


@dataclass
class Weights:
    """The constants of `graph`, read from `store`. dtype is np.float32 (what is written) or np.float64 (reference).

    device: cpu or cuda, where what has kernels there is quantized, to the same bytes.
    """

    graph: Graph
    store: Store
    dtype: type[np.floating] = np.float32
    device: Device = "cpu"
    peaks: float_weights.Peaks = field(default_factory=float_weights.Peaks)
    factors: Factors = field(default_factory=Factors)
    kept: lattice_weights.Kept = field(default_factory=lattice_weights.Kept)
    shared: Shared | None = None  # with the weights of other outputs
    _whole: dict[str, Array] = field(default_factory=dict)
    _pairs: dict[tuple[str, ...], tuple[Array, Array]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def rows(self, name: str, begin: int, end: int) -> Array | QTensor:
        """Rows begin..end of the value `name`. Safe to call from several threads."""
        node = self.graph.nodes[name]
        try:
            op = OPS[node.op]
        except KeyError:
            raise GraphError(f"%{name}: {node.op} is not an op on weights") from None
        if self.shared is None or name not in self.shared.identities:
            return op(self, name, node, begin, end)
        shape = node.type.dims
        step = rows_per_block(shape[-1], BLOCK_VALUES[self.device]) if len(shape) > 1 else node.type.rows
        return self.shared.rows(name, step, (begin, end), node.type.rows, partial(op, self, name, node))

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Rows as real numbers, dequantized where they are quantized or packed."""
        node = self.graph.nodes[name]
        if node.op == "pack" and not layout_of(node.type.dtype).whole:
            return self.real(node.inputs[0], begin, end)
        value = self.rows(name, begin, node.type.rows if end is None else end)
        if isinstance(value, QTensor):
            return value.dequantize().astype(self.dtype, copy=False)
        if "." in node.type.dtype:
            return layout_of(node.type.dtype).unpack(cast(Bytes, value)).dequantize().astype(self.dtype, copy=False)
        return value

    def whole(self, name: str) -> Array:
        """A small value, kept: adapter factors, norms, biases."""
        with self._lock:
            if name not in self._whole:
                value = self.real(name)
                if value.size > SMALL:
                    return value
                if len(self._whole) > 32:
                    self._whole.pop(next(iter(self._whole)))
                self._whole[name] = value
            return self._whole[name]

    def once(self, key: tuple[str, ...], make: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        """A small pair that takes a whole weight to compute: made when it is first asked for, and kept."""
        with self._lock:
            if key not in self._pairs:
                self._pairs[key] = make()
            return self._pairs[key]

    def encoded(self, name: str, begin: int, end: int) -> Bytes:
        """Rows as the bytes that a file holds, u8 flat. InputError where a value does not fit f16."""
        node = self.graph.nodes[name]
        if node.type.dtype in ("f32", "f16", "bf16") and (stored := _stored(self, name, begin, end)) is not None:
            if not kernels.all_finite(stored):
                _checked(self, node, (begin, 0), stored)
            return stored.view(np.uint8).reshape(-1)
        value = self.rows(name, begin, end)
        if isinstance(value, QTensor):
            raise GraphError(f"%{name} is quantized but not packed: {node.type}")
        if node.op == "pack":
            return cast(Bytes, value).reshape(-1)
        if node.type.dtype == "u8":  # another file's bytes
            return value.reshape(-1)
        if node.type.dtype == "i64":
            return np.ascontiguousarray(value, "<i8").view(np.uint8).reshape(-1)
        _must_be_finite(self, name, value)
        match node.type.dtype:
            case "f32":
                out: Array = np.ascontiguousarray(value, np.float32)
            case "f16":
                out = value.astype(np.float16)
            case "bf16":
                out = kernels.narrow_bf16(np.ascontiguousarray(value, np.float32))
            case dtype:
                raise GraphError(f"%{name}: {dtype} is not written to files")
        return out.view(np.uint8).reshape(-1)


def _must_be_finite(w: Weights, name: str, value: Array) -> None:
    """What was loaded is checked already, but a wider type may not fit."""
    node = w.graph.nodes[name]
    checked = node.op == "load" and node.type.dtype in ("f32", "f16", "bf16")
    if not checked and not kernels.all_finite(value):
        raise InputError(f"{name} overflows: the weights and adapters are finite, what they add up to is not")


def _load(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    return _checked(w, node, (begin, 0), _raw(w, node, begin, end))


def _stored(w: Weights, name: str, begin: int, end: int) -> Array | None:
    """Bits of what is loaded, unless other outputs read the same; not checked."""
    node = w.graph.nodes[name]
    if node.op != "load" or (w.shared is not None and name in w.shared.identities):
        return None
    return _raw(w, node, begin, end)


def _raw(w: Weights, node: Node, begin: int, end: int) -> Array:
    read = w.store.read_stacked if len(node.type.shape) > 2 else w.store.read
    return read(str(node.attrs["tensor"]), begin, end)


def _checked(w: Weights, node: Node, origin: tuple[int, int], raw: Array) -> Array:
    """Source bits as real numbers; a NaN or an infinity is an error that names tensor and place."""
    if node.type.dtype not in FLOATS:
        return raw
    value: Array = raw
    if node.type.dtype == "bf16":
        value, finite = kernels.widen_and_check(raw)
    else:
        finite = kernels.all_finite(raw)
    if not finite:
        at = np.argwhere(~np.isfinite(value))[0]
        place = [int(i) + o for i, o in zip(at, (*origin, 0, 0), strict=False)]
        raise InputError(
            f"{node.attrs['tensor']}: {value[tuple(at)]} at {place}",
            hint="the checkpoint is damaged or its training diverged; nothing can be converted from it",
        )
    return value.astype(w.dtype, copy=False)


def _constant(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    return np.asarray(node.attrs["values"], w.dtype)[begin:end]


def _transpose(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    source = w.graph.nodes[node.inputs[0]]
    if source.op == "load":
        raw = w.store.read_columns(str(source.attrs["tensor"]), begin, end)
        return np.ascontiguousarray(_checked(w, source, (0, begin), raw).T)
    return np.ascontiguousarray(w.whole(node.inputs[0]).T[begin:end])


def _stack(w: Weights, name: str, node: Node, begin: int, end: int) -> Array | QTensor:
    if scheme_of(node.type.dtype) is None:
        return _joined(w, node, [w.real(node.inputs[e], i, j) for e, i, j in _per_expert(node, begin, end)])
    found = [cast(QTensor, w.rows(node.inputs[e], i, j)) for e, i, j in _per_expert(node, begin, end)]
    levels = zip(*(q.levels for q in found), strict=True)
    return QTensor(found[0].scheme, np.concatenate([q.codes for q in found]), tuple(map(np.concatenate, levels)))


def _expert(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    e = int(_number(node, "e"))
    if len(node.type.dims) == 1:
        return w.real(node.inputs[0], e, e + 1)[0, begin:end]
    first = e * node.type.dims[0]
    return w.real(node.inputs[0], first + begin, first + end)


def _part(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    n, first = w.graph.nodes[node.inputs[0]].type.dims[1], int(_number(node, "begin"))
    at = [(e * n + first, i, j) for e, i, j in _per_expert(node, begin, end)]
    return _joined(w, node, [w.real(node.inputs[0], origin + i, origin + j) for origin, i, j in at])


def _per_expert(node: Node, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(e, i, j): rows i..j of expert e, which together are rows begin..end of [E,N,K]."""
    n = node.type.dims[1]
    for e in range(begin // n, -(-end // n)):
        yield e, max(0, begin - e * n), min(n, end - e * n)


def _joined(w: Weights, node: Node, parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, node.type.dims[2]), w.dtype), *parts])


def _interleave(w: Weights, name: str, node: Node, begin: int, end: int) -> Array | QTensor:
    low = begin // 2
    if scheme_of(node.type.dtype):
        a, b = (cast(QTensor, w.rows(i, low, -(-end // 2))) for i in node.inputs)

        def turns(x: Array, y: Array) -> Array:
            return np.stack([x, y], 1).reshape(-1, x.shape[1])[begin - 2 * low : end - 2 * low]

        return QTensor(a.scheme, turns(a.codes, b.codes), tuple(turns(*pair) for pair in zip(a.levels, b.levels, strict=True)))
    pair = [w.real(i, low, -(-end // 2)) for i in node.inputs]
    return np.stack(pair, 1).reshape(-1, node.type.dims[2])[begin - 2 * low : end - 2 * low]


def _flat(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    return w.real(node.inputs[0], begin, end)


def _beside(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    e, n, _ = w.graph.nodes[node.inputs[0]].type.dims
    return np.concatenate([w.real(node.inputs[0], i * n + begin, i * n + end) for i in range(e)], axis=1)


def _cast(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    value = w.real(node.inputs[0], begin, end)
    if node.type.dtype == "f16":
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.isfinite(half).all():
            peak = float(np.abs(value).max())
            raise InputError(
                f"{name}: {peak:g} does not fit f16 (65504)", hint="bf16 and f32 hold it: --quant bf16, or --tensor-type"
            )
        return half.astype(w.dtype)
    if node.type.dtype == "bf16":
        return kernels.widen_bf16(kernels.narrow_bf16(value.astype(np.float32))).astype(w.dtype, copy=False)
    return value


def _blend(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    value, base, new = (w.real(i, begin, end) for i in node.inputs)
    if _number(node, "weight") == 1 and node.inputs[0] == node.inputs[1]:
        return new
    return (value + _number(node, "weight") * (new - value if node.inputs[0] == node.inputs[1] else new - base)).astype(w.dtype)


def _set_rows(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    value, base, new = node.inputs
    out = np.array(w.real(value, begin, end))
    weight = _number(node, "weight")
    rows = w.whole(new)
    for j, index in enumerate(cast(list[int], node.attrs["indices"])):
        if begin <= index < end:
            exact = weight == 1 and value == base
            out[index - begin] = (
                rows[j] if exact else out[index - begin] + weight * (rows[j] - w.real(base, index, index + 1)[0])
            )
    return out


def _add_scaled(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    value, d = (w.real(i, begin, end) for i in node.inputs)
    return (value + _number(node, "scale") * d).astype(w.dtype)


def _scaled(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    return (_number(node, "scale") * w.real(node.inputs[0], begin, end)).astype(w.dtype)


def _shifted(w: Weights, name: str, node: Node, begin: int, end: int) -> Array:
    return (_number(node, "by") + w.real(node.inputs[0], begin, end)).astype(w.dtype)


def _quantize(w: Weights, name: str, node: Node, begin: int, end: int) -> QTensor:
    if node.type.dtype in LATTICES:
        return lattice_weights.quantized(w, name, node, begin, end)
    if gives_codes(node):
        return solved(w, name, node, begin, end, partial(_must_be_finite, w))
    if node.type.dtype in GGML_SCHEMES and (node.type.dtype not in MINIFLOATS or node.attrs.get("solver") == "search"):
        return layout_of(f"gguf.{node.type.dtype}").unpack(_search(w, node, begin, end))
    scheme, packed, levels = _solved(w, node, begin, end)
    codes = from_bits(packed, scheme.bits, node.type.dims[-1])
    signed = (codes - np.uint8(scheme.centre)).view(np.int8) if scheme.centre else codes
    return QTensor(scheme, signed, levels)


def _second_level(w: Weights, name: str, node: Node, begin: int, end: int) -> QTensor:
    return with_second_level(cast(QTensor, w.rows(node.inputs[0], begin, end)), cast(Scheme, scheme_of(node.type.dtype)))


def _solved(w: Weights, node: Node, begin: int, end: int) -> tuple[Scheme, Bytes, tuple[F32, ...]]:
    """Codes in bits, the first low, and levels as the scheme keeps them."""
    scheme, solver = cast(Scheme, scheme_of(node.type.dtype)), str(node.attrs.get("solver"))
    if scheme.name in MINIFLOATS or solver == "rtn":
        return _small_floats(w, node, scheme, solver, begin, end)
    source = w.graph.nodes[node.inputs[0]]
    straight = solver == "mse" and w.device == "cpu" and source.type.dtype == "bf16" and reads_bf16(scheme)
    if straight and (stored := _stored(w, node.inputs[0], begin, end)) is not None:
        found = least_squares(scheme, cast(U16, stored))
        if not kernels.all_finite(found.scales):
            _checked(w, source, (begin, 0), stored)
        return scheme, found.packed, (found.scales,)
    value = w.real(node.inputs[0], begin, end)
    _must_be_finite(w, node.inputs[0], value)
    x = np.ascontiguousarray(value, np.float32)
    if solver == "mse" and any(level.role == "offset" for level in scheme.levels):
        return scheme, *line(scheme, x)
    if solver == "mse" and len(scheme.table) in (0, 16):
        found = least_squares(scheme, x, on_gpu=w.device == "cuda" and on_gpu.has(node))
        return scheme, found.packed, (found.scales, found.zeros)[: len(scheme.levels)]
    if solver not in peer_weights.SOLVERS:
        raise GraphError(f"unknown solver {solver!r}", hint=f"solvers of this scheme: mse, {', '.join(peer_weights.SOLVERS)}")
    whole = [w.graph.nodes[i].type.dims == (1,) for i in node.inputs[1:]]
    others = [w.whole(i) if one else w.real(i, begin, end) for i, one in zip(node.inputs[1:], whole, strict=True)]
    packed, levels = peer_weights.SOLVERS[solver](scheme, x, others)
    kept = zip(scheme.levels, levels, strict=True)
    return scheme, packed, tuple(rounded_to(level.dtype, v) for level, v in kept)


def _small_floats(
    w: Weights, node: Node, scheme: Scheme, solver: str, begin: int, end: int
) -> tuple[Scheme, Bytes, tuple[F32, ...]]:
    """Solvers: mse, of least squared error; rtn, scales as compressed-tensors takes them."""
    peak = float(w.real(node.inputs[1])[0]) if len(node.inputs) > 1 else None
    low, high = float_weights.whole_blocks(scheme, node.type.rows, begin, end)
    value = w.real(node.inputs[0], low, high)
    _must_be_finite(w, node.inputs[0], value)
    packed, levels = float_weights.codes_of(scheme, np.ascontiguousarray(value, np.float32), peak, solver == "mse")
    return scheme, packed[begin - low : end - low], tuple(v[begin - low : end - low] for v in levels)


def _search(w: Weights, node: Node, begin: int, end: int) -> Bytes:
    if node.attrs.get("solver") != "search":
        raise GraphError(f"unknown solver {node.attrs.get('solver')!r}", hint="solvers: search")
    value = w.real(node.inputs[0], begin, end)
    _must_be_finite(w, node.inputs[0], value)
    x, scheme = np.ascontiguousarray(value, np.float32), node.type.dtype
    if len(node.inputs) < 2:
        search = on_gpu.search if w.device == "cuda" and on_gpu.has(node) else kernels.search
        return search(scheme, x)
    importance = w.whole(node.inputs[1])
    if importance.ndim == 1:
        return kernels.search(scheme, x, importance=importance)
    n = node.type.dims[1]
    parts = [(importance[e], x[e * n + i - begin : e * n + j - begin]) for e, i, j in _per_expert(node, begin, end)]
    return np.concatenate([kernels.search(scheme, rows, importance=one) for one, rows in parts])


def _pack(w: Weights, name: str, node: Node, begin: int, end: int) -> Bytes:
    quantized, layout = w.graph.nodes[node.inputs[0]], layout_of(node.type.dtype)
    if quantized.op == "quantize" and gives_codes(quantized):
        return layout.pack(cast(QTensor, w.rows(node.inputs[0], begin, end)))
    if quantized.op == "quantize" and layout.name == f"gguf.{quantized.type.dtype}":
        return _search(w, quantized, begin, end)  # ggml's own quantizers make packed blocks: no detour over codes
    if quantized.op == "quantize" and layout.join is not None and layout.scheme.name == quantized.type.dtype:
        _, packed, levels = _solved(w, quantized, begin, end)
        return layout.join(packed, levels)
    return layout.pack(cast(QTensor, w.rows(node.inputs[0], begin, end)))


def rows_per_block(k: int, values: int = BLOCK_VALUES["cpu"]) -> int:
    """Rows of k values in a block of about `values` (2 MB of f32), in multiples of 16 where that fits."""
    n = max(1, values // max(1, k))
    return n // 16 * 16 if n >= 16 else n


def _number(node: Node, attr: str) -> float:
    value = node.attrs[attr]
    assert isinstance(value, int | float)
    return value


Op = Callable[[Weights, str, Node, int, int], Array | QTensor]
OPS: dict[str, Op] = {
    "load": _load, "constant": _constant, "transpose": _transpose,
    "stack": _stack, "expert": _expert, "part": _part, "interleave": _interleave, "flat": _flat, "beside": _beside,
    "cast": _cast,
    "blend": _blend, "set_rows": _set_rows, "add_scaled": _add_scaled, "scaled": _scaled,
    "shifted": _shifted, "quantize": _quantize, "second_level": _second_level, "pack": _pack,
    **adapter_weights.OPS, **stored_weights.OPS, **peer_weights.OPS, **fold_weights.OPS, **lattice_weights.OPS,
    "amax": float_weights.amax,
}  # fmt: skip
