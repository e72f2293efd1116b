"""Every family: two random layers, logits of the graph against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CASES, SMALL_GEMMA3, logits, one_thread, save_random, some_tokens, their_logits, their_logits_in_f64

from qconvert.build import build
from qconvert.ops import verify
from qconvert.sources import Store, read_checkpoint
from qconvert.text import format, parse

__all__ = ["one_thread"]


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), *CASES[request.param])


def test_logits_equal_those_of_transformers(folder: Path) -> None:
    tokens = some_tokens()
    torch.testing.assert_close(logits(folder, tokens), their_logits(folder, tokens), rtol=1e-5, atol=1e-5)


def test_logits_in_f64_equal_those_of_transformers_in_f64(folder: Path) -> None:
    tokens = some_tokens()
    theirs = their_logits_in_f64(folder, tokens)
    torch.testing.assert_close(logits(folder, tokens, torch.float64), theirs, rtol=1e-12, atol=1e-12)


def test_graph_is_valid_and_survives_printing(folder: Path) -> None:
    graph = build(read_checkpoint(folder, Store()))
    verify(graph)
    assert parse(format(graph)) == graph


@pytest.mark.parametrize("name", ["stories260K", "novels-13m"])
def test_a_real_model_gives_the_logits_of_transformers(name: str, shared_data: Path) -> None:
    tokens = some_tokens(vocab=512, n=64)
    path = shared_data / "models" / name
    torch.testing.assert_close(logits(path, tokens), their_logits(path, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [c for c in CASES if c.startswith("llama") and ("rope" in c or "yarn" in c)])
def test_rope_settings_spelled_as_in_transformers_4_mean_the_same(name: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path, *CASES[name])
    new = build(read_checkpoint(folder, Store()))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": {"type": scaling.pop("rope_type"), **scaling}}
    path.write_text(json.dumps(config))
    old = build(read_checkpoint(folder, Store()))
    assert old.nodes == new.nodes
    torch.testing.assert_close(logits(folder, some_tokens()), their_logits(folder, some_tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_gemma3_settings_spelled_as_in_transformers_4_mean_the_same(tmp_path: Path, scaled: bool) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0} if scaled else {}
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e3} | scaling,
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
    }
    options = SMALL_GEMMA3 | {"num_hidden_layers": 4, "layer_types": None, "sliding_window_pattern": 3}
    folder = save_random(tmp_path, "Gemma3", options | {"rope_parameters": ropes})
    new = build(read_checkpoint(folder, Store()))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del config[key]
    config |= {"rope_theta": 5e3, "rope_local_base_freq": 700, "rope_scaling": scaling or None, "sliding_window_pattern": 3}
    path.write_text(json.dumps(config))
    assert build(read_checkpoint(folder, Store())).nodes == new.nodes
    assert [new.nodes[f"l{i}.q_rope"].attrs["theta"] for i in range(4)] == [700.0, 700.0, 5e3, 700.0]
    torch.testing.assert_close(logits(folder, some_tokens()), their_logits(folder, some_tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [c for c in CASES if c.startswith(("mixtral", "qwen3-moe"))])
def test_experts_stored_as_one_tensor_mean_the_same(name: str, tmp_path: Path) -> None:
    old = save_random(tmp_path / "old", *CASES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    new = tmp_path / "new"
    graph = build(read_checkpoint(new, Store()))
    verify(graph)
    assert any(node.op == "part" for node in graph.nodes.values())
    assert graph.parameters() == build(read_checkpoint(old, Store())).parameters()
    assert torch.equal(logits(new, some_tokens()), logits(old, some_tokens()))


def test_every_key_of_config_json_is_accounted_for(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, Store())
    keys: Any = build(checkpoint).meta["config_keys"]
    assert sorted([*keys["used"], *keys["dropped"]]) == sorted(checkpoint.config)


def test_every_tensor_is_loaded_once(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, Store())
    graph = build(checkpoint)
    loaded = [node.attrs["tensor"] for node in graph.nodes.values() if node.op == "load"]
    assert sorted(map(str, loaded)) == sorted(info.ref for info in checkpoint.tensors.values())


def test_parameters_know_their_role_and_layer(folder: Path) -> None:
    graph = build(read_checkpoint(folder, Store()))
    for name in graph.parameters():
        attrs = graph.root(name).attrs
        outside = {"token_embd", "position_embd", "output", "output_norm"}
        assert attrs["role"] in outside or isinstance(attrs["layer"], int)
        assert name.endswith((".weight", ".bias"))
