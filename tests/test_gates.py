"""Gates: what a limit lets through, what it costs not to have measured, and what the last release is held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert import convert
from qconvert.errors import GateError, InputError, NotVerifiedError, QConvertError, UsageError
from qconvert.facts import Facts
from qconvert.gates import DEFAULTS, Gates, defaults_of, demand
from qconvert.html_report import html_page
from qconvert.printing import plan_text, report_text
from qconvert.recipe import asked, read_recipe, recipe_text
from qconvert.report import Gate, Report, Row
from qconvert.request import Request

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a Q4_0 that was let through."""
    made = convert(TINY, to="gguf:Q4_0", output=tmp_path_factory.mktemp("release") / "a.gguf", gate=True, eval_tokens=256)
    return made.report.data()


@pytest.fixture
def baseline(release: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """baseline(change): the release's report after change(report), as a file."""

    def written(change: Callable[[dict[str, Any]], Any] = lambda _: None, many: bool = False) -> Path:
        data = json.loads(json.dumps(release))
        change(data)
        path = tmp_path / "release.json"
        path.write_text(json.dumps([data] if many else data))
        return path

    return written


def planned(**options: Any) -> Report:
    """The report of a dry run to Q4_0."""
    return convert(TINY, **{"to": "gguf:Q4_0", "output": "unwritten.gguf", "dry_run": True, **options}).report


def verdicts(report: Report, origin: str | None = None) -> dict[str, str]:
    return {g.metric: g.verdict for g in report.gates if origin in (None, g.origin)}


def failed(error: QConvertError) -> set[str]:
    assert isinstance(error.report, Report)
    return {g.metric for g in error.report.failed_gates}


# limits -------------------------------------------------------------------------------------------


def test_all_that_failed_is_named_and_the_worst_code_is_taken(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_kl": 1e-5, "p999_kl": 100.0, "min_top1": 0.999, "max_ppl_ratio": 2.0}
    with pytest.raises(GateError) as caught:
        convert(TINY, to="gguf:Q4_0", output=tmp_path / "o.gguf", max_new_fallbacks=0, **limits)
    assert failed(caught.value) == {"mean_kl", "top1"}
    assert caught.value.message.startswith("2 gates failed\n  --max-kl 1.0e-05: mean_kl is 0.0")
    assert "\n  --min-top1 0.999: top1 is 0." in caught.value.message
    assert isinstance(caught.value.report, Report)
    assert verdicts(caught.value.report)["p999_kl"] == verdicts(caught.value.report)["new_fallbacks"] == "pass"
    assert caught.value.report.exit == caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_size_and_bits_are_known_before_anything_is_written(tmp_path: Path, dry_run: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("qconvert.conversion.preflight", lambda *_: pytest.fail("began to write"))
    with pytest.raises(GateError) as caught:
        convert(TINY, to="gguf:Q4_0", output=tmp_path / "o.gguf", max_size="1M", max_bpw=3.0, max_kl=1.0, dry_run=dry_run)
    assert failed(caught.value) == {"nbytes", "bpw"} and "--max-size 1.00 MB: nbytes is 1.2" in caught.value.message
    assert isinstance(caught.value.report, Report) and verdicts(caught.value.report)["mean_kl"] == "skip"


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    report = convert(TINY, to="safetensors:w4a16", output=tmp_path / "o", check=False, max_size="100M", max_bpw=100.0).report
    value = {g.metric: g.value for g in report.gates}
    assert value["nbytes"] == sum(p.stat().st_size for p in (tmp_path / "o").iterdir())
    assert value["bpw"] == report.outputs[0]["bpw"]["file"]


def test_a_fallback_counts() -> None:
    assert verdicts(planned(max_new_fallbacks=0)) == {"new_fallbacks": "pass"}
    report = Report([{"bpw": {"linear": 4.5}}], fallbacks=[{"tensor": "a", "wanted": "q4_k", "got": "q5_0", "reason": "80"}])
    gates = Gates.of(Request("m", max_new_fallbacks=0), report)
    with pytest.raises(GateError, match="--max-new-fallbacks 0: new_fallbacks is 1; a is q5_0"):
        gates.before(report)
    assert Gates.of(Request("m", max_new_fallbacks=1), report).before(report).exit == 0


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_kl": 1.0, "check": False}, 7),
        ({"min_top1": 0.0, "eval_tokens": 0}, 7),
        ({"require_verified": True, "check": False}, 8),
        ({"require_verified": True, "check": False, "max_ppl_ratio": 99.0}, 7),
        ({"gate": True, "check": False}, 7),
    ],
)
def test_what_is_not_measured_fails_before_anything_is_written(limits: dict[str, Any], code: int, tmp_path: Path) -> None:
    with pytest.raises(QConvertError) as caught:
        convert(TINY, to="gguf:Q4_0", output=tmp_path / "o.gguf", **limits)
    assert caught.value.exit_code == code and isinstance(caught.value.report, Report)
    assert caught.value.report.exit == code and "--" in caught.value.message
    assert "pass" not in verdicts(caught.value.report).values() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quality", [{}, {"skipped": "the model gives no logits"}, {"mean_kl": float("nan"), "n_tokens": 1}])
def test_what_could_not_be_measured_fails_too(quality: dict[str, Any]) -> None:
    report = Report([], quality=quality)
    report = Gates.of(Request("m", max_kl=1e9), report).after(report)
    assert verdicts(report) == {"mean_kl": "fail"} and report.exit == 7
    with pytest.raises(GateError, match=r"--max-kl 1000000000: (not measured: |mean_kl is nan)"):
        demand(report)


def test_a_failed_check_comes_before_a_failed_gate() -> None:
    gate = Gate("--max-kl", "mean_kl", "<=", 1.0, 2.0, "fail", "flag")
    assert Report([], [Row("merge", "KL", 1.0, 0.0, "fail")], gates=[gate]).exit == 6
    assert Report([], gates=[gate]).exit == 7
    assert Report([], gates=[gate._replace(verdict="skip")]).exit == 0


def test_a_runtime_that_did_not_run_is_no_pass() -> None:
    report = Report([], [Row("runtime x", "not verified", None, None, "skip", "x is not installed")])
    with pytest.raises(NotVerifiedError, match="not verified: x is not installed"):
        demand(Gates.of(Request("m", require_verified=True), report).after(report))


@pytest.mark.parametrize("limits", [{"min_top1": 93.0}, {"max_kl": -1.0}, {"max_size": "much"}, {"max_bpw": float("nan")}])
def test_a_limit_that_is_none_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        planned(**limits)


# defaults -----------------------------------------------------------------------------------------


def test_fewer_bits_have_wider_limits() -> None:
    for more, fewer in zip(DEFAULTS, DEFAULTS[1:], strict=False):
        assert more.bits > fewer.bits and more.mean_kl < fewer.mean_kl and more.p999_kl < fewer.p999_kl
        assert more.top1 > fewer.top1 and more.perplexity_ratio < fewer.perplexity_ratio
    assert defaults_of(4.69) is defaults_of(4.6) and defaults_of(0.5) is DEFAULTS[-1]


def test_defaults_give_way_to_what_is_said_and_are_told_apart(release: dict[str, Any]) -> None:
    assert {g["metric"]: (g["origin"], g["verdict"]) for g in release["gates"]} == dict.fromkeys(
        ("mean_kl", "p999_kl", "top1", "perplexity_ratio", "verified"), ("default", "pass")
    )
    assert any("defaults for 4.50 bits per weight; a small model loses more" in note for note in release["notes"])
    report = planned(gate=True, max_kl=0.25)
    assert {g.metric: g.origin for g in report.gates}["mean_kl"] == "flag" and len(report.gates) == 5


def test_gates_are_printed() -> None:
    result = convert(TINY, to="gguf:Q4_0", output="unwritten.gguf", dry_run=True, max_size="2M", max_kl=0.1)
    assert "pass  --max-size  nbytes" in plan_text(result) and "skip  --max-kl" in plan_text(result)
    assert "gates\n" in report_text(result.report) and "<h2>Gates</h2>" in html_page([Facts(result.report.data())])
    gate = Gate("--max-kl", "mean_kl", "<=", 0.1, 0.2, "fail", "recipe", "r.yaml:7")
    assert str(gate) == "--max-kl 0.1 (r.yaml:7): mean_kl is 0.2"
    assert "FAILED  --max-kl" in report_text(Report([], gates=[gate]))


# baseline -----------------------------------------------------------------------------------------


def test_the_same_again_is_let_through_and_less_is_not(baseline: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": tmp_path / "o.gguf", "eval_tokens": 256, "force": True}
    report = convert(TINY, to="gguf:Q4_0", baseline=baseline(many=True), **options).report
    assert set(verdicts(report, "baseline").values()) == {"pass"} and len(report.gates) == 9

    def better(data: dict[str, Any]) -> None:
        quality = data["quality"]
        quality.update(mean_kl=quality["mean_kl"] / 1.06, p999_kl=quality["p999_kl"] / 1.04, top1=1.0, perplexity_ratio=0.5)
        data["accounting"]["size"]["total"] //= 2
        data["checks"].append({"what": "runtime y", "metric": "", "value": 0, "limit": 0, "verdict": "pass", "reason": ""})

    with pytest.raises(GateError) as caught:
        convert(TINY, to="gguf:Q4_0", baseline=baseline(better), **options)
    assert failed(caught.value) == {"nbytes"}  # known before anything is measured

    def as_large(data: dict[str, Any]) -> None:
        better(data)
        data["accounting"]["size"]["total"] *= 2

    with pytest.raises(GateError, match=r"runtime y \(did not run\)") as caught:
        convert(TINY, to="gguf:Q4_0", baseline=baseline(as_large), **options)
    assert failed(caught.value) == {"mean_kl", "top1", "perplexity_ratio", "lost_checks"}
    assert "it was 0.0" in caught.value.message and "+ 5 %" in caught.value.message
    with pytest.raises(GateError) as caught:
        sure = baseline(lambda d: d["quality"].update(top1=1.0))
        convert(TINY, to="gguf:Q4_0", baseline=sure, baseline_tolerance=0.5, **options)
    assert failed(caught.value) == {"top1"}
    with pytest.raises(GateError) as caught:
        convert(TINY, to="gguf:Q4_0", baseline=baseline(), **{**options, "check": False})
    assert failed(caught.value) == {"mean_kl", "p999_kl", "top1", "perplexity_ratio", "lost_checks", "lost_verification"}
    with pytest.raises(InputError, match=r"measured on 256 tokens of .*; this on 512 tokens"):
        convert(TINY, to="gguf:Q4_0", baseline=baseline(), **{**options, "eval_tokens": 512})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema="qconvert-report/0"), "its schema is 'qconvert-report/0'"),
        (lambda d: d.pop("schema"), "its schema is None"),
        (lambda d: d.update(quant="Q4_1"), "no report of gguf:Q4_0; there is gguf:Q4_1"),
        (lambda d: d["outputs"][0].update(format="onnx"), "there is onnx:Q4_0"),
        (lambda d: d.update(outputs=[]), "there is no output:Q4_0"),
        (lambda d: d["provenance"].update(family="qwen2"), "another model: a model of family qwen2, this is llama"),
        (lambda d: d["provenance"].update(n_weights=7), "another model: a model of so many weights: 7, this is"),
        (lambda d: d.update(exit=7), "a run that failed with exit 7"),
        (lambda d: d.update(quality={"skipped": "--no-check"}), "nothing was measured for it: --no-check"),
        (lambda d: d.update(quality={}), "nothing was measured for it"),
        (lambda d: d["quality"].update(text="other.txt"), "measured on other.txt; this on the evaluation text"),
        (lambda d: d["quality"].pop("top1"), "is not built as its format says"),
        (lambda d: d.update(checks=[1]), "is not built as its format says"),
    ],
)
def test_a_baseline_of_something_else_is_refused(change: Any, said: str, baseline: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=said) as caught:
        planned(baseline=baseline(change))
    assert caught.value.message.startswith("--baseline ")


