"""Fixtures for all tests, and tests/ir/*.ir collected as tests of passes.

An .ir file: `// run: pass{option=value},pass`, a graph, a line `// ----`, the graph that must come out.
`pytest --update` writes what came out below the bar: read the diff before you commit it.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
BAR = "// ----\n"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and as many workers as cores
os.environ.setdefault("QCONVERT_THREADS", "1")
os.environ.setdefault("QCONVERT_EVAL_TOKENS", "256")  # tests of quality ask for more

# peft imports these wherever they are installed, and with them torch's compiler: 8 CPU seconds in each worker
HIDDEN = ("hqq", "torchao")
for _name in HIDDEN:
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]  # so that it looks as if it were not installed


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """visible("hqq"): that library, to be found for the rest of a test; skips where it is not installed."""

    def found(name: str) -> ModuleType:
        if name in SEEN:
            monkeypatch.setitem(sys.modules, name, SEEN[name])
        else:
            monkeypatch.delitem(sys.modules, name, raising=False)
            SEEN[name] = pytest.importorskip(name)
            for full, module in list(sys.modules.items()):  # loaded before, when their parent was hidden again
                if full.startswith(f"{name}.") and full.count(".") == 1:
                    setattr(SEEN[name], full.partition(".")[2], module)
        return SEEN[name]

    return found


SEEN: dict[str, ModuleType] = {}  # imported once: their submodules stay


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models, adapters and tokenizers beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real inputs are not at {SHARED_DATA}")
    return SHARED_DATA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite the expected part of tests/ir/*.ir")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return IrFile.from_parent(parent, path=file_path) if file_path.suffix == ".ir" else None


class IrFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield IrTest.from_parent(self, name=self.path.stem)


class IrTest(pytest.Item):
    def runtest(self) -> None:
        from qconvert.pipeline import Pipeline, parse_passes
        from qconvert.text import format, parse

        source, _, want = self.path.read_text(encoding="utf-8").partition(BAR)
        first = source.splitlines()[0]
        if not first.startswith("// run: "):
            raise IrMismatch(f"the first line must be // run: PASS, not {first!r}")
        got = format(Pipeline(parse_passes(first.removeprefix("// run: "))).run(parse(source)))
        if got != want and self.config.getoption("--update"):
            self.path.write_text(source + BAR + got, encoding="utf-8")
        elif got != want:
            diff = difflib.unified_diff(want.splitlines(True), got.splitlines(True), "want", "got")
            raise IrMismatch("\n" + "".join(diff))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        from qconvert.errors import QConvertError

        if excinfo.errisinstance((IrMismatch, QConvertError)):
            return f"{self.path}: {excinfo.value}"
        return "".join(traceback.format_exception(excinfo.value))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"ir: {self.name}"


class IrMismatch(Exception):
    pass
