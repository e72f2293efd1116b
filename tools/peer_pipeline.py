"""The four tools that qconvert replaces, measured: PEFT merge and save, convert_hf_to_gguf.py, llama-quantize.

    python tools/peer_pipeline.py MODEL ADAPTER OUT Q4_K_M --llama-cpp FOLDER      # FOLDER: llama.cpp's source

Each stage is a process of its own. One JSON object on stdout: per stage and in total, CPU seconds (with children),
wall seconds, peak RSS and bytes written. llama-quantize is called through cyllama's model_quantize, the same code.
convert_hf_to_gguf.py refuses a byte-level BPE whose vocabulary it does not know; here, as users do by editing it, the
refusal is answered with "gpt-2", and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STAGES = ("merge", "convert", "quantize")


class Job(NamedTuple):
    model: Path
    adapter: Path
    out: Path
    quant: str
    llama_cpp: Path
    threads: int
    ftype: int  # general.file_type of quant

    @property
    def merged(self) -> Path:
        return self.out / "merged"

    @property
    def converted(self) -> Path:
        return self.out / "converted" / "model.gguf"

    @property
    def quantized(self) -> Path:
        return self.out / "quantized" / f"model-{self.quant}.gguf"


class Cost(NamedTuple):
    cpu_seconds: float
    wall_seconds: float
    peak_rss_mb: float
    nbytes_written: int


def merge(job: Job) -> None:
    """PEFT's merge_and_unload in the checkpoint's own dtype, saved with its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(job.adapter)).merge_and_unload()
    merged.save_pretrained(job.merged)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.merged)


def convert(job: Job) -> None:
    """convert_hf_to_gguf.py as it lies in llama.cpp's tree, with the gguf-py beside it; the dtype is kept."""
    sys.path[:0] = [str(job.llama_cpp), str(job.llama_cpp / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]  # in job.llama_cpp

    known = TextModel.get_vocab_base_pre

    def known_or_gpt2(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            (job.out / "patched").touch()
            return "gpt-2"

    TextModel.get_vocab_base_pre = known_or_gpt2
    script = job.llama_cpp / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(job.merged), "--outfile", str(job.converted), "--outtype", "auto"]
    runpy.run_path(str(script), run_name="__main__")


def quantize(job: Job) -> None:
    from cyllama.llama import llama_cpp

    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = job.ftype, job.threads
    llama_cpp.model_quantize(str(job.converted), str(job.quantized), params)


def measure(command: Sequence[str], folder: Path, log: Path) -> Cost:
    """Run `command`, which writes into `folder`, its output into `log`. SystemExit with the log's end if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.execv(command[0], list(command))
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n" + log.read_text("utf-8", "replace")[-2000:])
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024, nbytes)


def run(job: Job) -> dict[str, object]:
    """All stages; the cost of each and of the whole, as JSON says it."""
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "patched").unlink(missing_ok=True)
    folders = {"merge": job.merged, "convert": job.converted.parent, "quantize": job.quantized.parent}
    costs: dict[str, Cost] = {}
    for stage in STAGES:
        command = [sys.executable, __file__, *map(str, job[:4]), "--llama-cpp", str(job.llama_cpp)]
        command += ["--threads", str(job.threads), "--ftype", str(job.ftype), "--stage", stage]
        costs[stage] = measure(command, folders[stage], job.out / f"{stage}.log")
    total = Cost(
        sum(c.cpu_seconds for c in costs.values()),
        sum(c.wall_seconds for c in costs.values()),
        max(c.peak_rss_mb for c in costs.values()),
        sum(c.nbytes_written for c in costs.values()),
    )
    return {
        "case": f"peer: PEFT merge + convert_hf_to_gguf + llama-quantize, {job.quantized.stem}",
        "stages": {stage: _rounded(cost) for stage, cost in costs.items()},
        "total": _rounded(total),
        "threads": job.threads,
        "output": str(job.quantized),
        "pre_tokenizer_patched": (job.out / "patched").exists(),
    }


def _rounded(cost: Cost) -> dict[str, float]:
    return {name: round(value, 2) for name, value in cost._asdict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "adapter", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("quant")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a llama.cpp source folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ftype", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # set in the processes that are measured
    options = vars(parser.parse_args())
    stage = options.pop("stage")
    paths = {name: value.resolve() for name, value in options.items() if isinstance(value, Path)}
    if not stage:
        from qconvert.formats.gguf_mix import file_type  # not where the peer is measured: it would pay for the import

        options["quant"], options["ftype"] = file_type(options["quant"])[:2]
    job = Job(**{**options, **paths})
    if stage:
        {"merge": merge, "convert": convert, "quantize": quantize}[stage](job)
    else:
        print(json.dumps(run(job)))


if __name__ == "__main__":
    main()
