"""Measure qconvert beside its peers: one JSON line per case.

    python tools/bench.py                       every case
    python tools/bench.py q4_k "low rank"       cases whose names contain one of these
    python tools/bench.py --isa avx2 --record   as on a CPU without AVX-512; append the lines to bench_results.jsonl

Times are CPU seconds of one thread, ours and the peer's in turn on the same array; medians. A new case is a function that
yields results, in CASES.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bench_calibrate
import bench_curve
import bench_export
import bench_onnx
import bench_pipeline
import bench_quality
import bench_safetensors
import bench_solvers
import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench_results.jsonl"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Result = dict[str, str | float | None]
ROWS, COLUMNS = 128, 4096  # 2 MB of f32: a block of rows as the emitter hands it on
ROUNDS = 15
SCHEMES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
BOOKS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")  # these are made with importance


def cpu_seconds(work: Callable[[], object], least: float = 0.02) -> float:
    """CPU seconds of one call, over as many calls as take `least` seconds."""
    begin, calls = time.process_time(), 0
    while not calls or time.process_time() - begin < least:
        work()
        calls += 1
    return (time.process_time() - begin) / calls


def weights(n: int = ROWS, k: int = COLUMNS) -> np.ndarray:
    """f32[n,k] like a trained model's: normal, each row of its own spread, one outlier in a thousand."""
    rng = np.random.default_rng(0)
    spread = 0.02 * np.exp(0.3 * rng.standard_normal((n, 1)))
    x = rng.standard_normal((n, k), np.float32) * spread.astype(np.float32)
    x[rng.random(x.shape) < 0.001] *= 6
    return x


def quantize(scheme: str, imatrix: bool = False) -> Iterator[Result]:
    """Our search against ggml_quantize_chunk, with importance or without. `ratio`: the median over neighbouring runs."""
    import ggml_oracle

    from qconvert import kernels

    x = weights()
    out = np.empty((ROWS, ggml_oracle.row_nbytes(scheme, COLUMNS)), np.uint8)
    importance = np.exp(np.random.default_rng(2).standard_normal(COLUMNS)).astype(np.float32) if imatrix else None
    ours = partial(kernels.search, scheme, x, out=out, importance=importance)
    peer = partial(ggml_oracle.quantize, scheme, x, out, importance)
    ours()  # compiles
    seconds = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(ROUNDS)]
    mine, theirs = (x.size / 1e6 / statistics.median(column) for column in zip(*seconds, strict=True))
    yield {
        "case": f"quantize {scheme}{' imatrix' if imatrix else ''} {ROWS}x{COLUMNS}",
        "m_weights_per_s": round(mine, 1),
        "peer_m_weights_per_s": round(theirs, 1),
        "ratio": round(statistics.median(b / a for a, b in seconds), 1),
    }


def low_rank(r: int) -> Iterator[Result]:
    """A rank-r adapter added to f32 rows, the work of a merge beside quantizing."""
    from qconvert import kernels

    x = weights()
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((r, COLUMNS), np.float32), rng.standard_normal((ROWS, r), np.float32)
    work = partial(kernels.add_low_rank, x, a, b, 1e-6)
    work()
    seconds = statistics.median(cpu_seconds(work) for _ in range(ROUNDS))
    yield {"case": f"add low rank {r} {ROWS}x{COLUMNS}", "m_weights_per_s": round(x.size / 1e6 / seconds, 1)}


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    **bench_pipeline.CASES,
    **bench_calibrate.CASES,
    **bench_onnx.CASES,
    **bench_export.CASES,
    **bench_safetensors.CASES,
    **bench_quality.CASES,
    **bench_solvers.CASES,
    **bench_curve.CASES,
    **{f"quantize {scheme}": partial(quantize, scheme) for scheme in SCHEMES},
    **{f"quantize {scheme} imatrix": partial(quantize, scheme, True) for scheme in (*SCHEMES, *BOOKS) if scheme != "q8_0"},
    **{f"low rank {r}": partial(low_rank, r) for r in (16, 64)},
}


def machine() -> Result:
    """What every line says of where it was measured."""
    from qconvert.kernels.lanes import host

    avx2, avx512 = host()
    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    isa = "avx512" if avx512 else "avx2" if avx2 else "scalar"
    return {"cpu": model[0] if model else "?", "isa": isa, "commit": commit.stdout.strip()}


def as_avx2() -> int:
    """This command again in a process for which numba compiles as for x86-64-v3, with a cache of its own."""
    words = [word for word in sys.argv if word not in ("--isa", "avx2", "--isa=avx2")]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CACHE_DIR": cache}
        return subprocess.run([sys.executable, *words], env=env, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="part of a case's name")
    parser.add_argument("--isa", choices=["host", "avx2"], default="host")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--plot", help="an SVG for the case `curve`")
    args = parser.parse_args()
    if args.plot:
        os.environ["BENCH_PLOT"] = args.plot
    if args.isa == "avx2":
        return as_avx2()
    for name, case in CASES.items():
        if args.case and not any(part in name for part in args.case):
            continue
        for result in case():
            line = json.dumps({**result, **machine()})
            print(line, flush=True)
            if args.record:
                with RESULTS.open("a") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
