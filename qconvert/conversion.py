"""The whole conversion as one readable function.

read:   checkpoint -> graph, adapters attached as they were trained
lower:  merge, the user's passes, what the format needs -> graph of packed weights
write:  plan -> preflight -> streamed into files that have no final name yet
prove:  unmerged, merged, quantized, file, runtime: each against the one before -> names, report
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import EllipsisType
from typing import Any, NamedTuple, cast

from qconvert import accountant, offloading, on_device, registry
from qconvert.beside import Beside, beside
from qconvert.budget import n_weights
from qconvert.calibration import read_text
from qconvert.certifying import attested, probes, with_room
from qconvert.elsewhere import Elsewhere, executor_of, made_here
from qconvert.emit import Progress, staged
from qconvert.errors import OutputsError, QConvertError, ResourceError, UnsupportedError, UsageError, of_output
from qconvert.formats.gguf_source import tokenizer_rows
from qconvert.gates import Gates, demand
from qconvert.graph import Graph
from qconvert.hessians import Factors
from qconvert.lowering import Ready, lower, offload, read_sources, readied
from qconvert.manifest import Output, hashing, write_manifest
from qconvert.measuring import Asked, measured
from qconvert.parallel import default_threads
from qconvert.pipeline import Function, Pass
from qconvert.plans import Plan
from qconvert.preflight import check_memory, preflight, refuse_full_disks, refuse_same_place
from qconvert.qat_grids import grid_notes, recovered_rows
from qconvert.rehearsal import refuse_rehearsing, rehearsing
from qconvert.report import Fate, Report, Row, bpw_of, fate_of, size_of
from qconvert.request import AdapterSpec, Request, adapters_of, parse_model, parse_target
from qconvert.sources import Store
from qconvert.statistics import ALIAS
from qconvert.target import Format, Lowered, Rewriter, Source
from qconvert.targets import target_notes
from qconvert.together import Making, write_together
from qconvert.url_files import is_url, local_path
from qconvert.weights import Weights

log = logging.getLogger("qconvert")


@dataclass(frozen=True)
class Result:
    """What a conversion made: files, whether the runtime proved them, and the report that says so.

    error: why there are no files, where this is one of several outputs.
    """

    outputs: tuple[Path | str, ...]  # text: a URL
    report: Report
    plan: Plan
    error: QConvertError | None = None

    @property
    def verified(self) -> bool:
        return self.report.verified and self.error is None


def convert(
    model: str | Path,
    *,
    adapters: Sequence[str | AdapterSpec] = (),
    passes: Sequence[Pass | Function | str | EllipsisType] = (...,),
    progress: Callable[[Plan], Progress] = lambda _: lambda _: None,
    **options: Any,
) -> Result:
    """Convert `model` ("path", "org/name@revision", "model+adapter:0.7") with `adapters`; options as in Request.

    passes: run after the merge; `...` stands for qconvert's own, so [MyPass(), ...] runs before it.
    Raises QConvertError; VerificationError has the whole report as its `report`.
    """
    (result,) = _converted([request_of(model, adapters=adapters, passes=passes, **options)], progress)
    if result.error is not None:
        raise result.error
    return result


def convert_all(
    requests: Sequence[Request], progress: Callable[[Plan], Progress] = lambda _: lambda _: None
) -> tuple[Result, ...]:
    """Several outputs: what they have in common is read, merged and calibrated once; see request_of for what is asked.

    All are planned before the first byte of any is written. Each is then judged by itself: OutputsError where some are not
    what was asked for, while the others have their files. What stops all is raised as it is.
    """
    if not requests:
        raise UsageError("no output was asked for")
    results = _converted(requests, progress)
    if failed := [r for r in results if r.error is not None]:
        first, place = failed[0].error, failed[0].plan.paths[0]
        assert first is not None
        what = f"{len(failed)} of {len(results)} outputs failed, first {place}: {first.message}"
        raise OutputsError(what, first.exit_code, results)
    return results


def request_of(
    model: str | Path,
    *,
    adapters: Sequence[str | AdapterSpec] = (),
    passes: Sequence[Pass | Function | str | EllipsisType] = (...,),
    **options: Any,
) -> Request:
    """What convert() is given, as one record."""
    unknown = options.keys() - {f.name for f in fields(Request)}
    if unknown:
        raise UsageError(f"convert() has no option {min(unknown)!r}", hint="options are the fields of qconvert.request.Request")
    name, named = parse_model(str(model))
    if (output := options.get("output")) is not None:
        options["output"] = local_path(str(output)) or (str(output) if is_url(str(output)) else Path(output))
    to, quant = parse_target(options.pop("to", "gguf"), options.pop("quant", None))
    return Request(name, (*named, *adapters_of(adapters)), to=to, quant=quant, passes=tuple(passes), **options)


def _converted(requests: Sequence[Request], progress: Callable[[Plan], Progress]) -> tuple[Result, ...]:
    for flag in ("dry_run", "rehearse", "executor"):
        if len({getattr(request, flag) for request in requests}) > 1:
            raise UsageError(f"--{flag.replace('_', '-')}: of some outputs and not of others", hint="say it for all of them")
    if not requests[0].rehearse:
        with ExitStack() as stack:
            here = [made_here(request, stack) for request in requests]
            results = write(planned([request for request, _ in here], stack), progress)
            return tuple(sent(result, to) if to else result for result, (_, to) in zip(results, here, strict=True))
    for i, request in enumerate(requests):
        with of_output(i):
            refuse_rehearsing(request)
    with TemporaryDirectory(prefix="qconvert-") as folder, ExitStack() as stack:
        small = [rehearsing(request, Path(folder) / str(i)) for i, request in enumerate(requests)]
        results = write(planned(small, stack), progress)
        return tuple(replace(r, outputs=(), report=replace(r.report, outputs=[])) for r in results)


def sent(result: Result, elsewhere: Elsewhere) -> Result:
    if result.outputs:
        elsewhere.send()
    facts = [{**each, "path": elsewhere.place(Path(each["path"]))} for each in result.report.outputs]
    outputs = tuple(elsewhere.place(Path(path)) for path in result.outputs)
    return replace(result, outputs=outputs, report=replace(result.report, outputs=facts))


class Job(NamedTuple):
    """An output that is planned, and how it will be proven. of: what it is made of, but where a file's own graph is kept."""

    request: Request
    graph: Graph
    plan: Plan
    report: Report
    store: Store
    prove: Callable[[Weights, tuple[Path, ...], int, Mapping[str, Any]], Proof]
    of: tuple[Source, Lowered] | None = None
    others: Beside = Beside()


