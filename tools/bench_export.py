"""Cases of bench.py for whole exports to quantized safetensors, beside other tools' and beside reading and writing the bytes.

LLMCOMPRESSOR_PYTHON, GPTQMODEL_PYTHON and AUTOAWQ_PYTHON name Pythons with llm-compressor, gptqmodel 7.7, and autoawq 0.2.9
(beside transformers 4.51 and datasets 3), as they want versions of their own; without one only ours is measured.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench_pipeline import Cost, Result, measured, synthetic, work_folder

ROUNDS = 3
CHUNK = 1 << 22


class Peer(NamedTuple):
    """Who else writes what `quant` is: the variable that names its Python, and what that runs on a source and an output."""

    quant: str
    python: str
    code: str


W4A16 = Peer("w4a16", "LLMCOMPRESSOR_PYTHON", """
import sys
from llmcompressor import model_free_ptq  # without data and without loading the model as one: each shard is read and written
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W4A16", ignore=["lm_head", "re:.*embed_tokens"],
               max_workers=1, device="cpu")
""")  # fmt: skip
GPTQ = Peer("gptq", "GPTQMODEL_PYTHON", """
import os, sys
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its own number is an error
os.chdir(os.path.dirname(sys.argv[2]))  # where its logs go
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import RTNConfig  # without data: nearest codes, then its packing
model = GPTQModel.load(sys.argv[1], RTNConfig(bits=4, group_size=128))
model.quantize(None)
model.save(sys.argv[2])
""")  # fmt: skip
AWQ = Peer("awq", "AUTOAWQ_PYTHON", """
import sys
import torch
from awq import AutoAWQForCausalLM
from awq.models.base import AwqConfig
from awq.quantize.quantizer import AwqQuantizer
model = AutoAWQForCausalLM.from_pretrained(sys.argv[1], device_map="cpu", torch_dtype=torch.float16)
packer = AwqQuantizer.__new__(AwqQuantizer)  # its last step alone: nearest codes and WQLinear_GEMM.from_linear, no calibration
packer.w_bit, packer.group_size, packer.zero_point, packer.version = 4, 128, True, "gemm"
packer.modules, packer.modules_to_not_convert = model.get_model_layers(model.model), None
packer.pack()
model.quant_config = AwqConfig.from_dict({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"})
model.save_quantized(sys.argv[2])
""")  # fmt: skip


def ours(source: Path, out: Path, quant: str = "w4a16", threads: int = 2) -> Cost:
    command = [sys.executable, "-m", "qconvert", str(source), "--to", "safetensors", "--quant", quant, "--no-check", "--force"]
    return measured([*command, "--threads", str(threads), "-o", str(out)])


def theirs(peer: Peer, source: Path, out: Path) -> Cost | None:
    python = os.environ.get(peer.python)
    return measured([python, "-c", peer.code, str(source), str(out)]) if python else None


def whole_process(peer: Peer, billions: float) -> Iterator[Result]:
    """4 bits in groups of 128: CPU seconds, memory and bytes."""
    with work_folder() as folder:
        source, _ = synthetic(folder, billions)
        out, other = folder / "ours-st", folder / "theirs-st"
        ours(source, out, peer.quant), theirs(peer, source, other)  # which compile
        pairs = [(ours(source, out, peer.quant), theirs(peer, source, other)) for _ in range(ROUNDS)]
        result: Result = {"case": f"{peer.quant} export {billions:g}B, whole process"}
        for who, costs in (("", [m for m, _ in pairs]), ("peer_", [p for _, p in pairs if p is not None])):
            if costs:
                result |= {
                    f"{who}cpu_seconds": round(statistics.median(c.cpu_seconds for c in costs), 2),
                    f"{who}wall_seconds": round(statistics.median(c.wall_seconds for c in costs), 2),
                    f"{who}peak_rss_mb": round(max(c.peak_rss_mb for c in costs)),
                }
        if all(p is not None for _, p in pairs):
            result["ratio"] = round(statistics.median(p.cpu_seconds / m.cpu_seconds for m, p in pairs if p), 1)
            result["rss_ratio"] = round(min(p.peak_rss_mb for _, p in pairs if p) / max(m.peak_rss_mb for m, _ in pairs), 1)
        yield result


def beside_copying() -> Iterator[Result]:
    """One core, start-up left out: weights a second with their files, and reading and writing as many bytes."""
    from qconvert import convert

    with work_folder() as folder:
        source, _ = synthetic(folder, 0.7)
        out = folder / "ours-st"
        files = sorted(source.glob("*.safetensors"))
        n = sum(file.stat().st_size for file in files) / 2
        run = partial(convert, source, to="safetensors", bits=4, check=False, force=True, threads=1, output=out)
        run()  # compiles, and fills the page cache
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        seconds = [(cpu(run), cpu(partial(copied, files, folder / "copy", written))) for _ in range(5)]
        mine, copying = (statistics.median(column) for column in zip(*seconds, strict=True))
        yield {
            "case": "w4a16 export 0.7B, one core, with files",
            "g_weights_per_s": round(n / 1e9 / mine, 3),
            "copy_g_weights_per_s": round(n / 1e9 / copying, 3),
            "percent_of_copying": round(100 * statistics.median(b / a for a, b in seconds), 1),
        }


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds, the system's included."""
    before = time.process_time()
    work()
    return time.process_time() - before


def copied(files: list[Path], to: Path, nbytes: int) -> None:
    """Read all of `files`, and write `nbytes`."""
    block = b""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while data := opened.read(CHUNK):
                block = data if len(data) == CHUNK else block
    with to.open("wb", buffering=0) as out:
        for at in range(0, nbytes, CHUNK):
            out.write(block[: min(CHUNK, nbytes - at)])
    to.unlink()


def memory() -> Iterator[Result]:
    """Peak RSS of checkpoints of 1 and 4 GB."""
    with work_folder() as folder:
        peaks = [max(ours(synthetic(folder, b)[0], folder / "ours-st").peak_rss_mb for _ in range(2)) for b in (0.5, 2.0)]
        yield {
            "case": "peak RSS of w4a16 export, 0.5B and 2B",
            "peak_rss_0.5b_mb": round(peaks[0]),
            "peak_rss_2b_mb": round(peaks[1]),
            "ratio": round(peaks[1] / peaks[0], 2),
        }


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    **{f"{peer.quant} export 0.5B": partial(whole_process, peer, 0.5) for peer in (W4A16, GPTQ, AWQ)},
    "w4a16 export beside copying": beside_copying,
    "w4a16 memory": memory,
}
