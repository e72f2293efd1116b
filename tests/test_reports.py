"""Reports: the same facts in every form, of runs that ended well and of those that did not."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from qconvert import errors, findings
from qconvert.changes import MOST, changes
from qconvert.cli import main
from qconvert.facts import Facts
from qconvert.html_report import html_page
from qconvert.junit_report import junit_text
from qconvert.markdown_report import markdown_text
from qconvert.report import Report, Row
from qconvert.reports import FORMS, Asked, Run, json_page
from qconvert.sarif_report import RULES, sarif_text

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
SHORT = ("--eval-tokens", 256, "-q")
EVIL = "a|b\n<script>alert(1)</script>\x1b[31m`x`*y*&\u202e\x00"


class Made(NamedTuple):
    """What a command left: its exit code and its folder of reports."""

    exit: int
    folder: Path

    def text(self, file: str) -> str:
        return (self.folder / file).read_text(encoding="utf-8")

    @property
    def data(self) -> Any:
        return json.loads(self.text("report.json"))

    @property
    def outputs(self) -> list[Any]:
        return self.data if isinstance(self.data, list) else [self.data]

    @property
    def suites(self) -> list[ElementTree.Element]:
        return ElementTree.fromstring(self.text("junit.xml")).findall("testsuite")

    @property
    def sarif(self) -> Any:
        (run,) = json.loads(self.text("report.sarif"))["runs"]
        return run


def qconvert(folder: Path, *args: object) -> Made:
    reports = folder / "reports" / "of-this-run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["qconvert", *map(str, args), "--reports", str(reports)])
        main()
        raise SystemExit(0)
    return Made(int(ended.value.code or 0), reports)


def with_stray_key(folder: Path) -> Path:
    """An adapter with a tensor for a layer that the model has not."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(LORA / "adapter_model.safetensors")
    for part in "AB":
        key = f"base_model.model.model.layers.{{}}.self_attn.q_proj.lora_{part}.weight"
        tensors[key.format(9)] = tensors[key.format(0)]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((LORA / "adapter_config.json").read_bytes())
    return folder


def damaged(folder: Path) -> Path:
    """A GGUF with infinite scales."""
    path = folder / "bad.gguf"
    if qconvert(folder, TINY, "--quant", "Q4_0", "-o", path, "--no-check", "-q").exit == 0:
        data = bytearray(path.read_bytes())
        data[-4096:-2048] = b"\xff" * 2048
        path.write_bytes(data)
    return path


