"""Where the reports of a command go, and what they say: also of a command that failed.

arguments -> Run: the data of each output, as far as it came -> FORMS -> files
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from qconvert.errors import MISSHAPEN, Place, QConvertError, ResourceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from qconvert.facts import Facts

Data = Mapping[str, Any]
DIRECTORY = "--reports"


class Form(NamedTuple):
    """flag: for this form alone; file: its name in --reports DIR; render: of all outputs' facts, found when it is asked for."""

    flag: str
    file: str
    module: str
    render: str


FORMS = (
    Form("--json", "report.json", "qconvert.reports", "json_page"),
    Form("--html", "report.html", "qconvert.html_report", "html_page"),
    Form("--markdown", "report.md", "qconvert.markdown_report", "markdown_text"),
    Form("--junit", "junit.xml", "qconvert.junit_report", "junit_text"),
    Form("--sarif", "report.sarif", "qconvert.sarif_report", "sarif_text"),
)


class Asked(NamedTuple):
    """An output before it is begun. known: of its report. place: where a recipe says it."""

    known: Data
    place: Place | None = None


class Run:
    """One command. args: as they were given, so that reports are written also where no command got to read them."""

    def __init__(self, args: Sequence[str]) -> None:
        self.found: list[Data] = []
        self.asked: list[Asked] = [Asked({})]
        self.targets = [(form, path) for form in FORMS if (path := value_of(form.flag, args))]
        self.baseline: Path | None = None  # the report of the last release
        self.folder = value_of(DIRECTORY, args)
        if self.folder:
            self.targets += [(form, str(Path(self.folder) / form.file)) for form in FORMS]

    @property
    def prints(self) -> bool:
        """Whether standard output belongs to a report."""
        return any(path == "-" for _, path in self.targets)

    def begin(self, *asked: Asked, baseline: Path | None = None) -> None:
        """UsageError where a report could not be written at the end."""
        self.asked, self.baseline = list(asked), baseline
        if self.folder:
            make(self.folder)
        for form, path in self.targets:
            if path != "-" and not Path(path).parent.is_dir():
                raise UsageError(f"{form.flag} {path}: there is no folder {Path(path).parent}")

    def manifests(self) -> list[Path | None]:
        """Of each output, in --reports DIR; one of an earlier run does not stay beside the reports of this."""
        from qconvert.manifest import apart

        paths = apart([Path(self.folder) / "manifest.json" if self.folder else None] * len(self.asked))
        for path in paths:
            if path is not None:
                path.unlink(missing_ok=True)
        return paths

    def add(self, data: Data, error: QConvertError | None = None) -> None:
        """What an output came to."""
        self.found.append(failure(error, data) if error else data)

    def fail(self, error: QConvertError) -> None:
        """An error that stopped all, where nothing is known of the outputs yet: it is of one, and the others were not made."""
        if self.found:
            return
        failed = error.output or 0
        skipped = {"exit": error.exit_code, "skipped": f"not made, since output {failed + 1} failed"}
        for i, (known, place) in enumerate(self.asked):
            if i != failed:
                self.found.append({**nothing(), **known, **skipped})
                continue
            if isinstance(error, UsageError | UnsupportedError):  # of what was asked, so where that was asked
                error.place = error.place or place
            self.found.append(failure(error, {**nothing(), **known}))

    def write(self) -> None:
        """Every form that was asked for. ResourceError names the files that could not be written; the others are."""
        if not self.targets:
            return
        from qconvert.facts import Facts

        if self.folder:
            make(self.folder)
        facts = [Facts(data, self.released(data)) for data in self.found]
        made: dict[Form, str] = {}
        failed = []
        for form, path in self.targets:
            if form not in made:
                made[form] = getattr(import_module(form.module), form.render)(facts)
            try:
                put(made[form], path)
            except OSError as e:
                failed.append(f"{path} ({e.strerror})")
        if failed:
            raise ResourceError(f"no report was written to {', '.join(failed)}")

    def released(self, data: Data) -> Facts | None:
        """What the baseline says of the same output; None where the gates did not take it, or it is not built so."""
        from qconvert.changes import changes
        from qconvert.facts import Facts

        taken = any(gate["origin"] == "baseline" for gate in data.get("gates", ()))
        with suppress(OSError, *MISSHAPEN):
            found = json.loads(self.baseline.read_text("utf-8")) if self.baseline and taken else []
            for then in map(Facts, found if isinstance(found, list) else [found]):
                if then.kind == Facts(data).kind:
                    changes(then, Facts(data))
                    return then
        return None


def nothing() -> Data:
    """What a report says where nothing is known."""
    from qconvert.report import Report

    return Report([]).data()


def failure(error: QConvertError, known: Data) -> Data:
    """What a report says of an output that ended so."""
    found: Any = error.report
    place = error.place and error.place._asdict()
    what = {"exit": error.exit_code, "error": error.message, "hint": error.hint, "kind": type(error).__name__, "place": place}
    return {**(known if found is None else found.data()), **what}


def json_page(facts: Sequence[Facts]) -> str:
    """One object; of several outputs a list."""
    data = [{**f.data, "verdict": f.verdict, "counts": f.counts} for f in facts]
    return json_text(data[0] if len(data) == 1 else data)


def json_text(data: object) -> str:
    from qconvert.report import finite

    return json.dumps(finite(data), indent=2, ensure_ascii=False, default=str) + "\n"


def make(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{DIRECTORY} {folder}: {e.strerror}") from e


def put(text: str, path: str) -> None:
    if path == "-":
        click.echo(text, nl=False)
    else:  # a name that is no UTF-8 has lone surrogates, which JSON writes the same way
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """What a flag was given, also where no command got to read it; the last one counts."""
    return next(reversed([*_values(flag, args)]), None)


def _values(flag: str, args: Sequence[str]) -> Iterator[str]:
    for i, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            yield arg.partition("=")[2]
        elif arg == flag and i + 1 < len(args):
            yield args[i + 1]
