"""passes/ and formats/ lie at the root and are qconvert.passes and qconvert.formats, in a checkout and in a wheel."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "formats")
FILES = sorted(p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_is_a_module_of_a_package_that_the_wheel_ships(path: Path) -> None:
    parts = ("qconvert", *path.with_suffix("").parts)
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert module.__file__ is not None and Path(module.__file__).samefile(ROOT / path)
    assert ".".join(parts[:-1]) in PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_folder_is_shipped_and_every_shipped_package_exists() -> None:
    tops = [ROOT / "qconvert", *(ROOT / f for f in FOLDERS)]
    folders = [p.parent.relative_to(ROOT).parts for top in tops for p in top.rglob("__init__.py")]
    names = {".".join(f if f[0] == "qconvert" else ("qconvert", *f)) for f in folders}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_in_the_package_points_to_the_folder_beside_it(folder: str) -> None:
    link = ROOT / "qconvert" / folder
    if not link.is_symlink():
        pytest.skip("links are for type checkers; this checkout has none")
    assert os.readlink(link) == os.path.join("..", folder)  # noqa: PTH115, PTH118  # the text of the link itself


def test_no_file_imports_a_folder_without_its_package() -> None:
    found = []
    for top in ("qconvert", *FOLDERS, "tests", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{path.relative_to(ROOT)}: {n}" for n in names if n.partition(".")[0] in FOLDERS]
    assert found == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_without_the_package_is_refused_so_that_no_module_exists_twice(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"import qconvert.{folder}, not {folder}" in done.stderr


def test_package_is_found_from_a_folder_that_has_its_own_formats(tmp_path: Path) -> None:
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import qconvert.formats, qconvert.passes; print(qconvert.formats.__file__)"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    assert Path(out.strip()).samefile(ROOT / "formats" / "__init__.py")
