"""Gates: what an output must keep to be let through.

limits:   flags and recipe, defaults of the type (--gate), the last release's report (--baseline)
judged:   each against what the plan says, before a weight is read, and against what was measured, before a file has its name
demand:   one error that names every gate that failed
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from qconvert.baseline import Baseline, read_baseline
from qconvert.errors import GateError, NotVerifiedError, UsageError, VerificationError
from qconvert.report import Gate, Report, some
from qconvert.request import Request, parse_nbytes

Origin = Literal["flag", "recipe", "default", "baseline"]


class Metric(NamedTuple):
    """What a flag limits. planned: known before a weight is read."""

    name: str
    option: str  # of Request
    bound: Literal["<=", ">="]
    planned: bool = False
    most: float = math.inf  # that the limit can be

    @property
    def flag(self) -> str:
        return "--" + self.option.replace("_", "-")


METRICS = (
    Metric("mean_kl", "max_kl", "<="),
    Metric("p999_kl", "p999_kl", "<="),
    Metric("top1", "min_top1", ">=", most=1),
    Metric("perplexity_ratio", "max_ppl_ratio", "<="),
    Metric("nbytes", "max_size", "<=", True),
    Metric("bpw", "max_bpw", "<=", True),
    Metric("new_fallbacks", "max_new_fallbacks", "<=", True),
    Metric("verified", "require_verified", ">="),
    Metric("lost_checks", "baseline", "<="),
    Metric("lost_verification", "baseline", "<="),
)
BY_NAME = {m.name: m for m in METRICS}
REHEARSED = "not judged in a rehearsal"  # which is of a model without most of its layers
NAMED = 5  # weights or checks of a reason
QUALITY = ("mean_kl", "p999_kl", "top1", "perplexity_ratio")


class Defaults(NamedTuple):
    """Of types with at least so many bits per weight of the linears, scales counted."""

    bits: float
    mean_kl: float
    p999_kl: float
    top1: float
    perplexity_ratio: float


# Mean KL and perplexity: about twice what llama.cpp's README measured for Llama 3 8B, which loses more than most models of its
# size: 8.5 bits .0014, 6.6 .0055, 5.7 .011, 4.8 .031, 4.5 .072, 3.9 .084, 2.96 .33, 2.4 .55, 1.8 2.3 nats; perplexity x 1.0002,
# 1.003, 1.009, 1.028, 1.075, 1.08, 1.39, 1.7, 10. The tail: 99.9 % are below some 40 times the mean (IQ4_XS: .0425 and 1.55).
# The top token changes in a share of about the root of the mean KL, or less (golden/tiny .0261: 15 %; IQ4_XS above: 10 %).
DEFAULTS = (
    Defaults(15, 0.002, 0.08, 0.95, 1.005),
    Defaults(8, 0.01, 0.4, 0.90, 1.01),
    Defaults(6.2, 0.02, 0.8, 0.86, 1.02),
    Defaults(5.2, 0.04, 1.6, 0.80, 1.04),
    Defaults(4.6, 0.08, 3.0, 0.72, 1.08),
    Defaults(4, 0.15, 5.0, 0.62, 1.2),
    Defaults(3.2, 0.3, 7.0, 0.5, 1.4),
    Defaults(2.5, 0.8, 10.0, 0.35, 2.5),
    Defaults(0, 3.0, 20.0, 0.1, 20.0),
)


class Limit(NamedTuple):
    metric: Metric
    at: float
    origin: Origin
    place: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Gates:
    """The limits of one output."""

    request: Request
    baseline: Baseline | None
    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, request: Request, report: Report) -> Gates:
        """UsageError for a limit that nothing can keep; InputError for a baseline that this output cannot be held against."""
        baseline = None
        if request.baseline is not None and not request.rehearse:
            baseline = read_baseline(request.baseline, request.baseline_tolerance, report, request.eval)
        return cls(request, baseline, tuple(limits(request, report, baseline)))

    def before(self, report: Report) -> Report:
        """Judged by the plan alone. GateError where that is enough to fail, or where nothing is going to be measured."""
        unproven = ["--no-check"] if not self.request.check else []
        unmeasured = [*unproven, *(["--eval-tokens 0"] if self.request.eval_tokens == 0 else [])]
        gates = []
        for limit in self.limits:
            if self.request.rehearse:
                gates.append(gate(limit, None, "skip", REHEARSED))
                continue
            never = unmeasured if limit.metric.name in QUALITY else unproven
            if limit.metric.planned:
                gates.append(self.judged(limit, report))
            elif self.request.dry_run:
                gates.append(gate(limit, None, "skip", "a dry run measures nothing"))
            elif never:
                gates.append(gate(limit, None, "fail", f"not measured: {never[0]}"))
            else:
                gates.append(gate(limit, None, "skip", "not measured yet"))
        notes = list(report.notes)
        if self.request.gate:
            bits = report.outputs[0]["bpw"]["linear"]
            said = f"gates: limits that nobody named are defaults for {bits:.2f} bits per weight"
            notes.append(f"{said}; a small model loses more than a large one at the same bits")
        report = replace(report, gates=gates, notes=notes)
        demand(report)
        return report

    def after(self, report: Report) -> Report:
        """Judged by what was measured; demand() raises."""
        if self.request.rehearse:
            return report
        if self.baseline is not None:
            self.baseline.refuse_another_text(report.quality)
        return replace(report, gates=[self.judged(limit, report) for limit in self.limits])

    def judged(self, limit: Limit, report: Report) -> Gate:
        value, reason = self.measured(limit.metric, report)
        if value is None:
            return gate(limit, None, "fail", f"not measured: {reason}")
        kept = value <= limit.at if limit.metric.bound == "<=" else value >= limit.at  # a NaN is kept by nothing
        return gate(limit, value, "pass" if kept else "fail", "; ".join(filter(None, (reason, limit.reason))))

    def measured(self, metric: Metric, report: Report) -> tuple[float | None, str]:
        """The value, and what there is to say of it; None and why."""
        quality = report.quality
        match metric.name:
            case "nbytes":
                return report.accounting["size"]["total"], ""
            case "bpw":
                return report.outputs[0]["bpw"]["file"], ""
            case "new_fallbacks":
                before = self.baseline.fallbacks if self.baseline else set()
                new = [f for f in report.fallbacks if (f["tensor"], f["got"]) not in before]
                return len(new), some([f"{f['tensor']} is {f['got']}" for f in new], NAMED)
            case "verified" | "lost_verification":
                skipped = next((r.reason for r in report.checks if r.verdict == "skip"), "no check ran")
                return float(report.verified == (metric.name == "verified")), "" if report.verified else skipped
            case "lost_checks":
                lost = self.baseline.lost(report.checks) if self.baseline else []
                return len(lost), some(lost, NAMED)
            case name if name in quality:
                return quality[name], ""
        return None, str(quality.get("skipped", "no check ran"))


def gate(limit: Limit, value: float | None, verdict: Literal["pass", "fail", "skip"], reason: str) -> Gate:
    metric = limit.metric
    return Gate(metric.flag, metric.name, metric.bound, limit.at, value, verdict, limit.origin, limit.place, reason)


def limits(request: Request, report: Report, baseline: Baseline | None) -> Iterator[Limit]:
    """What was said, then what the type should keep where nothing was said, then what the last release kept."""
    said = {}
    for metric in METRICS:
        value = getattr(request, metric.option)
        if value is None or value is False or metric.option == "baseline":
            continue
        at = parse_nbytes(value) if isinstance(value, str) else float(value)
        if not 0 <= at <= metric.most:
            raise UsageError(f"{metric.flag} {at:g}: {'a share, from 0 to 1' if metric.most == 1 else 'not below 0'}")
        place = request.places.get(metric.option, "")
        said[metric.name] = Limit(metric, at, "recipe" if place else "flag", place)
    yield from said.values()
    if request.gate:
        defaults = defaults_of(report.outputs[0]["bpw"]["linear"])
        for name, at in {**defaults._asdict(), "verified": 1.0}.items():
            if name != "bits" and name not in said:
                yield Limit(BY_NAME[name], at, "default")
    if request.rehearse and request.baseline is not None:
        yield Limit(BY_NAME["lost_checks"], 0, "baseline", str(request.baseline))
    if baseline is not None:
        place = str(baseline.path)
        for name, at, reason in baseline.limits():
            if name != "new_fallbacks" or name not in said:
                yield Limit(BY_NAME[name], at, "baseline", place, reason)


def defaults_of(bits: float) -> Defaults:
    return next(d for d in DEFAULTS if bits >= d.bits)


def demand(report: Report) -> None:
    """Raise where a check failed, a gate failed, or the runtime did not prove what must be proven."""
    error: VerificationError | GateError | NotVerifiedError
    gates = report.failed_gates
    if report.failed:
        row = report.failed[0]
        error = VerificationError(
            f"verification failed at {row.what}: {row.metric} {row.value:g}, limit {row.limit:g}. {row.reason}".rstrip(" ."),
            hint="no file was left; --no-check writes it unverified",
        )
    elif report.exit == NotVerifiedError.exit_code:
        reason = gates[0].reason.removeprefix("not measured: ")
        flag = "--gate" if gates[0].origin == "default" else "--require-verified"
        error = NotVerifiedError(f"not verified: {reason}", hint=f"drop {flag} to keep an unverified file")
    elif gates:
        many = [f"{len(gates)} gates failed"] if len(gates) > 1 else []
        error = GateError("\n  ".join([*many, *map(str, gates)]), hint=hint_of(gates))
    else:
        return
    error.report = report
    raise error


def hint_of(gates: Sequence[Gate]) -> str:
    planned = [g for g in gates if BY_NAME[g.metric].planned]
    if len(planned) == len(gates):
        return "nothing was written; a smaller type, or another limit"
    if all(g.value is None for g in gates):
        return "no file was left; a limit on what is not measured cannot be kept: measure it, or drop the limit"
    return "no file was left; more bits are nearer to what was trained"
