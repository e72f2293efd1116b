"""The command line: what is printed, where, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


def qconvert(*args: object, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, "-m", "qconvert", *map(str, args)], capture_output=True, text=True, env=env)


def test_converting_prints_the_path_alone_on_stdout_and_the_report_on_stderr(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    done = qconvert(f"{TINY}+{LORA}", "--to", "gguf", "--bits", 4, "-o", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "type    Q4_K_M" in done.stderr
    assert "verified in llama.cpp" in done.stderr or "not verified: llama.cpp is not installed" in done.stderr


def test_json_on_stdout_is_all_of_stdout(tmp_path: Path) -> None:
    done = qconvert("convert", TINY, "--quant", "q8_0", "-o", tmp_path / "a.gguf", "--no-check", "--json", "-", "-q")
    data = json.loads(done.stdout)
    assert data["verified"] is False and data["exit"] == 0 and data["quant"] == "Q8_0"
    assert done.stderr == ""


def test_a_dry_run_prints_the_plan_and_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from qconvert import convert; "
        f"r = convert({str(TINY)!r}, bits=4, dry_run=True, output={str(tmp_path / 'a')!r}); "
        "print(r.plan.nbytes, sorted({'torch', 'transformers', 'numba', 'onnx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    plan = qconvert(TINY, "--bits", 4, "--dry-run")
    assert "blk.0.attn_q.weight" in plan.stdout and "q4_k" in plan.stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--bogus"], 2, "No such option"),
        ([], 0, "Usage"),
        (["convert"], 2, "Missing argument 'MODEL'"),
        ([TINY, "--bits", "7"], 2, "--bits 7"),
        ([TINY, "--quant", "Q4_K_Z"], 2, "did you mean"),
        ([TINY, "--to", "ggml"], 5, "no format is called 'ggml'"),
        ([TINY, "--to", "gguf:Q4_0", "--quant", "Q8_0"], 2, "disagree"),
        ([TINY, "--split-max-size", "huge"], 2, "cannot read 'huge'"),
        (["no/such"], 3, "hf download no/such"),
        ([f"{TINY}+nowhere"], 3, "nowhere"),
        (["inspect", "nowhere.gguf"], 3, "nowhere.gguf"),
        (["verify", "nowhere.gguf", "--against", TINY], 3, "is not a file"),
    ],
)
def test_mistakes_have_a_message_a_code_and_no_traceback(args: list[object], code: int, said: str) -> None:
    done = qconvert(*args)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_in_the_json_too(tmp_path: Path) -> None:
    done = qconvert("no/such", "--json", tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == data["exit"] == 3 and "no/such" in data["error"] and data["outputs"] == []


def test_a_bug_says_so_and_shows_its_traceback_on_request(tmp_path: Path) -> None:
    script = "import qconvert.listing as l; l.lines = lambda _: 1 / 0; from qconvert.cli import main; main()"
    for flag, traceback in ((), False), (("-v",), True):
        args = [sys.executable, "-c", script, "--list", "passes", *flag]
        done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is traceback and ("a bug in qconvert" in done.stderr) is not traceback


def test_after_ctrl_c_the_same_command_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import qconvert.weights as w; true = w.Weights.encoded\n"
        "def slow(*a):\n    time.sleep(0.2)\n    print(a[1], flush=True)\n    return true(*a)\n"
        "w.Weights.encoded = slow; from qconvert.cli import main; sys.argv = ['qconvert', *sys.argv[2:]]; main()"
    )
    out = tmp_path / "a.gguf"
    args = [sys.executable, "-c", script, str(ROOT), str(TINY), "--bits", "4", "-o", str(out), "--no-check", "--threads", "1"]
    running = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    made = [running.stdout.readline() for _ in range(5)]
    running.send_signal(signal.SIGINT)
    rest, said = running.communicate(timeout=60)
    made += rest.splitlines(keepends=True)
    assert running.returncode == 130, said
    assert "interrupted" in said and "the same command goes on" in said and "Traceback" not in said
    assert not out.exists()
    again = subprocess.run(args, capture_output=True, text=True, check=True)
    assert not {*made[:4]} & {*again.stdout.splitlines(keepends=True)[:-1]}
    once = tmp_path / "once.gguf"
    qconvert(TINY, "--bits", 4, "-o", once, "--no-check")
    assert out.read_bytes() == once.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "once.gguf"]


def test_ctrl_c_while_torch_is_imported_keeps_what_is_written(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "class Strike:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch._C': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Strike())\n"
        "from qconvert.cli import main; sys.argv = ['qconvert', *sys.argv[2:]]; main()"
    )
    args = [sys.executable, "-c", script, str(ROOT), str(TINY), "--bits", "4", "-o", str(tmp_path / "a.gguf")]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.gguf.part", ".a.gguf.part.journal"]


def test_a_failed_check_exits_6_and_the_report_says_so(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qconvert.formats.gguf_check as g\n"
        "from qconvert.report import judged\n"
        "g.bytes_row = lambda *a: judged('file bytes', 'of 1 tensors differ', 1.0, 0.0, 'blk.0.x')\n"
        "from qconvert.cli import main; sys.argv = ['qconvert', *sys.argv[2:]]; main()"
    )
    report = tmp_path / "r.json"
    args = [sys.executable, "-c", script, str(ROOT), str(TINY), "--bits", "4", "-o", str(tmp_path / "a"), "--json", str(report)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 6 and "verification failed at file bytes" in done.stderr
    assert json.loads(report.read_text())["exit"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json"]


def test_verify_passes_the_right_model_and_fails_another(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    assert qconvert(f"{TINY}+{LORA}", "--bits", 8, "-o", out, "--no-check", "-q").returncode == 0
    right = qconvert("verify", out, "--against", f"{TINY}+{LORA}")
    assert right.returncode == 0, right.stderr
    wrong = qconvert("verify", out, "--against", TINY)
    assert wrong.returncode == 6 and "FAILED  weights" in wrong.stdout


def test_inspect_tells_types_and_true_bits(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    qconvert(TINY, "--bits", 8, "-o", out, "--no-check", "-q")
    said = qconvert("inspect", out).stdout
    assert "general.architecture = 'llama'" in said and "8.000 codes, 8.500 with metadata" in said
    assert "bf16" in qconvert("inspect", TINY).stdout
    assert "%logits : f32[B,T," in qconvert("inspect", f"{TINY}+{LORA}", "--ir").stdout
    assert json.loads(qconvert("inspect", out, "--json", "-").stdout)["format"] == "gguf"


@pytest.mark.parametrize("group", ["passes", "formats", "families", "types", "runtimes"])
def test_lists_name_what_there_is(group: str) -> None:
    done = qconvert("--list", group)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 1


def test_help_answers_without_numpy() -> None:
    code = "import sys; import qconvert.cli; print(sorted({'numpy', 'torch', 'numba'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_recipe_makes_several_outputs_and_flags_win(tmp_path: Path) -> None:
    outputs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    recipe = tmp_path / "recipe.yaml"
    pairs = zip(("Q8_0", "Q4_0"), outputs, strict=True)
    told = [f"  - {{format: gguf, quant: {quant}, output: {path}}}" for quant, path in pairs]
    recipe.write_text("\n".join([f"model: {TINY}", "threads: 1", "no-such: 1", "to:", *told]))
    wrong = qconvert("--recipe", recipe)
    assert wrong.returncode == 2 and f"{recipe}:3: no option is called 'no-such'" in wrong.stderr
    recipe.write_text(recipe.read_text().replace("no-such: 1", "split-max-size: 2G"))
    saved = tmp_path / "saved.yaml"
    done = qconvert("--recipe", recipe, "--no-check", "--split-max-size", "3G", "--save-config", saved, "--json", "-", "-q")
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [Path(r["outputs"][0]["path"]) for r in reports] == outputs and all(path.exists() for path in outputs)
    assert "split-max-size: 3G" in saved.read_text() and "check: false" in saved.read_text()
    again = qconvert("--recipe", saved, "--dry-run")
    assert again.returncode == 0 and again.stdout.count("Q8_0") and again.stdout.count("Q4_0")
