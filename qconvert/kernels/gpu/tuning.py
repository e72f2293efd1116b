"""Which tiles are fastest on the GPU at hand, for one operand and number of rows of x."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from qconvert.errors import UnsupportedError, require
from qconvert.kernels.gpu.launch import Launch, Tiles, interprets, multiplication
from qconvert.kernels.gpu.records import Placed

GEMV = tuple(Tiles(n, k, 1, warps) for n, k, warps in product((1, 2, 4, 8, 16), (256, 512, 1024, 2048), (1, 2, 4, 8)))
GEMM = tuple(
    Tiles(n, k, m, warps, stages)
    for n, k, m, warps, stages in product((32, 64, 128), (64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4))
)
WEIGHTS_A_THREAD = (8, 128)  # less is idle, more does not fit registers
FLUSH = 1 << 29  # bytes: more than caches hold
REPLAYS = 15


def candidates(m: int) -> list[Tiles]:
    """Tiles worth a try for m rows of x."""
    if m == 1:
        low, high = WEIGHTS_A_THREAD
        return [t for t in GEMV if low <= t.n * t.k // (32 * t.warps) <= high]
    return [t for t in GEMM if t.m <= max(16, m)]


def n_copies(nbytes: float) -> int:
    """Of an operand, so that a round over them finds none in a cache."""
    return max(2, int(-(-FLUSH // nbytes)))


def seconds(works: Sequence[Callable[[], object]]) -> float:
    """Of one of works on the GPU: the median round over all of them, replayed as a graph, free of the cost of launching."""
    for work in works:
        work()  # compiles
    torch.cuda.synchronize()
    graph, taken = torch.cuda.CUDAGraph(), list[float]()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1000 / len(works))
    return statistics.median(taken)


def run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def fastest(x: torch.Tensor, copies: Sequence[Placed]) -> tuple[Tiles, float]:
    """The fastest tiles of x by an operand, and the seconds of one product. copies: n_copies() of it."""
    if interprets(copies[0].device):
        raise UnsupportedError("tiles are tuned on a GPU, and here is none")
    best: tuple[Tiles, float] | None = None
    for tiles in candidates(x.shape[0]):
        works = [partial(run_all, multiplication(x, w, tiles=tiles)[1]) for w in copies]
        try:
            taken = seconds(works)
        except require("triton.errors", "tuning kernels").TritonError:  # no room for these tiles
            continue
        if best is None or taken < best[1]:
            best = tiles, taken
    if best is None:
        raise UnsupportedError(f"{copies[0].operand.name}: no tiles fit this GPU")
    return best
