"""One base, many adapters: tokens and logits equal PEFT's for the base and for each adapter, in onnxruntime and in genai."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import LINEARS, VOCAB, Converted, edit_tensors, load, tiny_adapter, tiny_model
from peft_oracle import tokens as some_tokens

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError, VerificationError
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.graph import Graph, Node, Type
from qconvert.passes.adapter_slots import AdapterSlots, alone, filling
from qconvert.run import run
from qconvert.weights import Weights

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


def assert_equal_logits(out: Path, adapter: str, model: Any) -> Any:
    """At once and by the cache; returns PEFT's."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    file = out / f"{adapter}.onnx_adapter" if adapter else None
    opened, want = OnnxRuntime().open(out / "model.onnx", 20, 1, adapter=file), theirs(model, ids)
    for got in (opened.logits(ids), opened.decoded(ids, 8)):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)  # f32 in another order of sums
    return want


@pytest.mark.parametrize("form", ["ort", "portable", "legacy"])
def test_logits_equal_peft_for_the_base_and_for_each_adapter(made: Any, tmp_path: Path, form: str) -> None:
    folder, models = made
    out = tmp_path / "out"
    result = swapped(folder, out, "small", "wide", quant="fp32", form=form)
    assert result.verified and sorted(p.name for p in out.glob("*.onnx_adapter")) == ["small.onnx_adapter", "wide.onnx_adapter"]
    answers = [assert_equal_logits(out, name, model) for name, model in models.items()]
    assert min(np.abs(a - b).max() for a, b in zip(answers, answers[1:], strict=False)) > 0.1


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),  # stored [in, out]
        ("phi3", ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]),  # one weight for three, two
        ("gemma2", ["q_proj", "o_proj", "down_proj"]),  # a norm reads the sum of linear and slot
    ],
)
def test_logits_equal_peft_where_linears_are_fused_or_stored_transposed(tmp_path: Path, family: str, targets: Any) -> None:
    base = tiny_model(family, tmp_path / "base", width=64)
    config = {"target_modules": targets, "rank_pattern": {targets[0]: 5}, "alpha_pattern": {targets[1]: 12}}
    one = tiny_adapter(base, tmp_path / "one", **config)
    two = tiny_adapter(base, tmp_path / "two", target_modules=targets[1:])
    assert swapped(tmp_path, tmp_path / "out", "one", "two", quant="fp32").verified
    for name, model in (("", load(base)), ("one", one), ("two", two)):
        assert_equal_logits(tmp_path / "out", name, model)


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", tied=True, width=64)
    head = tiny_adapter(base, tmp_path / "head", target_modules=["lm_head", "q_proj"], r=4)
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight has values of its own"):  # PEFT saves a copy of it
        swapped(tmp_path, tmp_path / "out", "head")
    edit_tensors(tmp_path / "head", lambda tensors: {name: t for name, t in tensors.items() if "lora_" in name})
    for name, options in (("fp32", {"quant": "fp32"}), ("portable", {"bits": 8, "form": "portable"})):
        assert swapped(tmp_path, tmp_path / name, "head", **options).verified
    assert_equal_logits(tmp_path / "fp32", "", load(base))
    assert_equal_logits(tmp_path / "fp32", "head", head)


