"""Every family: two random layers, logits of the graph against transformers' own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qconvert.build import build
from qconvert.errors import InputError, QConvertError, UnsupportedError
from qconvert.families import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, Family
from qconvert.graph import Graph
from qconvert.ops import verify
from qconvert.run import run
from qconvert.settings import Settings, read_settings
from qconvert.sources import Checkpoint, Store, TensorInfo, read_checkpoint
from qconvert.text import format, parse
from qconvert.weights import Weights

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
SMALL_GPT2: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
N_TOKENS = 40  # longer than every window and original context below


def rope(kind: str, **more: object) -> dict[str, object]:
    return SMALL | {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama grouped heads": ("Llama", SMALL),
    "llama as many kv heads": ("Llama", SMALL | {"num_key_value_heads": 4}),
    "llama biases": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", SMALL | {"head_dim": 12}),
    "llama gelu": ("Llama", SMALL | {"hidden_act": "gelu"}),
    "llama linear rope": ("Llama", rope("linear", factor=4.0)),
    "llama dynamic rope, short text": ("Llama", rope("dynamic", factor=2.0)),
    "llama dynamic rope, long text": ("Llama", rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    "llama yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama yarn, all options": (
        "Llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0, mscale=0.7,
             mscale_all_dim=1.3, truncate=False),
    ),
    "llama yarn, attention factor": (
        "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5),
    ),
    "llama 3 rope": (
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral window": ("Mistral", SMALL | {"sliding_window": 8}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 window in the upper layer": (
        "Qwen2", SMALL | WINDOW | {"max_window_layers": 1},
    ),
    "qwen2 window in the lower layer": (
        "Qwen2",
        SMALL | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "qwen3 biases and window": (
        "Qwen3",
        SMALL | WINDOW | {"attention_bias": True, "max_window_layers": 0},
    ),
    "gpt2": ("GPT2", SMALL_GPT2),
    "gpt2 untied, n_inner, relu": (
        "GPT2", SMALL_GPT2 | {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
    ),
}  # fmt: skip


def save_random(folder: Path, kind: str, options: dict[str, Any]) -> Path:
    """A transformers model whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are several times faster so, and the other cores are for other tests."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), *CASES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"), "Llama", SMALL)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("gpt2"), "GPT2", SMALL_GPT2)


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    weights = Weights(graph, store, np.float64 if dtype == torch.float64 else np.float32)
    return run(graph, weights, tokens, dtype=dtype)["logits"]


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: torch.Tensor = model(tokens).logits
    return out


@contextmanager
def no_float32() -> Iterator[None]:
    """transformers computes norms and rope in torch.float32 by name, whatever the model's dtype: make that f64."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.multiple(torch, float32=torch.float64, float=torch.float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def their_logits_in_f64(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = transformers.AutoConfig.from_pretrained(folder)
    with no_float32(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
        out: torch.Tensor = model(tokens).logits
    return out


def some_tokens(vocab: int = 61, n: int = N_TOKENS) -> torch.Tensor:
    return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(1))


def edited(folder: Path, **config: object) -> Checkpoint:
    """The checkpoint with other settings in its config.json; ... deletes one."""
    found = read_checkpoint(folder, Store())
    merged = found.config | config
    return found._replace(config={k: v for k, v in merged.items() if v is not ...})


def with_tensors(folder: Path, change: Callable[[dict[str, TensorInfo]], object]) -> Checkpoint:
    found = read_checkpoint(folder, Store())
    tensors = dict(found.tensors)
    change(tensors)
    return found._replace(tensors=tensors)


# logits -------------------------------------------------------------------------------------------


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


# config.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [
    (LLAMA, "Llama"), (MISTRAL, "Mistral"), (QWEN2, "Qwen2"), (QWEN3, "Qwen3"), (GPT2, "GPT2"),
])  # fmt: skip
def test_every_key_of_transformers_is_known_and_every_default_is_its_own(family: Family, kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")()
    full = json.loads(config.to_json_string(use_diff=False))
    sizes = {family.config[k].spellings[0]: full[family.config[k].spellings[0]]
             for k in ("layers", "width", "heads", "ffn", "vocab")}  # fmt: skip

    def plain(settings: Settings) -> Settings:
        return dataclasses.replace(settings, used=(), dropped={})

    assert plain(read_settings(family, sizes, "config.json")) == plain(read_settings(family, full, "config.json"))


LLAMA2_CONFIG = """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 11008,
"max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5e5,
"tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true,
"vocab_size": 32000, "unsloth_version": "2024.9", "_attn_implementation_autoset": true, "max_length": 4096}"""
GPT2_CONFIG = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
"resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
"summary_type": "cls_index",
"summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
"vocab_size": 50257}"""


@pytest.mark.parametrize(("family", "text"), [(LLAMA, LLAMA2_CONFIG), (GPT2, GPT2_CONFIG)])
def test_config_files_as_they_were_published_years_ago_are_read(family: Family, text: str) -> None:
    settings = read_settings(family, json.loads(text), "config.json")
    assert settings.tied == (family is GPT2)
    assert settings.rope == (None if family is GPT2 else {"theta": 5e5})
    assert set(settings.used) | set(settings.dropped) == set(json.loads(text))


