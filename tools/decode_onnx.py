"""Decode with an ONNX folder in a process of its own and say as one JSON line how long a token took and what memory it needs.

    python tools/decode_onnx.py FOLDER [--threads 2] [--genai]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
N_PROMPT, N_STEPS = 32, 128


def resident_mb() -> dict[str, float]:
    """Memory of this process by the kernel's account: anonymous, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {key: float(value.split()[0]) for key, _, value in (line.partition(":") for line in lines) if key.startswith("Rss")}
    return {"anonymous_mb": round(kb["RssAnon"] / 1024, 1), "file_mb": round(kb["RssFile"] / 1024, 1)}


def onnxruntime_steps(folder: Path, threads: int) -> tuple[Callable[[list[int]], object], Callable[[int], object]]:
    """(prefill, one step) of a session in plain onnxruntime."""
    from builder_oracle import Decoder

    model = Decoder(folder, threads)
    return model.logits, lambda token: model.step([token])


def genai_steps(folder: Path) -> tuple[Callable[[list[int]], object], Callable[[int], object]]:
    """The same in onnxruntime-genai, which chooses its tokens itself."""
    import onnxruntime_genai as genai

    model: Any = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    length = N_PROMPT + N_STEPS + 1
    params.set_search_options(min_length=length, max_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    return generator.append_tokens, lambda _: generator.generate_next_token()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--genai", action="store_true", help="in onnxruntime-genai, with as many threads as it takes")
    options = parser.parse_args()
    prefill, step = genai_steps(options.folder) if options.genai else onnxruntime_steps(options.folder, options.threads)
    loaded = resident_mb()
    tokens = np.random.default_rng(0).integers(2, 1000, N_PROMPT + N_STEPS).tolist()
    begin = time.perf_counter()
    prefill(tokens[:N_PROMPT])
    first = time.perf_counter() - begin
    seconds = []
    for token in tokens[N_PROMPT:]:
        begin = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"prefill_ms": 1e3 * first, "step_ms": 1e3 * statistics.median(seconds), "loaded": loaded,
                      "used": resident_mb()}))  # fmt: skip


if __name__ == "__main__":
    main()
