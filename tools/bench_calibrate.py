"""Calibration of bench.py: what a model's weights multiply over 128 x 512 tokens, ours beside llama-imatrix.

LLAMA_CPP_BIN names the folder of llama.cpp's programs; without it only ours is run.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench_onnx import DATA
from bench_pipeline import Cost, measured, work_folder

Result = dict[str, str | float | None]
ROUNDS = 3
CHUNKS, LENGTH = 128, 512


def ours(model: Path, text: Path, folder: Path, *more: str) -> Cost:
    """The whole process, in which an f16 file is written too."""
    words = ["--calibrate", str(text), "--calibrate-tokens", str(CHUNKS * LENGTH), "--threads", "1", "--no-check", "--force"]
    command = [sys.executable, "-m", "qconvert", str(model), "--quant", "F16", *words, *more, "-o", str(folder / "ours.gguf")]
    return measured(command)


def peer(text: Path, folder: Path) -> Cost:
    """llama-imatrix on the f16 file that ours wrote."""
    tool, model = f"{os.environ['LLAMA_CPP_BIN']}/llama-imatrix", str(folder / "ours.gguf")
    words = ["-f", str(text), "-c", str(LENGTH), "--chunks", str(CHUNKS), "-t", "1", "--no-ppl"]
    return measured([tool, "-m", model, *words, "-o", str(folder / "peer.gguf")])


def calibrate() -> Iterator[Result]:
    """CPU seconds of one thread, in turn; `ratio` is the peer's over ours."""
    model, text = DATA / "models" / "novels-13m", DATA / "text" / "en-fauntleroy-1886.txt"
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    with work_folder() as folder:
        ours(model, text, folder)  # compiles, and makes the file that the peer reads
        costs: list[tuple[Cost, Cost | None]] = []
        for _ in range(ROUNDS):
            mine = ours(model, text, folder, "--save-imatrix", str(folder / "ours-imatrix.gguf"))
            costs.append((mine, peer(text, folder) if "LLAMA_CPP_BIN" in os.environ else None))
        result: Result = {
            "case": f"calibrate {CHUNKS} x {LENGTH} tokens, {model.name}",
            "cpu_seconds": round(statistics.median(m.cpu_seconds for m, _ in costs), 1),
            "peak_rss_mb": round(max(m.peak_rss_mb for m, _ in costs)),
        }
        if theirs := [p for _, p in costs if p is not None]:
            result |= {
                "peer_cpu_seconds": round(statistics.median(p.cpu_seconds for p in theirs), 1),
                "peer_peak_rss_mb": round(max(p.peak_rss_mb for p in theirs)),
                "ratio": round(statistics.median(p.cpu_seconds / m.cpu_seconds for m, p in costs if p is not None), 2),
            }
        yield result


CASES: dict[str, Callable[[], Iterator[Result]]] = {"calibrate": calibrate}