@pytest.mark.parametrize("name", [c for c in CASES if "rope" in c or "yarn" in c])
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


def test_a_setting_that_no_llama_has_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(InputError, match=r"logit_scale = 0\.0625"):
        build(edited(llama, logit_scale=0.0625))


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_act", "quick_gelu"),
    ("pretraining_tp", 2),
    ("partial_rotary_factor", 0.5),
    ("rope_parameters", {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}),
    ("rope_parameters", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ("is_encoder_decoder", True),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", ["full_attention", "linear_attention"]),
    ("head_dim", 9),
])  # fmt: skip
def test_a_value_that_no_graph_has_is_refused_with_exit_5(llama: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=key.replace("rope_parameters", "rope")):
        build(edited(llama, **{key: value}))


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_gpt2_with_another_attention_is_refused(gpt2: Path, key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        build(edited(gpt2, **{key: True}))


@pytest.mark.parametrize(("config", "match"), [
    ({"hidden_size": ...}, "has no hidden_size"),
    ({"hidden_size": "32"}, "hidden_size = '32'"),
    ({"hidden_size": 30, "head_dim": None}, "30 does not divide into 4 heads"),
    ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
    ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
    ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "'linear' has no factor"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}, "rope_parameters": None}, "type is 'yarn'"),
    ({"rope_theta": 123.0}, "rope_theta is both 10000.0 and 123.0"),
    ({"layer_types": ["full_attention"]}, "a list of 2 names"),
    ({"model_type": "mistral"}, "model_type says 'mistral'"),
    ({"architectures": ..., "model_type": ...}, "names neither architectures nor model_type"),
])  # fmt: skip
def test_a_malformed_setting_is_refused_by_name(llama: Path, config: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        build(edited(llama, **config))


def test_layer_types_that_contradict_the_window_are_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "Mistral", SMALL | {"sliding_window": 8})
    with pytest.raises(InputError, match="layer_types and sliding_window = 8 contradict"):
        build(edited(folder, layer_types=["full_attention", "sliding_attention"]))


def test_an_unknown_architecture_names_the_nearest_with_exit_5(llama: Path) -> None:
    with pytest.raises(UnsupportedError, match="Llama4ForCausalLM is not supported") as e:
        build(edited(llama, architectures=["Llama4ForCausalLM"]))
    assert e.value.exit_code == 5
    assert e.value.hint == "nearest: LlamaForCausalLM"


def test_without_architectures_the_model_type_decides(llama: Path) -> None:
    assert build(edited(llama, architectures=...)).meta["family"] == "llama"
    with pytest.raises(UnsupportedError, match="'qwen9' is not supported") as e:
        build(edited(llama, architectures=..., model_type="qwen9"))
    assert e.value.hint in ("nearest: qwen2", "nearest: qwen3")


def test_every_key_of_config_json_is_accounted_for(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, Store())
    keys: Any = build(checkpoint).meta["config_keys"]
    assert sorted([*keys["used"], *keys["dropped"]]) == sorted(checkpoint.config)


# tensors ------------------------------------------------------------------------------------------


def test_every_tensor_is_loaded_once(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, Store())
    graph = build(checkpoint)
    loaded = [node.attrs["tensor"] for node in graph.nodes.values() if node.op == "load"]
    assert sorted(map(str, loaded)) == sorted(info.ref for info in checkpoint.tensors.values())


def test_a_missing_tensor_is_named(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"no tensor is called {name}"):
        build(with_tensors(llama, lambda t: t.pop(name)))


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


# the graph ----------------------------------------------------------------------------------------


def test_parameters_know_their_role_and_layer(folder: Path) -> None:
    graph: Graph = build(read_checkpoint(folder, Store()))
    for name in graph.parameters():
        attrs = graph.root(name).attrs
        outside = {"token_embd", "position_embd", "output", "output_norm"}
        assert attrs["role"] in outside or isinstance(attrs["layer"], int)
        assert name.endswith((".weight", ".bias"))


def test_config_errors_are_user_errors(llama: Path) -> None:
    """Any single value, however absurd, is refused by a QConvertError or accepted: no traceback."""
    values: tuple[Any, ...] = (None, True, -1, 0, 1e400, "x", [], {}, [None], {"a": {}})
    found = read_checkpoint(llama, Store())
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for key in [*found.config, "layer_types", "rope_scaling", "rope_theta", "original_max_position_embeddings"]:
        for value in values:
            with suppress(QConvertError):
                build(found._replace(config=found.config | {key: value}))
    for key in ("rope_type", "type", "factor", "rope_theta", "truncate", "original_max_position_embeddings"):
        for value in values:
            with suppress(QConvertError):
                build(found._replace(config=found.config | {"rope_parameters": yarn | {key: value}}))
