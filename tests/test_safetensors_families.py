"""--to safetensors of every family: whole folders in transformers, and adapters against PEFT's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_oracle import VOCAB, load, logits_of, tiny_adapter, tiny_model
from safetensors.torch import load_file, save_file
from test_adapters import CASES as ADAPTERS
from test_encoders import SMALL as SMALL_BERT
from test_encoders import padded, sentence_model, theirs
from test_encoders import save_random as save_encoder
from tiny_models import CASES, one_thread, save_random, some_tokens, their_logits

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError, VerificationError

assert one_thread  # an autouse fixture
FAMILIES = ("llama biases", "mistral window", "qwen2", "qwen3 biases and window", "gemma2 tied, biases", "gemma3",
            "phi3 tied, window", "phi3 longrope, part of each head, factors", "mixtral",
            "qwen3-moe every other layer, biases, window")  # fmt: skip
WIDE: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 32},
    "Phi3": {},  # lists of factors have the length of half a head
}


def bf16(folder: Path) -> Path:
    """The checkpoint as models are published."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def model(folder: Path, name: str, **more: Any) -> Path:
    kind, options = CASES[name]
    wide = {"hidden_size": 64, "intermediate_size": 96} if kind != "Phi3" else {"intermediate_size": 96}
    return bf16(save_random(folder, kind, options | wide | WIDE.get(kind, {}) | more))


def default_load(folder: Path) -> Any:
    """As a user does it; every key is where it belongs."""
    found, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    return found.eval()


def rows_of(result: Any) -> dict[str, str]:
    return {row.what.partition(":")[0]: row.verdict for row in result.report.checks}


@pytest.mark.parametrize("name", [*FAMILIES, "llama tied", "gpt2", "gpt2 untied, n_inner, relu"])
def test_a_plain_folder_is_the_checkpoint_again(name: str, tmp_path: Path) -> None:
    """Tensor by tensor: names, orientation, the norms' offset, experts apart."""
    kind, options = CASES[name]
    source = bf16(save_random(tmp_path / "model", kind, options))
    assert convert(source, to="safetensors", quant="bf16", output=tmp_path / "out", threads=1).verified
    first, second = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    if kind == "GPT2" and options.get("tie_word_embeddings", True):
        first.pop("lm_head.weight", None)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantized_folder_loads_as_it_is_and_is_proven(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = model(tmp_path / "model", name)
    result = convert(source, to="safetensors", quant="w4a16", output=tmp_path / "out", threads=1)
    assert result.verified and rows_of(result)["compressed-tensors' decompressor"] == "pass"
    default_load(tmp_path / "out")


@pytest.mark.parametrize("width", [96, 64])  # groups of two sizes, or of one: another way through transformers
def test_a_tied_head_is_left_out_by_name(width: int, tmp_path: Path) -> None:
    """Without it in `ignore` transformers looks for lm_head.weight_packed."""
    pytest.importorskip("compressed_tensors")
    source = model(tmp_path / "model", "llama tied", intermediate_size=width)
    assert convert(source, to="safetensors", quant="w4a16", output=tmp_path / "out", threads=1).verified
    assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    found, want = (default_load(folder)(some_tokens()).logits.float() for folder in (tmp_path / "out", source))
    assert float((found - want).norm() / want.norm()) < 0.4  # of 4 bits: 0.2; of a random head: 1.4


def test_conv1d_has_no_name_in_quantized_dialects(tmp_path: Path) -> None:
    source = save_random(tmp_path / "model", *CASES["gpt2"])
    with pytest.raises(UnsupportedError, match=r"w4a16: no weight can be quantized so.*c_attn.weight: stored as \[in, out\]"):
        convert(source, to="safetensors", quant="w4a16", output=tmp_path / "out")


# adapters -------------------------------------------------------------------------------------------

MERGED = ("dora beside biases", "bias all", "fan_in_fan_out lora_bias", "gpt2 embedding dora", "phi3", "mixtral attention",
          "gemma3", "gemma2 norms and embedding saved", "gemma2 head", "head dora, tied", "embedding saved, tied",
          "resized, both saved, tied", "tokens, resized, tied", "ensure_weight_tying, factors")  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_merged_folders_have_pefts_logits(name: str, tmp_path: Path) -> None:
    """Untied heads and more tokens too: config.json says them."""
    family, tied, resized, config = ADAPTERS[name]
    (tmp_path / "base").mkdir()
    base, vocab = tiny_model(family, tmp_path / "base", tied), resized or VOCAB
    want = logits_of(tiny_adapter(base, tmp_path / "adapter", resized, **config), vocab)
    result = convert(
        base, adapters=[str(tmp_path / "adapter")], to="safetensors", quant="fp32", output=tmp_path / "out", threads=1
    )
    assert result.verified
    torch.testing.assert_close(logits_of(load(tmp_path / "out"), vocab), want, rtol=0, atol=1e-5)  # measured 2e-6
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["vocab_size"] == vocab
    untied = "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert written.get("tie_word_embeddings", family in ("gpt2", "gemma2", "gemma3")) is not untied


def test_a_bias_that_the_model_has_not_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = tiny_model("llama", tmp_path / "base", False)
    tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=4, lora_bias=True)
    with pytest.raises(UnsupportedError, match="layers.0.self_attn.q_proj.bias: the adapter trained a bias"):
        convert(base, adapters=[str(tmp_path / "adapter")], to="safetensors", output=tmp_path / "out")


# encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["fp32", "fp16", "bf16", "w4a16"])
def test_an_encoder_gives_the_hidden_states_of_the_graph(quant: str, tmp_path: Path) -> None:
    if quant == "w4a16":
        pytest.importorskip("compressed_tensors")
    source = save_encoder(tmp_path / "model", SMALL_BERT | {"hidden_size": 64})
    result = convert(source, to="safetensors", quant=quant, output=tmp_path / "out", threads=1)
    assert result.verified and any("pooler.dense" in note for note in result.report.notes)
    if quant == "fp32":
        torch.testing.assert_close(theirs(tmp_path / "out", padded()), theirs(source, padded()), rtol=0, atol=0)


def test_an_embedding_model_keeps_the_files_of_sentence_transformers(tmp_path: Path) -> None:
    source = sentence_model(tmp_path / "model", "mean", True, False)
    assert convert(source, to="safetensors", quant="bf16", output=tmp_path / "out", threads=1).verified
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


# what goes wrong ------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith((".", "out"))]


def test_an_interrupt_in_the_proof_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.formats import safetensors_transformers

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_transformers, "load", interrupted)
    source = save_random(tmp_path / "model", *CASES["llama tied"])
    with pytest.raises(KeyboardInterrupt):
        convert(source, to="safetensors", quant="bf16", output=tmp_path / "out")
    assert sorted(left(tmp_path)) == [".out.part", ".out.part.journal"]


def test_a_folder_that_transformers_cannot_load_is_a_failed_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.formats import safetensors_transformers

    monkeypatch.setattr(safetensors_transformers, "KINDS", None)
    source = save_random(tmp_path / "model", *CASES["llama tied"])
    with pytest.raises(VerificationError, match=r"runtime transformers: errors as it loads.*TypeError"):
        convert(source, to="safetensors", quant="bf16", output=tmp_path / "out")
    assert left(tmp_path) == []


def test_a_weight_that_f16_cannot_hold_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = save_random(tmp_path / "model", *CASES["llama tied"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight.*1.*does not fit f16") as caught:
        convert(source, to="safetensors", quant="fp16", output=tmp_path / "out")
    assert "--quant bf16" in str(caught.value.hint) and left(tmp_path) == []


def test_folders_that_are_there_are_not_written_over_unasked(tmp_path: Path) -> None:
    source = save_random(tmp_path / "model", *CASES["llama tied"])
    options: dict[str, Any] = {"to": "safetensors", "quant": "bf16", "output": tmp_path / "out", "check": False}
    convert(source, **options)
    with pytest.raises(UsageError, match="exists already"):
        convert(source, **options)
    convert(source, force=True, **options)
    with pytest.raises(UsageError, match=r"model\.safetensors would be read with the new files"):
        convert(source, force=True, split_max_size="20k", **options)  # transformers would load the old file instead
    with pytest.raises(UsageError, match="is the folder that is read"):
        convert(source, force=True, **(options | {"output": source}))
    assert load_file(source / "model.safetensors")


def test_a_folder_of_bf16_has_the_logits_of_the_model(tmp_path: Path) -> None:
    """Against transformers alone, where no graph of ours has a part."""
    source = bf16(save_random(tmp_path / "model", *CASES["gemma2"]))
    convert(source, to="safetensors", quant="bf16", output=tmp_path / "out", check=False)
    want = their_logits(source, some_tokens())
    torch.testing.assert_close(their_logits(tmp_path / "out", some_tokens()), want, rtol=0, atol=0)
