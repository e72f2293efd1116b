"""config.json: every key is used, known to change nothing, or an error that names it."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import CASES, SMALL, SMALL_GEMMA3, SMALL_GPT2, SMALL_QWEN3_MOE, edited, longrope, save_random

from qconvert.build import build
from qconvert.errors import InputError, QConvertError, UnsupportedError
from qconvert.families import GPT2, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, Family
from qconvert.families_gemma import GEMMA2, GEMMA3
from qconvert.families_moe import MIXTRAL, QWEN3_MOE
from qconvert.settings import Settings, read_settings
from qconvert.sources import Store, read_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"), "Llama", SMALL)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("gpt2"), "GPT2", SMALL_GPT2)


@pytest.mark.parametrize(("family", "kind"), [
    (LLAMA, "Llama"), (MISTRAL, "Mistral"), (QWEN2, "Qwen2"), (QWEN3, "Qwen3"), (GPT2, "GPT2"),
    (GEMMA2, "Gemma2"), (GEMMA3, "Gemma3Text"), (PHI3, "Phi3"), (MIXTRAL, "Mixtral"),
    (QWEN3_MOE, "Qwen3Moe"),
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


GEMMA3_CONFIG = """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
"final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
"initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
"num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
"transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}"""


def test_gemma3_as_it_was_published_is_read() -> None:
    settings = read_settings(GEMMA3, json.loads(GEMMA3_CONFIG), "config.json")
    assert [i for i, w in enumerate(settings.windows) if w is None] == [5, 11, 17, 23]
    assert (settings.rope, settings.window_rope) == ({"theta": 1e6}, {"theta": 1e4})
    assert settings.tied and settings.act == "gelu_tanh" and settings.attn_scale == 1 / 16


@pytest.mark.parametrize(("family", "text"), [(LLAMA, LLAMA2_CONFIG), (GPT2, GPT2_CONFIG)])
def test_config_files_as_they_were_published_years_ago_are_read(family: Family, text: str) -> None:
    settings = read_settings(family, json.loads(text), "config.json")
    assert settings.tied == (family is GPT2)
    assert settings.rope == (None if family is GPT2 else {"theta": 5e5})
    assert set(settings.used) | set(settings.dropped) == set(json.loads(text))


def test_a_setting_that_no_llama_has_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(InputError, match=r"logit_scale = 0\.0625"):
        build(edited(llama, logit_scale=0.0625))


def test_a_model_that_brings_its_own_code_is_refused_and_a_tokenizer_that_does_is_not(llama: Path) -> None:
    build(edited(llama, auto_map={"AutoTokenizer": ["tokenization.Own", None]}))
    with pytest.raises(InputError, match="auto_map"):
        build(edited(llama, auto_map={"AutoModelForCausalLM": "modeling.Own"}))


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


@pytest.mark.parametrize(("config", "match"), [
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}}, "rope scaling 'yarn'"),
    ({"sliding_window": None}, "contradict|no sliding_window"),
    ({"layer_types": ..., "_sliding_window_pattern": 4}, "_sliding_window_pattern = 4"),  # transformers takes 6 here
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
])  # fmt: skip
def test_a_gemma3_that_no_graph_has_is_refused_by_name(tmp_path: Path, config: dict[str, object], match: str) -> None:
    gemma3 = save_random(tmp_path, "Gemma3", SMALL_GEMMA3)
    with pytest.raises((InputError, UnsupportedError), match=match):
        build(edited(gemma3, **config))


@pytest.mark.parametrize(("config", "match"), [
    ({"num_experts_per_tok": 6}, "num_experts_per_tok = 6, but there are 5 experts"),
    ({"mlp_only_layers": "all"}, "mlp_only_layers = 'all'"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ({"norm_topk_prob": None}, "norm_topk_prob = None"),
    ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8"),
])  # fmt: skip
def test_experts_that_no_graph_has_are_refused_by_name(tmp_path: Path, config: dict[str, object], match: str) -> None:
    qwen3 = save_random(tmp_path, "Qwen3Moe", SMALL_QWEN3_MOE)
    with pytest.raises(InputError, match=match):
        build(edited(qwen3, **config))


@pytest.mark.parametrize(("config", "match"), [
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),  # transformers reads it as longrope
    ({"rope_scaling": {"type": "su", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}}, "rope scaling 'su'"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 4}}, "has no short_factor"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 3, "short_factor": [1.0] * 4}}, "long_factor"),
    ({"rope_scaling": {"type": "longrope", "long_factor": 4 * [2.0], "short_factor": 4 * ["1"]}}, "short_factor = '1'"),
    ({"partial_rotary_factor": 0.9}, "7 of head_dim 8 are to rotate"),
    ({"partial_rotary_factor": 1.5}, "12 of head_dim 8 are to rotate"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor = 0"),
])  # fmt: skip
def test_phi3_with_a_rope_that_no_graph_has_is_refused(
    tmp_path: Path, config: dict[str, object], match: str
) -> None:
    phi3 = save_random(tmp_path, "Phi3", SMALL)
    with pytest.raises((InputError, UnsupportedError), match=match):
        build(edited(phi3, rope_parameters=None, **config))


def test_longrope_needs_to_know_the_original_context(tmp_path: Path) -> None:
    phi3 = save_random(tmp_path, "Phi3", longrope(16))
    with pytest.raises(InputError, match="original_max_position_embeddings = None"):
        build(edited(phi3, original_max_position_embeddings=...))


def test_phi3_as_it_was_published_with_code_that_transformers_took_over_is_read(tmp_path: Path) -> None:
    phi3 = save_random(tmp_path, "Phi3", SMALL)
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    build(edited(phi3, auto_map=code, attention_bias=False))
    with pytest.raises(UnsupportedError, match="auto_map"):
        build(edited(phi3, auto_map=code | {"AutoModelForCausalLM": "modeling.Own"}))


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_gpt2_with_another_attention_is_refused(gpt2: Path, key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        build(edited(gpt2, **{key: True}))


@pytest.mark.parametrize(("config", "match"), [
    ({"hidden_size": ...}, "has no hidden_size"),
    ({"num_hidden_layers": 20_000}, "at most 10000 was wanted"),
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


@pytest.mark.parametrize("name", ["gemma2", "gemma3 linear scaling", "phi3 longrope, long text", "qwen3-moe a dense layer"])
def test_config_errors_of_other_families_are_user_errors(name: str, tmp_path: Path) -> None:
    found = read_checkpoint(save_random(tmp_path, *CASES[name]), Store())
    for key in [*found.config, "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern"]:
        for value in (None, True, -1, 0, 0.5, 1e400, "x", [], {}, [None], {"full_attention": 3}):
            with suppress(QConvertError):
                build(found._replace(config=found.config | {key: value}))


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
