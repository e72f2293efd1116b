"""action.yml and the GitLab template: their very scripts are run, on golden/tiny, as a runner would run them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from qconvert.request import GATES

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
HEADER, JOB = yaml.safe_load_all((ROOT / "templates" / "qconvert.yml").read_text("utf-8"))
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]  # as GitHub starts `shell: bash`
PROVEN = "verified" if importlib.util.find_spec("xllamacpp") else "unverified"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@dataclass(frozen=True)
class Ended:
    """exit: of the first step that failed, else 0. said: what all steps printed."""

    exit: int
    outputs: Mapping[str, str]
    summary: str
    said: str


@dataclass(frozen=True)
class Runner:
    """A machine: its folder, in which steps run, and one of programs that come first."""

    work: Path
    temp: Path
    programs: Path

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def called(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program that only writes them down."""
        path = self.temp / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def records(self, name: str, status: int = 0) -> None:
        write = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + chr(10))"
        self.program(name, f'"{sys.executable}" -c "{write}" "{self.temp}/{name}.calls" "$@"; exit {status}')

    def env(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("QC_", "GITHUB_", "RUNNER_"))}
        return {**inherited, "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def bash(self, script: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        file = self.temp / "script.sh"
        file.write_text(script, encoding="utf-8")
        return subprocess.run([*BASH, str(file)], cwd=self.work, env=env, capture_output=True, text=True)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """pip installs nothing; qconvert is this one; the network is not there."""
    made = Runner(*(tmp_path / name for name in ("work", "temp", "programs")))
    for folder in (made.work, made.temp, made.programs):
        folder.mkdir()
    made.program("qconvert", f'exec "{sys.executable}" -m qconvert "$@"')
    made.records("pip")
    made.records("hf")
    python = f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "{made.programs}/python3" "$3/bin/python"; exit; fi\n'
    python += f'if [ "$1 $2" = "-m pip" ]; then shift 2; exec "{made.programs}/pip" "$@"; fi\nexec "{sys.executable}" "$@"'
    made.program("python3", python)
    return made


def github(runner: Runner, **inputs: str) -> Ended:
    """Run the action as GitHub does: expressions are replaced, then each script runs in a shell of its own."""
    unknown = inputs.keys() - {name.replace("-", "_") for name in ACTION["inputs"]}
    assert not unknown
    values = {name: inputs.get(name.replace("-", "_"), of.get("default", "")) for name, of in ACTION["inputs"].items()}
    context = {**{f"inputs.{k}": v for k, v in values.items()}, "runner.temp": str(runner.temp), "runner.os": "Linux"}
    files = {name: runner.temp / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
    places = {"RUNNER_TEMP": runner.temp, "GITHUB_ACTION_PATH": ROOT, **files}
    env = {**runner.env(), **{k: str(v) for k, v in places.items()}}
    said, status = "", 0
    for step in ACTION["runs"]["steps"]:
        if "uses" in step or status:
            continue
        for file in files.values():
            file.touch()
        more = {k: replaced(v, context) for k, v in step.get("env", {}).items()}
        done = runner.bash(replaced(step["run"], context), {**env, **more})
        said, status = said + done.stdout + done.stderr, done.returncode
        outputs = read_outputs(files["GITHUB_OUTPUT"].read_text("utf-8"))
        context |= {f"steps.{step.get('id')}.outputs.{k}": v for k, v in outputs.items()}
    given = {name: replaced(of["value"], context) for name, of in ACTION["outputs"].items()}
    return Ended(status, given, files["GITHUB_STEP_SUMMARY"].read_text("utf-8"), said)


def replaced(text: str, context: Mapping[str, str]) -> str:
    return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda m: context.get(m[1], ""), text)


def read_outputs(text: str) -> dict[str, str]:
    """name=value, or name<<END, lines, END."""
    found, lines = dict[str, str](), iter(text.splitlines())
    for line in lines:
        if m := re.fullmatch(r"([\w-]+)<<(.+)", line):
            rows = []
            while (row := next(lines)) != m[2]:
                rows.append(row)
            found[m[1]] = "\n".join(rows)
        else:
            name, _, found[name] = line.partition("=")
    return found


def gitlab(runner: Runner, **inputs: str) -> Ended:
    """Run the template's job as GitLab does: inputs are put into the file, and all lines are one script."""
    assert not inputs.keys() - {name.replace("-", "_") for name in HEADER["spec"]["inputs"]}
    job = job_of(inputs)
    env = {**runner.env(), "CI_PROJECT_DIR": str(runner.work)}
    for name, value in job["variables"].items():
        if name.startswith("QC_") or name == "PIP_CACHE_DIR":  # caches of the machine are those of the tests
            env[name] = value["value"] if isinstance(value, dict) else value.replace("$CI_PROJECT_DIR", str(runner.work))
    done = runner.bash("\n".join([*job["before_script"], *job["script"]]), env)
    return Ended(done.returncode, {}, "", done.stdout + done.stderr)


def job_of(inputs: Mapping[str, str]) -> Any:
    values = {name: inputs.get(name.replace("-", "_"), of.get("default", "")) for name, of in HEADER["spec"]["inputs"].items()}

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {put(k): put(v) for k, v in value.items()}
        if isinstance(value, list):
            return [put(v) for v in value]
        return re.sub(r"\$\[\[ inputs\.([\w-]+) \]\]", lambda m: values[m[1]], value) if isinstance(value, str) else value

    (job,) = put(JOB).values()
    return job


HOSTS = pytest.mark.parametrize("host", [github, gitlab])


# what is in the files -----------------------------------------------------------------------------


def test_they_are_what_their_hosts_publish_schemas_for() -> None:
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas")
    jsonschema = pytest.importorskip("jsonschema")
    checks = [
        ("vendor.github-actions", ACTION),
        ("vendor.gitlab-ci", HEADER),
        ("vendor.gitlab-ci", {"convert": job_of({"model": "m"})}),
    ]
    for name, data in checks:
        validator = jsonschema.Draft7Validator(schemas.get_builtin_schema(name))
        assert [f"{e.json_path}: {e.message[:300]}" for e in validator.iter_errors(data)] == []


def test_inputs_are_nowhere_in_a_script() -> None:
    scripts = [step["run"] for step in ACTION["runs"]["steps"] if "run" in step]
    (job,) = JOB.values()
    scripts += [*job["before_script"], *job["script"]]
    assert len(scripts) == 6 and not [s for s in scripts if "${{" in s or "$[[" in s]
    assert all(v["expand"] is False for k, v in job["variables"].items() if k.startswith("QC_"))


def test_every_gate_can_be_asked_for() -> None:
    known = {name.replace("_", "-") for name in GATES} - {"gate", "baseline", "baseline-tolerance"}
    for text in (ROOT / "action.yml", ROOT / "templates" / "qconvert.yml"):
        (line,) = [x for x in text.read_text("utf-8").splitlines() if x.strip().startswith("require-verified |")]
        assert {x.strip().removesuffix("=*") for x in line.strip().rstrip(")").split("|")} == known


# what they do -------------------------------------------------------------------------------------


@HOSTS
def test_a_good_export_goes_through(host: Any, runner: Runner) -> None:
    gate = "max-kl=0.2  min-top1=0.5\nmax-size=2M max-new-fallbacks=0"
    ended = host(runner, model=str(TINY), adapter=str(LORA), to="gguf:Q4_0", gate=gate, output="my model.gguf",
                 args="--eval-tokens\n256\n--threads=1")  # fmt: skip
    assert ended.exit == 0, ended.said
    report = json.loads((runner.work / "qconvert-reports" / "report.json").read_text())
    assert [g["verdict"] for g in report["gates"]] == ["pass"] * 4 and report["provenance"]["adapters"]
    assert (runner.work / "my model.gguf").stat().st_size == report["outputs"][0]["nbytes"]
    assert "my model.gguf" in (runner.work / "qconvert-reports" / "SHA256SUMS").read_text()
    if host is github:
        assert ended.outputs == {
            "artifact": "my model.gguf", "reports": "qconvert-reports", "verdict": PROVEN, "exit-code": "0"
        }  # fmt: skip
        assert "my model.gguf" in ended.summary
    assert len(runner.called("pip")) == 1 and not runner.called("hf")


@HOSTS
def test_a_wrong_adapter_fails_with_3(host: Any, runner: Runner) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    wrong = runner.work / "wrong"
    shutil.copytree(LORA, wrong)
    tensors = safetensors.load_file(wrong / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query"): value for name, value in tensors.items()}
    safetensors.save_file(renamed, wrong / "adapter_model.safetensors")
    ended = host(runner, model=str(TINY), adapter="wrong", to="gguf:Q4_0", output="a.gguf")
    assert ended.exit == 3 and "query" in ended.said and not (runner.work / "a.gguf").exists()
    assert json.loads((runner.work / "qconvert-reports" / "report.json").read_text())["exit"] == 3
    if host is github:
        assert (ended.outputs["verdict"], ended.outputs["exit-code"], ended.outputs["artifact"]) == ("failed", "3", "")
        assert "query" in ended.summary


@HOSTS
def test_too_few_bits_fail_their_gate_with_7(host: Any, runner: Runner) -> None:
    args = "--eval-tokens=256\n--threads=1"
    ended = host(runner, model=f"{TINY}+{LORA}", to="gguf:Q2_K", gate="max-kl=0.05", output="a.gguf", args=args)
    assert ended.exit == 7 and "--max-kl 0.05: mean_kl is" in ended.said and not (runner.work / "a.gguf").exists()
    assert json.loads((runner.work / "qconvert-reports" / "report.json").read_text())["exit"] == 7
    if host is github:
        assert (ended.outputs["verdict"], ended.outputs["exit-code"]) == ("failed", "7")
        assert "--max-kl" in ended.summary


HOSTILE = [
    "a b", "'", '"', "$(touch hit)", "`touch hit`", "; touch hit #", "| touch hit", "$HOME", "*", "\\", "--help", "-v",
    "a\nverdict=verified", "${{ github.token }}", "a'\"$(touch hit)\" b",
]  # fmt: skip


@HOSTS
@pytest.mark.parametrize("value", HOSTILE)
def test_an_input_is_an_argument_and_never_a_script(host: Any, value: str, runner: Runner) -> None:
    runner.records("qconvert", 5)
    (runner.work / "some file").touch()
    inputs = dict.fromkeys(("model", "to", "baseline", "output", "args", "adapter", "reports"), value)
    ended = host(runner, **inputs)
    assert ended.exit == 5, ended.said
    (called,) = runner.called("qconvert")
    lines = value.split("\n")
    reports = [f"--reports={value}", f"--manifest={value}/manifest.json"]
    flags = [*reports, f"--to={value}", f"--baseline={value}", f"--output={value}"]
    assert called == ["convert", *flags, *(f"--adapter={x}" for x in lines), *lines, "--", value]
    assert [p.name for p in runner.work.iterdir()] == ["some file"]
    if host is github:
        assert ended.outputs == {"artifact": "", "reports": value, "verdict": "failed", "exit-code": "5"}


@HOSTS
@pytest.mark.parametrize("gate", ["max-kl", "output=/etc/passwd", "strict", "$(touch hit)", "--max-kl=1", "max-kl =1", "*"])
def test_a_gate_that_is_none_is_refused(host: Any, gate: str, runner: Runner) -> None:
    runner.records("qconvert")
    ended = host(runner, model="m", to="gguf", gate=f"max-kl=1 {gate}")
    assert ended.exit == 2 and "is no limit" in ended.said and not runner.called("qconvert")
    assert list(runner.work.iterdir()) == []


@HOSTS
def test_gates_and_recipe_become_flags(host: Any, runner: Runner) -> None:
    runner.records("qconvert")
    (runner.work / "r").mkdir()
    (runner.work / "r" / "report.json").write_text('[{"verified": true}, {"verified": false}]')
    ended = host(runner, recipe="my recipe.yaml", gate=" default\tmax-size=800M\nrequire-verified ", output="", reports="r")
    assert ended.exit == 0, ended.said
    flags = ["--reports=r", "--recipe=my recipe.yaml", "--gate", "--max-size=800M", "--require-verified"]
    assert runner.called("qconvert") == [["convert", *flags]]
    if host is github:
        assert ended.outputs["verdict"] == "unverified"  # one of two


@HOSTS
def test_what_is_on_the_hub_is_fetched_at_its_revision(host: Any, runner: Runner) -> None:
    runner.records("qconvert", 5)
    (runner.work / "org").mkdir()
    (runner.work / "org" / "here").mkdir()
    host(runner, model="org/model@5a8abab+org/lora:0.5+org/here", adapter="../up/x\n./a/b\norg/two@v1:2\n-x/y")
    assert runner.called("hf") == [
        ["download", "org/model", "--revision", "5a8abab"],
        ["download", "org/lora", "--revision", "main"],
        ["download", "org/two", "--revision", "v1"],
    ]
    runner.records("hf", 1)
    assert host(runner, model="org/gone").exit == 3 and len(runner.called("qconvert")) == 1


def test_the_action_installs_what_was_proven_together(runner: Runner) -> None:
    runner.records("qconvert", 5)
    github(runner, model="m", extras="llama,onnx")
    (called,) = runner.called("pip")
    assert called[-3:] == ["--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[llama,onnx]"]
