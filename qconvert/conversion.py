"""The whole conversion as one readable function.

read:   checkpoint -> graph, adapters attached as they were trained
lower:  merge, the user's passes, what the format needs -> graph of packed weights
write:  plan -> preflight -> streamed into files that have no final name yet
prove:  unmerged, merged, quantized, file, runtime: each against the one before -> names, report
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, cast

from qconvert import accountant, offloading, on_device, registry
from qconvert.calibration import read_text
from qconvert.companions import n_vocab, tokenizer_of
from qconvert.emit import Executor, Plan, Progress, preflight, written
from qconvert.errors import (
    GateError,
    NotVerifiedError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
    uninterrupted,
)
from qconvert.evaluation import affordable, evaluation_text, overlap
from qconvert.formats.gguf_source import tokenizer_rows
from qconvert.graph import Graph
from qconvert.lowering import lower, offload, read_source, torch_threads_of
from qconvert.parallel import default_threads
from qconvert.pipeline import Function, Pass
from qconvert.qat_grids import grid_notes, recovered_rows
from qconvert.report import Fate, Report, Row, bpw_of, fate_of, size_of
from qconvert.request import AdapterSpec, Request, adapters_of, parse_model, parse_target
from qconvert.sources import Store
from qconvert.statistics import ALIAS
from qconvert.target import Format, Lowered, Rewriter, Source
from qconvert.targets import target_notes
from qconvert.url_files import is_url, local_path, refuse_existing, staging, upload
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
REWRITTEN = ".onnx"  # a model whose graph is kept
WORKING_NBYTES = 400 << 20  # interpreter, libraries and row blocks of two threads


@dataclass(frozen=True)
class Result:
    """What a conversion made: files, whether the runtime proved them, and the report that says so."""

    outputs: tuple[Path | str, ...]  # text: a URL
    report: Report
    plan: Plan

    @property
    def verified(self) -> bool:
        return self.report.verified


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
    request = request_of(model, adapters=adapters, passes=passes, **options)
    if request.output is not None and is_url(str(request.output)):
        return to_url(request, str(request.output).rstrip("/"), progress)
    return converted(request, progress)


def to_url(request: Request, url: str, progress: Callable[[Plan], Progress]) -> Result:
    """Make and prove the output in a folder here, and copy it to where it is wanted."""
    refuse_existing(url, request.force or request.dry_run)
    base, _, name = url.rpartition("/")
    with staging(url) as folder:
        result = converted(replace(request, output=folder / name, force=True), progress)
        places = {f.path: f"{base}/{f.path.relative_to(folder).as_posix()}" for f in result.plan.files}
        if not request.dry_run:
            upload(sorted(places.items(), key=lambda item: -item[0].stat().st_size))  # what names the others is small
    facts = [{**each, "path": places[Path(each["path"])]} for each in result.report.outputs]
    outputs = (url,) if result.plan.folder else tuple(places.values())
    return replace(result, outputs=outputs if result.outputs else (), report=replace(result.report, outputs=facts))


def converted(request: Request, progress: Callable[[Plan], Progress]) -> Result:
    store = Store(shared_place(request))
    try:
        return _convert(request, store, progress)
    finally:
        store.close()


def shared_place(request: Request) -> Path | None:
    """Where what tasks read again lies: beside the output, which their machines see; None: where temporary files do."""
    elsewhere = request.executor == "ray" and not request.dry_run
    return Path(request.output or ".").absolute().parent if elsewhere else None


def executor_of(request: Request) -> Executor | None:
    """None: threads."""
    if request.executor == "threads":
        return None
    from qconvert.ray_executor import RayExecutor

    return RayExecutor()


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


def _convert(request: Request, store: Store, progress: Callable[[Plan], Progress]) -> Result:
    if request.adapters_as == "swap" and not request.adapters:
        raise UsageError("--adapters swap: no adapter was given", hint="MODEL+ADAPTER, or -a ADAPTER")
    runs_on(request)
    on_device.demand(request)
    offload(request)  # flags that go together, before anything is read
    if request.eval is not None:
        read_text(request.eval, "--eval")
    target = cast(type[Format], registry.find("formats", request.to))()
    if request.model.endswith(REWRITTEN):
        return _rewrite(request, store, progress, target)
    source = read_source(request, store)
    lowered = lower(request, source, target)
    report = describe(request, source, lowered)

    def prove(weights: Weights, parts: tuple[Path, ...], threads: int) -> Proof:
        rows, runtime = target.prove(source, lowered, weights, parts, threads)
        found = measured(request, source, lowered, weights)
        rows += recovered_rows(lowered.graph, weights)
        rows = [*tokenizer_rows(source), *rows, *offloading.rows(weights, lowered.plan, parts)]
        if share := found.get("read_by_calibration", 0):
            why = "the weights were fitted to this text; --eval FILE names another"
            rows.append(Row("quality", "share of the text that calibration read", share, None, "info", why))
        return Proof(rows, runtime, found)

    return write(request, lowered.graph, lowered.plan, report, store, progress, prove)


def _rewrite(request: Request, store: Store, progress: Callable[[Plan], Progress], target: Format) -> Result:
    """A file of the target's own format: its weights change, its graph does not."""
    if not hasattr(target, "rewrite"):
        raise UnsupportedError(f"{request.model}: only --to onnx takes an ONNX model", hint="--to onnx, or give the checkpoint")
    rewriter = cast(Rewriter, target)
    job = rewriter.rewrite(request, store)
    left = [{"tensor": t, "wanted": job.quant, "got": "as it was", "reason": why} for t, why in job.left.items()]
    report = replace(
        described(request, job.graph, job.plan, job.quant, fate_of(job.graph, job.plan, job.refs)),
        notes=[*job.notes, *runs_on(request), *on_device.notes(request, job.graph)],
        fallbacks=left, pipeline=job.pipeline, provenance={"model": request.model},
    )  # fmt: skip

    def prove(weights: Weights, parts: tuple[Path, ...], threads: int) -> Proof:
        return Proof(*rewriter.prove_rewritten(job, weights, parts, threads))

    return write(request, job.graph, job.plan, report, store, progress, prove)


