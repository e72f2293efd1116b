"""From checkpoint and adapter to a proven ONNX folder, on the model that the project ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qconvert import convert
from qconvert.cli import cli
from qconvert.errors import QConvertError, UnsupportedError, UsageError, VerificationError
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.weights import Weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return convert(f"{TINY}+{LORA}", to="onnx", bits=4, output=tmp_path_factory.mktemp("onnx") / "out", threads=1)


def proto(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def external(tensor: Any) -> dict[str, str]:
    return {e.key: e.value for e in tensor.external_data}


def test_model_and_adapter_become_a_proven_folder(int4: Any) -> None:
    report = int4.report.data()
    assert int4.verified and report["quant"] == "int4_g32"
    (folder,) = int4.outputs
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja", "genai_config.json", "generation_config.json", "model.onnx", "model.onnx.data", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert report["accounting"]["size"]["total"] == sum(p.stat().st_size for p in folder.iterdir())
    assert report["outputs"][0]["bpw"]["codes"] == 4 and report["outputs"][0]["bpw"]["linear"] == 5


def test_each_check_there_is_has_run(int4: Any) -> None:
    rows = {r.what: r.verdict for r in int4.report.checks}
    wanted = ("onnx.checker", "file bytes", "merge", "kernel int4_g32 x 256", "kernel gather int4_g32 x 256",
              "runtime onnxruntime, prompts", "runtime onnxruntime, 8 cached steps",
              "runtime onnxruntime, 8-bit activations, 8 cached steps")  # fmt: skip
    assert {w: rows[w] for w in wanted} == dict.fromkeys(wanted, "pass")
    assert rows.get("genai token ids", "pass") == "pass"


def test_opset_ir_and_names_are_those_that_runtimes_load(int4: Any) -> None:
    model = proto(int4.outputs[0])
    assert model.ir_version == 11
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "com.microsoft": 1}
    inputs, outputs = ([v.name for v in side] for side in (model.graph.input, model.graph.output))
    assert inputs[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names) and "/model/layers/0/self_attn/q_proj/MatMulNBits" in names
    initializers = {t.name for t in model.graph.initializer}
    assert {"model.norm.weight", "model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.scales"} <= initializers


def test_weights_lie_outside_and_a_tied_head_shares_the_embeddings_bytes(int4: Any) -> None:
    model = proto(int4.outputs[0])
    places = {t.name: external(t) for t in model.graph.initializer if t.external_data}
    head, rows = places["model.embed_tokens.qweight"], places["model.embed_tokens.qweight.rows"]
    assert head == rows and head["location"] == "model.onnx.data"
    assert all(np.prod(t.dims) <= 64 for t in model.graph.initializer if not t.external_data)


def test_provenance_names_model_and_adapter_without_their_paths(int4: Any) -> None:
    said = {p.key: p.value for p in proto(int4.outputs[0]).metadata_props}
    assert said["qconvert.base_model"] == "tiny" and said["qconvert.adapter.0"] == "tiny-lora"
    assert str(ROOT).encode() not in (int4.outputs[0] / "model.onnx").read_bytes()


def test_provenance_names_an_adapters_weight(tmp_path: Path) -> None:
    convert(f"{TINY}+{LORA}:0.5", to="onnx", output=tmp_path / "out", check=False)
    assert {p.key: p.value for p in proto(tmp_path / "out").metadata_props}["qconvert.adapter.0"] == "tiny-lora:0.5"


def test_genai_config_says_where_the_cache_and_the_stop_tokens_are(int4: Any) -> None:
    config = json.loads((int4.outputs[0] / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    stops = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    assert model["type"] == "llama" and (model["bos_token_id"], model["eos_token_id"]) == (0, stops)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"


def test_genai_generates_the_tokens_that_transformers_and_peft_generate(tmp_path: Path) -> None:
    same_greedy_tokens(tmp_path / "out", TINY, LORA)


ADAPTERS = ["python-rslora-r16-all", "shakespeare-lora-r8-qv", "stories-dora-r8"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_int4_of_a_trained_adapter_is_scored_stage_by_stage(tmp_path: Path, shared_data: Path, adapter: str) -> None:
    source = f"{shared_data / 'models' / 'novels-13m'}+{shared_data / 'adapters' / adapter}"
    result = convert(source, to="onnx", bits=4, output=tmp_path / "out", threads=1)
    rows = {(r.what, r.metric): r for r in result.report.checks}
    price, change = (rows["price of the bits", metric].value for metric in ("mean KL", "NLL change"))
    assert result.verified and price is not None and 1e-3 < price < 0.05  # measured 0.005 to 0.02
    assert change is not None and abs(change) < 0.05  # nats; a wrong scale or permutation costs whole ones
    for what in ("merge", "runtime onnxruntime, prompts", "runtime onnxruntime, 8 cached steps"):
        assert [r.verdict for r in result.report.checks if r.what == what] == ["pass"]
    pytest.importorskip("onnxruntime_genai")
    assert [r.verdict for r in result.report.checks if r.what == "genai greedy tokens"] == ["pass"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_genai_generates_the_same_tokens_with_trained_adapters(tmp_path: Path, shared_data: Path, adapter: str) -> None:
    same_greedy_tokens(tmp_path / "out", shared_data / "models" / "novels-13m", shared_data / "adapters" / adapter)


def same_greedy_tokens(out: Path, folder: Path, adapter: Path) -> None:
    genai, peft = pytest.importorskip("onnxruntime_genai"), pytest.importorskip("peft")
    import torch
    import transformers

    from qconvert.formats.onnx_genai_check import generated

    convert(f"{folder}+{adapter}", to="onnx", quant="fp32", output=out, check=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    opened = genai.Model(str(out))
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(0, 900, 20).tolist()
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        new = out[0, len(prompt) :].tolist()
        stopped = new[-1] == base.generation_config.eos_token_id  # genai does not tell the stop token
        assert generated(genai, opened, prompt, 24) == (new[:-1] if stopped else new)


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(f"{TINY}+{LORA}", to="onnx", quant="uint4", output=tmp_path / str(threads), check=False, threads=threads)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


def test_a_dry_run_knows_the_exact_bytes_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from qconvert import convert; "
        f"r = convert({str(TINY)!r}, to='onnx', bits=4, dry_run=True, output={str(tmp_path / 'a')!r}); "
        "print(r.plan.nbytes, sorted({'torch', 'transformers', 'numba', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert os.listdir(tmp_path) == []
    convert(TINY, to="onnx", bits=4, output=tmp_path / "a", check=False)
    assert int(done.stdout.split()[0]) == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())


def test_a_weight_that_is_not_what_the_graph_says_fails_by_name_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = Weights.encoded, []

    def wrong_once(self: Weights, name: str, begin: int, end: int) -> Any:
        data = true(self, name, begin, end)
        if name.endswith("layers.1.mlp.up_proj.weight") and not calls:
            calls.append(name)
            data = data ^ 1
        return data

    monkeypatch.setattr(Weights, "encoded", wrong_once)
    with pytest.raises(VerificationError, match=r"file bytes.*layers\.1\.mlp\.up_proj"):
        convert(TINY, to="onnx", bits=4, output=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_node_that_computes_something_else_fails_in_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.formats import onnx_contrib

    true = onnx_contrib.OPS["attention"]

    def rotated_wrongly(e: Any, name: str, node: Any) -> None:
        true(e, name, node)
        next(a for a in e.model.nodes[-1].attribute if a.name == "do_rotary").i = 0
        del e.model.nodes[-1].input[7:]

    monkeypatch.setitem(onnx_contrib.OPS, "attention", rotated_wrongly)
    with pytest.raises(VerificationError, match="runtime onnxruntime, prompts"):
        convert(TINY, to="onnx", quant="fp32", form="legacy", output=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_without_onnxruntime_the_result_says_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "missing", lambda _: "onnxruntime is not installed")
    result = convert(TINY, to="onnx", bits=4, output=tmp_path / "out")
    assert not result.verified and result.report.exit == 0 and (tmp_path / "out").is_dir()


def test_an_existing_folder_is_kept_unless_forced_and_other_files_in_it_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(TINY, to="onnx", quant="fp16", output=out, check=False)
    (out / "mine.txt").write_text("kept")
    before = (out / "model.onnx.data").stat().st_size
    with pytest.raises(UsageError, match="exists already"):
        convert(TINY, to="onnx", bits=4, output=out, check=False)
    convert(TINY, to="onnx", bits=4, output=out, check=False, force=True)
    assert (out / "model.onnx.data").stat().st_size < before and (out / "mine.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["out"]


def test_rows_that_do_not_divide_get_a_smaller_group_and_say_so(tmp_path: Path) -> None:
    result = convert(TINY, to="onnx", bits=4, group=256, output=tmp_path / "a", dry_run=True)
    assert result.report.fallbacks == []
    from tiny_models import SMALL, save_random

    folder = save_random(tmp_path / "model", "Llama", SMALL | {"hidden_size": 64, "intermediate_size": 72})
    result = convert(folder, to="onnx", bits=4, output=tmp_path / "b", dry_run=True)
    got = {f["tensor"]: f["got"] for f in result.report.fallbacks}
    assert got["model.layers.0.mlp.down_proj.weight"] == "f32"
    with pytest.raises(UnsupportedError, match="do not divide into groups of 32"):
        convert(folder, to="onnx", bits=4, output=tmp_path / "b", dry_run=True, fallback="error")


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"bits": 3}, UsageError, "--bits 3"),
        ({"quant": "int5"}, UsageError, "--quant int5"),
        ({"group": 48}, UsageError, "--group 48"),
        ({"quant": "fp16", "group": 32}, UsageError, "fp16 has no groups"),
        ({"pure": True}, UnsupportedError, "--pure"),
        ({"tensor_types": ("x=int8",)}, UnsupportedError, "--tensor-type"),
        ({"split_max_size": "huge"}, UsageError, "cannot read 'huge'"),
        ({"layout": "browser"}, UsageError, "--layout browser"),
        ({"weights_in": "gguf"}, UsageError, "--weights-in gguf"),
        ({"layout": "transformersjs", "weights_in": "safetensors"}, UnsupportedError, "onnx_data alone"),
        ({"layout": "transformersjs", "split_max_size": "2G"}, UsageError, "less than 2 GiB"),
        ({"to": "gguf", "layout": "genai"}, UnsupportedError, "--layout"),
        ({"to": "gguf", "weights_in": "safetensors"}, UnsupportedError, "--weights-in"),
        ({"to": "gguf", "group": 32}, UnsupportedError, "--group 32"),
    ],
)
def test_what_cannot_be_asked_for_is_named(
    tmp_path: Path, options: dict[str, Any], kind: type[QConvertError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        convert(TINY, output=tmp_path / "out", **{"to": "onnx", **options})
    assert os.listdir(tmp_path) == []


def test_the_command_line_makes_a_folder_named_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["convert", f"{TINY}+{LORA}", "--to", "onnx", "--bits", "8", "--group", "64", "--no-check"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "tiny-tiny-lora-int8-onnx\n"
    assert (tmp_path / "tiny-tiny-lora-int8-onnx" / "model.onnx").is_file()
