"""Every known abuse of an input ends in its named error, soon and in little memory; see tests/abuses."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from abuses import ABUSES, Abuse
from mutations import TARGETS, bounded

from qconvert import convert
from qconvert.errors import QConvertError
from qconvert.inspection import inspect_file

for kind in ("gguf", "adapter", "settings", "tokenizer", "onnx"):
    importlib.import_module(f"abuses.{kind}")


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported and compiled at first is not part of the bounds."""
    folder = tmp_path_factory.mktemp("warm")
    for name in ("adapter", "onnx"):
        TARGETS[name].make(folder / name)
        TARGETS[name].run(folder / name, folder / f"{name}.out")


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda a: a.name)
def test_abuse_ends_in_its_named_error(abuse: Abuse, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    source, out = str(abuse.make(tmp_path / "input")), tmp_path / "out" / "x"

    def run() -> None:
        convert(source, to=abuse.to, bits=8, check=abuse.to == "onnx", threads=1, output=out)

    found = bounded(run)
    assert found.kind == ("right" if abuse.harmless else "error"), found.what
    assert abuse.says in found.what
    assert abuse.harmless or not out.exists()


@pytest.mark.parametrize("abuse", [a for a in ABUSES if a.name.startswith(("gguf", "onnx"))], ids=lambda a: a.name)
def test_inspecting_an_abusive_file_is_an_error_or_a_list(abuse: Abuse, tmp_path: Path) -> None:
    source = str(abuse.make(tmp_path))

    def run() -> None:
        try:
            inspect_file(source)
        except QConvertError as e:
            assert e.exit_code in (2, 3, 5)

    assert bounded(run).kind == "right"
