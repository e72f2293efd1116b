"""The report as SARIF 2.1.0: findings that have a place, for code scanning and editors.

Facts of all outputs -> results (failures, findings, fallbacks: each at a file, with a line or a key) and notifications of
the invocations (skips, and errors that lie in no file) -> JSON
Rule ids are qconvert/ and a key of RULES; they do not change. One run holds all outputs, since code scanning takes one.
Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qconvert import __version__, findings
from qconvert.facts import Case, Facts, printable

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES: Mapping[str, str] = {
    # errors, by their kind
    "usage-error": "A flag, an argument or a line of a recipe is wrong",
    "input-error": "A file of the model is missing, damaged or not what it says",
    "adapter-error": "An adapter does not fit the model or its own configuration",
    "unused-adapter-key": "A tensor of the adapter matches no weight of the model",
    "missing-adapter-key": "The adapter's configuration names a module that its file has nothing for",
    "resource-error": "Not enough disk or memory, or a file that cannot be written",
    "unsupported-error": "An architecture, type or combination that is not supported",
    "missing-dependency": "An optional package is not installed",
    "verification-error": "The file is not what it should be",
    "gate-error": "A quality gate failed",
    "not-verified-error": "The runtime could not prove the file, which was demanded",
    "interrupted": "The command was interrupted",
    "graph-error": "A pass left an invalid graph",
    "bug": "qconvert itself failed",
    "error": "The command failed",
    # what was judged
    "check": "A check of the file failed",
    "gate": "A limit on quality, size or regressions was not kept",
    "skipped": "A check did not run, so that nothing is proven by it",
    "fallback": "A weight did not get the type that was asked for",
    # what a file that somebody made has in it
    **findings.RULES,
}
LEVELS = {"error": "error", "warning": "warning", "note": "note"}


def sarif_text(outputs: Sequence[Facts]) -> str:
    results = [result for facts in outputs for result in results_of(facts)]
    driver = {
        "name": "qconvert", "semanticVersion": __version__,
        "rules": [{"id": f"qconvert/{rule}", "shortDescription": {"text": f"{said}."}} for rule, said in RULES.items()],
    }  # fmt: skip
    run = {"tool": {"driver": driver}, "invocations": [invocation(facts) for facts in outputs], "results": results}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"


def results_of(facts: Facts) -> Iterator[dict[str, Any]]:
    for case in facts.cases:
        if (level := level_of(case)) and (place := place_of(case, facts)):
            yield {**said(case.rule, level, text_of(case)), "locations": [place]}
    for f in facts.data.get("fallbacks") or ():
        what = f"{f['tensor']}: {f['got']} in place of {f['wanted']}: {f['reason']}"
        if facts.outputs:
            yield {**said("fallback", "note", what), "locations": [location({"file": facts.title, "key": f["tensor"]})]}


def invocation(facts: Facts) -> dict[str, Any]:
    """One output: its exit code, and what lies in no file."""
    told = [c for c in facts.cases if c.verdict == "skip" or (level_of(c) and not place_of(c, facts))]
    return {
        "executionSuccessful": facts.data["exit"] == 0, "exitCode": facts.data["exit"],
        "exitCodeDescription": printable(facts.verdict),
        "toolExecutionNotifications": [notification(c) for c in told],
    }  # fmt: skip


def notification(case: Case) -> dict[str, Any]:
    rule, level = ("skipped", "warning") if case.verdict == "skip" else (case.rule, "error")
    found = said(rule, level, text_of(case))
    return {"descriptor": {"id": found["ruleId"]}, "level": level, "message": found["message"]}


def said(rule: str, level: str, text: str) -> dict[str, Any]:
    known = rule if rule in RULES else "error"
    index = list(RULES).index(known)
    return {"ruleId": f"qconvert/{known}", "ruleIndex": index, "level": level, "message": {"text": printable(text)}}


def level_of(case: Case) -> str | None:
    """None where there is nothing to tell."""
    if case.verdict == "fail":
        return "error"
    return LEVELS.get(case.metric) if case.group == "findings" and case.verdict == "info" else None


def text_of(case: Case) -> str:
    parts = [case.name] if case.group != "run" else []
    if case.value or case.limit:
        parts.append(" ".join(part for part in (case.metric, case.value, case.limit and f"(limit {case.limit})") if part))
    return ": ".join([*parts, *([case.reason] if case.reason else [])])


def place_of(case: Case, facts: Facts) -> dict[str, Any] | None:
    """Its own; of a check or a gate the output that it is about."""
    if case.place:
        return location(case.place)
    return location({"file": facts.title}) if case.group in ("checks", "gates") and facts.outputs else None


def location(place: Mapping[str, Any]) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri(place["file"])}}
    if place.get("line"):
        physical["region"] = {"startLine": place["line"]}
    out: dict[str, Any] = {"physicalLocation": physical}
    if place.get("key"):
        out["logicalLocations"] = [{"fullyQualifiedName": printable(place["key"]), "kind": "member"}]
    return out


def uri(file: str) -> str:
    """Relative to the working folder where it lies below, as code scanning wants it."""
    path = Path(file).absolute()
    try:
        return quote(os.fsencode(path.relative_to(Path.cwd()).as_posix()))
    except ValueError:
        return path.as_uri()