def test_a_bf16_adapter_on_biased_linears_is_widened(tmp_path: Path) -> None:
    base = tiny_model("qwen2", tmp_path / "base", width=64)
    model = tiny_adapter(base, tmp_path / "half", target_modules=["q_proj", "down_proj"], r=4)
    edit_tensors(tmp_path / "half", lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(p.bfloat16().float())
    swapped(tmp_path, tmp_path / "out", "half", quant="fp32")
    assert_equal_logits(tmp_path / "out", "half", model)


def test_genai_generates_pefts_tokens_for_the_base_and_two_adapters(tmp_path: Path) -> None:
    second = tmp_path / "second"
    tiny_adapter(TINY, second, target_modules=["k_proj", "o_proj", "gate_proj"], r=4, lora_alpha=2)
    same_tokens(tmp_path / "out", TINY, LORA, second)


def test_genai_generates_pefts_tokens_with_trained_adapters(tmp_path: Path, shared_data: Path) -> None:
    names = "shakespeare-lora-r8-qv", "python-rslora-r16-all"
    same_tokens(tmp_path / "out", shared_data / "models" / "novels-13m", *(shared_data / "adapters" / n for n in names))


def same_tokens(out: Path, base: Path, *adapters: Path) -> None:
    """Of 24 greedy ones, in genai and in onnxruntime."""
    genai, peft = pytest.importorskip("onnxruntime_genai"), pytest.importorskip("peft")
    import transformers

    from qconvert.formats.onnx_genai_check import generated

    convert(base, adapters=list(map(str, adapters)), to="onnx", quant="fp32", adapters_as="swap", output=out, check=False)
    model, texts = genai.Model(os.fspath(out)), []
    for adapter in (None, *adapters):
        their = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        stop = their.generation_config.eos_token_id
        if adapter:
            their = peft.PeftModel.from_pretrained(their, str(adapter)).eval()
        prompt = np.random.default_rng(3).integers(0, 900, 20).tolist()
        text = their.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, 20:].tolist()
        file = out / f"{adapter.name}.onnx_adapter" if adapter else None
        stopped = text[-1] == stop  # genai does not tell the stop token
        assert generated(genai, model, prompt, 24, file) == text[: len(text) - stopped]
        assert OnnxRuntime().open(out / "model.onnx", 64, 1, adapter=file).generate(prompt, len(text)) == text
        texts.append(text)
    assert len(set(map(tuple, texts))) == len(texts)


def test_a_file_that_one_adapter_was_loaded_into_gives_the_base_again(made: Any, tmp_path: Path) -> None:
    """Slots that another adapter fills fall back to rank 0: nothing of `wide` is left beside `small`."""
    folder, models = made
    swapped(folder, tmp_path / "out", "wide", "small", quant="fp32", check=False)
    for name in ("wide", "small", "", "wide"):
        assert_equal_logits(tmp_path / "out", name, models[name])


@pytest.mark.parametrize("form", ["ort", "portable", "legacy"])
def test_an_int4_base_takes_each_adapter_and_every_row_passes(made: Any, tmp_path: Path, form: str) -> None:
    folder, _ = made
    result = swapped(folder, tmp_path / "out", "small", "wide", bits=4, form=form)
    rows = {r.what: r.verdict for r in result.report.checks}
    for name in ("small", "wide"):
        wanted = [f"adapter file {name}.onnx_adapter", f"slots filled by {name}", f"runtime onnxruntime, {name}, prompts"]
        wanted += [f"runtime onnxruntime, {name}, 8 cached steps"]
        assert {rows[w] for w in wanted} == {"pass"} and rows[f"price of the bits, {name}"] == "info"


