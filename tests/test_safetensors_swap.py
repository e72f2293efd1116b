"""Adapters beside a quantized folder: transformers loads the base, PEFT each adapter, and their logits are the graph's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import LINEARS, VOCAB, tiny_adapter, tiny_model
from safetensors.numpy import load_file

from qconvert import adapter_refit, check, convert
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.certifying import certificate_report
from qconvert.errors import UnsupportedError, UsageError, VerificationError
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

pytest.importorskip("peft")
pytest.importorskip("compressed_tensors")
TINY, LORA = (Path(__file__).parents[1] / "golden" / name for name in ("tiny", "tiny-lora"))
Q_V = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
ALL = {"target_modules": LINEARS, "r": 3, "use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"o_proj": 20}}
PROMPTS = np.random.default_rng(0).integers(0, 1000, (3, 24)).tolist()


def swapped(base: Path, out: Path, *adapters: Path | str, **options: Any) -> Any:
    given = {"to": "safetensors", "adapters_as": "swap", "output": out, "threads": 1, "eval_tokens": 0, **options}
    return convert(base, adapters=[str(a) for a in adapters], **given)


def with_peft(out: Path, adapter: str, ids: list[int]) -> np.ndarray:
    """Logits of transformers' model, its weights dequantized from the folder, with an adapter of the folder on it by PEFT."""
    import transformers
    from peft import PeftModel

    config = transformers.AutoConfig.from_pretrained(out)
    vars(config).pop("quantization_config", None)
    graph, weights = graph_of(out)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = {name: torch.from_numpy(weights.real(name)) for name in graph.parameters()}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        logits: np.ndarray = PeftModel.from_pretrained(model, out / adapter).eval()(torch.tensor([ids])).logits[0].numpy()
    return logits


def loaded_with_peft(out: Path, adapter: str, ids: list[int]) -> np.ndarray:
    """The same, from the folders alone."""
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits: np.ndarray = PeftModel.from_pretrained(model, out / adapter).eval()(torch.tensor([ids])).logits[0].numpy()
    return logits


def graph_of(out: Path, *adapters: Path) -> tuple[Any, Weights]:
    """The folder as our own input with adapters beside its linears, all as files have them."""
    store = Store()
    graph = build(read_checkpoint(out, store))
    for i, folder in enumerate(adapters):
        graph = AttachAdapter(read_adapter(folder, store, f"adapter{i}"))(graph)
    return graph, Weights(graph, store)


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def kl_of(out: Path, adapter: Path) -> float:
    """Of base + adapter, as files have them, from golden/tiny with its adapter as trained."""
    trained, weights = graph_of(TINY, LORA)
    want = check.log_probs(trained, weights, PROMPTS)
    return check.distance(want, check.log_probs(*graph_of(out, adapter), PROMPTS), PROMPTS).mean_kl


@pytest.mark.peer
@pytest.mark.parametrize("quant", ["w4a16", "nf4", "gptq"])
def test_refitted_adapters_are_nearer_and_pefts_logits_are_the_evaluators(tmp_path: Path, quant: str) -> None:
    result = swapped(TINY, tmp_path / "new", LORA, quant=quant, refit_adapters=True)
    (note,) = [n for n in result.report.notes if "refit" in n]
    before, after = (float(v) for v in note.split("mean KL ")[1].split(" from")[0].split(" -> "))
    assert note.startswith("tiny-lora: refitted") and after < before
    rows = {r.what: r.verdict for r in result.report.checks}
    assert {rows[w] for w in ("adapter file of tiny-lora", "slots filled by tiny-lora")} == {"pass"}
    assert rows["runtime PEFT, tiny-lora"] == rows["runtime transformers"] == ("skip" if quant == "gptq" else "pass")
    graph, weights = graph_of(tmp_path / "new", tmp_path / "new" / "tiny-lora")
    (want,) = run(graph, weights, PROMPTS[:1]).values()
    assert relative(with_peft(tmp_path / "new", "tiny-lora", PROMPTS[0]), want[0].numpy()) < 1e-5


def test_kl_on_other_tokens_falls_where_much_was_lost(tmp_path: Path) -> None:
    kls = {}
    for refit in (False, True):
        out = tmp_path / str(refit)
        swapped(TINY, out, LORA, quant="gptq", bits=2, refit_adapters=refit, check=False)
        kls[refit] = kl_of(out, out / "tiny-lora")
    old, new = (load_file(tmp_path / str(refit) / "tiny-lora" / "adapter_model.safetensors") for refit in (False, True))
    print(kls)
    assert kls[True] < 0.98 * kls[False]
    assert old.keys() == new.keys() and all(old[k].shape == new[k].shape and not np.array_equal(old[k], new[k]) for k in old)
    base = [(tmp_path / str(refit) / "model.safetensors").read_bytes() for refit in (False, True)]
    assert base[0] == base[1]


