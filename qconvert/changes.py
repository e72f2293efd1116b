"""What is other than in the report of the last release, what matters first; what is the same is not told.

Facts then, facts now -> lines of text, those that are worse before those that are better or only other
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qconvert.facts import MEASURES, Facts
from qconvert.report import nbytes_text, number, some

MOST = 14  # lines, so that with a heading there are 15
SAID = {"pass": "passed", "fail": "failed", "skip": "skipped", "info": "measured", "absent": "not there"}
RISING = {"top1"}  # better where it is more


class Change(NamedTuple):
    """worse: True, False, or None where it is neither."""

    worse: bool | None
    what: str


def changes(then: Facts, now: Facts) -> list[Change]:
    """At most MOST; of the others their number is the last line."""
    found = [*_verdict(then, now), *_cases(then, now), *_quality(then.data, now.data), *_bytes(then.data, now.data),
             *_fallbacks(then.data, now.data), *_inputs(then.data, now.data)]  # fmt: skip
    found.sort(key=lambda c: c.worse is not True)
    left = len(found) - MOST
    return found if left <= 0 else [*found[: MOST - 1], Change(None, f"and {left + 1} more")]


def _verdict(then: Facts, now: Facts) -> Iterator[Change]:
    if then.outcome != now.outcome:
        yield Change(then.outcome == "verified" or now.outcome == "FAILED", f"{then.outcome} -> {now.outcome}")


def _cases(then: Facts, now: Facts) -> Iterator[Change]:
    """Checks and gates that end otherwise, together where they do so alike. What did not run has not passed."""
    before, after = ({f"{c.name} ({c.metric})": c for c in f.cases if c.group in ("checks", "gates")} for f in (then, now))
    alike: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys((*before, *after)):
        was, is_now = (side[name].verdict if name in side else "absent" for side in (before, after))
        if was != is_now and (is_now == "fail" or was in ("pass", "fail")):
            alike.setdefault((was, is_now), []).append(name)
    for (was, is_now), names in alike.items():
        why = after[names[0]].reason if len(names) == 1 and names[0] in after else ""
        told = f"{SAID[was]} then, {SAID[is_now]} now: {some(names)}" + (f": {why}" if why else "")
        yield Change(is_now != "pass" and (was, is_now) != ("fail", "info"), told)


def _quality(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    before, after = (data.get("quality", {}) for data in (then, now))
    measured = ["mean_kl" in q for q in (before, after)]
    if not all(measured):
        if measured[0]:
            yield Change(True, f"quality is not measured any more: {after.get('skipped', 'no check ran')}")
        return
    texts = [f"{q['n_tokens']} tokens of {q['text']}" for q in (before, after)]
    if texts[0] != texts[1]:
        yield Change(None, f"quality is of {texts[1]}, it was of {texts[0]}: not compared")
        return
    for key, name, share in MEASURES:
        yield from _number(name, before[key], after[key], percent if share else number, key in RISING)


def _bytes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    if not then.get("outputs") or not now.get("outputs"):
        return
    was, is_now = (sum(o["nbytes"] for o in data["outputs"]) for data in (then, now))
    yield from _number("size", was, is_now, nbytes_text)
    before, after = (data["outputs"][0]["bpw"] for data in (then, now))
    yield from _number("bits per weight, whole file", before["file"], after["file"], "{:.3f}".format)


def _number(name: str, was: float, now: float, text: Any, rising: bool = False) -> Iterator[Change]:
    """Where it is seen in what is printed of it."""
    if text(was) != text(now):
        times = now / was if was and text is not percent else None
        grown = "" if times is None else f" (x {times:.3g})" if times >= 2 else f" ({100 * (times - 1):+.1f} %)"
        yield Change((now < was) == rising, f"{name}: {text(was)} -> {text(now)}{grown}")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _fallbacks(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    before, after = ({(f["tensor"], f["got"]) for f in data.get("fallbacks", ())} for data in (then, now))
    for worse, which, what in ((True, after - before, "new fallbacks"), (False, before - after, "fallbacks less")):
        if which:
            yield Change(worse, f"{len(which)} {what}: {some(sorted(f'{name} is {got}' for name, got in which))}")


def _inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What it was made from and by."""
    for name, of in (
        ("runtime", lambda d: " ".join((d.get("runtime") or {"name": "none"}).values())),
        ("model", lambda d: "@".join(str(d.get("provenance", {}).get(k)) for k in ("model", "revision"))),
        ("adapters", lambda d: some([str(a["name"]) for a in d.get("provenance", {}).get("adapters", ())])),
        ("type", lambda d: d.get("quant", "")),
        ("pipeline", lambda d: d.get("pipeline", "")),
    ):
        was, is_now = of(then), of(now)
        if was != is_now:
            yield Change(None, f"{name}: {was or 'none'} -> {is_now or 'none'}")
    new = [n for n in now.get("notes", ()) if n not in then.get("notes", ())]
    yield from (Change(None, f"note: {n}") for n in new)