def test_adapters_tensors_are_used_and_bits_per_weight_are_those_of_the_base(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    facts = swapped(folder, tmp_path / "out", "small", "wide", bits=4, dry_run=True).report.data()
    alone = convert(folder / "base", to="onnx", bits=4, output=tmp_path / "base", dry_run=True).report.data()
    fate, of_base = (f["accounting"]["tensors"] for f in (facts, alone))
    assert fate["folded"] == 0 and fate["dropped"] == []
    assert fate["used"] == of_base["used"] + 2 * (2 * 2 + 2 * len(LINEARS))  # A and B of each target in both layers
    for key in ("codes", "linear"):
        assert facts["outputs"][0]["bpw"][key] == alone["outputs"][0]["bpw"][key]


def test_a_dry_run_knows_the_adapters_bytes_without_onnxruntime(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    code = (
        "import sys; from qconvert import convert; "
        f"r = convert({str(folder / 'base')!r}, adapters={[str(folder / n) for n in ('small', 'wide')]!r}, to='onnx', "
        f"adapters_as='swap', dry_run=True, output={str(tmp_path / 'out')!r}); "
        "print(r.plan.nbytes, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith(" False\n"), done.stdout + done.stderr
    result = swapped(folder, tmp_path / "out", "small", "wide", check=False)
    assert int(done.stdout.split()[0]) == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert result.report.accounting["size"]["total"] == result.plan.nbytes


def test_factors_are_streamed_and_not_held_in_the_plan(made: Any, tmp_path: Path) -> None:
    plan = swapped(made[0], tmp_path / "out", "wide", dry_run=True).plan
    (file,) = (f for f in plan.files if f.path.suffix == ".onnx_adapter")
    assert len(file.entries) == 2 * 2 * len(LINEARS) and file.known_nbytes < 160 * len(file.entries)


def test_the_base_knows_nothing_of_its_adapters_but_their_slots(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    tiny_adapter(folder / "base", folder / "other", seed=7, **{**Q_V, "r": 2})
    swapped(folder, tmp_path / "one", "small", check=False)
    swapped(folder, tmp_path / "two", "other", check=False)
    swapped(folder, tmp_path / "three", "small", "wide:0.5", check=False)
    convert(folder / "base", to="onnx", output=tmp_path / "none", check=False)
    assert (tmp_path / "one" / "model.onnx").read_bytes() == (tmp_path / "two" / "model.onnx").read_bytes()
    weights = {(tmp_path / n / "model.onnx.data").read_bytes() for n in ("one", "two", "three", "none")}
    assert len(weights) == 1
    one, three = (tmp_path / n / "small.onnx_adapter" for n in ("one", "three"))
    assert one.read_bytes() == three.read_bytes()


def test_an_adapters_weight_is_in_its_file_and_the_report_says_so(made: Any, tmp_path: Path) -> None:
    folder, models = made
    result = swapped(folder, tmp_path / "half", "small:0.5", quant="fp32")
    whole = {**models["small"].state_dict()}
    a, b = (whole[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.default.weight"].numpy() for x in "AB")
    found = ort.AdapterFormat.read_adapter(str(tmp_path / "half" / "small.onnx_adapter")).get_parameters()
    stem = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(found[f"{stem}.lora_A.weight"].numpy(), a.T)
    assert np.allclose(found[f"{stem}.lora_B.weight"].numpy(), 0.5 * 2.0 * b.T, rtol=1e-6)
    assert result.report.notes == ["small: its weight 0.5 is in the factors of its file"]


def test_the_folder_has_the_models_tokenizer_and_says_whose_is_another(tmp_path: Path) -> None:
    adapter = tmp_path / "mine"
    tiny_adapter(TINY, adapter, **Q_V)
    (adapter / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    options: dict[str, Any] = {"adapters": [str(adapter)], "to": "onnx", "output": tmp_path / "out", "check": False}
    result = convert(TINY, adapters_as="swap", **options)
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == (TINY / "chat_template.jinja").read_text()
    assert result.report.notes == ["mine: its own chat_template.jinja is not what the folder has, which is the model's"]


def test_a_pass_of_the_users_is_no_failure_of_the_slots(made: Any, tmp_path: Path) -> None:
    def halve(graph: Graph) -> Graph:
        name = "model.layers.0.mlp.up_proj.weight"
        old = graph.nodes[name]
        half = Node("scaled", (f"{name}~mine",), Type("f32", old.type.shape), {"scale": 0.5})
        return graph.rewrite(lambda n, _: {f"{name}~mine": old, name: half} if n == name else None)

    for i, passes in enumerate(([halve, ...], [..., halve])):
        result = swapped(made[0], tmp_path / str(i), "small", quant="fp32", passes=passes)
        rows = {r.what: r for r in result.report.checks}
        assert result.verified and rows["slots filled by small"].verdict == "pass"
        assert (rows.get("passes before") or rows["passes"]).value > 1e-3


def test_slots_compute_what_the_adapters_beside_their_linears_do(made: Any) -> None:
    """In f64, of each adapter alone and of none."""
    folder, _ = made
    graphs = Converted(folder / "base", folder / "small", (folder / "wide", 0.5))
    slotted = AdapterSlots()(graphs.attached)
    weights = Weights(slotted, graphs.store, np.float64)
    choices: dict[str | None, dict[str, str]] = {None: {}, **filling(slotted)}
    assert {alias: len(values) for alias, values in choices.items()} == {None: 0, "adapter0": 8, "adapter1": 28}
    for alias, values in choices.items():
        slots = {slot: torch.from_numpy(weights.real(value)) for slot, value in values.items()}
        got = run(slotted, weights, some_tokens(), inputs=slots, dtype=torch.float64)["logits"]
        assert torch.allclose(got, graphs.exact(alone(graphs.attached, alias)), rtol=1e-12, atol=1e-12)
    separate = Converted(folder / "base", (folder / "wide", 0.5))
    assert torch.equal(separate.exact(separate.attached), graphs.exact(alone(graphs.attached, "adapter1")))


def test_a_wrong_factor_fails_by_the_adapters_name_and_leaves_nothing(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = Weights.encoded, []

    def wrong_once(self: Weights, name: str, begin: int, end: int) -> Any:
        data = true(self, name, begin, end)
        if name == "model.layers.1.self_attn.v_proj.lora_B.weight~adapter0" and not calls:
            calls.append(name)
            data = data ^ 1
        return data

    monkeypatch.setattr(Weights, "encoded", wrong_once)
    with pytest.raises(VerificationError, match=r"adapter file small\.onnx_adapter.*layers\.1\.self_attn\.v_proj\.lora_B"):
        swapped(made[0], tmp_path / "out", "small")
    assert os.listdir(tmp_path) == []


def test_a_scale_that_is_not_the_adapters_fails_at_its_slots(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = AdapterSlots.__call__

    def wrong(self: AdapterSlots, graph: Graph) -> Graph:
        def doubled(name: str, node: Node) -> dict[str, Node] | None:
            return {name: replace(node, attrs={"scale": 4.0})} if node.op == "scaled" else None

        return true(self, graph).rewrite(doubled)

    monkeypatch.setattr(AdapterSlots, "__call__", wrong)
    with pytest.raises(VerificationError, match="slots filled by small"):
        swapped(made[0], tmp_path / "out", "small")
    assert os.listdir(tmp_path) == []


def test_an_adapter_with_nan_is_refused_even_unchecked(made: Any, tmp_path: Path) -> None:
    tiny_adapter(made[0] / "base", tmp_path / "nan", **Q_V)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(tmp_path / "nan", lambda tensors: {**tensors, key: tensors[key] * float("nan")})
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight: nan at"):
        convert(made[0] / "base", adapters=[str(tmp_path / "nan")], to="onnx", adapters_as="swap", output=tmp_path / "out",
                check=False)  # fmt: skip
    assert os.listdir(tmp_path) == ["nan"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, r"adapter: .*q_proj is DoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj has a bias"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, r"q_proj\.bias has values of its own"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens changes an embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"lm_head\.weight has values of its own"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}}, r"tokens\.weight has values"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "resized": VOCAB + 3}, "has values of"),
    ],
)
def test_what_is_more_than_a_low_rank_path_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    base = tiny_model("qwen2", tmp_path / "base")
    tiny_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(UnsupportedError, match=said) as e:
        swapped(tmp_path, tmp_path / "out", "adapter")
    assert e.value.hint == "--adapters merge writes it into the weights"
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_what_cannot_be_swapped_at_all_is_refused(made: Any, tmp_path: Path) -> None:
    folder, _ = made
    with pytest.raises(UnsupportedError, match="--adapters swap: GGUF output merges"):
        convert(folder / "base", adapters=[str(folder / "small")], to="gguf", adapters_as="swap", output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"two adapters would be small\.onnx_adapter"):
        swapped(folder, tmp_path / "out", "small", "small")
    with pytest.raises(UsageError, match="no adapter was given"):
        swapped(folder, tmp_path / "out")


def test_the_command_line_takes_it_beside_repeated_adapters(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from qconvert.cli import cli

    folder, _ = made
    monkeypatch.chdir(tmp_path)
    words = ["-a", str(folder / "small"), "--adapter", str(folder / "wide"), "--adapters", "swap", "--to", "onnx", "--no-check"]
    done = CliRunner().invoke(cli, ["convert", str(folder / "base"), *words, "--json", "-"])
    assert done.exit_code == 0, done.output
    files = {Path(o["path"]).name for o in json.loads(done.stdout)["outputs"]}
    assert {"small.onnx_adapter", "wide.onnx_adapter", "model.onnx"} <= files
    assert os.listdir(tmp_path) == ["base-int4-swap-onnx"]
