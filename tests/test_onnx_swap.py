"""One base, many adapters: tokens and logits equal PEFT's for the base and for each adapter, in onnxruntime and in genai."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import LINEARS, VOCAB, load, tiny_adapter, tiny_model

from qconvert import convert
from qconvert.errors import UnsupportedError, UsageError, VerificationError
from qconvert.formats.onnx_runtime import OnnxRuntime

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
Q_V = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
ALL = {"target_modules": LINEARS, "r": 3, "use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"o_proj": 20}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of a base and its adapters `small` and `wide`, {name: PEFT model})"""
    folder = tmp_path_factory.mktemp("swap")
    base = tiny_model("llama", folder / "base", width=64)
    models = {name: tiny_adapter(base, folder / name, **c) for name, c in (("small", Q_V), ("wide", ALL))}
    return folder, {"": load(base), **models}


def swapped(folder: Path, out: Path, *adapters: str, **options: Any) -> Any:
    given = [str(folder / a) for a in adapters]
    return convert(folder / "base", adapters=given, to="onnx", adapters_as="swap", output=out, threads=1, **options)


def theirs(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("form", ["ort", "portable", "legacy"])
def test_logits_equal_peft_for_the_base_and_for_each_adapter(made: Any, tmp_path: Path, form: str) -> None:
    folder, models = made
    out = tmp_path / "out"
    result = swapped(folder, out, "small", "wide", quant="fp32", form=form)
    assert result.verified and sorted(p.name for p in out.glob("*.onnx_adapter")) == ["small.onnx_adapter", "wide.onnx_adapter"]
    ids = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    answers = []
    for name, model in models.items():
        file = out / f"{name}.onnx_adapter" if name else None
        opened = OnnxRuntime().open(out / "model.onnx", 20, 1, adapter=file)
        answers.append(theirs(model, ids))
        for got in (opened.logits(ids), opened.decoded(ids, 8)):
            assert np.linalg.norm(got - answers[-1]) < 1e-5 * np.linalg.norm(answers[-1])  # f32 in another order of sums
    assert min(np.abs(a - b).max() for a, b in ((answers[0], answers[1]), (answers[1], answers[2]))) > 0.1


@pytest.mark.parametrize("names", [("shakespeare-lora-r8-qv", "python-rslora-r16-all")])
def test_genai_generates_pefts_tokens_with_trained_adapters(tmp_path: Path, shared_data: Path, names: tuple[str, str]) -> None:
    genai, peft = pytest.importorskip("onnxruntime_genai"), pytest.importorskip("peft")
    import transformers

    from qconvert.formats.onnx_genai_check import generated

    base, files = shared_data / "models" / "novels-13m", [str(shared_data / "adapters" / n) for n in names]
    out = tmp_path / "out"
    convert(base, adapters=files, to="onnx", quant="fp32", adapters_as="swap", output=out, check=False)
    model = genai.Model(os.fspath(out))
    for name in (None, *names):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name:
            theirs = peft.PeftModel.from_pretrained(theirs, str(shared_data / "adapters" / name)).eval()
        prompt = np.random.default_rng(3).integers(0, 900, 20).tolist()
        text = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, 20:].tolist()
        stopped = text[-1] == theirs.generation_config.eos_token_id  # genai does not tell the stop token
        assert generated(genai, model, prompt, 24, out / f"{name}.onnx_adapter" if name else None) == text[: 24 - stopped]


def test_an_int4_base_takes_each_adapter_and_every_row_passes(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    result = swapped(folder, tmp_path / "out", "small", "wide", bits=4)
    rows = {r.what: r.verdict for r in result.report.checks}
    for name in ("small", "wide"):
        wanted = [f"adapter file {name}.onnx_adapter", f"slots filled by {name}", f"runtime onnxruntime, {name}, prompts"]
        assert {rows[w] for w in wanted} == {"pass"} and rows[f"price of the bits, {name}"] == "info"
    fate = result.report.data()["accounting"]["tensors"]
    assert fate["folded"] == 0 and fate["dropped"] == []


def test_a_dry_run_knows_the_adapters_bytes(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    dry = swapped(folder, tmp_path / "out", "small", "wide", dry_run=True)
    swapped(folder, tmp_path / "out", "small", "wide", check=False)
    assert dry.plan.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_the_weights_do_not_depend_on_which_adapters_there_are(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    swapped(folder, tmp_path / "one", "small", check=False)
    swapped(folder, tmp_path / "two", "small", "wide", check=False)
    one, two = ((tmp_path / n / "model.onnx.data").read_bytes() for n in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "small.onnx_adapter").read_bytes() == (tmp_path / "two" / "small.onnx_adapter").read_bytes()


def test_an_adapters_weight_is_in_its_file(made: Any, tmp_path: Path) -> None:
    folder, models = made
    swapped(folder, tmp_path / "half", "small:0.5", quant="fp32")
    whole = {**models["small"].state_dict()}
    a, b = (whole[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.default.weight"].numpy() for x in "AB")
    found = ort.AdapterFormat.read_adapter(str(tmp_path / "half" / "small.onnx_adapter")).get_parameters()
    stem = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(found[f"{stem}.lora_A.weight"].numpy(), a.T)
    assert np.allclose(found[f"{stem}.lora_B.weight"].numpy(), 0.5 * 2.0 * b.T, rtol=1e-6)


def test_a_wrong_factor_fails_by_the_adapters_name_and_leaves_nothing(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconvert.formats import onnx_swap

    true = onnx_swap.parameters
    monkeypatch.setattr(onnx_swap, "parameters", lambda *args: ((n, 1.01 * v) for n, v in true(*args)))
    with pytest.raises(VerificationError, match=r"adapter file small\.onnx_adapter"):
        swapped(made[0], tmp_path / "out", "small")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj is DoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj has a bias"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens changes an embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight has a whole parameter"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}}, "trained rows"),
    ],
)
def test_what_is_more_than_a_low_rank_path_is_refused(made: Any, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder, _ = made
    tiny_adapter(folder / "base", tmp_path / "adapter", **config)
    with pytest.raises(UnsupportedError, match=said) as e:
        convert(folder / "base", adapters=[str(tmp_path / "adapter")], to="onnx", adapters_as="swap", output=tmp_path / "out")
    assert e.value.hint == "--adapters merge writes it into the weights"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_tied_head_and_gguf_and_two_adapters_of_one_name_are_refused(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    tied = tiny_model("llama", tmp_path / "tied", tied=True)
    tiny_adapter(tied, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match="lm_head changes a head that is tied"):
        convert(tied, adapters=[str(tmp_path / "head")], to="onnx", adapters_as="swap", output=tmp_path / "out")
    with pytest.raises(UnsupportedError, match="--adapters swap: GGUF output merges"):
        convert(folder / "base", adapters=[str(folder / "small")], to="gguf", adapters_as="swap", output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"two adapters would be small\.onnx_adapter"):
        swapped(folder, tmp_path / "out", "small", "small")