def recipe_of(folder: Path, *outputs: str) -> Path:
    path = folder / "recipe.yaml"
    told = [f"  - {{format: gguf, quant: {quant}, output: {folder / f'{i}.gguf'}}}" for i, quant in enumerate(outputs)]
    path.write_text("\n".join([f"model: {TINY}", "check: false", "to:", *told]))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Runs by how they ended."""
    folders = {name: tmp_path_factory.mktemp(name) for name in
               ("good", "gate", "adapter", "recipe", "outputs", "flag", "unchecked", "doctor", "healthy", "bug")}  # fmt: skip
    (folders["recipe"] / "recipe.yaml").write_text(f"model: {TINY}\nbitz: 3\n")
    model, q4_0 = f"{TINY}+{LORA}", ("--quant", "Q4_0", *SHORT)
    args: dict[str, tuple[object, ...]] = {
        "good": (model, *q4_0, "-o", folders["good"] / "a.gguf"),
        "gate": (model, *q4_0, "-o", folders["gate"] / "a.gguf", "--max-kl", 1e-5),
        "adapter": (f"{TINY}+{with_stray_key(folders['adapter'] / 'stray')}", *q4_0),
        "recipe": ("--recipe", folders["recipe"] / "recipe.yaml"),
        "outputs": ("--recipe", recipe_of(folders["outputs"], "Q8_0", "Q4_Z", "Q4_0"), "-q"),
        "flag": (TINY, "--bogus"),
        "unchecked": (TINY, *q4_0, "-o", folders["unchecked"] / "a.gguf", "--no-check"),
        "doctor": ("verify", damaged(folders["doctor"])),
        "healthy": ("verify", folders["good"] / "a.gguf"),
    }
    found = {name: qconvert(folders[name], *arg) for name, arg in args.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qconvert.conversion.preflight", lambda *_: 1 // 0)
        found["bug"] = qconvert(folders["bug"], TINY, "-o", folders["bug"] / "a.gguf", "-q")
    return found


ENDS = {"good": 0, "gate": 7, "adapter": 3, "recipe": 2, "outputs": 2, "flag": 2, "unchecked": 0, "doctor": 6, "healthy": 0,
        "bug": 1}  # fmt: skip


@pytest.mark.parametrize(("name", "exit"), ENDS.items())
def test_every_end_leaves_every_form_and_all_say_the_same(made: dict[str, Made], name: str, exit: int) -> None:
    run = made[name]
    assert run.exit == exit
    assert sorted(p.name for p in run.folder.iterdir()) == sorted(form.file for form in FORMS)
    facts = [Facts(each) for each in run.outputs]
    assert max(f.data["exit"] for f in facts) == exit
    said = [f.verdict for f in facts]
    counts = [(f.counts["fail"], f.counts["skip"]) for f in facts]
    assert [(each["verdict"], each["counts"]["fail"], each["counts"]["skip"]) for each in run.outputs] == [
        (v, *c) for v, c in zip(said, counts, strict=True)
    ]
    assert [(*_junit(s),) for s in run.suites] == [(v, *c) for v, c in zip(said, counts, strict=True)]
    assert [i["exitCodeDescription"] for i in run.sarif["invocations"]] == said
    assert _sarif(run.sarif) == tuple(map(sum, zip(*counts, strict=True)))
    sections = run.text("report.md").split("\n### ")
    assert [_counted(s) for s in sections] == counts
    page = html.unescape(re.sub(r"<(?!p)[^>]*>", "", run.text("report.html").split("</head>")[1]))
    assert [_counted(s) for s in re.findall(r"<p>(?:\d+ (?:failed|skipped|passed|for information)(?:, )?)+", page)] == counts
    for verdict, section in zip(said, sections, strict=True):
        assert " ".join(verdict.split()) in " ".join(html.unescape(section.replace("**", "")).split())
        assert verdict in page
    assert (exit == 0) is (not any(c[0] for c in counts))


def _junit(suite: ElementTree.Element) -> Iterator[Any]:
    cases = suite.findall("testcase")
    n = {tag: sum(c.find(tag) is not None for c in cases) for tag in ("failure", "error", "skipped")}
    assert (len(cases), *n.values()) == tuple(int(suite.get(k, "")) for k in ("tests", "failures", "errors", "skipped"))
    yield suite.findtext("system-out")
    yield n["failure"] + n["error"]
    yield n["skipped"]


def _sarif(run: Any) -> tuple[int, int]:
    told = [n for i in run["invocations"] for n in i["toolExecutionNotifications"]]
    skips = sum(n["descriptor"]["id"] == "qconvert/skipped" for n in told)
    return sum(r["level"] == "error" for r in run["results"]) + sum(n["level"] == "error" for n in told), skips


def _counted(text: str) -> tuple[int, int]:
    first = next(line for line in text.splitlines() if re.search(r"^(<p>)?\d+ (failed|skipped|passed|for)", line))
    n = {word: int(count) for count, word in re.findall(r"(\d+) (failed|skipped)", first)}
    return n.get("failed", 0), n.get("skipped", 0)


# places -------------------------------------------------------------------------------------------


def _placed(run: Made) -> tuple[str, str, str, int | None]:
    (result,) = run.sarif["results"]
    (place,) = result["locations"]
    keys = [k["fullyQualifiedName"] for k in place.get("logicalLocations", [])]
    physical = place["physicalLocation"]
    return result["ruleId"], physical["artifactLocation"]["uri"], "".join(keys), physical.get("region", {}).get("startLine")


def test_sarif_points_at_the_line_of_a_recipe(made: dict[str, Made]) -> None:
    file = made["recipe"].folder.parents[1] / "recipe.yaml"
    assert _placed(made["recipe"]) == ("qconvert/usage-error", file.as_uri(), "", 2)


def test_sarif_points_at_the_key_of_an_adapter(made: dict[str, Made]) -> None:
    file = made["adapter"].folder.parents[1] / "stray" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    assert _placed(made["adapter"]) == ("qconvert/unused-adapter-key", file.as_uri(), key, None)


def test_sarif_points_at_the_tensor_that_the_doctor_names(made: dict[str, Made]) -> None:
    rule, uri, key, _ = _placed(made["doctor"])
    assert (rule, uri) == ("qconvert/not-finite", (made["doctor"].folder.parents[1] / "bad.gguf").as_uri())
    assert key.startswith("blk.2.")


def test_sarif_points_at_the_line_of_a_gate_and_else_at_the_output(made: dict[str, Made], tmp_path: Path) -> None:
    out = made["gate"].folder.parents[1] / "a.gguf"
    assert _placed(made["gate"]) == ("qconvert/gate", out.as_uri(), "", None)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {TINY}\nto: gguf:Q4_0\noutput: {tmp_path / 'a.gguf'}\ngates:\n  max-size: 1k\n")
    assert _placed(qconvert(tmp_path, "--recipe", recipe, "-q")) == ("qconvert/gate", recipe.as_uri(), "", 5)


def test_a_file_below_the_working_folder_is_named_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.yaml").write_text("model: m\nbits: four\n")
    uri = _placed(qconvert(tmp_path, "--recipe", "a b.yaml"))[1]
    assert uri == "a%20b.yaml"


def test_every_kind_of_error_and_finding_has_a_rule() -> None:
    def kinds(of: type[errors.QConvertError]) -> Iterator[str]:
        for each in of.__subclasses__():
            if each.__module__ == errors.__name__:
                yield each.__name__
                yield from kinds(each)

    failed = {"outputs": [], "verified": False, "exit": 1, "error": "x"}
    named = {Facts({**failed, "kind": kind}).cases[0].rule for kind in kinds(errors.QConvertError)}
    assert named | findings.RULES.keys() | {"check", "gate", "fallback", "skipped", "error"} == RULES.keys()
    files = [*(ROOT / "formats").glob("*_doctor.py"), ROOT / "qconvert" / "findings.py"]
    calls = [n for file in files for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    rules = [n.args[4] for n in calls if isinstance(n.func, ast.Name) and n.func.id == "Finding"]
    used = {r.value if isinstance(r, ast.Constant) else findings.UNREAD for r in rules}
    assert used == findings.RULES.keys() - {"finding"}  # that is for those of plugins


# names that others chose ---------------------------------------------------------------------------


@pytest.fixture
def evil() -> Facts:
    rows = [Row(EVIL, EVIL, float("nan"), 1.0, "fail", EVIL), Row("x", "y", None, None, "skip", EVIL)]
    bpw = {"codes": 4.0, "linear": 4.5, "file": 4.9}
    report = Report(
        [{"path": EVIL, "format": "gguf", "quant": EVIL, "nbytes": 3, "bpw": bpw}], rows, quant=EVIL, notes=[EVIL],
        fallbacks=[{"tensor": EVIL, "wanted": EVIL, "got": EVIL, "reason": EVIL}],
        provenance={"model": EVIL, "adapters": [{"name": EVIL}]},
    )  # fmt: skip
    return Facts({**report.data(), "error": EVIL, "hint": EVIL, "kind": "VerificationError"})


def test_names_are_not_xml(evil: Facts) -> None:
    (suite,) = ElementTree.fromstring(junit_text([evil]))
    assert {e.tag for e in suite.iter()} == {
        "testsuite", "properties", "property", "testcase", "failure", "skipped", "system-out", "system-err"
    }  # fmt: skip
    failure = suite.find("testcase/failure")
    assert failure is not None and "<script>" in failure.get("message", "") and "\\x1b[31m" in failure.get("message", "")


def test_names_are_no_markdown(evil: Facts) -> None:
    text = markdown_text([evil])
    tags = re.findall(r"<(?=[A-Za-z/!?])[^>]*>", text)
    assert {*tags} == {"<code>", "</code>", "<details>", "</details>", "<summary>", "</summary>"}
    assert not re.search(r"[`\x1b\x00\u202e]|\*y\*", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert text.count("alert(1)") > 10  # it is all there


def test_names_are_no_html(evil: Facts) -> None:
    page = html_page([evil])
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "alert(1)" in page


def test_names_in_sarif_and_json_are_text(evil: Facts) -> None:
    run = json.loads(sarif_text([evil]))["runs"][0]
    places = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]]
    assert all(re.fullmatch(r"[\w%/.:~()+-]+", uri) for uri in places), places
    assert not re.search(r"[\x00-\x1f\u202e]", "".join(r["message"]["text"] for r in run["results"]))
    strict = json.loads(json_page([evil]), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["outputs"][0]["path"] == EVIL and strict["checks"][0]["value"] is None


def test_a_name_that_is_no_utf8_is_written(tmp_path: Path) -> None:
    run = Run(["--reports", str(tmp_path)])
    run.fail(errors.InputError("no \udc80"))
    run.write()
    assert json.loads((tmp_path / "report.json").read_text())["error"] == "no \udc80"
    assert "no \\udc80" in (tmp_path / "report.md").read_text()


# the baseline -------------------------------------------------------------------------------------


def test_the_same_again_is_no_change(made: dict[str, Made]) -> None:
    (now,) = made["good"].outputs
    assert changes(Facts(now), Facts(now)) == []
    assert "Nothing has changed since the baseline" in markdown_text([Facts(now, Facts(now))])


def test_what_is_worse_comes_first_and_no_diff_is_longer_than_15_lines(made: dict[str, Made]) -> None:
    (then,) = made["good"].outputs
    worse = {**then["quality"], "mean_kl": 3 * then["quality"]["mean_kl"], "top1": 0.5, "perplexity_ratio": 0.5}
    checks = [{**c, "verdict": "skip", "reason": "not installed"} if "runtime" in c["what"] else c for c in then["checks"]]
    fallbacks = [{"tensor": f"blk.{i}", "wanted": "q4_0", "got": "f16", "reason": "rows"} for i in range(5)]
    now = {**then, "verified": False, "quality": worse, "checks": checks, "fallbacks": fallbacks, "runtime": None}
    found = changes(Facts(then), Facts({**now, "notes": []}))
    assert [c.what.partition(":")[0] for c in found] == [
        "verified -> not verified", "passed then, skipped now", "mean KL", "top-1 unchanged", "5 new fallbacks",
        "perplexity ratio", "runtime",
    ]  # fmt: skip
    assert [c.worse for c in found] == [True] * 5 + [False, None]
    assert found[2].what.endswith("(x 3)") and found[1].what.endswith("not installed")
    many = Facts({**now, "notes": [f"note {i}" for i in range(40)]}, Facts(then))
    assert len(changes(many.baseline or many, many)) == MOST
    part = next(p for p in markdown_text([many]).split("\n\n") if p.startswith("**Since the baseline"))
    assert len(part.splitlines()) == 15 and part.endswith(f"and {40 + 7 - MOST + 1} more")


def test_a_baseline_is_matched_by_format_and_type(made: dict[str, Made], tmp_path: Path) -> None:
    (data,) = made["good"].outputs
    then = [{**data, "quant": "Q8_0"}, {**data, "quality": {**data["quality"], "mean_kl": 9.0}}]
    baseline = tmp_path / "then.json"
    baseline.write_text(json.dumps(then))
    out = tmp_path / "a.gguf"
    now = qconvert(tmp_path, f"{TINY}+{LORA}", "--quant", "Q4_0", "-o", out, "--baseline", baseline, *SHORT)
    assert now.exit == 0
    part = next(p for p in now.text("report.md").split("\n\n") if p.startswith("**Since the baseline"))
    assert "\n- mean KL: 9 ->" in part and "Q8" not in part
    baseline.write_text(json.dumps([{**then[1], "quality": {"mean_kl": 9.0}}]))
    run = Run([])
    run.begin(Asked({}), baseline=baseline)
    assert run.released(now.data) is None  # what somebody altered is not compared


# where reports go ---------------------------------------------------------------------------------


def test_one_form_alone_and_one_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit = tmp_path / "j.xml"
    out = tmp_path / "a.gguf"
    args = ["qconvert", str(TINY), "-o", str(out), "--no-check", "-q", f"--junit={junit}", "--sarif", "-"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", args)
        main()
    assert json.loads(capsys.readouterr().out)["version"] == "2.1.0"
    assert ElementTree.parse(junit).getroot().tag == "testsuites"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "j.xml"]


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for flag, value in (("--reports", file / "x"), ("--junit", tmp_path / "none" / "j.xml")):
        run = Run([flag, str(value)])
        with pytest.raises(errors.UsageError, match=flag):
            run.begin(Asked({}))
