"""Weights turned by Hadamard matrices and rounded to the points of a lattice (QuIP#): ops that need all of a weight at once.

Solvers: nearest, each point by itself; ldlq, from the last 8 columns to the first, each with the errors of those behind it
fed back by a block LDL of the Hessian. Source: QuIP# (Tseng et al. 2024), quip-sharp's lib/algo/quip.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from qconvert import kernels
from qconvert.errors import GraphError, InputError
from qconvert.graph import Graph, Node
from qconvert.quip_words import codes_of, words_of
from qconvert.scheme import F32, LATTICES, Array, QTensor

T = TypeVar("T")
KEPT_NBYTES = 1 << 29  # of whole weights that are kept, but for the last
SAMPLE = 1 << 19  # weights whose error chooses the scale
# of Gaussian weights 1.03 is best (quip-sharp's opt_scale); tails and narrow weights want others
SPREADS = (0.85, 0.91, 0.97, 1.03, 1.09, 1.15, 1.21)
WIDER = (1.0, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8)
DAMPING = 1e-2  # of the Hessian's mean diagonal, as quip-sharp's sigma_reg
BUFFER = 128  # columns whose errors are fed back together to all before them


class Kept:
    """Values of whole weights, each made once, by the first thread that asks; the last of KEPT_NBYTES."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.locks: dict[str, threading.Lock] = {}
        self.values: dict[str, tuple[object, int]] = {}

    def of(self, name: str, make: Callable[[], T], nbytes: Callable[[T], int]) -> T:
        with self.lock:
            own = self.locks.setdefault(name, threading.Lock())
        with own:
            with self.lock:
                found = self.values.pop(name, None)
                if found is not None:
                    self.values[name] = found
                    return cast(T, found[0])
            value = make()
            with self.lock:
                self.values[name] = (value, nbytes(value))
                while len(self.values) > 1 and sum(n for _, n in self.values.values()) > KEPT_NBYTES:
                    self.values.pop(next(iter(self.values)))
            return value


class Values(Protocol):
    """What an op reads: weights.Weights."""

    graph: Graph
    kept: Kept

    @property
    def dtype(self) -> type[np.floating]: ...

    def rows(self, name: str, begin: int, end: int) -> Array | QTensor: ...

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...

    def whole(self, name: str) -> Array: ...


