"""A model card (README.md) of an output: front matter that the Hub reads, and what was measured, for people.

Report (what was done and proven) + Facts (what it was made from, under which licence) -> text; nothing is read here.
Names come from inputs: YAML quotes them in the front matter, `plain` takes their markup away in the body.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import commonpath, relpath
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml  # type: ignore[import-untyped]

from qconvert.licenses import License
from qconvert.markdown_report import table
from qconvert.report import Report, nbytes_text
from qconvert.usage import Command, Usage

Relation = Literal["quantized", "finetune", "merge"]


class Origin(NamedTuple):
    """A model or an adapter that the output was made from. id: on the Hub, None where it is not known; never a path."""

    kind: Literal["model", "adapter"]
    name: str
    id: str | None
    revision: str | None
    weight: float
    license: License | None


class Facts(NamedTuple):
    """What a card says beside the report. task: the Hub's pipeline_tag. recipe: YAML that makes the output again."""

    title: str
    origins: tuple[Origin, ...]
    license: License | None
    quantized: bool
    swapped: bool
    task: str | None
    usage: Usage
    recipe: str
    version: str

    @property
    def relation(self) -> Relation:
        """To its base models. What only has another format is among a model's quantizations on the Hub, too."""
        n_adapters = sum(o.kind == "adapter" for o in self.origins)
        return "quantized" if self.quantized or self.swapped or not n_adapters else "finetune" if n_adapters == 1 else "merge"