def test_models_of_the_hub_go_by_their_names(release: dict[str, Any]) -> None:
    from qconvert.baseline import refuse_another_model

    def of(model: str, revision: str | None) -> dict[str, Any]:
        return {**release["provenance"], "model": model, "revision": revision}

    refuse_another_model(Path("r"), of("org/m@v1", "1a"), of("org/m@v2", "2b"))
    refuse_another_model(Path("r"), of("out/step-1200", None), of("out/step-1500", None))
    with pytest.raises(InputError, match="another model: org/m, this is org/m-instruct"):
        refuse_another_model(Path("r"), of("org/m", "1a"), of("org/m-instruct", "2b"))


def test_a_baseline_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        planned(baseline=tmp_path / "none.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        planned(baseline=tmp_path / "text")
    with pytest.raises(UsageError, match="--baseline-tolerance 5"):
        planned(baseline=tmp_path / "text", baseline_tolerance=5)


def test_a_fallback_of_the_release_is_none_anew(baseline: Callable[..., Path], release: dict[str, Any]) -> None:
    fallback = {"tensor": "a", "wanted": "q4_k", "got": "q5_0", "reason": "80"}
    made = Report(release["outputs"], accounting=release["accounting"], quant="Q4_0", provenance=release["provenance"],
                  fallbacks=[fallback])  # fmt: skip
    for known, verdict in ([fallback], "pass"), ([{**fallback, "got": "q8_0"}], "fail"):
        gates = Gates.of(Request("m", dry_run=True, baseline=baseline(lambda d, known=known: d.update(fallbacks=known))), made)
        assert next(gates.judged(x, made).verdict for x in gates.limits if x.metric.name == "new_fallbacks") == verdict


# recipes ------------------------------------------------------------------------------------------


def recipe(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"model: m\n{text}")
    return path


def test_a_recipe_says_gates_and_the_gate_says_where(tmp_path: Path) -> None:
    outputs = "to: [gguf:Q4_0, {format: onnx, gates: {max_kl: 1}}]\n"
    path = recipe(tmp_path, "gates:\n  max-kl: 0.05\n  max-size: 800000000\n  default: true\n" + outputs)
    first, second = asked(path, {}, {"max_size": "1G"})
    assert (first["max_kl"], first["gate"], first["max_size"], second["max_kl"]) == (0.05, True, "1G", 1)
    assert first["places"]["max_kl"] == f"{path}:3" and second["places"]["max_kl"] == f"{path}:6"
    assert "max_size" not in first["places"]
    first.pop("model")
    report = convert(TINY, **first, dry_run=True).report
    origins = {g.metric: (g.origin, g.place) for g in report.gates}
    assert origins["mean_kl"] == ("recipe", f"{path}:3") and origins["nbytes"] == ("flag", "")
    assert asked(recipe(tmp_path, "gates: default\n"), {}, {})[0]["gate"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gates: {max-kk: 1}\n", ":2: no option is called 'max-kk'"),
        ("gates: {bits: 4}\n", ":2: no option is called 'bits'"),
        ("gates: strict\n", ":2: gates: a mapping was wanted, or default"),
        ("gates: [max-kl]\n", ":2: gates: a mapping was wanted, or default"),
        ("max-kl: 1\ngates: {max-kl: 2}\n", ":3: max-kl is said twice, at .*:2 too"),
        ("gates: {max-new-fallbacks: 1.5}\n", ":2: max-new-fallbacks: a whole number was wanted"),
    ],
)
def test_a_mistake_in_gates_is_shown_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_recipe(recipe(tmp_path, text))


@pytest.mark.parametrize("gates", [{"gate": True}, {"gate": True, "max_kl": 0.1, "baseline": Path("b")}, {"max_size": "2G"}])
def test_gates_that_are_saved_read_back(tmp_path: Path, gates: dict[str, Any]) -> None:
    request = Request("m", quant="Q4_0", **gates)
    text = recipe_text((request,))
    assert ("gates: default" in text) is (gates == {"gate": True}) and "places" not in text
    (tmp_path / "s.yaml").write_text(text)
    assert [Request(**options) for options in read_recipe(tmp_path / "s.yaml").outputs] == [request]