def planned(requests: Sequence[Request], stack: ExitStack) -> list[Job]:
    """All that can be known before a byte is written. Sources are read once for all outputs of them."""
    for i, request in enumerate(requests):
        with of_output(i):
            refuse_at_once(request)
    targets = [cast(type[Format], registry.find("formats", request.to))() for request in requests]
    built = [i for i, request in enumerate(requests) if not request.keeps_graph]
    sources = dict(zip(built, read_sources([requests[i] for i in built], stack), strict=True))
    ready: dict[int, Ready] = {}
    for i in built:
        if i not in ready:
            alike = [j for j in built if sources[j] is sources[i]]
            with of_output(*alike):
                found = readied([requests[j] for j in alike], sources[i], [targets[j] for j in alike])
            ready |= zip(alike, found, strict=True)
    jobs = []
    for i, (request, target) in enumerate(zip(requests, targets, strict=True)):
        if request.dump_ir is not None and len(requests) > 1:
            request = replace(request, dump_ir=request.dump_ir / f"{i}-{request.to}")
        with of_output(i):
            if i in ready:
                jobs.append(of_source(request, sources[i], target, ready[i]))
            else:
                store = Store()
                stack.callback(store.close)
                jobs.append(rewriting(request, store, target))
    refuse_same_place([job.plan for job in jobs])
    return jobs


def refuse_at_once(request: Request) -> None:
    """Flags that do not go together, before anything is read."""
    if request.adapters_as == "swap" and not request.adapters:
        raise UsageError("--adapters swap: no adapter was given", hint="MODEL+ADAPTER, or -a ADAPTER")
    runs_on(request)
    on_device.demand(request)
    offload(request)
    if request.eval is not None:
        read_text(request.eval, "--eval")


def of_source(request: Request, source: Source, target: Format, ready: Ready) -> Job:
    lowered = lower(request, source, target, ready)

    def prove(weights: Weights, parts: tuple[Path, ...], threads: int, found: Mapping[str, Any]) -> Proof:
        rows, runtime = target.prove(source, lowered, weights, parts, threads)
        rows += recovered_rows(lowered.graph, weights)
        rows = [*tokenizer_rows(source), *rows, *offloading.rows(weights, lowered.plan, parts)]
        if share := found.get("read_by_calibration", 0):
            why = "the weights were fitted to this text; --eval FILE names another"
            rows.append(Row("quality", "share of the text that calibration read", share, None, "info", why))
        return Proof(rows, runtime, found, probes(request, source, lowered, weights, parts, threads))

    report = describe(request, source, lowered)
    others = beside(request, source, lowered)
    return Job(request, lowered.graph, lowered.plan, report, source.store, prove, (source, lowered), others)