def card(report: Report, facts: Facts) -> str:
    """The whole README.md."""
    made = f"{report.outputs[0]['format']}, {report.quant}"
    parts = [
        front_matter(report, facts),
        f"# {plain(facts.title)} ({made})\n\n{introduction(facts)} {proven(report)}",
        run_text(facts.usage.commands),
        size_text(report),
        quality_text(report.quality),
        proof_text(report),
        calibration_text(report.accounting.get("calibration") or {}),
        fallback_text(report),
        license_text(facts),
        origin_text(report, facts),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def front_matter(report: Report, facts: Facts) -> str:
    ids = list(dict.fromkeys(o.id for o in facts.origins if o.id))
    tags = dict.fromkeys((report.outputs[0]["format"], report.quant, "qconvert", *(["lora"] if len(facts.origins) > 1 else [])))
    calibrated = ["calibrated"] if report.accounting.get("calibration") else []
    keys: dict[str, object] = {"library_name": facts.usage.library}
    if facts.task:
        keys["pipeline_tag"] = facts.task
    if ids:
        keys |= {"base_model": ids, "base_model_relation": facts.relation}
    keys |= license_keys(facts)
    keys["tags"] = [*tags, *calibrated]
    lines = [yaml.safe_dump(keys, sort_keys=False, allow_unicode=False, width=120).rstrip("\n")]
    if any(o.id is None for o in facts.origins):
        lines.append("# base_model: not all that this was made from has a known id on the Hub; add what is missing")
    if facts.license is None:
        lines.append("# license: not known; see below")
    return "\n".join(["---", *lines, "---"])


def license_keys(facts: Facts) -> dict[str, object]:
    given = facts.license
    if given is None:
        return {}
    keys: dict[str, object] = {"license": given.id}
    if given.name:
        keys["license_name"] = given.name
    if link := link_of(facts):
        keys["license_link"] = link
    return keys


def link_of(facts: Facts) -> str | None:
    """Where the licence's text is. A file of a repository is linked to from outside; one that lies nowhere is left out."""
    given = facts.license
    if given is None or given.link is None or re.match(r"https?://", given.link):
        return given.link if given else None
    whose = next((o.id for o in facts.origins if o.id and o.license == given), None)
    return f"https://huggingface.co/{whose}/blob/main/{given.link}" if whose else None


def introduction(facts: Facts) -> str:
    models = [o for o in facts.origins if o.kind == "model"]
    adapters = [o for o in facts.origins if o.kind == "adapter"]
    text = f"Made from {' and '.join(map(shown, models))}"
    if adapters:
        how = "beside it to be swapped" if facts.swapped else "merged into it"
        text += f", with {' and '.join(map(shown, adapters))} {how}"
    return f"{text}, by qconvert {facts.version}."


def shown(origin: Origin) -> str:
    link = f"[{origin.id}](https://huggingface.co/{origin.id})" if origin.id else plain(origin.name)
    weight = "" if origin.weight == 1 else f" (weight {origin.weight:g})"
    return link + weight + (f" at `{origin.revision[:12]}`" if origin.revision else "")


def run_text(commands: Sequence[Command]) -> str:
    if not commands:
        return "## Run\n\nNo library loads this by a command of its own; the section on proof says what ran it."
    return "\n\n".join(["## Run", *(f"{c.runtime}:\n\n{fenced(c.language, c.code)}" for c in commands)])


def size_text(report: Report) -> str:
    bpw, ways = report.outputs[0]["bpw"], report.accounting.get("three_ways", {})
    names = {"codes": "codes alone", "linear": "linear weights with scales and zero points", "file": "whole output"}
    rows = [(names[way], f"{bpw[way]:.3f}", nbytes_text(ways[way]) if way in ways else "") for way in names]
    root = commonpath([Path(f["path"]).parent for f in report.outputs])
    files = [(f"`{code(Path(relpath(f['path'], root)).as_posix())}`", nbytes_text(f["nbytes"])) for f in report.outputs]
    shown = [f for f in files if f[0].endswith((".gguf`", ".onnx`", ".data`", ".safetensors`"))] or files
    return "\n\n".join(["## Size", table(("", "bits per weight", "bytes"), rows), table(("file", "bytes"), shown)])


def quality_text(q: Mapping[str, Any]) -> str:
    if "mean_kl" not in q:
        return f"## Quality\n\nNot measured: {plain(str(q.get('skipped', 'no check ran')))}."
    rows = [
        ("mean KL", f"{q['mean_kl']:.4g}"),
        ("99.9th percentile of KL", f"{q['p999_kl']:.4g}"),
        ("same most likely token", f"{100 * q['top1']:.2f} %"),
        ("perplexity, as a ratio", f"{q['perplexity_ratio']:.4f}"),
    ]
    if (tune := q.get("fine_tune")) and tune["share"] is not None:
        rows.append(("share of the fine-tune that is left", f"{100 * tune['share']:.1f} %"))
    text = f"Against the model as it was trained, in 32-bit floats, on {q['n_tokens']} tokens of {named(str(q['text']))}:"
    return f"## Quality\n\n{text}\n\n{table(('', ''), rows)}"


def proof_text(report: Report) -> str:
    n = {v: sum(r.verdict == v for r in report.checks) for v in ("pass", "skip")}
    rows = [(plain(r.what), plain(r.reason)) for r in report.checks if r.verdict == "skip"]
    text = f"{proven(report)} {n['pass']} checks passed, {n['skip']} were skipped."
    return "\n\n".join(filter(None, ["## Proof", text, table(("skipped", "why"), rows) if rows else ""]))


def proven(report: Report) -> str:
    if report.verified and report.runtime:
        return plain(f"Verified in {report.runtime['name']} {report.runtime['version']}.")
    skipped = (r.reason for r in report.checks if r.verdict == "skip")
    return plain(f"Not verified: {next(skipped, 'no runtime ran it')}.")


def calibration_text(coverage: Mapping[str, Any]) -> str:
    if not coverage:
        return ""
    return f"## Calibration\n\n{coverage.get('tokens')} tokens of {named(str(coverage.get('text')))}."


def fallback_text(report: Report) -> str:
    if not report.fallbacks:
        return ""
    rows = [(f"`{code(f['tensor'])}`", f["wanted"], f["got"], plain(f["reason"])) for f in report.fallbacks]
    head = f"## Other types\n\n{len(rows)} tensors did not get the type that {report.quant} wants:"
    return f"{head}\n\n{table(('tensor', 'wanted', 'got', 'why'), rows)}"


def license_text(facts: Facts) -> str:
    of = [f"{o.name}: {o.license.shown if o.license else 'not said'}" for o in facts.origins]
    total = facts.license.shown if facts.license else "Not known"
    return f"## Licence\n\n{plain(total)}. What this was made from says: {plain('; '.join(of))}."


def origin_text(report: Report, facts: Facts) -> str:
    return f"## How it was made\n\n{fenced('yaml', facts.recipe.rstrip())}\n\nPasses: `{code(report.pipeline)}`"


def named(text: str) -> str:
    """A text's name without the folders that it lay in."""
    return plain(text.replace("\\", "/").rstrip("/").rpartition("/")[2])


def plain(text: str) -> str:
    """Text of one line in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(visible(text).split()))


def code(text: str) -> str:
    """What stands between backquotes within a table."""
    return " ".join(visible(text).replace("`", "'").replace("|", "¦").split())


def visible(text: str) -> str:
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


def fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backquotes in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
