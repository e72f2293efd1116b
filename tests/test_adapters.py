"""Adapters: attached as PEFT runs them, merged without a difference. The oracle is PEFT itself, unmerged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft_oracle import (
    LINEARS,
    VOCAB,
    Converted,
    edit_config,
    edit_tensors,
    load,
    logits_of,
    tiny_adapter,
    tiny_model,
    tokens,
)

from qconvert.passes.untie_head import PATHS
from qconvert.run import run
from qconvert.weights import Weights

TOLERANCE = 1e-5  # f32, logits below 5; measured: attached <= 1e-6, merged <= 4e-6
Q = {"target_modules": ["q_proj"], "r": 4}
CONV1D = ["c_attn", "c_proj", "c_fc"]

# name -> family, tied, resized vocabulary, LoraConfig
CASES: dict[str, tuple[str, bool, int | None, dict[str, Any]]] = {
    "lora": ("llama", False, None, Q),
    "rslora": ("llama", False, None, {"target_modules": LINEARS, "r": 4, "use_rslora": True}),
    "use_qalora, which PEFT reads for GPTQ alone": ("llama", False, None, {**Q, "use_qalora": True, "qalora_group_size": 8}),
    "rank and alpha patterns": ("llama", False, None, {
        "target_modules": LINEARS, "r": 4, "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8, "proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, r"layers\.[01].*(gate|up)_proj": 5},
    }),
    "dora": ("llama", False, None, {"target_modules": LINEARS, "r": 4, "use_dora": True}),
    "dora and rslora": ("llama", False, None, {
        "target_modules": LINEARS, "r": 4, "use_dora": True, "use_rslora": True,
    }),
    "dora beside biases": ("qwen2", False, None, {"target_modules": LINEARS, "r": 4, "use_dora": True}),
    "lora_bias": ("qwen2", False, None, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_bias": True}),
    "lora_bias without a bias": ("llama", False, None, {"target_modules": LINEARS, "r": 4, "lora_bias": True}),
    "bias all": ("qwen2", False, None, {"target_modules": ["q_proj", "o_proj"], "r": 4, "bias": "all"}),
    "bias lora_only": ("qwen2", False, None, {"target_modules": ["q_proj", "o_proj"], "r": 4, "bias": "lora_only"}),
    "some layers only": ("llama", False, None, {**Q, "layers_to_transform": [1]}),
    "targets by a regular expression": ("llama", False, None, {"target_modules": r".*\.0\..*q_proj", "r": 4}),
    "random initialisation": ("llama", False, None, {**Q, "init_lora_weights": False}),
    "fan_in_fan_out": ("gpt2", True, None, {"target_modules": CONV1D, "r": 4, "fan_in_fan_out": True}),
    "fan_in_fan_out dora": ("gpt2", True, None, {"target_modules": CONV1D, "r": 4, "use_dora": True}),
    "fan_in_fan_out lora_bias": ("gpt2", True, None, {
        "target_modules": CONV1D, "r": 4, "lora_bias": True, "bias": "all",
    }),
    "gpt2 embeddings": ("gpt2", True, None, {"target_modules": ["wte", "wpe"], "r": 4}),
    "gpt2 embedding dora": ("gpt2", True, None, {"target_modules": ["wte", "c_fc"], "r": 4, "use_dora": True}),
    "gpt2 modules_to_save": ("gpt2", True, None, {
        "target_modules": ["c_attn"], "r": 4, "modules_to_save": ["c_fc", "ln_f", "wpe"],
    }),
    "ensure_weight_tying, factors": ("llama", True, None, {
        "target_modules": ["embed_tokens", "lm_head"], "r": 4, "ensure_weight_tying": True,
    }),
    "ensure_weight_tying, saved": ("llama", True, None, {
        **Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    }),
    "ensure_weight_tying, tokens": ("llama", True, None, {
        **Q, "trainable_token_indices": [1, 5], "ensure_weight_tying": True,
    }),
    "resized and targeted, tied": ("llama", True, 44, {"target_modules": ["embed_tokens"], "r": 4}),
    "phi3": ("phi3", False, None, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "r": 4}),
    "mixtral attention": ("mixtral", False, None, {"target_modules": LINEARS[:4], "r": 4}),
    "qwen3-moe attention": ("qwen3-moe", False, None, {"target_modules": LINEARS[:4], "r": 4, "use_dora": True}),
    "gemma3": ("gemma3", True, None, {"target_modules": LINEARS, "r": 4, "modules_to_save": ["q_norm"]}),
    "gemma2": ("gemma2", True, None, {"target_modules": LINEARS, "r": 4}),
    "gemma2 dora": ("gemma2", True, None, {"target_modules": LINEARS, "r": 4, "use_dora": True}),
    "gemma2 embedding": ("gemma2", True, None, {"target_modules": ["embed_tokens"], "r": 4}),
    "gemma2 norms and embedding saved": ("gemma2", True, None, {
        **Q, "modules_to_save": ["norm", "input_layernorm", "embed_tokens"],
    }),
    "gemma2 tokens": ("gemma2", True, None, {**Q, "trainable_token_indices": [1, 5]}),
    "gemma2 head": ("gemma2", True, None, {"target_modules": ["lm_head"], "r": 4}),
}  # fmt: skip
for tied in (False, True):
    more: dict[str, tuple[int | None, dict[str, Any]]] = {
        "head": (None, {"target_modules": ["lm_head"], "r": 4}),
        "head dora": (None, {"target_modules": ["lm_head"], "r": 4, "use_dora": True}),
        "embedding": (None, {"target_modules": ["embed_tokens"], "r": 4}),
        "embedding dora": (None, {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
        "embedding and head": (None, {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
        "embedding saved": (None, {**Q, "modules_to_save": ["embed_tokens"]}),
        "head saved": (None, {**Q, "modules_to_save": ["lm_head"]}),
        "both saved": (None, {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
        "norms and mlp saved": (None, {**Q, "modules_to_save": ["norm", "input_layernorm", "mlp"]}),
        "resized": (44, Q),
        "resized, embedding saved": (44, {**Q, "modules_to_save": ["embed_tokens"]}),
        "resized, both saved": (44, {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
        "tokens": (None, {**Q, "trainable_token_indices": [1, 5]}),
        "tokens of both": (None, {**Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 6]}}),
        "tokens of the head": (None, {**Q, "trainable_token_indices": {"lm_head": [1, 6]}}),
        "tokens, resized": (44, {**Q, "trainable_token_indices": [41, 42]}),
    }
    for name, (resized, config) in more.items():
        CASES[f"{name}, {'tied' if tied else 'untied'}"] = ("llama", tied, resized, config)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    kinds = {(family, tied) for family, tied, *_ in CASES.values()}
    return {k: tiny_model(k[0], tmp_path_factory.mktemp("base"), k[1]) for k in kinds}


class Case(NamedTuple):
    base: Path
    ours: Converted
    vocab: int
    want: torch.Tensor  # PEFT's logits, the adapter beside the linears


@pytest.fixture(scope="session")
def made(bases: dict[tuple[str, bool], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def make(name: str) -> Case:
        family, tied, resized, config = CASES[name]
        folder, vocab = tmp_path_factory.mktemp("adapter"), resized or VOCAB
        model = tiny_adapter(bases[family, tied], folder, resized, **config)
        return Case(bases[family, tied], Converted(bases[family, tied], folder), vocab, logits_of(model, vocab))

    return make


@pytest.mark.parametrize("name", CASES)
def test_attached_and_merged_graphs_equal_peft_unmerged(name: str, made: Callable[[str], Case]) -> None:
    case = made(name)
    ours = case.ours
    assert float((case.want[..., :VOCAB] - logits_of(load(case.base))).abs().max()) > 0.05  # the adapter matters
    torch.testing.assert_close(ours.logits(ours.attached, case.vocab), case.want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.logits(ours.merged, case.vocab), case.want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_merging_is_algebra_the_difference_is_rounding_alone(name: str, made: Callable[[str], Case]) -> None:
    ours = made(name).ours
    merged, attached = ours.exact(ours.merged), ours.exact(ours.attached)
    torch.testing.assert_close(merged, attached, rtol=0, atol=1e-12)  # f64; measured 1e-14


@pytest.mark.parametrize("name", CASES)
def test_merged_graphs_hold_plain_parameters_with_their_roles(name: str, made: Callable[[str], Case]) -> None:
    ours = made(name).ours
    assert not [n for n in ours.merged.nodes.values() if n.op in PATHS]
    settings = ours.merged.meta["config"]
    assert isinstance(settings, dict) and settings["vocab"] == made(name).vocab
    for parameter in ours.merged.parameters():
        attrs, before = ours.merged.root(parameter).attrs, ours.base.nodes.get(parameter)
        assert "~" not in parameter and "role" in attrs
        if before is not None:
            assert {**ours.base.root(parameter).attrs, "tensor": 0} == {**attrs, "tensor": 0}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_an_adapter_is_used_or_dropped_with_a_reason(name: str, made: Callable[[str], Case]) -> None:
    ours = made(name).ours
    loaded = {n.attrs["tensor"] for n in ours.merged.nodes.values() if n.op == "load"}
    listed = ours.merged.meta.get("dropped", [])
    assert isinstance(listed, list)
    dropped = {d["tensor"] for d in listed if isinstance(d, dict)}
    assert {t.ref for t in ours.store.tensors("adapter0").values()} <= loaded | dropped


# ties ---------------------------------------------------------------------------------------------


def tied_after(base: Path, folder: Path, resized: int | None = None, **config: Any) -> bool:
    tiny_adapter(base, folder, resized, **config)
    merged = Converted(base, folder).merged
    settings = merged.meta["config"]
    assert isinstance(settings, dict)
    assert settings["tied"] is ("lm_head.weight" not in merged.nodes)
    return bool(settings["tied"])


def test_an_adapter_on_one_side_of_a_tie_unties_the_head(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["llama", True]
    assert not tied_after(base, tmp_path / "a", target_modules=["lm_head"])
    assert not tied_after(base, tmp_path / "b", target_modules=["embed_tokens"])
    assert not tied_after(base, tmp_path / "c", **Q, modules_to_save=["embed_tokens"])
    assert not tied_after(base, tmp_path / "d", **Q, trainable_token_indices={"lm_head": [3]})


def test_a_tie_is_kept_where_both_sides_change_alike(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    base = bases["llama", True]
    assert tied_after(base, tmp_path / "a", **Q)
    assert tied_after(base, tmp_path / "b", 44, **Q)
    assert tied_after(base, tmp_path / "c", target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    assert tied_after(base, tmp_path / "d", **Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert tied_after(base, tmp_path / "e", **Q, trainable_token_indices=[3])


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_weight_in_the_file_is_what_its_dora_lies_on(
    tied: bool, bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """PEFT saves the base weight of a targeted head, and reads it back: into both layers where they are tied."""
    from peft import PeftModel

    base = bases["llama", tied]
    tiny_adapter(base, tmp_path, target_modules=["lm_head"], r=4, use_dora=True, modules_to_save=["embed_tokens"])
    key = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(tmp_path, lambda t: {**t, key: t[key] + 0.05 * torch.randn(t[key].shape)})
    want = logits_of(PeftModel.from_pretrained(load(base), tmp_path).eval())
    ours = Converted(base, tmp_path)
    torch.testing.assert_close(ours.logits(ours.attached), want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


# several adapters ---------------------------------------------------------------------------------

SEVERAL: dict[str, tuple[str, list[tuple[float, dict[str, Any]]]]] = {
    "lora, rslora and dora": ("llama", [
        (0.7, {"target_modules": LINEARS, "r": 4}),
        (1.0, {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_rslora": True}),
        (-0.4, {"target_modules": LINEARS, "r": 4, "use_dora": True}),
    ]),
    "two dora": ("llama", [
        (0.5, {"target_modules": LINEARS, "r": 4, "use_dora": True}),
        (0.8, {"target_modules": ["q_proj", "o_proj"], "r": 3, "use_dora": True, "use_rslora": True}),
    ]),
    "biases": ("qwen2", [
        (0.7, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_bias": True}),
        (0.3, {"target_modules": ["q_proj", "o_proj"], "r": 4, "bias": "all"}),
        (1.0, {"target_modules": ["k_proj"], "r": 4, "use_dora": True, "bias": "lora_only"}),
    ]),
    "saved modules": ("llama", [
        (0.7, {**Q, "modules_to_save": ["norm", "lm_head", "mlp"]}),
        (0.5, {**Q, "modules_to_save": ["norm"]}),
        (1.0, {"target_modules": ["lm_head", "down_proj"], "r": 4, "use_dora": True}),
    ]),
    "dora below saved modules": ("llama", [
        (0.6, {"target_modules": ["lm_head", "embed_tokens", "down_proj"], "r": 4, "use_dora": True}),
        (0.7, {**Q, "modules_to_save": ["lm_head", "embed_tokens", "mlp"]}),
    ]),
    "embeddings and tokens": ("llama", [
        (0.7, {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
        (0.6, {**Q, "trainable_token_indices": [1, 5]}),
        (0.5, {**Q, "trainable_token_indices": [5, 7]}),
        (0.5, {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    ]),
    "conv1d": ("gpt2", [
        (0.7, {"target_modules": CONV1D, "r": 4, "use_dora": True}),
        (0.5, {"target_modules": CONV1D, "r": 4, "lora_bias": True, "bias": "all"}),
        (0.4, {"target_modules": ["c_attn"], "r": 4, "modules_to_save": ["c_fc", "ln_f"]}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", SEVERAL)
def test_weighted_adapters_are_the_weighted_sum_of_what_peft_merges_of_each(
    case: str, bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """W + sum_i weight_i * (W_i - W), with W_i from PEFT's merge_and_unload of adapter i alone."""
    family, parts = SEVERAL[case]
    base = bases[family, family == "gpt2"]
    model = load(base)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    total = {k: v.clone() for k, v in start.items()}
    folders = []
    for i, (weight, config) in enumerate(parts):
        folders.append((tmp_path / str(i), weight))
        alone = tiny_adapter(base, tmp_path / str(i), seed=i + 1, **config).merge_and_unload().state_dict()
        for k in total:
            total[k] += weight * (alone[k] - start[k])
    model.load_state_dict(total)
    ours = Converted(base, *folders)
    want = logits_of(model)
    torch.testing.assert_close(ours.logits(ours.attached), want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


def test_two_adapters_at_full_weight_are_what_peft_computes_with_both_active(
    bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = bases["llama", False]
    tiny_adapter(base, tmp_path / "a", seed=1, **Q)
    tiny_adapter(base, tmp_path / "b", seed=2, target_modules=LINEARS, r=8, use_rslora=True)
    model = PeftModel.from_pretrained(load(base), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    ours = Converted(base, tmp_path / "a", tmp_path / "b")
    want = logits_of(model.eval())
    torch.testing.assert_close(ours.logits(ours.attached), want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_one_adapter_at_weight_one_is_the_identity_where_pefts_weighted_sum_is_not(
    config: dict[str, Any], bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    base = bases["qwen2", False]
    model = tiny_adapter(base, tmp_path, target_modules=["q_proj", "v_proj"], r=4, **config)
    want = logits_of(model)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    ours = Converted(base, (tmp_path, 1.0))
    assert float((logits_of(model) - want).abs().max()) > 0.01  # PEFT 0.21.2's own sum is another model
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


# files as others write them -----------------------------------------------------------------------


def rename(folder: Path, old: str, new: str) -> None:
    edit_tensors(folder, lambda t: {k.replace(old, new): v for k, v in t.items()})


@pytest.mark.parametrize(
    "old, new", [("lora_A.", "lora_A.default."), ("base_model.model.", ""), ("model.model.", "model.")]
)
def test_keys_with_the_adapters_name_or_without_a_prefix_are_understood(
    old: str, new: str, bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    base = bases["llama", False]
    want = logits_of(tiny_adapter(base, tmp_path, **Q, use_dora=True))
    rename(tmp_path, old, new)
    ours = Converted(base, tmp_path)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


def test_a_bin_file_is_read(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = bases["llama", False]
    want = logits_of(tiny_adapter(base, tmp_path, target_modules=["embed_tokens", "q_proj"], r=4))
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    ours = Converted(base, tmp_path)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


def test_an_adapter_in_bf16_is_widened_and_not_rounded_again(
    bases: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = bases["llama", False]
    tiny_adapter(base, tmp_path, **Q)
    edit_tensors(tmp_path, lambda t: {k: v.bfloat16() for k, v in t.items()})
    want = logits_of(PeftModel.from_pretrained(load(base), tmp_path).eval())  # PEFT widens as well
    ours = Converted(base, tmp_path)
    torch.testing.assert_close(ours.logits(ours.attached), want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.logits(ours.merged), want, rtol=0, atol=TOLERANCE)


def test_what_was_attached_is_recorded(bases: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    folder = tmp_path / "models--me--mine" / "snapshots" / "c0ffee"
    tiny_adapter(bases["llama", False], folder, **Q, use_dora=True, revision="abc")
    edit_config(folder, base_model_name_or_path="someone/model")
    merged = Converted(bases["llama", False], (folder, 0.5)).merged
    assert merged.meta["adapters"] == [{
        "name": "mine", "weight": 0.5, "kind": "dora", "modules": 2, "unused": [], "base": "someone/model",
        "base_revision": "abc", "revision": "c0ffee",
    }]  # fmt: skip


# real adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shakespeare-lora-r8-qv", "python-rslora-r16-all", "stories-dora-r8"])
def test_shipped_adapters_attached_and_merged_equal_peft(name: str, shared_data: Path) -> None:
    from peft import PeftModel

    base = shared_data / "models" / "novels-13m"
    ours = Converted(base, shared_data / "adapters" / name)
    model = PeftModel.from_pretrained(load(base).float(), shared_data / "adapters" / name).eval()
    x = tokens(4096).repeat(1, 7)
    with torch.no_grad():
        want = model(input_ids=x).logits
    for graph in (ours.attached, ours.merged):
        got = run(graph, Weights(graph, ours.store), x)["logits"]
        torch.testing.assert_close(got, want, rtol=0, atol=3e-5)  # logits to 20; PEFT's own merge differs by 1e-5