def rewriting(request: Request, store: Store, target: Format) -> Job:
    """A file of the target's own format: its weights change, its graph does not."""
    if flag := "--card" if request.card else "--modelfile" if request.modelfile else None:
        raise UnsupportedError(f"{flag}: not for an ONNX model as input, which says nothing of where it is from")
    if not hasattr(target, "rewrite"):
        raise UnsupportedError(f"{request.model}: only --to onnx takes an ONNX model", hint="--to onnx, or give the checkpoint")
    rewriter = cast(Rewriter, target)
    job = rewriter.rewrite(request, store)
    plan = with_room(request, job.plan, job.graph)
    left = [{"tensor": t, "wanted": job.quant, "got": "as it was", "reason": why} for t, why in job.left.items()]
    report = replace(
        described(request, job.graph, plan, job.quant, fate_of(job.graph, plan, job.refs)),
        notes=[*job.notes, *runs_on(request), *on_device.notes(request, job.graph)],
        fallbacks=left, pipeline=job.pipeline, provenance=kind_of(job.graph, request.model, None),
    )  # fmt: skip

    def prove(weights: Weights, parts: tuple[Path, ...], threads: int, _: Mapping[str, Any]) -> Proof:
        return Proof(*rewriter.prove_rewritten(job, weights, parts, threads))

    return Job(request, job.graph, plan, report, store, prove)


class Proof(NamedTuple):
    """Rows of all checks, what ran the file, what quality.quality measured ({"skipped": why} where nothing was), and probes
    for a certificate."""

    rows: list[Row]
    runtime: dict[str, str] | None
    quality: Mapping[str, Any] = {"skipped": "the model's graph is another's"}
    probes: Mapping[str, Any] = {"skipped": "the model's graph is another's"}


def write(jobs: list[Job], progress: Callable[[Plan], Progress]) -> tuple[Result, ...]:
    """Stream the plans into files, prove each, and give their names to those that are what was asked for; the reports get
    the rows of the proofs."""
    for entry in (entry for job in jobs for entry in job.plan.entries):
        log.debug("%-28s %-8s %s", entry.name, entry.dtype.rpartition(".")[2], "x".join(map(str, entry.shape)))
    gates = [Gates.of(job.request, job.report) for job in jobs]
    for i, g in enumerate(gates):
        with of_output(i):
            jobs[i] = jobs[i]._replace(report=g.before(jobs[i].report))
    if jobs[0].request.dry_run:
        return tuple(Result((), job.report, job.plan) for job in jobs)
    for job in jobs:
        preflight(job.plan, job.request.force)
    refuse_full_disks([job.plan for job in jobs])
    check_memory()
    threads = max(job.request.threads or default_threads() for job in jobs)
    factors = {id(job.store): Factors() for job in jobs}
    with ExitStack() as stack:
        sums = stack.enter_context(hashing([(job.request, job.store) for job in jobs]))
        outputs = []
        for job in jobs:
            weights = Weights(job.graph, job.store, device=job.request.device, factors=factors[id(job.store)])
            outputs.append(Making(stack.enter_context(staged(job.plan)), weights, progress(job.plan)))
        errors = dict(write_together(outputs, threads, executor_of(jobs[0].request)))
        checked = [i for i, job in enumerate(jobs) if job.request.check and i not in errors]
        asked = {i: Asked(jobs[i].request, *of, outputs[i].weights) for i in checked if (of := jobs[i].of)}
        quality = {**dict.fromkeys(checked, Proof([], None).quality), **measured(asked)}
        results, manifests = [], {}
        for i, (job, (output, weights, _)) in enumerate(zip(jobs, outputs, strict=True)):
            error, report, parts = errors.get(i), job.report, tuple(output.parts.paths.values())
            try:
                if error is None:
                    report, prompts = proven(job, gates[i], weights, parts, threads, quality.get(i))
                    manifests[i] = attested(job.request, job.plan, parts, report, prompts, sums[i], threads)
            except ResourceError:
                raise
            except QConvertError as e:
                error, report = e, e.report if isinstance(e.report, Report) else report
            results.append(Result(() if error else job.plan.paths, report, job.plan, error))
        for result, (output, _, _) in zip(results, outputs, strict=True):
            if result.error is None:
                output.publish()
    for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
        if result.error is None:
            write_beside(job, result.report, manifests.get(i))
    return tuple(results)


