"""README and docs/ as tests read them: blocks, commands with what they print, and the folder that commands run in.

    page -> blocks (a fence, or README's commands of 4 spaces) -> commands: words, lines that are shown, exit code

A block behind `<!-- not run: why -->` is not run. A fence with a title is a file of that name.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qconvert.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
GOLDEN = {"model": "tiny", "adapter": "tiny-lora", "a": "tiny-lora", "b": "tiny-lora"}  # what the pages call them
SHELL = ("ls", "cat", "head", "cp", "mkdir", "sed", "python")  # programs besides qconvert that pages run
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")
SHAPE_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip


class Block(NamedTuple):
    """line: of its first one in the page. why: it is not run."""

    kind: str
    title: str | None
    text: str
    line: int
    why: str | None


class Command(NamedTuple):
    text: str
    shown: tuple[str, ...]  # a line `...` stands for any; one that ends so is a beginning
    code: int
    line: int


def blocks(page: Path) -> Iterator[Block]:
    lines, at, why = page.read_text(encoding="utf-8").splitlines(), 0, None
    while at < len(lines):
        line = lines[at]
        if found := NOT_RUN.search(line):
            why = found[1]
        elif fence := re.match(r'( *)```(\w*)(?: title="(.+?)")?', line):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            body = [each.removeprefix(fence[1]) for each in lines[at + 1 : end]]
            yield Block(fence[2], fence[3], "\n".join(body) + "\n", at + 2, why)
            at, why = end, None
        elif page.name == "README.md" and line.startswith("    qconvert "):
            yield Block("console", None, f"$ {line.strip()}\n", at + 1, why)
            why = None
        elif line.strip():
            why = None
        at += 1


def commands(block: Block) -> list[Command]:
    """Lines behind `$ `, joined where they end in a backslash; `$ echo $?` says how the one before it ended."""
    found: list[Command] = []
    lines = iter(enumerate(block.text.splitlines(), block.line))
    for number, line in lines:
        if line.startswith("$ "):
            text = line[2:]
            while text.endswith("\\"):
                text = text[:-1] + next(lines)[1].strip()
            if text == "echo $?":
                found[-1] = found[-1]._replace(code=int(next(lines)[1]))
            else:
                found.append(Command(text, (), 0, number))
        elif found and line.strip() and line.strip() != "...":
            found[-1] = found[-1]._replace(shown=(*found[-1].shown, line))
    return found


def workshop(folder: Path) -> Path:
    """A folder with what the pages name: model, adapter, my-text.txt ..."""
    for name, made in GOLDEN.items():
        (folder / name).symlink_to(ROOT / "golden" / made)
    (folder / "golden").symlink_to(ROOT / "golden")
    text = (ROOT / "qconvert" / "calibration.txt").read_text(encoding="utf-8")
    (folder / "my-text.txt").write_text(text[:12000], encoding="utf-8")
    (folder / "llama-70b").mkdir()
    (folder / "llama-70b" / "config.json").write_text(json.dumps(SHAPE_70B), encoding="utf-8")
    return folder


def ran(command: Command, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code, and standard output and error together. qconvert runs in this process: torch is loaded once."""
    words = shlex.split(command.text)
    if words[0] != "qconvert":
        assert words[0] in SHELL, f"{command.text!r}: mark the block with <!-- not run: why -->"
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(words, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    monkeypatch.setattr(sys, "argv", words)
    logging.getLogger("qconvert").handlers.clear()  # they write to the stream of the command before
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
    return code, out.getvalue()


def unlike(command: Command, output: str) -> list[str]:
    """Lines that are shown and were not printed; numbers may be others."""
    printed = [plain(line) for line in output.splitlines()]
    return [
        line for line in command.shown
        if not any(p.startswith(plain(line[:-3])) if line.endswith("...") else p == plain(line) for p in printed)
    ]  # fmt: skip


def plain(line: str) -> str:
    return " ".join(NUMBER.sub("#", line).split())
