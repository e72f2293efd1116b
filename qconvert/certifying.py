"""Certificates as they are made, with a conversion, and as they are read, by `qconvert verify FILE`.

make:    plan with room -> written, proven -> probes -> digests of what lies on the disk -> manifest -> certificate in place
verify:  file alone -> certificate -> digests again, the runtime on the same prompts -> rows
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from qconvert import certificate as c
from qconvert import probes as p
from qconvert import registry
from qconvert.certificate import Certificate, Certifier, Digests, Located
from qconvert.companions import context_of, gives_logits, n_vocab, tokenizer_of
from qconvert.emit import Plan
from qconvert.errors import InputError, QConvertError, UnsupportedError, VerificationError, uninterrupted
from qconvert.graph import Graph, n_rows
from qconvert.manifest import Hashing, Output, manifest_digest, manifest_of
from qconvert.parallel import default_threads, in_parallel
from qconvert.report import Report, Row, judged, some
from qconvert.request import Request
from qconvert.target import Lowered, Source, reader_of
from qconvert.tokenizer import hard_corpus
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
WEIGHTS, FILES, CERTIFICATE = "weights by certificate", "all else by certificate", "certificate"


@runtime_checkable
class Certifying(Protocol):
    """A format whose outputs carry certificates."""

    def certifier(self) -> Certifier: ...


def certifier_of(name: str) -> Certifier | None:
    target = cast(type[Any], registry.find("formats", name))()
    return target.certifier() if isinstance(target, Certifying) else None


# made -----------------------------------------------------------------------------------------------


def with_room(request: Request, plan: Plan, graph: Graph) -> Plan:
    """The plan with room for a certificate, where one is asked for. UnsupportedError for a format that has none."""
    if not request.certify:
        return plan
    certifier = certifier_of(request.to)
    if certifier is None:
        raise UnsupportedError(f"--certify: {request.to} has no place for a certificate", hint="--manifest FILE")
    return c.with_slot(plan, certifier, 0 if no_probes(request, graph) else p.NBYTES)


def no_probes(request: Request, graph: Graph) -> str | None:
    if request.keeps_graph:
        return "the model's graph is another's"
    if not request.check:
        return "--no-check"
    if request.adapters_as == "swap":
        return "adapters are swapped"
    return None if gives_logits(graph) else "the model gives no logits"


def probes(
    request: Request, source: Source, lowered: Lowered, weights: Weights, parts: Sequence[Path], threads: int
) -> dict[str, Any]:
    """Prompts, the largest logits of the model as trained and those that the output's runtime should give; or why not."""
    if not request.certify:
        return {}
    if why := no_probes(request, lowered.graph):
        return {"skipped": why}
    with uninterrupted():
        from qconvert import check
        from qconvert.run import run
    certifier, graph, trained = cast(Certifier, certifier_of(request.to)), lowered.graph, lowered.stages[0].graph
    tokenizer = tokenizer_of(source, graph)
    encode = tokenizer.reference() if tokenizer else lambda _: []
    prompts = check.prompts_for(encode, hard_corpus(), n_vocab(graph), min(p.LENGTH, context_of(graph)))
    with check.torch_threads(threads):
        (logits,) = run(trained, Weights(trained, source.store), prompts).values()
        kind, metric, expected = certifier.expected(lowered, weights, parts, prompts)
    reference = [p.top_of(x.numpy()) for x in logits]
    return p.Probes(prompts, kind, metric, reference, list(map(p.top_of, expected))).data()


def attested(
    request: Request, plan: Plan, parts: Sequence[Path], report: Report, asked: Mapping[str, Any], sums: Hashing | None,
    threads: int,
) -> tuple[dict[str, Any], list[Output]] | None:  # fmt: skip
    """The manifest and the outputs' sums, where they are asked for; the certificate is in its place afterwards."""
    if sums is None:
        return None
    certifier = certifier_of(request.to)
    made = c.digests(certifier, parts, threads) if certifier else as_planned(plan, parts, threads)
    inputs = sums.sums()
    manifest = manifest_of(request, report, inputs, {name: text[:64] for name, text in made.weights.items()})
    if plan.slot is not None and certifier is not None:
        at = next(i for i, f in enumerate(plan.files) if f.path == plan.slot.path)
        order = [at, *(i for i in range(len(parts)) if i != at)]
        files = [{"name": name_of(plan, i), "sha256": made.files[i]} for i in order]
        facts = c.fact_digests(certifier.facts(parts[at]))
        made_by = Certificate(
            manifest_digest(manifest), report.pipeline, report.verified, report.runtime, list(map(c.row_data, report.checks)),
            files, made.weights, facts, dict(asked) or {"skipped": "--no-check"},
        )  # fmt: skip
        c.fill_slot(plan.slot, parts[at], c.fitted(made_by, plan.slot))
    found: dict[int, str] = {}
    in_parallel(range(len(parts)), lambda i: found.update({i: c.digest(parts[i])}), threads)
    return manifest, [Output(f.path, f.nbytes, found[i]) for i, f in enumerate(plan.files)]


def name_of(plan: Plan, i: int) -> str:
    """In its folder; a file alone may be called anything, and is the same."""
    return plan.files[i].path.relative_to(plan.folder).as_posix() if plan.folder else f"part {i + 1}"


