"""Encoders: hidden states of the graph against transformers' own, with and without padding and two kinds of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import N_TOKENS, edited, one_thread, some_tokens

from qconvert import convert
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.errors import InputError, UnsupportedError
from qconvert.families_encoder import BERT
from qconvert.ops import verify
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.passes.untie_head import PATHS
from qconvert.run import run
from qconvert.settings import read_settings
from qconvert.sources import Store, read_checkpoint
from qconvert.text import format, parse
from qconvert.weights import Weights

__all__ = ["one_thread"]

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "bert relu, three kinds of text": SMALL | {"hidden_act": "relu", "type_vocab_size": 3},
}
Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), CASES[request.param])


def save_random(folder: Path, options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder


def padded() -> Inputs:
    """Two texts: one in two parts, one that ends after 29 tokens."""
    mask, kinds = torch.ones(2, N_TOKENS, dtype=torch.int64), torch.zeros(2, N_TOKENS, dtype=torch.int64)
    mask[1, 29:] = 0
    kinds[0, 17:] = 1
    return {"attention_mask": mask, "token_types": kinds}


def hidden(folder: Path, inputs: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    weights = Weights(graph, store, np.float64 if dtype == torch.float64 else np.float32)
    (out,) = run(graph, weights, some_tokens(), inputs=inputs, dtype=dtype).values()
    return out


def theirs(folder: Path, inputs: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    names = {"token_types": "token_type_ids"}
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).to(dtype).eval()
    with torch.no_grad():
        out: torch.Tensor = model(some_tokens(), **{names.get(k, k): v for k, v in inputs.items()}).last_hidden_state
    return out


def kept(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Without the places that are only padding: what stands there has no meaning."""
    return x[inputs["attention_mask"] != 0] if "attention_mask" in inputs else x


@pytest.mark.parametrize("inputs", [{}, padded()], ids=["plain", "padded"])
def test_hidden_states_equal_those_of_transformers(folder: Path, inputs: Inputs) -> None:
    got, want = hidden(folder, inputs), theirs(folder, inputs)
    torch.testing.assert_close(kept(got, inputs), kept(want, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [{}, padded()], ids=["plain", "padded"])
def test_hidden_states_in_f64_equal_those_of_transformers_in_f64(folder: Path, inputs: Inputs) -> None:
    got, want = hidden(folder, inputs, torch.float64), theirs(folder, inputs, torch.float64)
    torch.testing.assert_close(kept(got, inputs), kept(want, inputs), rtol=1e-12, atol=1e-12)


def test_every_token_sees_those_after_it(folder: Path) -> None:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    a, b = some_tokens(), some_tokens()
    b[:, -1] = (b[:, -1] + 1) % 61
    first, second = (next(iter(run(graph, Weights(graph, store), t).values()))[:, 0] for t in (a, b))
    assert (first - second).abs().max() > 1e-4


def test_graph_is_valid_and_survives_printing(folder: Path) -> None:
    graph = build(read_checkpoint(folder, Store()))
    verify(graph)
    assert parse(format(graph)) == graph
    assert [n for n, node in graph.nodes.items() if node.op == "input"] == ["tokens", "token_types", "attention_mask"]


def test_every_key_and_every_tensor_is_accounted_for(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, Store())
    graph = build(checkpoint)
    keys: Any = graph.meta["config_keys"]
    dropped: Any = graph.meta["dropped"]
    loaded = [str(node.attrs["tensor"]) for node in graph.nodes.values() if node.op == "load"]
    assert sorted([*keys["used"], *keys["dropped"]]) == sorted(checkpoint.config)
    assert sorted([*loaded, *(d["tensor"] for d in dropped)]) == sorted(i.ref for i in checkpoint.tensors.values())
    assert {d["tensor"].partition("#")[2] for d in dropped} == {"pooler.dense.weight", "pooler.dense.bias"}


def test_every_key_of_transformers_is_known_and_every_default_is_its_own() -> None:
    full = json.loads(transformers.BertConfig().to_json_string(use_diff=False))
    a, b = (read_settings(BERT, config, "config.json").meta() for config in ({}, full))
    assert a == b


def test_norms_named_as_in_the_first_checkpoints_are_found(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in tensors.items()}
    save_file(old | {"embeddings.position_ids": torch.arange(64)[None]}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(hidden(tmp_path, {}), hidden(folder, {}))
    torch.testing.assert_close(hidden(tmp_path, {}), theirs(tmp_path, {}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "match"), [
    ({"is_decoder": True}, "is_decoder"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"embedding_size": 16}, "embedding_size"),
    ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
])  # fmt: skip
def test_a_bert_that_no_graph_has_is_refused_by_name(tmp_path: Path, config: dict[str, object], match: str) -> None:
    with pytest.raises((InputError, UnsupportedError), match=match):
        build(edited(save_random(tmp_path, SMALL), **config))


@pytest.mark.parametrize("config", [
    {"target_modules": ["query", "value", "dense"], "exclude_modules": ["pooler.dense"]},
    {"target_modules": ["query", "intermediate.dense"], "use_dora": True},
    {"target_modules": ["word_embeddings", "key"]},
    {"target_modules": ["key"], "modules_to_save": ["LayerNorm"]},
], ids=lambda c: "-".join(c))  # fmt: skip
def test_adapters_on_an_encoder_give_the_hidden_states_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_random(tmp_path / "base", SMALL)
    model = get_peft_model(transformers.AutoModel.from_pretrained(base), LoraConfig(r=4, **config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
        model.save_pretrained(tmp_path / "adapter")
        want = model.eval()(some_tokens()).last_hidden_state
    store = Store()
    graph = build(read_checkpoint(base, store))
    attached = AttachAdapter(read_adapter(tmp_path / "adapter", store, "adapter0"))(graph)
    merged = MergeAdapters()(attached)
    assert not any(node.op in PATHS for node in merged.nodes.values())
    for g in (attached, merged):
        verify(g)
        (got,) = run(g, Weights(g, store), some_tokens()).values()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def sentence_model(folder: Path, mode: str, unit: bool, legacy: bool) -> Path:
    """A model with sentence-transformers' files beside it."""
    save_random(folder, SMALL)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if unit else [])]
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
               for i, k in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, kind in enumerate(kinds[1:], 1):
        (folder / f"{i}_{kind}").mkdir()
    old = {f"pooling_mode_{k}_tokens": k == mode for k in ("mean", "max", "mean_sqrt_len")}
    old |= {"word_embedding_dimension": 32, "pooling_mode_cls_token": mode == "cls"}
    new = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old if legacy else new))
    return folder


