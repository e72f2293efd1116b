"""Tensors of a checkpoint: every one is used, dropped for a reason, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    SMALL,
    SMALL_GPT2,
    edited,
    logits,
    one_thread,
    save_random,
    some_tokens,
    their_logits,
    with_tensors,
)

from qconvert.build import build
from qconvert.errors import InputError, UnsupportedError
from qconvert.sources import Store, TensorInfo, read_checkpoint

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"), "Llama", SMALL)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("gpt2"), "GPT2", SMALL_GPT2)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"no tensor is called {name}"):
        build(with_tensors(llama, lambda t: t.pop(name)))


def test_a_weight_that_is_there_in_quantized_form_is_recognized(llama: Path) -> None:
    def quantize(tensors: dict[str, TensorInfo]) -> None:
        tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    with pytest.raises(InputError) as e:
        build(with_tensors(llama, quantize))
    assert e.value.hint == "there is model.layers.0.mlp.up_proj.qweight; is it quantized?"


def test_a_missing_bias_points_at_the_setting_that_wants_it(llama: Path) -> None:
    with pytest.raises(InputError, match=r"q_proj\.bias") as e:
        build(edited(llama, attention_bias=True))
    assert "attention_bias" in str(e.value.hint)


def test_a_config_with_more_layers_than_tensors_says_so(llama: Path) -> None:
    with pytest.raises(InputError) as e:
        build(edited(llama, num_hidden_layers=3))
    assert e.value.hint == "nothing of layer 2 is there, but config.json says num_hidden_layers = 3"


def test_a_config_with_fewer_layers_than_tensors_says_so(llama: Path) -> None:
    with pytest.raises(InputError, match=r"layers\.1\.") as e:
        build(edited(llama, num_hidden_layers=1))
    assert e.value.hint == "it is of layer 1, but config.json says num_hidden_layers = 1"


def test_a_missing_head_is_explained(llama: Path) -> None:
    with pytest.raises(InputError, match=r"lm_head\.weight") as e:
        build(with_tensors(llama, lambda t: t.pop("lm_head.weight")))
    assert "not tied" in str(e.value.hint)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    mixtral = save_random(tmp_path, "Mixtral", SMALL | {"num_local_experts": 4})
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(InputError, match=f"no tensor is called {name}"):
        build(with_tensors(mixtral, lambda t: t.pop(name)))
    with pytest.raises(InputError, match=r"gate\.weight: shape \[4, 32\], .* \[num_local_experts, hidden_size\]"):
        build(edited(mixtral, num_local_experts=5))


def test_an_unread_tensor_is_named(llama: Path) -> None:
    extra = TensorInfo("base/model.safetensors#model.layers.0.self_attn.q_proj.bias", "f32", (32,))
    with pytest.raises(InputError, match=r"q_proj\.bias: llama models have no such tensor") as e:
        build(with_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": extra})))
    assert "attention_bias" in str(e.value.hint)


def test_a_tensor_of_another_shape_is_named_with_the_settings_it_contradicts(llama: Path) -> None:
    with pytest.raises(InputError, match=r"embed_tokens\.weight: shape \[61, 32\], .* = \[vocab_size, hidden_size\]"):
        build(edited(llama, vocab_size=64))
    with pytest.raises(InputError, match=r"k_proj\.weight: .* = \[num_key_value_heads \* head_dim, hidden_size\]"):
        build(edited(llama, num_key_value_heads=4))


def test_weights_of_a_quantized_type_are_refused(llama: Path) -> None:
    def quantize(tensors: dict[str, TensorInfo]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"]._replace(dtype="f8_e4m3")

    with pytest.raises(UnsupportedError, match=r"lm_head\.weight: f8_e4m3"):
        build(with_tensors(llama, quantize))


def rewrite(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the model with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_buffers_of_old_checkpoints_are_dropped_with_the_reason(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    new = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    graph = build(read_checkpoint(rewrite(llama, tmp_path / "a", lambda t: t.update(new)), Store()))
    ref = "base/model.safetensors#model.layers.0.self_attn.rotary_emb.inv_freq"
    assert graph.meta["dropped"] == [{"tensor": ref, "reason": "computed from rope_theta"}]
    masks = {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 64, 64) for name in ("bias", "masked_bias")}
    graph = build(read_checkpoint(rewrite(gpt2, tmp_path / "b", lambda t: t.update(masks)), Store()))
    assert len(graph.meta["dropped"]) == 2  # type: ignore[arg-type]


def test_a_checkpoint_saved_without_the_prefix_is_read_under_the_full_names(gpt2: Path, tmp_path: Path) -> None:
    """gpt2 itself was published like this."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    bare = rewrite(gpt2, tmp_path, strip)
    tokens = some_tokens()
    assert build(read_checkpoint(bare, Store())).parameters() == build(read_checkpoint(gpt2, Store())).parameters()
    torch.testing.assert_close(logits(bare, tokens), their_logits(bare, tokens), rtol=1e-5, atol=1e-5)


def tie(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    return folder


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_dropped(llama: Path, tmp_path: Path) -> None:
    def copy_embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    folder = tie(rewrite(llama, tmp_path, copy_embedding))
    graph = build(read_checkpoint(folder, Store()))
    assert graph.nodes["logits"].inputs[1] == "model.embed_tokens.weight"
    assert [d["tensor"] for d in graph.meta["dropped"]] == ["base/model.safetensors#lm_head.weight"]  # type: ignore
    torch.testing.assert_close(logits(folder, some_tokens()), their_logits(folder, some_tokens()), rtol=1e-5, atol=1e-5)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(llama: Path, tmp_path: Path) -> None:
    """transformers 4 uses the embedding here, transformers 5 the head."""
    folder = tie(rewrite(llama, tmp_path, lambda _: None))
    with pytest.raises(InputError, match=r"lm_head\.weight: differs from .*embed_tokens\.weight"):
        build(read_checkpoint(folder, Store()))


def test_a_tied_embedding_stored_as_the_head_only_is_found(llama: Path, tmp_path: Path) -> None:
    folder = tie(rewrite(llama, tmp_path, lambda t: t.pop("model.embed_tokens.weight")))
    torch.testing.assert_close(logits(folder, some_tokens()), their_logits(folder, some_tokens()), rtol=1e-5, atol=1e-5)
