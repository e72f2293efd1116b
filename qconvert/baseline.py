"""The report of the last release, as limits for the next: what it was measured on must be what this is measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.errors import InputError, UsageError, misshapen
from qconvert.evaluation import SHIPPED
from qconvert.report import SCHEMA, Report, Row, number

GROWTH = 0.01  # of a file: names and notes in its header differ, types do not


@dataclass(frozen=True)
class Baseline:
    """data: a report of SCHEMA. tolerance: by how much what is lost may grow, relative."""

    path: Path
    data: Mapping[str, Any]
    tolerance: float

    @property
    def fallbacks(self) -> set[tuple[str, str]]:
        return {(f["tensor"], f["got"]) for f in self.data["fallbacks"]}

    def limits(self) -> Iterator[tuple[str, float, str]]:
        """(metric, limit, how it comes about)."""
        quality, more = self.data["quality"], 1 + self.tolerance
        if "mean_kl" in quality:
            allowed = f"+ {100 * self.tolerance:g} %"
            kl, n = quality["mean_kl"], quality["n_tokens"]
            for name in ("mean_kl", "p999_kl"):
                yield name, quality[name] * more, f"it was {number(quality[name])}, {allowed}"
            changed = (1 - quality["top1"]) * more + 1 / n
            yield "top1", 1 - changed, f"it was {number(quality['top1'])}, {allowed} of the changed, and one token"
            ratio, noise = quality["perplexity_ratio"], 2 * (2 * kl / n) ** 0.5  # log p - log q of n tokens: variance 2 KL each
            why = f"it was {number(ratio)}, {allowed} of its distance to 1, and two standard errors"
            yield "perplexity_ratio", ratio + self.tolerance * abs(ratio - 1) + noise, why
        total, bpw = self.data["accounting"]["size"]["total"], self.data["outputs"][0]["bpw"]["file"]
        yield "nbytes", total * (1 + GROWTH), f"it was {total}, + {100 * GROWTH:g} %"
        yield "bpw", bpw * (1 + GROWTH), f"it was {number(bpw)}, + {100 * GROWTH:g} %"
        yield "new_fallbacks", 0.0, ""
        yield "lost_checks", 0.0, ""
        if self.data["verified"]:
            yield "lost_verification", 0.0, "it was verified"

    def lost(self, checks: Sequence[Row]) -> list[str]:
        """Checks that passed then and do not now."""
        passing = {r.what for r in checks if r.verdict == "pass"}
        then = dict.fromkeys(c["what"] for c in self.data["checks"] if c["verdict"] == "pass")
        why = {r.what: f"{r.verdict}: {r.reason}" for r in checks if r.verdict != "pass"}
        return [f"{what} ({why.get(what, 'did not run')})" for what in then if what not in passing]

    def refuse_another_text(self, quality: Mapping[str, Any]) -> None:
        before = self.data["quality"]
        if "mean_kl" not in quality or "mean_kl" not in before:
            return
        then, now = (f"{q['n_tokens']} tokens of {q['text']}, {q['sequence']} at a time" for q in (before, quality))
        if before["digest"] != quality["digest"]:
            same = " (the same words, other tokens)" if then == now else ""
            raise refused(self.path, f"measured on {then}; this on {now}{same}", "--eval and --eval-tokens of the release")


def read_baseline(path: Path, tolerance: float, report: Report, text: Path | None) -> Baseline:
    """The one report in a file that is of the same model and type as `report`; InputError, with why, where there is none."""
    if not 0 <= tolerance < 1:
        raise UsageError(f"--baseline-tolerance {tolerance:g}: a share, from 0 to 1", hint="--baseline-tolerance 0.05")
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise UsageError(f"--baseline {path}: {e.strerror}") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"--baseline {path}: not JSON: {e}") from e
    with misshapen(f"--baseline {path}"):
        reports = found if isinstance(found, list) else [found]
        for each in reports:
            if each.get("schema") != SCHEMA:
                raise refused(path, f"its schema is {each.get('schema')!r}, not {SCHEMA!r}", "write it again with this version")
        wanted = type_of(report.outputs, report.quant)
        of_type = [each for each in reports if type_of(each["outputs"], each["quant"]) == wanted]
        if len(of_type) != 1:
            there = ", ".join(type_of(each["outputs"], each["quant"]) for each in reports)
            raise refused(path, f"{'no' if not of_type else 'more than one'} report of {wanted}; there is {there or 'nothing'}")
        baseline = Baseline(path, of_type[0], tolerance)
        refuse_another_model(path, baseline.data["provenance"], report.provenance)
        refuse_unmeasured(path, baseline.data, text)
        tuple(baseline.limits()), baseline.fallbacks, baseline.lost(())  # all that is read of it
        return baseline


def type_of(outputs: Sequence[Mapping[str, Any]], quant: str) -> str:
    """Format and type: gguf:Q4_K_M."""
    return f"{outputs[0]['format'] if outputs else 'no output'}:{quant}"


def refuse_another_model(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A model of the Hub is known by its name; a folder, which each training makes anew, by what kind of model is in it."""
    for what, key in (("a model of family", "family"), ("a model of so many weights:", "n_weights")):
        if then[key] != now[key]:
            raise refused(path, f"another model: {what} {then[key]}, this is {now[key]}")
    names = [str(p["model"]).partition("@")[0] for p in (then, now) if p["revision"] and not Path(p["model"]).is_absolute()]
    if len(set(names)) > 1:
        raise refused(path, f"another model: {names[0]}, this is {names[1]}")


def refuse_unmeasured(path: Path, data: Mapping[str, Any], text: Path | None) -> None:
    if data["exit"]:
        raise refused(path, f"the report of a run that failed with exit {data['exit']}")
    quality = data["quality"]
    if "mean_kl" not in quality and (not quality or str(quality["skipped"]).startswith("--")):
        raise refused(path, f"nothing was measured for it: {quality.get('skipped', '--dry-run')}")
    if "text" in quality and (quality["text"] == SHIPPED) != (text is None):
        raise refused(path, f"measured on {quality['text']}; this on {text or SHIPPED}", "--eval of the release")


def refused(path: Path, why: str, hint: str = "the report of a release of the same model and type") -> InputError:
    return InputError(f"--baseline {path}: {why}", hint=hint)
