"""What one run came to, in the terms that every form of its report is made of.

Report.data(), Diagnosis.data() or what is known of an error -> Facts: cases that were judged, one verdict
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from qconvert.errors import Place
from qconvert.findings import UNREAD
from qconvert.report import number

Group = Literal["checks", "gates", "quality", "findings", "run"]
Verdict = Literal["fail", "skip", "info", "pass"]
Outcome = Literal["FAILED", "verified", "not verified"]
# key of report.quality, what it is called, whether it is a share
MEASURES = (
    ("mean_kl", "mean KL", False), ("p99_kl", "p99 KL", False), ("p999_kl", "p99.9 KL", False),
    ("top1", "top-1 unchanged", True), ("perplexity_ratio", "perplexity ratio", False),
)  # fmt: skip
NOT_COMPARED = "its answers were not compared with a model (--against MODEL does)"
SAID: Mapping[Verdict, str] = {"fail": "failed", "skip": "skipped", "pass": "passed", "info": "for information"}
SEVERITY: Mapping[str, Verdict] = {"error": "fail", "warning": "info", "note": "info"}


class Case(NamedTuple):
    """One thing that was judged. value and limit are text, "" where there is none; `rule` names what a fail breaks."""

    group: Group
    name: str
    metric: str
    value: str
    limit: str
    verdict: Verdict
    reason: str
    rule: str
    place: Mapping[str, Any] | None = None  # file, line, key


@dataclass(frozen=True)
class Facts:
    """data: what --json writes of this run. baseline: the same of the last release, where there is one."""

    data: Mapping[str, Any]
    baseline: Facts | None = None

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Gates, then checks, quality and findings; where an error says more than these, it is one too."""
        found = [*_gates(self.data), *_checks(self.data), *_quality(self.data), *_findings(self.data)]
        return (*found, *_run(self.data, any(c.verdict == "fail" for c in found)))

    def of(self, verdict: Verdict) -> list[Case]:
        return [c for c in self.cases if c.verdict == verdict]

    @property
    def counts(self) -> dict[Verdict, int]:
        return {verdict: len(self.of(verdict)) for verdict in get_args(Verdict)}

    @property
    def outputs(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.data.get("outputs", ())
        return found

    @property
    def title(self) -> str:
        """The first file that was made or looked at, else what was to be made of what."""
        to = f" to {self.data['quant']}" if self.data.get("quant") else ""
        named = self.outputs[0]["path"] if self.outputs else self.data.get("path") or f"{self.source}{to}"
        return str(named or "qconvert")

    @property
    def kind(self) -> tuple[str, str]:
        """Format and type: what an output has in common with that of another release."""
        return (self.outputs[0]["format"] if self.outputs else "", self.data.get("quant", ""))

    @property
    def source(self) -> str:
        """Model and adapters."""
        of = self.data.get("provenance", {})
        return " + ".join([str(of.get("model", "")), *(str(a["name"]) for a in of.get("adapters", ()))])

    @property
    def outcome(self) -> Outcome:
        return "FAILED" if self.of("fail") else "verified" if self.data.get("verified") else "not verified"

    @property
    def verdict(self) -> str:
        """The outcome, and of what, in one line."""
        skipped, outcome = self.of("skip"), self.outcome
        if outcome == "FAILED":
            names = dict.fromkeys(c.reason if c.group == "run" else c.name for c in self.of("fail"))
            return f"{outcome}  {', '.join(names)}"
        if outcome == "verified":
            also = f"; not checked: {', '.join(c.name for c in skipped)}" if skipped else ""
            return f"{outcome} in {self.data['runtime']['name']} {self.data['runtime']['version']}{also}"
        if cut := self.data.get("accounting", {}).get("rehearsal"):
            return f"{outcome}: a rehearsal, of {cut['layers']} of {cut['of']} layers"
        return f"{outcome}: {skipped[0].reason if skipped else 'no check ran'}"


def _gates(data: Mapping[str, Any]) -> Iterator[Case]:
    for gate in data.get("gates", ()):
        value, limit = _shown(gate["value"]), f"{gate['bound']} {_shown(gate['limit'])}"
        why = "; ".join(part for part in (gate["reason"], f"limit from {gate['origin']} {gate['place']}".strip()) if part)
        said_at = Place.parse(gate["place"])  # a baseline is a file without a line: none
        place = said_at and said_at._asdict()
        yield Case("gates", gate["flag"], gate["metric"], value, limit, gate["verdict"], why, "gate", place)


def _checks(data: Mapping[str, Any]) -> Iterator[Case]:
    for row in data.get("checks", ()):
        most = "" if row["limit"] is None else f"<= {number(row['limit'])}"
        yield Case("checks", row["what"], row["metric"], _shown(row["value"]), most, row["verdict"], row["reason"], "check")


def _shown(value: float | str | None) -> str:
    return value if isinstance(value, str) else "" if value is None else number(value)


def _quality(data: Mapping[str, Any]) -> Iterator[Case]:
    """Measures on the evaluation text: nothing limits them but the gates."""
    q = data.get("quality") or {}
    if "skipped" in q:
        yield Case("quality", "quality", "", "", "", "skip", q["skipped"], "quality")
    for key, name, share in MEASURES:
        if key in q:
            value = f"{100 * q[key]:.2f} %" if share else _shown(q[key])
            yield Case("quality", name, f"{q['n_tokens']} tokens of {q['text']}", value, "", "info", "", "quality")


def _findings(data: Mapping[str, Any]) -> Iterator[Case]:
    if "findings" not in data:
        return
    for f in data["findings"]:
        verdict = "skip" if f["rule"] == UNREAD else SEVERITY[f["severity"]]
        why = "; ".join(part for part in (f["what"], f["do"]) if part)
        place = {"file": f["file"], "key": f["place"]}
        yield Case("findings", f["place"], f["severity"], "", "", verdict, why, f["rule"], place)
    if not any(f["severity"] == "error" for f in data["findings"]):
        yield Case("findings", data["path"], "errors", "0", "", "pass", "", "")
    if "checks" not in data:  # of a certificate
        yield Case("findings", "answers", "", "", "", "skip", NOT_COMPARED, "")


def _run(data: Mapping[str, Any], told: bool) -> Iterator[Case]:
    """The run itself: not begun, or ended by an error of which no check or gate tells."""
    if why := data.get("skipped"):
        yield Case("run", "run", "", "", "", "skip", why, "")
    elif not told and (error := data.get("error")):
        kind = data.get("kind", "error")
        rule = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind).lower()
        yield Case("run", "run", kind, "", "", "fail", error, rule, data.get("place"))


def printable(text: str) -> str:
    """Control and other invisible characters as their escapes: names come from files that others made."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(cases: Sequence[Case]) -> str:
    return ", ".join(f"{n} {said}" for v, said in SAID.items() if (n := sum(c.verdict == v for c in cases))) or "nothing ran"
