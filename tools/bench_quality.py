"""Quality cases of bench.py: KL of files of equal bytes in llama.cpp, ours beside llama-quantize with an imatrix.

LLAMA_CPP_BIN names the folder of llama.cpp's programs; without it only ours are measured. The imatrix and our statistics are
of one text, the KL is on another, both of the adapter's domain; the reference is the f32 file of the merged model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_onnx import DATA
from bench_pipeline import work_folder

Result = dict[str, str | float | None]
LENGTH, CHUNKS, SEEN = 256, 16, 64 * 512  # tokens of a sequence, sequences of the evaluation, tokens that calibrate


class Domain(NamedTuple):
    """What an adapter was trained for: a text, whose first part calibrates and whose rest judges."""

    adapter: str
    text: str


DOMAINS = (
    Domain("shakespeare-lora-r8-qv", "tinyshakespeare.txt"),
    Domain("python-rslora-r16-all", "code-python-eval.txt"),
    Domain("stories-dora-r8", "tinystories-sample.txt"),
)


def qconvert(model: str, quant: str, out: Path, *more: str) -> Path:
    words = ["--quant", quant, "-o", str(out), "--force", "--no-check", "-q", *more]
    subprocess.run([sys.executable, "-m", "qconvert", model, *words], check=True, stdout=subprocess.DEVNULL)
    return out


def log_probs(path: Path, sequences: list[list[int]]) -> Iterator[np.ndarray]:
    """f64[T,V] of each sequence, by llama.cpp."""
    from qconvert.formats.llama_cpp import LlamaCpp

    with LlamaCpp().open(path, LENGTH, 2) as model:
        for sequence in sequences:
            x = model.logits(sequence).astype(np.float64)
            x -= x.max(-1, keepdims=True)
            yield x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(reference: Path, other: Path, sequences: list[list[int]]) -> float:
    both = zip(log_probs(reference, sequences), log_probs(other, sequences), strict=True)
    return float(np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in both]))


def halves(folder: Path, domain: Domain) -> tuple[Path, Path]:
    """The text to calibrate on, and the one to judge by."""
    text = (DATA / "text" / domain.text).read_text("utf-8-sig")
    cut = text.find("\n", 2 * len(text) // 3)
    parts = folder / f"{domain.adapter}.seen.txt", folder / f"{domain.adapter}.unseen.txt"
    for path, part in zip(parts, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, "utf-8")
    return parts


def tokens_of(reference: Path, unseen: Path) -> list[list[int]]:
    """CHUNKS sequences of the text, as llama.cpp cuts it."""
    from qconvert.formats.llama_cpp import LlamaCpp

    with LlamaCpp().open(reference, LENGTH, 2) as opened:
        ids = opened.tokenize(unseen.read_text("utf-8"), False, False)
    return [ids[i : i + LENGTH] for i in range(0, min(len(ids) - LENGTH + 1, CHUNKS * LENGTH), LENGTH)]


def equal_bytes(domain: Domain, quants: tuple[str, ...], solvers: tuple[str, ...]) -> Iterator[Result]:
    model = f"{DATA / 'models' / 'novels-13m'}+{DATA / 'adapters' / domain.adapter}"
    with work_folder() as folder:
        seen, unseen = halves(folder, domain)
        reference = qconvert(model, "F32", folder / "f32.gguf", "--calibrate", str(seen), "--calibrate-tokens", str(SEEN),
                             "--save-imatrix", str(folder / "imatrix.gguf"))  # fmt: skip
        sequences = tokens_of(reference, unseen)
        for quant in quants:
            result: Result = {"case": f"KL of {quant}, novels-13m + {domain.adapter}", "tokens": LENGTH * len(sequences)}
            if "LLAMA_CPP_BIN" in os.environ:
                theirs, tool = folder / "theirs.gguf", f"{os.environ['LLAMA_CPP_BIN']}/llama-quantize"
                words = ["--imatrix", str(folder / "imatrix.gguf"), str(reference), str(theirs), quant, "2"]
                subprocess.run([tool, *words], check=True, capture_output=True)
                result |= {"peer_kl": round(kl(reference, theirs, sequences), 6)}
            statistics = ["--calibrate", str(seen), "--calibrate-tokens", str(SEEN)]
            for solver in solvers:
                ours = qconvert(model, quant, folder / "ours.gguf", "--solver", solver, *statistics)
                found = kl(reference, ours, sequences)
                result[f"kl_{solver}"] = round(found, 6)
                if "peer_kl" in result:
                    result[f"less_{solver}_percent"] = round(100 * (1 - found / float(result["peer_kl"] or 1)), 1)
                    tensors = [data_nbytes(path) for path in (ours, theirs)]
                    result["nbytes"], result["peer_nbytes"] = tensors
            yield result


def data_nbytes(path: Path) -> int:
    """Of all tensors: headers hold other words."""
    from qconvert.gguf_reader import read_header

    return sum(t.nbytes for t in read_header(path).tensors)


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    f"quality {d.adapter}": partial(equal_bytes, d, ("Q4_K_M", "Q3_K_M", "Q2_K"), ("search", "gptq", "auto")) for d in DOMAINS
}