def embedded(folder: Path, inputs: Inputs) -> torch.Tensor:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    verify(graph)
    assert parse(format(graph)) == graph
    return run(graph, Weights(graph, store), some_tokens(), inputs=inputs)["embedding"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_embeddings_equal_those_of_sentence_transformers(mode: str, unit: bool, legacy: bool, tmp_path: Path) -> None:
    modules = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="sentence-transformers is the reference here"
    )
    folder, inputs = sentence_model(tmp_path, mode, unit, legacy), padded()
    features = {"token_embeddings": theirs(folder, inputs), "attention_mask": inputs["attention_mask"]}
    want = modules.Pooling(32, pooling_mode=mode)(features)["sentence_embedding"]
    want = modules.Normalize()({"sentence_embedding": want})["sentence_embedding"] if unit else want
    torch.testing.assert_close(embedded(folder, inputs), want, rtol=1e-5, atol=1e-5)


def test_mean_and_first_token_leave_padding_out(tmp_path: Path) -> None:
    inputs = padded()
    states = theirs(save_random(tmp_path / "plain", SMALL), inputs)
    mean = embedded(sentence_model(tmp_path / "mean", "mean", False, True), inputs)
    first = embedded(sentence_model(tmp_path / "cls", "cls", True, True), inputs)
    torch.testing.assert_close(mean, torch.stack([states[0].mean(0), states[1, :29].mean(0)]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, states[:, 0] / states[:, 0].norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "match"), [
    ({"pooling_mode": "max"}, "pooling by max"),
    ({"pooling_mode": ["mean", "cls"]}, "pooling by mean, cls"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling by mean_tokens, cls_token"),
    ({}, "pooling by nothing"),
    ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
    ({"pooling_mode": "mean", "weights": 1}, "weights = 1"),
])  # fmt: skip
def test_a_pooling_that_no_graph_has_is_refused_by_name(tmp_path: Path, config: dict[str, object], match: str) -> None:
    folder = sentence_model(tmp_path, "mean", False, False)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, UnsupportedError), match=match):
        build(read_checkpoint(folder, Store()))


def test_a_module_after_the_pooling_that_no_graph_has_is_refused_by_name(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, "mean", True, False)
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("models.Normalize", "models.Dense"))
    with pytest.raises(UnsupportedError, match="the module Dense"):
        build(read_checkpoint(folder, Store()))
    for wrong in ("{}", "[1]", "nonsense"):
        (folder / "modules.json").write_text(wrong)
        with pytest.raises(InputError, match=r"modules\.json"):
            build(read_checkpoint(folder, Store()))


def test_gguf_refuses_an_encoder_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="bert"):
        convert(folder, quant="F16", output=tmp_path / "out.gguf", dry_run=True)
