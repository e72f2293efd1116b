"""Trained models and adapters that were made and measured elsewhere: our files must give those numbers in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from qconvert import convert
from qconvert.formats.llama_cpp import LlamaCpp, Model
from qconvert.gguf_reader import read_header
from qconvert.tokenizer import read_tokenizer

needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")
CHUNK = 256
# adapter -> its text, the part of it that was held out, chunks, NLL: data/README.md, "adapters", column "merged f32"
ADAPTERS = {
    "shakespeare-lora-r8-qv": ("tinyshakespeare.txt", 0.9, 30, 4.4885),
    "python-rslora-r16-all": ("code-python-eval.txt", 0.0, 30, 5.0430),
    "stories-dora-r8": ("tinystories-sample.txt", 0.85, 30, 4.0572),
}


def mean_nll(model: Model, tokens: list[int], n: int) -> float:
    """Mean NLL of tokens 2..256 of the first n chunks of 256: the protocol of data/README.md."""
    total = []
    for i in range(n):
        chunk = tokens[i * CHUNK : (i + 1) * CHUNK]
        logits = model.logits(chunk).astype(np.float64)[:-1]
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total.append(-log_p[np.arange(CHUNK - 1), chunk[1:]])
    return float(np.mean(total))


@needs_llama
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_has_the_published_nll_in_llama_cpp(shared_data: Path, tmp_path: Path, name: str) -> None:
    model, (file, cut, n, want) = shared_data / "models" / "novels-13m", ADAPTERS[name]
    result = convert(f"{model}+{shared_data / 'adapters' / name}", quant="Q8_0", output=tmp_path / "a.gguf")
    assert result.verified
    text = (shared_data / "text" / file).read_text(encoding="utf-8-sig")
    tokens = read_tokenizer(model, 4096).reference()(text[int(cut * len(text)) :])
    opened = LlamaCpp().open(tmp_path / "a.gguf", CHUNK, 2)
    try:
        assert mean_nll(opened, tokens, n) == pytest.approx(want, abs=0.002)
    finally:
        opened.close()


def test_stories260k_equals_the_file_that_llama_cpp_made(shared_data: Path, tmp_path: Path) -> None:
    convert(shared_data / "models" / "stories260K", quant="F32", output=tmp_path / "a.gguf", check=False)
    ours = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    theirs = {t.name: t for t in gguf.GGUFReader(shared_data / "models/stories260K-gguf/stories260K.gguf").tensors}
    assert theirs.keys() - ours.keys() == {"output.weight"}  # tied: the same bytes as token_embd
    assert np.array_equal(theirs["output.weight"].data, ours["token_embd.weight"].data)
    for name, tensor in ours.items():
        assert np.array_equal(tensor.data, theirs[name].data), name


def test_stories260k_has_the_same_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    convert(shared_data / "models" / "stories260K", quant="F32", output=tmp_path / "a.gguf", check=False)
    ours, theirs = (read_header(p).kv for p in (tmp_path / "a.gguf", shared_data / "models/stories260K-gguf/stories260K.gguf"))
    assert ours["tokenizer.ggml.model"] == theirs["tokenizer.ggml.model"] == "llama"
    assert ours["tokenizer.ggml.scores"] == theirs["tokenizer.ggml.scores"]
    for key in ("bos", "eos"):
        assert ours[f"tokenizer.ggml.{key}_token_id"] == theirs[f"tokenizer.ggml.{key}_token_id"]


@needs_llama
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_stories260k_is_proven_with_its_awkward_rows(shared_data: Path, tmp_path: Path, quant: str) -> None:
    result = convert(shared_data / "models" / "stories260K", quant=quant, output=tmp_path / "a.gguf")
    assert result.verified
    fallbacks = {f["tensor"]: f["got"] for f in result.report.fallbacks}
    assert (quant == "F32") == (not fallbacks)