def _signs(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """+-1 from the bits of a generator whose stream numpy promises to keep."""
    n = node.type.dims[0]
    words = np.random.PCG64(cast(int, node.attrs["seed"])).random_raw(-(-n // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:n]
    return (1 - 2 * bits.astype(w.dtype))[begin:end]


def _turned(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    return w.kept.of(name, lambda: whole(w, name), lambda x: x.nbytes)[begin:end]


def whole(w: Values, name: str) -> Array:
    """All of a weight, as nothing else keeps it: it may be changed."""
    node = w.graph.nodes[name]
    if node.op not in ("incoherent", "coherent"):
        return np.array(w.real(name), w.dtype)
    value, su, sv = node.inputs
    (n, k), x = node.type.dims, np.empty(node.type.dims, w.dtype)
    step = max(1, (1 << 19) // k) // 16 * 16 or 16  # tiles of rows
    for i in range(0, n, step):
        x[i : i + step] = w.real(value, i, min(n, i + step))
    turn = kernels.incoherent if node.op == "incoherent" else kernels.coherent
    return turn(x, w.whole(su).astype(w.dtype), w.whole(sv).astype(w.dtype))


def _rows(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    first, times = cast(int, node.attrs["begin"]), cast(float, node.attrs["times"])
    return (w.real(node.inputs[0], first + begin, first + end) * times).astype(w.dtype)


# solvers ------------------------------------------------------------------------------------------


def quantized(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    """Rows of a weight in a lattice's scheme."""
    q = w.kept.of(name, lambda: _solved(w, node), lambda q: q.codes.nbytes)
    return QTensor(q.scheme, q.codes[begin:end], tuple(v[begin:end] for v in q.levels))


def _solved(w: Values, node: Node) -> QTensor:
    solver = node.attrs.get("solver")
    if solver not in ("nearest", "ldlq"):
        raise GraphError(f"unknown solver {solver!r}", hint="solvers of a lattice: nearest, ldlq")
    x = whole(w, node.inputs[0]).astype(np.float32, copy=False)
    if not kernels.all_finite(x):
        raise InputError(f"{node.inputs[0]} overflows: the weights and adapters are finite, what they add up to is not")
    hessian = whole(w, node.inputs[1]).astype(np.float64, copy=False) if solver == "ldlq" else None
    points, unit = nearest(x) if hessian is None else ldlq(x, hessian)
    return QTensor(LATTICES[node.type.dtype], points, (np.full((len(x), 1), unit / 4, np.float32),))


I8 = npt.NDArray[np.int8]
Solved = tuple[I8, np.float32]


def nearest(x: F32) -> Solved:
    """f32[N,K] -> points i8[N,K] in quarters, and the unit that they are multiplied by, a number of f16."""
    unit = unit_of(x)
    points = kernels.e8p_nearest(x, float(unit))
    xq = qq = 0.0
    for row, q in zip(x, points, strict=True):
        q = q.astype(np.float32)
        xq, qq = xq + float(row @ q), qq + float(q @ q)
    return points, _half(4 * xq / qq)


def unit_of(x: F32) -> np.float32:
    """The root of the mean square over what makes the error of some rows least."""
    some = x[:: max(1, x.size // SAMPLE)]
    rms = float(np.sqrt(np.mean(np.square(some, dtype=np.float64))))
    if rms == 0:
        return np.float32(0)

    def error(unit: float) -> float:
        return float(np.square(some - kernels.e8p_nearest(some, unit) * np.float32(unit / 4)).sum(dtype=np.float64))

    return _half(min((rms / spread for spread in SPREADS), key=error))


def _half(unit: float) -> np.float32:
    """A unit is stored in f16."""
    return np.float32(np.float16(min(max(unit, 0.0), 65504.0)))


def ldlq(x: F32, hessian: Array) -> Solved:
    """f32[N,K], f64[K,K] (turned as x is) -> as nearest(); hessian is changed.

    What is fed back makes weights larger, so that the unit that is best for themselves leaves many outside the lattice:
    of some greater ones that is taken of which some rows have the least error, by the Hessian.
    """
    least, feedback, some = unit_of(x), block_ldl(hessian), x[:: max(1, x.size // SAMPLE)]
    damped = hessian.astype(np.float32)

    def cost(unit: np.float32) -> float:
        error = some - fed_back(some, feedback, unit) * (unit / 4)
        return float(np.sum(error @ damped * error, dtype=np.float64))

    unit = min((_half(float(least) * more) for more in WIDER), key=cost)
    return fed_back(x, feedback, unit), unit


def fed_back(x: F32, feedback: F32, unit: np.float32) -> I8:
    """The points of each 8 columns from the last on, with the errors of those behind them."""
    n, k = x.shape
    points, error, far = np.empty((n, k), np.int8), np.zeros((n, k), np.float32), np.zeros((n, k), np.float32)
    for high in range(k, 0, -BUFFER):
        low = max(0, high - BUFFER)
        for i in range(high - 8, low - 8, -8):
            some = slice(i, i + 8)
            wanted = x[:, some] + far[:, some] + error[:, i + 8 : high] @ feedback[i + 8 : high, some]
            points[:, some] = kernels.e8p_nearest(wanted, float(unit))
            error[:, some] = x[:, some] - points[:, some] * (unit / 4)
        far[:, :low] += error[:, low:high] @ feedback[low:high, :low]
    return points


def block_ldl(hessian: Array) -> F32:
    """f64[K,K] -> the L of L D L.T, f32, with unit blocks of 8 by 8 on its diagonal."""
    k = len(hessian)
    mean = float(np.trace(hessian)) / k
    if not mean > 0:
        raise InputError("a Hessian without a positive trace", hint="was the text that it was measured on empty?")
    hessian /= mean
    hessian[np.arange(k), np.arange(k)] += DAMPING
    lower = np.linalg.cholesky(hessian)
    for i in range(0, k, 8):
        lower[i:, i : i + 8] = lower[i:, i : i + 8] @ np.linalg.inv(lower[i : i + 8, i : i + 8])
    return lower.astype(np.float32)


# as quip-sharp stores them ------------------------------------------------------------------------


def _lattice_unit(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    q = cast(QTensor, w.rows(node.inputs[0], 0, 16))
    unit: Array = 4 * q.levels[0][0]
    return unit.astype(w.dtype)


def _tile(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    low, high = begin // 16 * 16, -(-end // 16) * 16
    points = cast(QTensor, w.rows(node.inputs[0], low, high)).codes.view(np.int8)
    return words_of(kernels.e8p_codes(points))[begin - low : end - low]


def _untile(w: Values, name: str, node: Node, begin: int, end: int) -> QTensor:
    low, high = begin // 16 * 16, -(-end // 16) * 16
    words, unit = node.inputs
    points = kernels.e8p_points(codes_of(cast(Array, w.rows(words, low, high))))[begin - low : end - low]
    scale = np.float32(w.whole(unit).reshape(-1)[0]) / 4
    if not np.isfinite(scale):
        raise InputError(f"{w.graph.nodes[unit].attrs['tensor']}: {scale}", hint="the file is damaged")
    return QTensor(LATTICES[node.type.dtype], points, (np.full((end - begin, 1), scale, np.float32),))


OPS: dict[str, Callable[[Values, str, Node, int, int], Array | QTensor]] = {
    "signs": _signs, "incoherent": _turned, "coherent": _turned, "lattice_unit": _lattice_unit, "tile": _tile,
    "untile": _untile, "rows": _rows,
}  # fmt: skip
