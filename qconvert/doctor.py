"""Look over a file or folder that somebody made, without the model it came from: `qconvert verify FILE`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from qconvert import registry
from qconvert.errors import UnsupportedError
from qconvert.facts import NOT_COMPARED
from qconvert.findings import Finding
from qconvert.model_cache import find_model
from qconvert.target import Examiner, reader_of

RANK = {"error": 0, "warning": 1, "note": 2}
FAILED = 6


class Diagnosis(NamedTuple):
    """exit: 6 where a finding is an error, else 0."""

    path: str
    findings: tuple[Finding, ...]

    @property
    def exit(self) -> int:
        return FAILED if any(f.severity == "error" for f in self.findings) else 0

    def data(self) -> dict[str, Any]:
        found = [{**f._asdict(), "file": self.file(f)} for f in self.findings]
        return {"path": self.path, "findings": found, "exit": self.exit}

    def file(self, finding: Finding) -> str:
        """The file of a folder that a finding's place is, or begins with (config.json: KEY); else the whole."""
        name = finding.place.partition(":")[0]
        beside = Path(self.path) / name if name else Path(self.path)
        return str(beside if beside.is_file() else self.path)


def diagnose(path: Path, values: bool = True) -> Diagnosis:
    """Everything that is found; without `values`, by headers alone.

    InputError where the file cannot be read at all; UnsupportedError for a format that nobody here can look over.
    """
    if not path.exists():
        path = find_model(str(path))
    known = reader_of(path)
    if known is None or not isinstance(known[0], Examiner):
        raise UnsupportedError(f"{path}: no file that can be looked over", hint=f"of {', '.join(registry.entries('formats'))}")
    level = (log := logging.getLogger("qconvert")).level
    log.setLevel(logging.WARNING)  # what builds a graph to look at it has nothing to say
    try:
        found = known[0].diagnose(known[1], values)
    finally:
        log.setLevel(level)
    return Diagnosis(str(path), tuple(sorted(found, key=lambda f: RANK[f.severity])))


def diagnosis_text(found: Diagnosis, certified: bool = False) -> str:
    """certified: a certificate tells of its answers."""
    counts = [sum(f.severity == s for f in found.findings) for s in RANK]
    lines = [line for f in found.findings for line in (f"{f.severity:8}{f.place}: {f.what}", f"        {f.do}")]
    said = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in zip(RANK, counts, strict=True) if n) or "nothing found"
    return "\n".join([*lines, f"{found.path}: {said}" + ("" if certified else f"; {NOT_COMPARED}")])

