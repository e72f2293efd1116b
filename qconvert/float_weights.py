"""Codes that are small floats, and the greatest magnitude of whole weights, which some scales come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np

from qconvert import kernels
from qconvert.graph import Graph, Node
from qconvert.scheme import E4M3_TABLE, E8M0_TABLE, F32, MINIFLOATS, SCHEMES, Array, Bytes, Scheme

E4M3, E8M0 = (np.array(table, np.float32) for table in (E4M3_TABLE, E8M0_TABLE))
E4M3_STEPS, INT8_STEPS, FP4_STEPS = 448.0, 127.5, 448.0 * 6.0  # from zero to the peak


class Values(Protocol):
    """What an op reads: weights.Weights."""

    graph: Graph
    peaks: Peaks

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...


def codes_of(scheme: Scheme, x: F32, peak: float | None, search: bool) -> tuple[Bytes, tuple[F32, ...]]:
    """x f32[N,K] -> packed codes u8[N, K * bits / 8], signed ones from 0 on, and the levels of `scheme`.

    Rows that share entries are all there. peak: of all that share what a tensor shares. search: for scales of least error.
    """
    n, k = x.shape
    if scheme.name == "nvfp4":
        divisor = divisor_of(peak or 0.0)
        q = kernels.nvfp4(x, float(divisor), search)
        return q.packed, (np.full((n, 1), divisor), E4M3[q.scales])
    if scheme.name == "mxfp4":
        q = kernels.mxfp4(x)
        return q.packed, (E8M0[q.scales],)
    level = scheme.levels[-1]
    group = level.group or k
    peaks = np.full((n, 1), peak, np.float32) if level.rows is None else kernels.group_peaks(x, group)
    if level.dtype == "e8m0":
        scales = E8M0[kernels.mx_exponents(peaks, 8)]
    else:
        if level.rows is not None and level.rows > 1:
            first = np.arange(0, n, level.rows)
            peaks = np.maximum.reduceat(peaks, first).repeat(np.diff([*first, n]), axis=0)
        scales = kernels.scales_of(peaks, E4M3_STEPS if scheme.table else INT8_STEPS, level.dtype)
    if scheme.table:
        return kernels.e4m3_codes(x, scales, group), (scales,)
    return kernels.int8_codes(x, scales, group).view(np.uint8) ^ np.uint8(128), (scales,)


def has_rtn(scheme: Scheme) -> bool:
    """Small floats, and int8 with one scale a group: as compressed-tensors rounds them."""
    plain = scheme.bits == 8 and not scheme.table and [level.role for level in scheme.levels] == ["scale"]
    return scheme.name in MINIFLOATS or (plain and scheme.name not in SCHEMES)


def divisor_of(peak: float) -> np.float32:
    """Of scales that are e4m3, so that the largest is 448: 448 * 6 / peak; 1 where that is infinite."""
    with np.errstate(over="ignore", divide="ignore"):
        divisor = np.float32(FP4_STEPS) / np.float32(peak)
    return divisor if np.isfinite(divisor) else np.float32(1)


class Peak:
    """The greatest magnitude of some weights, by all threads that want it: each takes blocks until none is left."""

    def __init__(self, blocks: Iterator[tuple[str, int, int]]) -> None:
        self.blocks, self.lock, self.done = blocks, threading.Lock(), threading.Event()
        self.value, self.n_open, self.ended, self.error = 0.0, 0, False, cast(BaseException | None, None)

    def found(self, peak_of: Callable[[str, int, int], float]) -> float:
        while (block := self._take()) is not None:
            try:
                self._put(peak_of(*block))
            except BaseException as e:
                self.error = e
                self.done.set()
                raise
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value

    def _take(self) -> tuple[str, int, int] | None:
        with self.lock:
            block = None if self.error else next(self.blocks, None)
            self.ended = self.ended or block is None
            self.n_open += block is not None
            self._close()
            return block

    def _put(self, peak: float) -> None:
        with self.lock:
            self.value, self.n_open = max(self.value, peak), self.n_open - 1
            self._close()

    def _close(self) -> None:
        if self.ended and not self.n_open:
            self.done.set()


class Peaks:
    """Those of the nodes `amax`, kept."""

    def __init__(self) -> None:
        self.known: dict[str, Peak] = {}
        self.lock = threading.Lock()

    def of(self, name: str, blocks: Callable[[], Iterator[tuple[str, int, int]]]) -> Peak:
        with self.lock:
            if name not in self.known:
                self.known[name] = Peak(blocks())
            return self.known[name]


def amax(w: Values, name: str, node: Node, begin: int, end: int) -> Array:
    """f32[1]"""

    def blocks() -> Iterator[tuple[str, int, int]]:
        for i in node.inputs:
            kind = w.graph.nodes[i].type
            step = max(1, BLOCK // kind.dims[-1])
            yield from ((i, at, min(kind.rows, at + step)) for at in range(0, kind.rows, step))

    def peak_of(i: str, begin: int, end: int) -> float:
        value = np.ascontiguousarray(w.real(i, begin, end), np.float32)
        return float(kernels.group_peaks(value, value.shape[-1]).max())

    return np.array([w.peaks.of(name, blocks).found(peak_of)], np.float32)


BLOCK = 1 << 19  # weights that are evaluated at a time


def whole_blocks(scheme: Scheme, n: int, begin: int, end: int) -> tuple[int, int]:
    """The rows that share entries with rows begin..end of n."""
    step = max(level.rows or 1 for level in scheme.levels)
    return begin // step * step, min(n, -(-end // step) * step)