def test_a_refit_that_is_farther_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_refit import Worse

    monkeypatch.setattr(adapter_refit, "RefitAdapter", Worse)
    result = swapped(TINY, tmp_path / "new", LORA, bits=8, refit_adapters=True, check=False)
    assert any("left as trained: refitting would bring it to" in n for n in result.report.notes)
    swapped(TINY, tmp_path / "old", LORA, bits=8, check=False)
    old, new = ((tmp_path / n / "tiny-lora" / "adapter_model.safetensors").read_bytes() for n in ("old", "new"))
    assert old == new


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", ALL),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 5}}),  # stored [in, out]
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "alpha_pattern": {"qkv_proj": 12}}),
        ("gemma2", {"target_modules": ["q_proj", "o_proj", "down_proj"]}),  # norms without their offset
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),  # experts are split as they are written
    ],
)
def test_logits_equal_pefts_of_the_adapters_that_came_in(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    base = tiny_model(family, tmp_path / "base", width=64)
    ids = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    models = {name: tiny_adapter(base, tmp_path / name, seed=seed, **config) for seed, name in enumerate(("one", "two"))}
    out = tmp_path / "out"
    result = swapped(base, out, tmp_path / "one", tmp_path / "two", quant="fp32")
    rows = {r.what: r.verdict for r in result.report.checks}
    assert {rows[f"runtime PEFT, {name}"] for name in models} == {"pass"}
    for name, model in models.items():
        with torch.no_grad():
            want = model(torch.tensor([ids])).logits[0].numpy()
        assert relative(loaded_with_peft(out, name, ids), want) < 1e-5  # f32 in another order of sums


def test_scales_of_all_modules_are_1_and_the_users_weight_is_in_b(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", width=64)
    tiny_adapter(base, tmp_path / "wide", **ALL)
    out = tmp_path / "out"
    result = swapped(base, out, f"{tmp_path / 'wide'}:0.5", quant="fp32", check=False)
    assert result.report.notes == ["wide: its weight 0.5 is in the factors of its file"]
    config = json.loads((out / "wide" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "out" and config["r"] == config["lora_alpha"] == 3
    ranks = {m: 5 for m in config["target_modules"] if m.endswith("k_proj")}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks and len(config["target_modules"]) == 2 * len(LINEARS)
    new, old = (load_file(folder / "adapter_model.safetensors") for folder in (out / "wide", tmp_path / "wide"))
    assert new.keys() == old.keys()
    for module, alpha, rank in (("o_proj", 20, 3), ("k_proj", 8, 5), ("v_proj", 8, 3)):
        a, b = (f"base_model.model.model.layers.1.self_attn.{module}.lora_{x}.weight" for x in "AB")
        assert np.array_equal(new[a], old[a])
        np.testing.assert_allclose(new[b], 0.5 * alpha / rank**0.5 * old[b], rtol=1e-6)


def test_every_byte_is_planned_and_the_folder_is_read_as_the_base_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = swapped(TINY, out, LORA, bits=4, check=False)
    assert result.plan.nbytes == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert sorted(p.name for p in (out / "tiny-lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    planned = swapped(TINY, tmp_path / "dry", LORA, bits=4, dry_run=True).plan.nbytes
    assert planned - result.plan.nbytes == len("dry") - len("out")
    alone = convert(TINY, to="safetensors", bits=4, output=tmp_path / "alone", check=False, threads=1)
    header = {p: json.loads((p / "config.json").read_text()) for p in (out, tmp_path / "alone")}
    assert header[out] == header[tmp_path / "alone"]
    tensors = [load_file_of(p / "model.safetensors") for p in (out, tmp_path / "alone")]
    assert tensors[0].keys() == tensors[1].keys() and alone.outputs
    assert all(np.array_equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def load_file_of(path: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load_torch

    return {k: t.view(torch.uint8).numpy() for k, t in load_torch(path).items() if t.ndim}


@pytest.mark.parametrize(
    ("quant", "said"),
    [("w8a8-static", "fixes ranges, which each adapter changes"), ("mlx-4bit", "whose adapters are not PEFT's")],
)
def test_types_that_take_no_adapter_are_refused(tmp_path: Path, quant: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as e:
        swapped(TINY, tmp_path / "out", LORA, quant=quant, dry_run=True)
    assert e.value.hint is not None and "--adapters merge" in e.value.hint


def test_an_adapter_config_that_lies_in_the_folder_is_refused(tmp_path: Path) -> None:
    """transformers would load it with the base, unasked."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"adapter_config\.json would be read with the new files"):
        swapped(TINY, tmp_path / "out", LORA, bits=4, force=True, dry_run=True)


def test_a_wrong_factor_fails_by_its_key_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Weights.encoded

    def wrong(self: Weights, name: str, begin: int, end: int) -> Any:
        data = true(self, name, begin, end)
        return data ^ 1 if name == "model.layers.1.self_attn.v_proj.lora_B.weight~adapter0" else data

    monkeypatch.setattr(Weights, "encoded", wrong)
    with pytest.raises(VerificationError, match=r"adapter file of tiny-lora.*layers\.1\.self_attn\.v_proj\.lora_B"):
        swapped(TINY, tmp_path / "out", LORA, bits=4)
    assert os.listdir(tmp_path) == []




def test_a_certificate_and_a_card_know_the_files_of_each_adapter(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", width=64)
    for i, name in enumerate(("one", "two")):
        tiny_adapter(base, tmp_path / name, seed=i, **Q_V)
    out = tmp_path / "out"
    swapped(base, out, tmp_path / "one", tmp_path / "two", bits=8, certify=True, check=False, card=True, license="mit")
    card = (out / "README.md").read_text()
    assert all(f"`{name}/adapter_model.safetensors`" in card for name in ("one", "two"))
    report = certificate_report(out)
    assert report is not None and not report.failed
    path = out / "one" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = certificate_report(out)
    assert report is not None and any("one/base_model" in row.reason for row in report.checks if row.verdict == "fail")
