"""The report as JUnit XML: a suite for each output, a case for each check, gate, measure of quality and finding.

Facts of each output -> elements -> text. A skip is <skipped>; the error that ended a run is <error>; what is only measured
is a case that cannot fail, with its value in the suite's properties.
Source: JUnit.xsd of windyroad/JUnit-Schema, which is stricter than what Jenkins' xunit plugin and GitLab read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from time import time
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qconvert import __version__
from qconvert.facts import Case, Facts, printable


def junit_text(outputs: Sequence[Facts]) -> str:
    root = Element("testsuites")
    for i, facts in enumerate(outputs):
        root.append(suite(facts, i))
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def suite(facts: Facts, i: int) -> Element:
    name = PurePath(facts.title).name if facts.outputs or "path" in facts.data else facts.title
    counts = Counter("errors" if c.group == "run" and c.verdict == "fail" else c.verdict for c in facts.cases)
    out = Element("testsuite", {
        "name": token(name), "package": "qconvert", "id": str(i), "timestamp": timestamp(), "hostname": "localhost",
        "tests": str(len(facts.cases)), "failures": str(counts["fail"]), "errors": str(counts["errors"]),
        "skipped": str(counts["skip"]), "time": "0",
    })  # fmt: skip
    properties = SubElement(out, "properties")
    for key, value in (*about(facts), *((f"{c.name}: {c.metric}", c.value) for c in facts.cases if c.value)):
        SubElement(properties, "property", {"name": token(key), "value": printable(value)})
    seen: Counter[str] = Counter()
    for case in facts.cases:
        out.append(element(case, name, seen))
    SubElement(out, "system-out").text = printable(facts.verdict)
    SubElement(out, "system-err").text = "\n".join(printable(facts.data[k]) for k in ("error", "hint") if facts.data.get(k))
    return out


def about(facts: Facts) -> Iterator[tuple[str, str]]:
    yield from (("qconvert", __version__), ("verdict", facts.verdict), ("exit", str(facts.data["exit"])))
    yield from ((key, value) for key, value in (("from", facts.source), ("type", facts.data.get("quant", ""))) if value)


def element(case: Case, suite: str, seen: Counter[str]) -> Element:
    """Names are unique in their suite: readers of results tell cases apart by them."""
    name = token(f"{case.name}: {case.metric}" if case.metric else case.name)
    seen[name] += 1
    unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
    out = Element("testcase", {"name": unique, "classname": token(f"{suite}.{case.group}"), "time": "0"})
    reason, measured = printable(case.reason), " ".join(printable(v) for v in (case.value, case.limit) if v)
    if case.verdict == "skip":
        SubElement(out, "skipped", {"message": reason})
    elif case.verdict == "fail":
        tag = "error" if case.group == "run" else "failure"
        said = "; ".join(part for part in (measured, reason) if part)
        SubElement(out, tag, {"type": case.rule, "message": said}).text = said
    return out


def timestamp() -> str:
    """UTC, to the second, without a zone, as the schema wants it."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time())
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def token(text: str) -> str:
    """xs:token: no line break, no space twice or at an end; never empty."""
    return " ".join(printable(text).split()) or "-"