def write_beside(job: Job, report: Report, made: tuple[dict[str, Any], list[Output]] | None) -> None:
    """What tells of an output that has its name."""
    if made is not None and job.request.manifest is not None:
        write_manifest(job.request.manifest, *made)
    for path in job.others.write(report):
        log.info("%-14s %s", "write", path)


def proven(
    job: Job, gates: Gates, weights: Weights, parts: tuple[Path, ...], threads: int,
    quality: Mapping[str, Any] | QConvertError | None,
) -> tuple[Report, Mapping[str, Any]]:  # fmt: skip
    """The report with the rows of all checks, and the probes of a certificate; raises what `demand` does."""
    if isinstance(quality, QConvertError):
        raise quality
    if quality is not None:
        proof = job.prove(weights, parts, threads, quality)
        proof = proof._replace(rows=[*proof.rows, *on_device.rows(weights)])
    else:
        skipped = {"skipped": "--no-check"}
        proof = Proof([Row("runtime", "not verified", None, None, "skip", "--no-check")], None, skipped, skipped)
    report = replace(job.report, checks=proof.rows, runtime=proof.runtime, quality=dict(proof.quality))
    report = gates.after(report)
    demand(report)
    return report, proof.probes


def describe(request: Request, source: Source, lowered: Lowered) -> Report:
    """All that is known before a weight is read."""
    aliases = [alias for alias in source.store.roots if not alias.startswith(ALIAS)]  # statistics are no part of the model
    refs = [info.ref for alias in aliases for info in source.store.tensors(alias).values()]
    fate = fate_of(lowered.graph, lowered.plan, refs)
    report = described(request, lowered.graph, lowered.plan, lowered.legal.quant, fate)
    grids = () if request.dry_run else grid_notes(source.base, source.store, request.solver, bool(source.adapters))
    return replace(
        report,
        accounting={
            **report.accounting,
            "config_keys": source.graph.meta.get("config_keys", {}),
            "calibration": dict(lowered.calibrated.coverage),
            **source.facts,
            **{k: v for k, v in lowered.graph.meta.items() if k == "inline_shift"},
        },
        fallbacks=[dict(f) for f in lowered.legal.fallbacks],
        notes=[
            *lowered.legal.notes, *grids, *lowered.calibrated.notes, *report.notes, *runs_on(request),
            *on_device.notes(request, lowered.graph),
        ],
        pipeline=lowered.pipeline,
        provenance=provenance(source),
        budget=dict(lowered.budget),
    )


def described(request: Request, graph: Graph, plan: Plan, quant: str, fate: Fate) -> Report:
    """Files and bytes."""
    (bpw, ways), size = bpw_of(plan, graph), size_of(plan)
    placement, notes = offloading.facts(graph, plan, request)
    facts = {"format": request.to, "quant": quant}
    outputs = [{"path": str(f.path), **facts, "nbytes": f.nbytes, "bpw": bpw._asdict()} for f in plan.files]
    files = accountant.files(plan, graph)
    accounting = {
        "files": files,
        "parts": accountant.totals(files),
        "three_ways": ways._asdict(),
        "size": {**size._asdict(), "total": size.total},
        "tensors": {
            "used": fate.used,
            "folded": fate.folded,
            "dropped": [{"tensor": t, "reason": r} for t, r in fate.dropped],
        },
        "placement": placement,
    }
    return Report(outputs, accounting=accounting, quant=quant, notes=list(notes))


def runs_on(request: Request) -> list[str]:
    """What runs the output on --target; UnsupportedError where nothing is known to."""
    return target_notes(request.target, request.to, request.quant, request.bits)


def provenance(source: Source) -> dict[str, Any]:
    meta = source.graph.meta.get("adapters", [])
    return {**kind_of(source.base, source.name, source.checkpoint.revision), "adapters": meta}


def kind_of(graph: Graph, model: str, revision: str | None) -> dict[str, Any]:
    """A model by name, and by what stays where it is trained again."""
    return {"model": model, "revision": revision, "family": graph.meta.get("family"), "n_weights": n_weights(graph)}
