"""The report as Markdown, for the summary of a job or a comment: what failed first, what passed folded away.

Facts of each output -> heading and verdict, files, gates, checks, quality, fallbacks
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qconvert.changes import changes
from qconvert.facts import SAID, Case, Facts, counted, printable
from qconvert.report import nbytes_text

# what begins a structure of Markdown or HTML, or makes an address a link; _ where it does not stand within a word
STRUCTURE = re.compile(
    r"\\(?![A-Za-z0-9 ])|[`*\[\]&|~#@$]|<(?=[A-Za-z/!?])|:(?=//)|(?<=www)\.|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
)
GROUPS = (("gates", "Gates"), ("findings", "Findings"), ("checks", "Checks"))


def markdown_text(outputs: Sequence[Facts]) -> str:
    """One section for each output."""
    return "\n\n".join("\n\n".join(output_parts(facts)) for facts in outputs) + "\n"


def output_parts(facts: Facts) -> Iterator[str]:
    yield f"### {text(facts.title)}"
    yield f"**{facts.outcome}**{text(facts.verdict.removeprefix(facts.outcome))}"
    yield counted(facts.cases) + (f"; exit code {facts.data['exit']}" if facts.data["exit"] else "")
    if facts.data.get("hint"):
        yield f"Hint: {text(facts.data['hint'])}"
    if facts.outputs and facts.source:
        yield f"From {code(facts.source)} to {text(facts.data['quant'])}."
    if facts.outputs:
        yield files(facts)
    for group, name in GROUPS:
        if cases := [c for c in facts.cases if c.group == group]:
            yield case_part(name, cases)
    yield from quality(facts)
    yield from baseline(facts)
    yield from fallbacks(facts)
    if facts.data.get("notes"):
        yield "\n".join(f"- {text(note)}" for note in facts.data["notes"])


def files(facts: Facts) -> str:
    """Bits per weight are of all files together."""
    rows = [(code(o["path"]), text(o["quant"]), *(f"{o['bpw'][way]:.3f}" for way in ("codes", "linear", "file")),
             nbytes_text(o["nbytes"])) for o in facts.outputs]  # fmt: skip
    return table(("file", "type", "bits per weight: codes", "with metadata", "whole file", "size"), rows)


def case_part(name: str, cases: Sequence[Case]) -> str:
    """Counts, then what failed and what was skipped; the rest is folded away."""
    first = [c for v in ("fail", "skip") for c in cases if c.verdict == v]
    rest = [c for c in cases if c not in first]
    parts = [f"**{name}**: {counted(cases)}"]
    if first:
        parts.append(case_table(first))
    if rest:
        parts.append(folded("the others" if first else f"all {len(rest)}", case_table(rest)))
    return "\n\n".join(parts)


def case_table(cases: Sequence[Case]) -> str:
    rows = [(f"**{SAID[c.verdict]}**" if c.verdict in ("fail", "skip") else SAID[c.verdict].removeprefix("for "), code(c.name),
             *map(text, (c.metric, c.value, c.limit, c.reason))) for c in cases]  # fmt: skip
    return table(("", "what", "metric", "value", "limit", "why"), rows)


def quality(facts: Facts) -> Iterator[str]:
    cases = [c for c in facts.cases if c.group == "quality"]
    if skipped := [c for c in cases if c.verdict == "skip"]:
        yield f"**Quality** was not measured: {text(skipped[0].reason)}"
    elif cases:
        head, row = [c.name for c in cases], [c.value for c in cases]
        if (tune := facts.data["quality"].get("fine_tune")) and tune["share"] is not None:
            head.append("of the fine-tune survives")
            row.append(f"{100 * tune['share']:.1f} %")
        yield f"**Quality** on {text(cases[0].metric)}, against the model as trained\n\n{table(head, [row])}"


def baseline(facts: Facts) -> Iterator[str]:
    """15 lines at most."""
    if facts.baseline is not None:
        found = changes(facts.baseline, facts)
        lines = [f"- {'**worse** ' if c.worse else ''}{text(c.what)}" for c in found]
        yield "\n".join(["**Since the baseline**:" if lines else "Nothing has changed since the baseline.", *lines])


def fallbacks(facts: Facts) -> Iterator[str]:
    found = facts.data.get("fallbacks")
    if found:
        rows = [(code(f["tensor"]), text(f["wanted"]), text(f["got"]), text(f["reason"])) for f in found]
        yield folded(f"{len(found)} weights of another type than asked for", table(("weight", "wanted", "got", "why"), rows))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{inner}\n\n</details>"


def text(said: str) -> str:
    """As it is, on one line: nothing in it is Markdown or HTML."""
    return STRUCTURE.sub(lambda m: f"&#{ord(m[0])};", printable(str(said)))


def code(name: str) -> str:
    return f"<code>{text(name)}</code>"