def as_planned(plan: Plan, parts: Sequence[Path], threads: int) -> Digests:
    """Of a format that reads no headers: each piece of a weight where the plan has it."""
    where, tensors = {f.path.name: part for f, part in zip(plan.files, parts, strict=True)}, list[Located]()
    for file in plan.files:
        for e in file.entries:
            names = e.files_of_pieces(file.path.name)
            nbytes = [plane.file_nbytes(n_rows(e.shape)) for plane in e.pieces]
            tensors += [Located(e.name if len(names) == 1 else f"{e.name}.{i}", where[name], plane.offset, n, e.dtype)
                        for i, (name, plane, n) in enumerate(zip(names, e.pieces, nbytes, strict=True))]  # fmt: skip
    found: dict[str, str] = {}
    in_parallel(tensors, lambda t: found.update({t.name: c.tensor_digest(t)}), threads)
    return Digests(dict(sorted(found.items())), [])


# verified -------------------------------------------------------------------------------------------


def certificate_report(path: Path, threads: int | None = None) -> Report | None:
    """What a file's certificate says of it, checked; None where it has none. Report.exit is 6 on failure."""
    known = reader_of(path)
    if known is None or not isinstance(known[0], Certifying):
        return None
    certifier, found = known[0].certifier(), known[1]
    place = certifier.certificate(found)
    if place is None:
        return None
    first, text = place
    try:
        certificate = c.read_certificate(first, text)
    except InputError as e:
        return Report([], [Row(CERTIFICATE, "is as it was sealed", None, None, "fail", f"{e.message}; {e.hint}")])
    n, log_level = threads or default_threads(), log.level
    log.setLevel(logging.WARNING)  # what builds a graph to look at it has nothing to say
    try:
        rows = digest_rows(certifier, certificate, first, text, n)
        answers, runtime = answer_rows(certifier, certificate, found, n)
    finally:
        log.setLevel(log_level)
    facts = {"file": path.name, "manifest": certificate.manifest, "qconvert": certificate.qconvert}
    notes = [certificate.told()]
    return Report([], [*rows, *answers], runtime, notes=notes, pipeline=certificate.pipeline, provenance=facts)


def digest_rows(certifier: Certifier, certificate: Certificate, first: Path, text: str, threads: int) -> list[Row]:
    """Every tensor's bytes, and all other bytes of every file."""
    names = [f["name"] for f in certificate.files]
    try:
        files = certifier.files(first, names)
        if missing := [path for path in files if not path.is_file()]:
            raise InputError(f"{missing[0]} is missing")
        if len(files) != len(names):
            raise InputError(f"it has {len(files)} files, its certificate has {len(names)}")
        now = c.digests(certifier, files, threads, c.raw(text, certifier.quoted))
    except QConvertError as e:
        return [judged(FILES, "cannot be read", 1.0, 0.0, e.message)]
    then = certificate.weights
    wrong = [f"{n} {'is missing' if n not in now.weights else difference(then[n], now.weights[n])}"
             for n in then if now.weights.get(n) != then[n]]  # fmt: skip
    wrong += [f"{n} was not there" for n in now.weights if n not in then]
    rows = [judged(f"{WEIGHTS}: {len(then)} tensors", "differ", float(len(wrong)), 0.0, some(wrong))]
    other = [i for i, sha256 in enumerate(now.files) if certificate.files[i]["sha256"] != sha256]
    reason = some([files[i].name for i in other])
    if 0 in other and (keys := changed(certificate.facts, c.fact_digests(certifier.facts(first)))):
        reason = f"{reason}: {some(keys)}"
    rows.append(judged(f"{FILES}: {len(files)} file{'s' * (len(files) > 1)}", "differ", float(len(other)), 0.0, reason))
    return [*rows[:-1], rows[-1]._replace(reason=f"{reason}; {c.AGAIN}")] if other else rows


def difference(then: str, now: str) -> str:
    before, kind = then[65:], now[65:]
    return f"was {before} and is {kind}" if before != kind else "has other bytes"


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))


def answer_rows(
    certifier: Certifier, certificate: Certificate, found: Path, threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """What runs the output on the probes' prompts, against what it should answer; and what it costs against the model."""
    what = "runtime"
    if "skipped" in certificate.probes:
        return [Row(what, "not run", None, None, "skip", f"no probes: {str(certificate.probes['skipped'])[:80]}")], None
    with uninterrupted():
        from qconvert.check import LIMITS
    try:
        asked = p.probes_of(certificate.probes, str(found))
        if asked.kind not in LIMITS or not asked.kind.startswith(what):
            raise InputError(f"{found}: its probes are judged by {asked.kind[:40]!a}, which this qconvert does not know")
        answers = certifier.answers(found, asked.tokens, threads)
        return compared(asked, answers, LIMITS[asked.kind][0])
    except (InputError, VerificationError, UnsupportedError) as e:
        return [judged(what, "errors", 1.0, 0.0, e.message)], None


def compared(asked: p.Probes, answers: Sequence[c.Answers], limit: float) -> tuple[list[Row], dict[str, str] | None]:
    rows, runtime = list[Row](), None
    for each in answers:
        if each.logits is None:
            rows.append(Row(each.what, "not run", None, None, "skip", each.reason))
            continue
        try:
            value = p.METRICS[asked.metric](asked.expected, each.logits)
            price = p.mean_kl(asked.reference, each.logits)
        except ValueError as e:
            rows.append(judged(f"{each.what}, probes", "errors", 1.0, 0.0, str(e)))
            continue
        runtime = dict(each.about) if each.about else runtime
        rows.append(judged(f"{each.what}, probes", asked.metric, value, limit))
        rows.append(Row("price of the bits, probes", "mean KL", price, None, "info"))
    return rows, runtime
