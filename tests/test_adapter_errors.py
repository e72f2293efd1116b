"""Adapters that would be silently wrong: each is refused, with its exit code and what to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import LINEARS, Converted, edit_config, edit_tensors, load, logits_of, tiny_adapter, tiny_model

from qconvert.adapters import read_adapter
from qconvert.errors import AdapterError, GraphError, InputError, QConvertError, UnsupportedError, UsageError
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.sources import Store
from qconvert.text import parse

Tensors = dict[str, torch.Tensor]
Q = {"target_modules": ["q_proj"], "r": 4}
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    tiny_adapter(base, tmp_path / "adapter", **Q)
    return tmp_path / "adapter"


def refused(kind: type[QConvertError], *parts: str, code: int, base: Path, adapter: Path) -> None:
    """Converting raises `kind` with exit code `code`, and the text has all `parts`."""
    with pytest.raises(kind) as caught:
        Converted(base, adapter)
    assert caught.value.exit_code == code
    assert caught.value.hint
    for part in parts:
        assert part in str(caught.value)


# the config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["loftq", "pissa", "pissa_niter_16", "olora", "corda", "eva", "lora_ga", "new_idea"])
def test_an_adapter_trained_on_an_altered_base_is_refused(init: str, base: Path, adapter: Path) -> None:
    edit_config(adapter, init_lora_weights=init)
    refused(AdapterError, f"init_lora_weights is '{init}'", "path_initial_model", code=3, base=base, adapter=adapter)


def test_pissa_saved_unconverted_is_refused_and_converted_is_exact(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base), LoraConfig(**Q, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, for the initial adapter
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    want = logits_of(model.eval())
    model.save_pretrained(tmp_path / "plain")
    refused(AdapterError, "subtracted", code=3, base=base, adapter=tmp_path / "plain")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = Converted(base, tmp_path / "converted")
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=2e-5)  # SVD and subtraction: 4e-6


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "LOKR", "ADALORA", "PREFIX_TUNING", "VERA", "OFT", "TRAINABLE_TOKENS"])
def test_another_kind_of_adapter_is_refused_by_name(kind: str, base: Path, adapter: Path) -> None:
    edit_config(adapter, peft_type=kind)
    refused(UnsupportedError, f"is a {kind} adapter", "merge_and_unload", code=5, base=base, adapter=adapter)


@pytest.mark.parametrize(
    "key, value",
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("megatron_config", {"hidden_size": 32}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("a_key_of_tomorrow", 0.5),
    ],
)
def test_a_setting_that_may_change_the_result_is_refused(key: str, value: Any, base: Path, adapter: Path) -> None:
    edit_config(adapter, **{key: value})
    refused(UnsupportedError, f"{key} = ", code=5, base=base, adapter=adapter)


def test_every_setting_of_peft_at_its_default_is_accepted(base: Path, adapter: Path) -> None:
    from peft import LoraConfig

    edit_config(adapter, **{**LoraConfig(**Q).to_dict(), "peft_type": "LORA", "target_modules": ["q_proj"]})
    assert Converted(base, adapter).adapters[0].kind == "lora"


def test_a_rank_that_is_not_the_configs_is_refused(base: Path, adapter: Path) -> None:
    edit_config(adapter, r=8)
    refused(AdapterError, "rank 4", "says 8", "scale", code=3, base=base, adapter=adapter)
    edit_config(adapter, r=4, rank_pattern={"layers.1.self_attn.q_proj": 2})
    refused(AdapterError, "layers.1.", "says 2", code=3, base=base, adapter=adapter)


@pytest.mark.parametrize(
    "config", [{"r": "four"}, {"lora_alpha": None}, {"rank_pattern": {"(": 2}}, {"alpha_pattern": [1]}], ids=str
)
def test_a_damaged_config_is_refused(config: dict[str, Any], base: Path, adapter: Path) -> None:
    edit_config(adapter, **config)
    with pytest.raises(AdapterError):
        Converted(base, adapter)


def test_a_folder_without_a_config_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    refused(AdapterError, "has no adapter_config.json", code=3, base=base, adapter=adapter)


def test_a_whole_model_in_the_place_of_an_adapter_is_refused(base: Path) -> None:
    refused(AdapterError, "a whole model", code=3, base=base, adapter=base)


def test_a_config_that_is_not_json_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Converted(base, adapter)


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_a_weight_that_leaves_nothing_or_everything_is_a_usage_error(weight: float, adapter: Path) -> None:
    with pytest.raises(UsageError):
        read_adapter(adapter, Store(), "adapter0", weight)


# the tensors --------------------------------------------------------------------------------------


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def test_a_factor_without_its_partner_is_named(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, without("layers.1.self_attn.q_proj.lora_B"))
    refused(AdapterError, "layers.1.self_attn.q_proj.lora_A", "lora_B", "missing", code=3, base=base, adapter=adapter)


def test_a_module_that_the_config_names_and_the_file_lacks_is_an_error(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, without("layers.1."))
    refused(AdapterError, "model.layers.1.self_attn.q_proj", "incomplete", code=3, base=base, adapter=adapter)


def test_a_missing_saved_module_is_an_error(base: Path, tmp_path: Path) -> None:
    tiny_adapter(base, tmp_path, **Q, modules_to_save=["lm_head"])
    edit_tensors(tmp_path, without("lm_head"))
    refused(AdapterError, "lm_head", code=3, base=base, adapter=tmp_path)


@pytest.mark.parametrize("config, part", [({"use_dora": True}, "magnitude"), ({"lora_bias": True}, "lora_B.bias")])
def test_missing_and_unannounced_parts_of_dora_and_lora_bias_are_errors(
    config: dict[str, Any], part: str, base: Path, tmp_path: Path
) -> None:
    tiny_adapter(base, tmp_path, **Q, **config)
    edit_config(tmp_path, **dict.fromkeys(config, False))
    refused(AdapterError, part, code=3, base=base, adapter=tmp_path)
    edit_config(tmp_path, **config)
    edit_tensors(tmp_path, without(part))
    refused(AdapterError, part, code=3, base=base, adapter=tmp_path)


def test_an_adapter_for_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "other", width=64)
    tiny_adapter(tmp_path / "other", tmp_path / "adapter", **Q)
    edit_config(tmp_path / "adapter", base_model_name_or_path="someone/wide-model")
    says = ("[4, 64] does not fit", "q_proj.weight", "another model?", "someone/wide-model", "width 32")
    refused(AdapterError, *says, code=3, base=base, adapter=tmp_path / "adapter")


def test_an_adapter_for_another_family_is_refused(base: Path, tmp_path: Path) -> None:
    tiny_model("gpt2", tmp_path / "other", tied=True)
    tiny_adapter(tmp_path / "other", tmp_path / "adapter", target_modules=["c_attn"], r=4)
    first = "first: base_model.model.transformer.h.0.attn.c_attn"
    says = ("4 adapter tensors match no weight", first, "another model?")
    refused(AdapterError, *says, code=3, base=base, adapter=tmp_path / "adapter")


def test_an_adapter_for_a_deeper_model_names_the_layer(base: Path, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "other", layers=3)
    tiny_adapter(tmp_path / "other", tmp_path / "adapter", **Q)
    refused(AdapterError, "layer 2", "has 2 layers", code=3, base=base, adapter=tmp_path / "adapter")


def test_a_wrong_prefix_is_named(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {k.replace("model.layers", "language_model.layers"): v for k, v in t.items()})
    says = ("prefix", "'base_model.model.language_model'", "'base_model.model.model' was wanted")
    refused(AdapterError, *says, code=3, base=base, adapter=adapter)


def test_unused_keys_can_be_allowed_and_are_recorded(
    base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"vision.lora_A.weight": torch.ones(4, 9), "vision.lora_B.weight": torch.ones(9, 4)}
    edit_tensors(adapter, lambda t: t | extra)
    says = ("2 adapter tensors match no weight", "vision.lora_A.weight")
    refused(AdapterError, *says, code=3, base=base, adapter=adapter)
    with caplog.at_level(logging.WARNING, "qconvert"):
        ours = Converted(base, adapter, allow_unused=True)
    (entry,) = ours.merged.meta["adapters"]  # type: ignore[misc, union-attr]
    assert entry["unused"] == ["vision.lora_A.weight", "vision.lora_B.weight"]  # type: ignore[index, call-overload]
    assert "left out 2 tensors" in caplog.text


def test_an_adapter_of_which_nothing_is_used_is_refused_even_where_that_is_allowed(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {f"other.{k}": v for k, v in t.items()})
    with pytest.raises(AdapterError, match="match no weight"):
        Converted(base, adapter, allow_unused=True)


def test_two_adapters_in_one_file_are_refused(base: Path, adapter: Path) -> None:
    two = lambda t: {k.replace("lora_A.", f"lora_A.{n}."): v.clone() for n in ("a", "b") for k, v in t.items()}  # noqa: E731
    edit_tensors(adapter, two)
    refused(AdapterError, "two adapters", code=3, base=base, adapter=adapter)


def test_unsharded_leftovers_of_a_distributed_run_are_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {**t, A0: t[A0].flatten()})
    refused(AdapterError, "ZeRO-3", code=3, base=base, adapter=adapter)


def test_an_adapter_in_integers_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {**t, A0: t[A0].to(torch.int32)})
    with pytest.raises(UnsupportedError, match="i32"):
        Converted(base, adapter)


def test_nan_in_an_adapter_is_named_when_it_is_read(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {**t, A0: t[A0] * math.nan})
    with pytest.raises(InputError, match=r"lora_A.*nan"):
        ours = Converted(base, adapter)
        ours.logits(ours.merged)


# nothing learned ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": LINEARS, "r": 4},
        {"target_modules": LINEARS, "r": 4, "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True},
        {"target_modules": ["q_proj"], "r": 4, "lora_bias": True},
        {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["norm", "lm_head"]},
        {"target_modules": ["q_proj"], "r": 4, "trainable_token_indices": [3]},
        {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_an_adapter_that_was_never_trained_is_refused(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(base), LoraConfig(**config)).save_pretrained(tmp_path)
    refused(AdapterError, "changes nothing", "never trained", code=3, base=base, adapter=tmp_path)


@pytest.mark.parametrize(
    "config, trained",
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"modules_to_save": ["norm"]}, "norm.modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    ],
    ids=str,
)
def test_an_adapter_is_taken_where_anything_in_it_was_trained(
    config: dict[str, Any], trained: str, base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base), LoraConfig(**Q, **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if trained in name:
                p += 0.1
    model.save_pretrained(tmp_path)
    ours = Converted(base, tmp_path)
    torch.testing.assert_close(ours.logits(ours.merged), logits_of(model.eval()), rtol=0, atol=1e-5)


# resized vocabularies -----------------------------------------------------------------------------


def test_a_resized_vocabulary_cannot_be_taken_in_part(base: Path, tmp_path: Path) -> None:
    tiny_adapter(base, tmp_path / "big", 44, **Q)
    tiny_adapter(base, tmp_path / "other", **Q, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="comes first, with weight 1"):
        Converted(base, (tmp_path / "big", 0.5))
    with pytest.raises(AdapterError, match="comes first, with weight 1"):
        Converted(base, tmp_path / "other", tmp_path / "big")


def test_a_resized_embedding_without_its_head_is_refused(base: Path, tmp_path: Path) -> None:
    tiny_adapter(base, tmp_path, 44, **Q)
    edit_tensors(tmp_path, without("lm_head"))
    refused(AdapterError, "44 rows", "the head 40", code=3, base=base, adapter=tmp_path)


def test_a_token_beyond_the_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    tiny_adapter(base, tmp_path, **Q, trainable_token_indices=[3, 4])
    edit_config(tmp_path, trainable_token_indices=[3, 44])
    refused(AdapterError, "does not fit model.embed_tokens.weight", code=3, base=base, adapter=tmp_path)
    edit_config(tmp_path, trainable_token_indices=[3])
    refused(AdapterError, "trainable_token_indices", code=3, base=base, adapter=tmp_path)


def test_a_declined_merge_says_why(tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_adapter(tied, tmp_path, target_modules=["lm_head"], r=4)
    with caplog.at_level(logging.INFO, "qconvert"):
        Converted(tied, tmp_path)
    assert "untied the head" in caplog.text


# graphs that cannot be merged ---------------------------------------------------------------------

SHARED = """
%tokens : i64[B,T] = input()
%E : f32[40,8] = load() {"tensor": "base/x#E"}
%W : f32[8,8] = load() {"tensor": "base/x#W"}
%A : f32[2,8] = load() {"tensor": "adapter0/x#A"}
%B : f32[8,2] = load() {"tensor": "adapter0/x#B"}
%h : f32[B,T,8] = embed(%tokens, %E)
%q~base : f32[B,T,8] = linear(%h, %W)
%q~lora : f32[B,T,8] = lora(%{x}, %A, %B) {"scale": 1.0}
%q : f32[B,T,8] = add(%q~base, %q~lora)
%k : f32[B,T,8] = linear(%q, %{second})
%logits : f32[B,T,40] = linear(%k, %E)
return %logits
"""


def test_a_weight_that_two_linears_share_is_not_merged_into(caplog: pytest.LogCaptureFixture) -> None:
    graph = parse(SHARED.replace("{x}", "h").replace("{second}", "W"))
    with caplog.at_level(logging.INFO, "qconvert"), pytest.raises(GraphError, match="left W alone: it is read 2 times"):
        MergeAdapters()(graph)
    assert "left W alone" in caplog.text


def test_a_path_that_reads_something_else_than_its_linear_is_not_merged() -> None:
    graph = parse(SHARED.replace("{x}", "q~base").replace("{second}", "E~2").replace(
        "%h :", '%E~2 : f32[8,8] = load() {"tensor": "base/x#E2"}\n%h :'
    ))  # fmt: skip
    with pytest.raises(GraphError, match="reads %q~base, the weight beside it does not"):
        MergeAdapters()(graph)
