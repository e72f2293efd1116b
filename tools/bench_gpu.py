"""Measure the fused products of packed weights on a GPU beside cuBLAS and the memory itself, and quantizing and solvers on it
beside the CPU: one JSON line per case.

    python tools/bench_gpu.py                     every case
    python tools/bench_gpu.py gemv "4096 x 4096"  cases whose names contain one of these
    python tools/bench_gpu.py "solve gptq"        GPTQ of a layer
    python tools/bench_gpu.py --record            append the lines to bench_results.jsonl

Weights are W4A16, groups of 128 with f16 scales; x is bf16, and so is cuBLAS's weight. GB/s count the packed weight, x and y
once. The copy's bandwidth, of bytes read and written, is measured in the same run. Tiles are tuned first. Each round goes over
as many copies of a weight as no cache holds.

quantize: bf16 weights that lie in GPU memory to blocks there, against kernels.search on f32 rows with all cores (goal 20x);
with_copies: f32 rows from and bytes to the CPU's memory too, by as many threads, as --device cuda does. wrong_bytes: of both.

solve: a layer by GPTQ or rounding, rows from and codes to the CPU's memory, against the CPU's solver with all cores. factor_s:
of the Hessian's Cholesky factor, which both take from the CPU, once for all weights that read the same inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_solvers import layer

from qconvert import kernels
from qconvert.hessians import factored
from qconvert.kernels.columns import CpuColumns
from qconvert.kernels.gpu import quantize, reference
from qconvert.kernels.gpu.check import relative
from qconvert.kernels.gpu.columns import GpuColumns
from qconvert.kernels.gpu.launch import multiply
from qconvert.kernels.gpu.operand import Codes, Metadata, Operand, Part
from qconvert.kernels.gpu.records import place
from qconvert.kernels.gpu.tuning import fastest, n_copies, seconds
from qconvert.parallel import default_threads, in_parallel
from qconvert.scheme import QTensor, scheme_of
from qconvert.solving import Given, Gptq, Rtn, Solver
from qconvert.weights import BLOCK_VALUES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench_results.jsonl"
Result = dict[str, str | float | None]
SHAPES = ((4096, 4096), (11008, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (8192, 28672))  # N, K
ROWS = {"gemv": 1, "gemm": 128}
GROUP = 128
QUANTIZED = (4096, 14336)  # N, K
SOLVED = (4096, 4096)  # N, K
SOLVERS: tuple[tuple[Solver, str], ...] = (
    (Rtn(), "int4_g128"), (Gptq(), "int4_g128"), (Gptq(static=True), "int4_g128"), (Gptq(ordered=True), "int4_g128"),
    (Gptq(), "uint4_g64"), (Gptq(), "q4_0"), (Gptq(), "q4_k"),
)  # fmt: skip
ROUNDS = 7


def w4a16(n: int, k: int) -> Operand:
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (n, k // 8), np.int64).astype(np.int32)
    scale = Metadata((rng.random((n, k // GROUP)) * 0.01).astype(np.float16), "f16")
    return Operand("w4a16", (n, k), Codes(words, 4), scale=scale, zero=8.0, block=(1, GROUP))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([partial(target.copy_, source)])


def measure(kind: str, n: int, k: int, bandwidth: float) -> Result:
    m, w = ROWS[kind], w4a16(n, k)
    nbytes = n * k / 2 + 2 * n * k / GROUP + 2 * m * k + 4 * m * n
    copies = [place(w, "cuda") for _ in range(n_copies(nbytes))]
    x = torch.randn((m, k), device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    tiles, taken = fastest(x, copies)
    dense = [torch.randn((n, k), device="cuda").bfloat16() for _ in range(n_copies(2 * n * k))]
    cublas = seconds([partial(torch.nn.functional.linear, x, weight) for weight in dense])
    part = Part(0, 64, k)
    y = multiply(x, copies[0], part=part, tiles=tiles).cpu().numpy()
    return {
        "case": f"w4a16 {kind} {n} x {k}, M = {m}",
        "us": round(taken * 1e6, 2),
        "cublas_bf16_us": round(cublas * 1e6, 2),
        "ratio": round(cublas / taken, 2),
        "gb_per_s": round(nbytes / taken / 1e9, 1),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "of_copy": round(nbytes / taken / bandwidth, 3),
        "tflops": round(2 * m * n * k / taken / 1e12, 2),
        "error": float(f"{relative(y, reference.product(x.float().cpu().numpy(), w, part)):.2g}"),
        "tiles": " ".join(f"{name}={value}" for name, value in tiles._asdict().items() if value is not None),
    }


def wall_seconds(work: Callable[[], object]) -> float:
    """The median of ROUNDS calls after one that warms up."""
    work()
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def measure_quantize(scheme: str) -> Result:
    (n, k), threads = QUANTIZED, default_threads()
    half = (torch.randn((n, k), device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 0.02).bfloat16()
    x = half.float().cpu().numpy()
    out, launch = quantize.searching(scheme, half, interpreted=False)
    launch.run()
    there, here = out.cpu().numpy(), kernels.search(scheme, x)
    taken = seconds([launch.run])

    def in_blocks(search: Callable[..., object], values: int) -> None:
        step = max(1, values // k)
        in_parallel((x[i : i + step] for i in range(0, n, step)), partial(search, scheme), threads)

    cpu = wall_seconds(partial(in_blocks, kernels.search, BLOCK_VALUES["cpu"]))
    copied = wall_seconds(partial(in_blocks, quantize.search, BLOCK_VALUES["cuda"]))
    return {
        "case": f"quantize {scheme} {n} x {k}, bf16",
        "m_weights_per_s": round(x.size / taken / 1e6),
        "cpu_m_weights_per_s": round(x.size / cpu / 1e6),
        "ratio": round(cpu / taken, 1),
        "with_copies_m_weights_per_s": round(x.size / copied / 1e6),
        "with_copies_ratio": round(cpu / copied, 1),
        "threads": threads,
        "wrong_bytes": int((there != here).sum()),
    }


def solver_case(solver: Solver, scheme: str) -> str:
    options = "".join(f" {name}" for name in ("static", "ordered") if getattr(solver, name, False))
    return f"solve {solver.name}{options} {scheme}"


def measure_solver(solver: Solver, scheme: str, n: int, k: int) -> Result:
    threads, made = default_threads(), scheme_of(scheme)
    assert made is not None
    x, h = layer(n, k)
    begin = time.perf_counter()
    factor = factored(h, 0.01, getattr(solver, "ordered", False), scheme)
    factor_s = time.perf_counter() - begin

    def solved(columns: type[CpuColumns] | type[GpuColumns], values: int) -> list[QTensor]:
        step, found = max(1, values // k), dict[int, QTensor]()
        given = Given(factor=lambda damp, ordered: factor, columns=columns)

        def block(i: int) -> None:
            found[i] = solver.solve(made, x[i : i + step], given)

        in_parallel(range(0, n, step), block, threads)
        return [found[i] for i in range(0, n, step)]

    ways: tuple[tuple[type[CpuColumns] | type[GpuColumns], int], ...]
    ways = (CpuColumns, BLOCK_VALUES["cpu"]), (GpuColumns, BLOCK_VALUES["cuda"])
    cpu, there = (wall_seconds(partial(solved, *way)) for way in ways)
    here, other = (solved(*way) for way in ways)
    codes = [np.concatenate([q.codes for q in found]) for found in (here, other)]
    levels = [np.concatenate([np.concatenate(q.levels, axis=1) for q in found]).view(np.uint32) for found in (here, other)]
    return {
        "case": f"{solver_case(solver, scheme)} {n} x {k}",
        "s": round(there, 4),
        "cpu_s": round(cpu, 3),
        "ratio": round(cpu / there, 1),
        "m_weights_per_s": round(x.size / there / 1e6),
        "factor_s": round(factor_s, 2) if solver.needs else None,
        "threads": threads,
        "wrong_codes_and_levels": int((codes[0] != codes[1]).sum() + (levels[0] != levels[1]).sum()),
    }


def cases(wanted: list[str]) -> Iterator[Result]:
    for scheme in quantize.SEARCHES:
        if not wanted or any(word in f"quantize {scheme}" for word in wanted):
            yield measure_quantize(scheme)
    for solver, scheme in SOLVERS:
        if not wanted or any(word in "{} {} x {}".format(solver_case(solver, scheme), *SOLVED) for word in wanted):
            yield measure_solver(solver, scheme, *SOLVED)
    products = [(kind, n, k) for kind in ROWS for n, k in SHAPES]
    products = [p for p in products if not wanted or any(word in "{} {} x {}".format(*p) for word in wanted)]
    bandwidth = copy_bandwidth() if products else 0.0
    for kind, n, k in products:
        yield measure(kind, n, k, bandwidth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="part of a case's name")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu.py needs a GPU, and torch sees none here: nothing was measured", file=sys.stderr)
        return 1
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for result in cases(args.case):
        line = json.dumps({**result, "device": torch.cuda.get_device_name(), "commit": commit.stdout.strip()})
        print(line, flush=True)
        if args.record:
            with RESULTS.open("a") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
