"""A rehearsal runs all of a recipe on the first layers, says so everywhere, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_outputs import LORA, TINY, read
from tiny_models import CASES, edited, save_random

from qconvert import convert, convert_all, request_of
from qconvert.cli import cli
from qconvert.conversion import Result
from qconvert.errors import InputError, OutputsError, UnsupportedError, UsageError, VerificationError
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.rehearsal import shortened

__all__ = ["read"]  # a fixture
LAYERS = json.loads((TINY / "config.json").read_text("utf-8"))["num_hidden_layers"]
needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden/tiny and its adapter with its layers four times over."""
    folder = tmp_path_factory.mktemp("deep")
    for name, of in (("model", TINY), ("adapter", LORA)):
        shutil.copytree(of, folder / name)
        path = next((folder / name).glob("*.safetensors"))
        tensors = load_file(path)
        for i in range(LAYERS, 4 * LAYERS):
            old, new = f".layers.{i % LAYERS}.", f".layers.{i}."
            tensors |= {key.replace(old, new): value.clone() for key, value in list(tensors.items()) if old in key}
        save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "model" / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = 4 * LAYERS
    (folder / "model" / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def rehearsed(deep: Path, **options: Any) -> Result:
    return convert(deep / "model", adapters=[str(deep / "adapter")], rehearse=True, threads=1, **options)


@needs_llama
def test_everything_runs_and_nothing_is_kept(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = rehearsed(deep, bits=4, calibrate_tokens=512, save_imatrix=tmp_path / "i.gguf")
    assert os.listdir(tmp_path) == [] and result.outputs == ()
    data = result.report.data()
    rows = {row["what"]: row["verdict"] for row in data["checks"]}
    assert rows["merge"] == "pass" and any(what.startswith("runtime llama.cpp") for what in rows)
    assert "fail" not in rows.values() and data["quality"]["n_tokens"] == 256
    assert data["accounting"]["rehearsal"] == {"layers": 2, "of": 4 * LAYERS}
    assert data["notes"][0] == f"rehearsal: 2 of {4 * LAYERS} layers, on little text; nothing is kept"
    assert data["exit"] == 0 and data["outputs"] == [] and not data["verified"]


def test_what_is_left_out_is_said_to_be_and_not_read(deep: Path, read: list[int]) -> None:
    whole = convert(deep / "model", adapters=[str(deep / "adapter")], dry_run=True, quant="q8_0").plan
    read.clear()
    fate = rehearsed(deep, quant="q8_0", check=False).report.data()["accounting"]["tensors"]
    model, adapter = (load_file(next((deep / name).glob("*.safetensors"))) for name in ("model", "adapter"))
    assert fate["used"] + fate["folded"] + len(fate["dropped"]) == len(model) + len(adapter)
    late = [key for key in (*model, *adapter) if any(f".layers.{i}." in key for i in range(2, 4 * LAYERS))]
    said = {d["tensor"].partition("#")[2] for d in fate["dropped"] if d["reason"] == "its layer has no part in a rehearsal"}
    assert said == set(late)
    assert sum(read) < whole.nbytes


def test_gates_are_not_judged_and_are_no_pass(deep: Path) -> None:
    result = rehearsed(deep, quant="q2_k", max_kl=1e-9, min_top1=1.0, require_verified=True, eval_tokens=100)
    gates = [(g.flag, g.verdict, g.reason) for g in result.report.gates]
    flags = ("--max-kl", "--min-top1", "--require-verified")
    assert gates == [(flag, "skip", "not judged in a rehearsal") for flag in flags]


def test_what_is_wrong_is_found_with_its_exit_code(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Q9_K"):
        rehearsed(deep, quant="Q9_K")
    with pytest.raises(InputError, match="match no weight"):
        shutil.copytree(deep / "adapter", tmp_path / "adapter")
        path = next((tmp_path / "adapter").glob("*.safetensors"))
        save_file({key.replace("q_proj", "x_proj"): value for key, value in load_file(path).items()}, path, {"format": "pt"})
        convert(deep / "model", adapters=[str(tmp_path / "adapter")], rehearse=True)
    from qconvert import check

    monkeypatch.setitem(check.LIMITS, "merge", (-1.0, "no merge is so good"))
    with pytest.raises(VerificationError, match="merge"):
        rehearsed(deep, quant="q8_0")
    with pytest.raises(UsageError, match="--rehearse and --dry-run"):
        rehearsed(deep, dry_run=True)
    with pytest.raises(UnsupportedError, match="an ONNX model"):
        convert("model.onnx", to="onnx", rehearse=True)


def test_statistics_of_all_layers_serve_a_rehearsal(deep: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200, "utf-8")
    kept = tmp_path / "statistics.safetensors"
    options = {"adapters": [str(deep / "adapter")], "quant": "q4_k_m", "check": False}
    convert(deep / "model", calibrate=text, calibrate_tokens=256, save_statistics=kept, output=tmp_path / "a.gguf", **options)
    assert convert(deep / "model", statistics=kept, rehearse=True, **options).report.accounting["calibration"]["tokens"]


def test_several_outputs_are_rehearsed_together(deep: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = [str(deep / "model"), "-a", str(deep / "adapter"), "--to", "gguf:Q8_0,onnx:int4", "--no-check", "--rehearse"]
    done = CliRunner().invoke(cli, ["convert", *words, "--json", str(report)])
    assert done.exit_code == 0, done.output
    assert [each["accounting"]["rehearsal"]["layers"] for each in json.loads(report.read_text("utf-8"))] == [2, 2]
    assert done.output.count("rehearsal: 2 of") == 2
    requests = [request_of(str(deep / "model"), to=to, rehearse=to == "onnx") for to in ("gguf", "onnx")]
    with pytest.raises(UsageError, match="--rehearse: of some outputs"):
        convert_all(requests)


def test_one_of_several_that_fails_is_named(deep: Path) -> None:
    path = deep / "nowhere.txt"
    path.write_text("", "utf-8")
    requests = [request_of(str(deep / "model"), to="gguf:Q8_0", rehearse=True, eval=eval) for eval in (None, path)]
    with pytest.raises(OutputsError, match="1 of 2 outputs failed") as caught:
        convert_all(requests)
    assert caught.value.exit_code == 3


# which layers -------------------------------------------------------------------------------------

GEMMA3 = CASES["gemma3"][1] if "gemma3" in CASES else {}


@pytest.mark.parametrize(
    ("kinds", "left", "missing"),
    [("ffff", 2, False), ("sfsf", 2, False), ("sssssfss", 6, False), ("ssssssssssf", 2, True), ("f", 1, False)],
)
def test_there_are_enough_layers_for_each_kind(tmp_path: Path, kinds: str, left: int, missing: bool) -> None:
    names = {"s": "sliding_attention", "f": "full_attention"}
    options = GEMMA3 | {"num_hidden_layers": len(kinds), "layer_types": [names[k] for k in kinds]}
    folder = save_random(tmp_path, "Gemma3", options)
    checkpoint, found, others = shortened(edited(folder))
    assert (found.layers, found.of, found.missing) == (left, len(kinds), missing)
    assert checkpoint.config["num_hidden_layers"] == left == len(checkpoint.config["layer_types"])  # type: ignore[arg-type]
    assert len(checkpoint.tensors) + len(others) == len(edited(folder).tensors)
    assert all(found.keeps(name) for name in checkpoint.tensors)
