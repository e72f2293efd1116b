"""Whole-process cases of bench.py: a fine-tuned checkpoint to Q4_K_M, ours beside the chain of tools it replaces.

LLAMA_CPP names a folder with llama.cpp's source (convert_hf_to_gguf.py and its gguf-py); without it only ours is run.
BENCH_WORK keeps the synthetic models between calls (else a temporary folder); the 4 GB one wants 5 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import make_synthetic

ROOT = Path(__file__).parents[1]
Result = dict[str, str | float | None]
ROUNDS = 3


class Cost(NamedTuple):
    cpu_seconds: float
    wall_seconds: float
    peak_rss_mb: float


def measured(command: Sequence[str]) -> Cost:
    """Run a command to its end; CPU seconds and peak RSS are the operating system's own account of that process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - begin, usage.ru_maxrss / 1024)


@contextmanager
def work_folder() -> Iterator[Path]:
    kept = os.environ.get("BENCH_WORK")
    folder = Path(kept or tempfile.mkdtemp(prefix="qconvert-bench-"))
    try:
        yield folder
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def synthetic(folder: Path, billions: float) -> tuple[Path, Path]:
    """A random Llama and an r=16 adapter on all its linears, made once."""
    home = folder / f"llama-{billions:g}b"
    model, adapter = home / "model", home / "adapter"
    if not adapter.exists():
        if billions == 70:
            make_synthetic.make_index_70b(model)
        else:
            make_synthetic.make_checkpoint(model, make_synthetic.SHAPES[billions])
        make_synthetic.make_adapter(adapter, make_synthetic.SHAPES[billions], sparse=billions == 70)
    return model, adapter


def ours(model: Path, adapter: Path, out: Path) -> Cost:
    command = [sys.executable, "-m", "qconvert", f"{model}+{adapter}", "--quant", "Q4_K_M", "--no-check", "--threads", "2"]
    return measured([*command, "--force", "-o", str(out)])


def peer(model: Path, adapter: Path, folder: Path) -> dict[str, float] | None:
    """Totals of PEFT's merge, convert_hf_to_gguf.py and llama-quantize; None without their source."""
    if "LLAMA_CPP" not in os.environ:
        return None
    tool = [sys.executable, str(ROOT / "tools" / "peer_pipeline.py"), str(model), str(adapter), str(folder), "Q4_K_M"]
    done = subprocess.run([*tool, "--llama-cpp", os.environ["LLAMA_CPP"]], cwd=ROOT, capture_output=True, text=True, check=True)
    total: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["total"]
    shutil.rmtree(folder)
    return total


def merge_and_quantize() -> Iterator[Result]:
    """0.5 B parameters, r = 16 on all linears, to Q4_K_M with two threads: CPU seconds, memory, bytes written."""
    with work_folder() as folder:
        model, adapter = synthetic(folder, 0.5)
        out = folder / "ours.gguf"
        ours(model, adapter, out)  # compiles
        pairs = [(ours(model, adapter, out), peer(model, adapter, folder / "peer")) for _ in range(ROUNDS)]
        mine, theirs = [m for m, _ in pairs], [p for _, p in pairs if p is not None]
        result: Result = {
            "case": "merge + quantize 0.5B Q4_K_M, whole process",
            "cpu_seconds": round(statistics.median(m.cpu_seconds for m in mine), 2),
            "wall_seconds": round(statistics.median(m.wall_seconds for m in mine), 2),
            "peak_rss_mb": round(max(m.peak_rss_mb for m in mine)),
            "written_mb": round(out.stat().st_size / 1e6),
        }
        if theirs:
            result |= {
                "peer_cpu_seconds": round(statistics.median(p["cpu_seconds"] for p in theirs), 2),
                "peer_wall_seconds": round(statistics.median(p["wall_seconds"] for p in theirs), 2),
                "peer_peak_rss_mb": round(max(p["peak_rss_mb"] for p in theirs)),
                "peer_written_mb": round(theirs[0]["nbytes_written"] / 1e6),
                "ratio": round(statistics.median(p["cpu_seconds"] / m.cpu_seconds for m, p in pairs if p is not None), 1),
            }
        yield result
        out.unlink()


def memory() -> Iterator[Result]:
    """Peak RSS of the same command on 1 GB and on 4 GB of weights."""
    with work_folder() as folder:
        peaks = []
        for billions in (0.5, 2.0):
            out = folder / "ours.gguf"
            peaks.append(max(ours(*synthetic(folder, billions), out).peak_rss_mb for _ in range(2)))
            out.unlink()
        yield {
            "case": "peak RSS of merge + quantize, 1 GB and 4 GB checkpoints",
            "peak_rss_mb": round(peaks[0]),
            "peak_rss_4gb_mb": round(peaks[1]),
            "ratio": round(peaks[1] / peaks[0], 2),
        }


def start_up() -> Iterator[Result]:
    """--help, and --dry-run of a sharded 70B index with an adapter."""
    with work_folder() as folder:
        model, adapter = synthetic(folder, 70)
        commands = {
            "--help": ["--help"],
            "--dry-run 70B": [f"{model}+{adapter}", "--bits", "4", "--dry-run"],
        }
        for name, words in commands.items():
            costs = [measured([sys.executable, "-m", "qconvert", *words]) for _ in range(5)]
            yield {
                "case": name,
                "cpu_seconds": round(statistics.median(c.cpu_seconds for c in costs), 3),
                "wall_seconds": round(statistics.median(c.wall_seconds for c in costs), 3),
            }


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    "pipeline 0.5B": merge_and_quantize,
    "pipeline memory": memory,
    "start-up": start_up,
}
