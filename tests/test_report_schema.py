"""report.schema.json describes what --json writes: whatever a run came to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qconvert import convert
from qconvert.cli import fail
from qconvert.errors import GateError, QConvertError
from qconvert.report import SCHEMA, Report, Row
from qconvert.reports import Run
from qconvert.verification import verify_file

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
PUBLISHED = json.loads((ROOT / "qconvert" / "report.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(PUBLISHED)


def written(report: Report) -> Any:
    return json.loads(json.dumps(report.data(), allow_nan=False))


def accepted(data: object) -> None:
    assert [f"{e.json_path}: {e.message[:200]}" for e in VALIDATOR.iter_errors(data)] == []


def test_the_schema_is_one_and_names_its_version() -> None:
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    assert PUBLISHED["$defs"]["report"]["properties"]["schema"]["const"] == SCHEMA


@pytest.mark.parametrize(
    ("to", "needs", "more"),
    [
        ("gguf:Q4_0", "gguf", {"gate": True}),
        ("gguf:Q4_K_M", "gguf", {"dry_run": True, "max_size": "2M", "max_kl": 0.1}),
        ("gguf", "gguf", {"target_bpw": 4.5, "check": False}),
        ("gguf:Q4_0", "gguf", {"solver": "gptq", "eval_tokens": 0}),
        ("onnx:int4", "onnx", {"offload_meta": "cpu"}),
        ("safetensors:w4a16", "compressed_tensors", {}),
    ],
)
def test_a_report_of_every_kind(to: str, needs: str, more: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(needs)
    report = convert(TINY, adapters=[str(LORA)], to=to, output=tmp_path / "out", **{"eval_tokens": 256, **more}).report
    accepted(written(report))
    accepted([written(report), written(report)])


def test_a_verification_and_an_onnx_model_of_others(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    convert(TINY, to="onnx:fp32", output=tmp_path / "first", check=False)
    report = convert(tmp_path / "first" / "model.onnx", to="onnx", bits=8, output=tmp_path / "second").report
    assert report.provenance["n_weights"] > 0
    accepted(written(report))
    accepted(written(verify_file(tmp_path / "first", str(TINY))))


def test_a_failed_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GateError) as caught:
        convert(TINY, to="gguf:Q2_K", output="out.gguf", eval_tokens=256, max_kl=1e-3)
    assert fail(Run(["--json", "report.json"]), caught.value) == 7
    data = json.loads(Path("report.json").read_text())
    assert data["exit"] == 7 and data["error"].startswith("--max-kl 0.001: mean_kl is")
    accepted(data)


def test_a_run_that_failed_before_it_had_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QConvertError) as caught:
        convert("no/such")
    assert fail(Run(["--json", "report.json"]), caught.value) == 3
    data = json.loads(Path("report.json").read_text())
    assert data["outputs"] == [] and data["verified"] is False and data["schema"] == SCHEMA
    accepted(data)


def test_an_output_that_was_not_begun_and_a_diagnosis(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {TINY}\nto: [{{format: gguf, quant: Q4_0, gates: {{max-size: 1k}}}}, gguf:Q8_0]\n")
    for args, code in ((["--recipe", recipe], 7), (["verify", TINY], 0), (["verify", tmp_path / "none", "--against", "m"], 3)):
        report = tmp_path / f"{code}.json"
        command = [sys.executable, "-m", "qconvert", *map(str, args), "--json", str(report), "-q"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        accepted(json.loads(report.read_text()))
    failed, waiting = json.loads((tmp_path / "7.json").read_text())
    assert failed["gates"][0]["place"] == f"{recipe}:2" and waiting["skipped"] and waiting["exit"] == 7


def test_numbers_that_json_cannot_say_are_null() -> None:
    data = written(Report([], [Row("runtime x", "mean KL", float("nan"), 1.0, "fail")]))
    assert data["checks"][0]["value"] is None and data["exit"] == 6
    accepted(data)


@pytest.mark.parametrize("key", [("more",), ("checks", 0, "more"), ("gates", 0, "more"), ("quality", "more")])
def test_a_key_that_nobody_named_is_refused(key: tuple[Any, ...], tmp_path: Path) -> None:
    data = written(convert(TINY, to="gguf:Q8_0", output=tmp_path / "o", dry_run=True, max_kl=1.0).report)
    data["checks"].append(Row("a", "b", None, None, "skip")._asdict())
    accepted(data)
    place = data
    for step in key[:-1]:
        place = place[step]
    place[key[-1]] = 1
    assert list(VALIDATOR.iter_errors(data))
