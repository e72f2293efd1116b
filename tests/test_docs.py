"""What is written is true: commands and Python blocks of README and docs/ run and print what is shown; links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from documents import DOCS, PAGES, ROOT, Block, blocks, commands, inline, ran, unlike, workshop
from plugin_installed import PLUGIN, install, refreshed

from qconvert.cli import cli
from qconvert.formats.llama_cpp import LlamaCpp

README = PAGES["README.md"].read_text(encoding="utf-8")
WRITTEN = [name for name in PAGES if not name.startswith("docs/reference/")]
LEFT = [(name, b) for name in WRITTEN for b in blocks(PAGES[name]) if b.why]
NEEDS = {
    "docs/run/onnx-runtime.md": "onnxruntime onnxruntime_genai", "docs/run/browser.md": "onnxruntime", "docs/run/mlx.md": "mlx",
    **dict.fromkeys(("docs/run/vllm.md", "docs/run/transformers.md", "docs/extending.md"), "compressed_tensors transformers"),
}  # fmt: skip
OF_OTHERS = {"--quantization", "--model", "--port", "--no-deps", "--strict"}  # flags of other programs, in the text


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


@pytest.mark.parametrize("name", [n for n in WRITTEN if any(not b.why for b in blocks(PAGES[n]))])
def test_what_a_page_shows_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder, so that a block can go on from the one before it."""
    if why := LlamaCpp().missing():
        pytest.skip(f"the page shows what llama.cpp says: {why}")
    for package in NEEDS.get(name, "").split():
        pytest.importorskip(package)
    page = PAGES[name]
    monkeypatch.chdir(workshop(tmp_path))
    (site := tmp_path / "site").mkdir()
    if name == "docs/extending.md":
        install(site, files_of(page))
    with refreshed(site):
        for block in blocks(page):
            if not block.why:
                run_block(page, block, monkeypatch)
        for command in inline(page):
            code, output = ran(command, monkeypatch)
            assert code == 0, f"{name}: {command.text}\n{output}"


def run_block(page: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.title is not None:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.kind == "python" and page.name != "README.md":  # README's has a test of its own
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), {"__name__": "__main__"})
    elif block.kind == "console" or "$ qconvert" in block.text:
        for command in commands(block):
            code, output = ran(command, monkeypatch)
            where = f"{page}:{command.line}: {command.text}"
            assert code == command.code, f"{where}\nends with {code}\n{output}"
            assert not unlike(command, output), f"{where}\nshows what was not printed: {unlike(command, output)}\n{output}"


@pytest.mark.parametrize(("name", "block"), LEFT, ids=[f"{name}:{b.line}" for name, b in LEFT])
def test_what_is_not_run_here(name: str, block: Block) -> None:
    assert not re.search(r"^\$ qconvert", block.text, re.MULTILINE), "qconvert's own commands run"
    pytest.skip(f"not run: {block.why}")


def files_of(page: Path) -> dict[str, str]:
    return {b.title: b.text for b in blocks(page) if b.title is not None}


def test_the_files_of_the_tutorial_are_those_of_the_plugin() -> None:
    shown = files_of(DOCS / "extending.md")
    files = (p.relative_to(PLUGIN) for p in PLUGIN.rglob("*") if p.suffix in (".py", ".toml"))
    assert shown.keys() == {str(p) for p in files if p.parts[0] != "build"}  # which pip leaves there
    for name, text in shown.items():
        assert (PLUGIN / name).read_text(encoding="utf-8") == text, name
        assert name == "pyproject.toml" or len([line for line in text.splitlines() if line.strip()]) < 30, name


def test_the_reference_is_what_the_code_says() -> None:
    code = "import sys, json; sys.path.insert(0, 'tools'); import reference; print(json.dumps(reference.pages()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = json.loads(done.stdout.splitlines()[-1])
    stale = [n for n, text in pages.items() if (DOCS / "reference" / f"{n}.md").read_text(encoding="utf-8") != text]
    assert stale == [], "run `python tools/reference.py` and commit what it writes"


def test_every_option_that_is_named_exists() -> None:
    help_texts = "".join(CliRunner().invoke(cli, [c, "--help"]).output for c in ("convert", "inspect", "verify"))
    for name in WRITTEN:
        text = README.partition("## How it is built")[0] if name == "README.md" else PAGES[name].read_text(encoding="utf-8")
        for block in blocks(PAGES[name]):
            text = text.replace(block.text, "") if block.why else text
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OF_OTHERS
        assert {o for o in named if o not in help_texts} == set(), name


def slug(heading: str) -> str:
    """As Python-Markdown's toc makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower())


def test_links_between_pages_lead_somewhere() -> None:
    texts = {p.resolve(): p.read_text("utf-8") for p in PAGES.values()}
    anchors = {p: {slug(h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)} for p, text in texts.items()}
    broken = []
    for name, page in PAGES.items():
        for to in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = to.partition("#")
            target = (page.parent / path).resolve() if path else page.resolve()
            if not to.startswith("http") and (not target.exists() or (anchor and anchor not in anchors.get(target, ()))):
                broken.append(f"{name}: {to}")
    assert broken == []


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert menu == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install .[docs])")
    args = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_extra_of_the_docs_is_what_mkdocs_yml_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(e.startswith("mkdocs-material") for e in extras["docs"])
