"""README and docs/ as tests read them: blocks, commands with what they print, and the folder that commands run in.

    page -> blocks (a fence, or README's commands of 4 spaces) -> commands: words, lines that are shown, exit code

A block behind `<!-- not run: why -->` is not run. A fence with a title is a file of that name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qconvert.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
GOLDEN = {"model": "tiny", "adapter": "tiny-lora"}  # what the pages call them
SHELL = ("ls", "cat", "head", "cp", "mkdir", "sed", "python")  # programs besides qconvert that pages run
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")
MEANT = {"MODEL[+ADAPTER]": "model+adapter", "FILE": "tiny.gguf", "FOLDER": "llama-70b"}
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


def inline(page: Path) -> list[Command]:
    """Those in the running text, with something in the place of words in capitals."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = []
    for said in re.findall(r"`(qconvert [^`]+)`", text):
        for word, meant in MEANT.items():
            said = said.replace(word, meant)
        found.append(Command(said, (), 0, 0))
    return found


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
    for name in ("a", "b"):  # adapters are named by the folders that they lie in
        shutil.copytree(ROOT / "golden" / "tiny-lora", folder / name)
    (folder / "golden").symlink_to(ROOT / "golden")
    text = (ROOT / "qconvert" / "calibration.txt").read_text(encoding="utf-8")
    (folder / "my-text.txt").write_text(text[:12000], encoding="utf-8")
    (folder / "llama-70b").mkdir()
    (folder / "llama-70b" / "config.json").write_text(json.dumps(SHAPE_70B), encoding="utf-8")
    if importlib.util.find_spec("onnx"):
        (folder / "model.onnx").write_bytes(onnx_product())
    return folder


def onnx_product() -> bytes:
    """x f32[1,256] times a weight, as others write it."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256]) for name in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


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
