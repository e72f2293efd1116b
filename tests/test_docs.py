"""The README is true: its command gives the checks that it shows, its Python runs, its options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from qconvert.cli import cli
from qconvert.formats.llama_cpp import LlamaCpp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_gives_the_checks_that_the_readme_shows(tmp_path: Path) -> None:
    command = re.search(r"^\$ qconvert (.*) -o tiny\.gguf$", README, re.MULTILINE)
    assert command
    args = [sys.executable, "-m", "qconvert", *command[1].split(), "-o", str(tmp_path / "tiny.gguf")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^  (?:pass|info)  (.+?)  ", README, re.MULTILINE)
    wanted = shown if LlamaCpp().missing() is None else shown[:6]
    assert [s for s in wanted if s.strip() not in done.stderr] == []
    for line in re.findall(r"^(?:size|bits|inputs) .*$", README, re.MULTILINE):
        assert line in done.stderr


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "golden").symlink_to(ROOT / "golden")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "'codes': 4.18" in done.stdout


def test_every_option_that_the_readme_names_exists() -> None:
    help_texts = "".join(CliRunner().invoke(cli, [c, "--help"]).output for c in ("convert", "inspect", "verify"))
    named = set(re.findall(r"--[a-z][a-z-]+", README.partition("## How it is built")[0]))
    assert {o for o in named if o not in help_texts} == set()