class Proof(NamedTuple):
    """Rows of all checks, what ran the file, and what quality.quality measured; {"skipped": why} where nothing was."""

    rows: list[Row]
    runtime: dict[str, str] | None
    quality: Mapping[str, Any] = {"skipped": "the model's graph is another's"}


def measured(request: Request, source: Source, lowered: Lowered, weights: Weights) -> dict[str, Any]:
    """The quality of the quantized graph on a text. UsageError, InputError for an --eval that is none."""
    reference, final = lowered.stages[0].graph, lowered.graph
    tokenizer = tokenizer_of(source, final)
    if len(final.outputs) > 1 or final.nodes[final.outputs[0]].type.shape[-1] != n_vocab(final):
        return {"skipped": "the model gives no logits"}
    if tokenizer is None:
        return {"skipped": "the model has no tokenizer that could cut a text"}
    if request.eval_tokens == 0:
        return {"skipped": "--eval-tokens 0"}
    with uninterrupted():
        from qconvert.quality import Model, quality  # loads torch
    tuned = bool(source.adapters) and not source.swap
    n = request.eval_tokens or affordable(final, 3 if tuned else 2)
    text = evaluation_text(request.eval, tokenizer, final, n)
    base = Model(source.base, Weights(source.base, source.store)) if tuned else None
    with torch_threads_of(request):
        found = quality(Model(reference, Weights(reference, source.store)), Model(final, weights), base, text)
    if lowered.calibrated.texts:
        found["read_by_calibration"] = overlap(lowered.calibrated.texts, text.sequences)
    return found


def write(
    request: Request, graph: Graph, plan: Plan, report: Report, store: Store, progress: Callable[[Plan], Progress],
    prove: Callable[[Weights, tuple[Path, ...], int], Proof],
) -> Result:  # fmt: skip
    """Stream the plan into files, prove them, and give them their names; the report gets the proof's rows."""
    for entry in plan.entries:
        log.debug("%-28s %-8s %s", entry.name, entry.dtype.rpartition(".")[2], "x".join(map(str, entry.shape)))
    if request.dry_run:
        return Result((), report, plan)
    preflight(plan, request.force)
    check_memory()
    weights = Weights(graph, store, device=request.device)
    threads = request.threads or default_threads()
    with written(plan, weights, threads, progress(plan), executor_of(request)) as parts:
        if request.check:
            proof = prove(weights, parts, threads)
            proof = proof._replace(rows=[*proof.rows, *on_device.rows(weights)])
        else:
            proof = Proof([Row("runtime", "not verified", None, None, "skip", "--no-check")], None, {"skipped": "--no-check"})
        report = replace(report, checks=proof.rows, runtime=proof.runtime, quality=dict(proof.quality))
        judge(report, request)
    return Result((plan.folder,) if plan.folder else tuple(f.path for f in plan.files), report, plan)


def check_memory() -> None:
    """ResourceError before the first byte where the machine has too little left to start."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return
    available = next((int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable")), None)
    if available is not None and available < WORKING_NBYTES:
        raise ResourceError(
            f"{available >> 20} MB of memory are free, {WORKING_NBYTES >> 20} MB are needed",
            hint="close something; the model's size does not matter",
        )


def describe(request: Request, source: Source, lowered: Lowered) -> Report:
    """All that is known before a weight is read."""
    aliases = [alias for alias in source.store.roots if alias != ALIAS]  # statistics are no part of the model
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
    return {"model": source.name, "revision": source.checkpoint.revision, "adapters": meta}


def judge(report: Report, request: Request) -> None:
    """Raise where a check failed or, with --require-verified, where the runtime did not prove the file."""
    if report.failed:
        row = report.failed[0]
        error = VerificationError(
            f"verification failed at {row.what}: {row.metric} {row.value:g}, limit {row.limit:g}. {row.reason}".rstrip(" ."),
            hint="no file was left; --no-check writes it unverified",
        )
        error.report = report
        raise error
    gate(report, request)
    if request.require_verified and not report.verified:
        skipped = next((r.reason for r in report.checks if r.verdict == "skip"), "no check ran")
        unverified = NotVerifiedError(f"not verified: {skipped}", hint="drop --require-verified to keep an unverified file")
        unverified.report = report
        raise unverified


def gate(report: Report, request: Request) -> None:
    """GateError where quality is not what was asked for, or was not measured."""
    for flag, wanted, key, sign in (("--max-kl", request.max_kl, "mean_kl", 1), ("--min-top1", request.min_top1, "top1", -1)):
        if wanted is None:
            continue
        found = report.quality.get(key)
        if found is None:
            why = f"not measured: {report.quality.get('skipped')}"
        elif sign * found <= sign * wanted:
            continue
        else:
            why = f"{key} is {found:.4g} on {report.quality['n_tokens']} tokens of {report.quality['text']}"
        error = GateError(f"{flag} {wanted:g}: {why}", hint="no file was left; more bits are nearer to what was trained")
        error.report = report
        raise error
