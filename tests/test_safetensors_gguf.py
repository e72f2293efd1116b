"""A GGUF to safetensors: config.json from its header, codes without loss, and what is rounded a second time is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_gguf_families import MODELS, saved
from tiny_models import one_thread

from qconvert import convert
from qconvert.errors import UnsupportedError

pytest.importorskip("gguf")
pytest.importorskip("compressed_tensors")
assert one_thread  # an autouse fixture
TINY = Path(__file__).parents[1] / "golden" / "tiny"
SOURCES = ("llama-tied-biased", "llama3-rope", "mistral-window", "qwen2-yarn", "qwen3", "gemma2-gqa-caps",
           "gemma3-untied-capped", "phi3-part-of-each-head")  # fmt: skip


def gguf(folder: Path, name: str, quant: str) -> Path:
    saved(folder / "model", *MODELS[name])
    convert(folder / "model", to="gguf", quant=quant, output=folder / "m.gguf", check=False, threads=1)
    return folder / "m.gguf"


def tiny(folder: Path, quant: str) -> Path:
    convert(TINY, to="gguf", quant=quant, output=folder / "m.gguf", check=False, threads=1)
    return folder / "m.gguf"


def told(result: Any, what: str) -> list[tuple[str, str]]:
    return [(row.what, row.verdict) for row in result.report.checks if row.what.startswith(what)]


@pytest.mark.parametrize("name", [*SOURCES, "gpt2"])
def test_settings_of_a_gguf_make_the_same_model(name: str, tmp_path: Path) -> None:
    """Against the checkpoint that the file was made from, in transformers alone."""
    source = gguf(tmp_path, name, "f32")
    assert convert(source, to="safetensors", quant="fp32", output=tmp_path / "out", threads=1).verified
    ids = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
            for folder in (tmp_path / "out", tmp_path / "model")
        )
    # f32 tensors of the same values, norms with their offset added and taken off again: measured 1e-6
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("name", SOURCES)
def test_codes_of_every_family_keep_their_values(name: str, tmp_path: Path) -> None:
    result = convert(gguf(tmp_path, name, "q4_0"), to="safetensors", bits=4, output=tmp_path / "out", threads=1)
    assert result.verified and [v for _, v in told(result, "codes moved")] == ["pass"] and not told(result, "rounded again")
    assert any("keep their codes, q4_0 -> int4_g32_f16" in note for note in result.report.notes)


def test_q8_0_is_w8a16_in_the_dtype_of_its_scales(tmp_path: Path) -> None:
    result = convert(tiny(tmp_path, "q8_0"), to="safetensors", bits=8, output=tmp_path / "out", threads=1)
    assert result.verified and told(result, "codes moved") == [("codes moved: 21 tensors, exact", "pass")]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    scales = {t.dtype for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if n.endswith("weight_scale")}
    assert scales == {torch.float16}


@pytest.mark.parametrize("quant", ["q4_1", "q4_k_m"])
def test_what_has_offsets_is_rounded_a_second_time_and_the_error_is_shown(quant: str, tmp_path: Path) -> None:
    result = convert(tiny(tmp_path, quant), to="safetensors", zero_point="int", output=tmp_path / "out", threads=1)
    rows = [row for row in result.report.checks if row.what.startswith("rounded again")]
    assert result.verified and rows and all(row.verdict == "info" and row.value and 0 < row.value < 0.2 for row in rows)
    assert any("are rounded a second time" in note for note in result.report.notes)


def test_the_tokenizer_of_a_gguf_lies_beside_the_weights(tmp_path: Path) -> None:
    result = convert(tiny(tmp_path, "q4_0"), to="safetensors", output=tmp_path / "out", threads=1)
    assert {v for _, v in told(result, "tokenizer of the GGUF")} == {"pass"}
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", TINY))
    text = "A line, and another: naïve 12345."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == ours.bos_token_id and ours.eos_token_id in (
        config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    )


def test_conv1d_of_a_gguf_is_refused_as_that_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no weight can be quantized so"):
        convert(gguf(tmp_path, "gpt2", "q4_0"), to="safetensors", output=tmp_path / "out")
