"""Reports: the same facts in every form, of runs that ended well and of those that did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qconvert.cli import main
from qconvert.facts import Facts

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
SHORT = ("--eval-tokens", 256, "-q")


class Made(NamedTuple):
    """What a command left: its exit code and its folder of reports."""

    exit: int
    folder: Path

    @property
    def data(self) -> Any:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def facts(self) -> list[Facts]:
        data = self.data
        return [Facts(each) for each in (data if isinstance(data, list) else [data])]


def qconvert(folder: Path, *args: object) -> Made:
    reports = folder / "reports" / "of-this-run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["qconvert", *map(str, args), "--reports", str(reports)])
        main()
        raise SystemExit(0)
    return Made(int(ended.value.code or 0), reports)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("good")
    return qconvert(folder, f"{TINY}+{LORA}", "--quant", "Q4_0", "-o", folder / "a.gguf", *SHORT)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("gated")
    return qconvert(folder, f"{TINY}+{LORA}", "--quant", "Q4_0", "-o", folder / "a.gguf", "--max-kl", 1e-5, *SHORT)


def test_a_run_that_ends_well_leaves_every_form(good: Made) -> None:
    assert good.exit == 0 == good.data["exit"]
    assert sorted(p.name for p in good.folder.iterdir()) == ["report.html", "report.json", "report.md"]
    assert "**failed**" not in (good.folder / "report.md").read_text()
