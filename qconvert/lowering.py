"""From a source to the graph of packed weights that a format writes, and the plan of its files.

read:   checkpoint -> graph, adapters attached as they were trained
lower:  merge, the user's passes, statistics, folds, what the format needs -> graph of packed weights -> plan
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from qconvert.adapter_delta import check_delta
from qconvert.adapter_refit import refit
from qconvert.adapters import read_adapter
from qconvert.budget import choose, refuse, wish_of
from qconvert.build import build
from qconvert.calibrated import all_calibrated, statistics_wanted
from qconvert.certifying import with_room
from qconvert.companions import tokenizer_of
from qconvert.errors import Place, UnsupportedError, UsageError, located, of_output, uninterrupted
from qconvert.evaluation import Text, affordable, calibration_text, calibration_tokens, evaluation_text
from qconvert.formats.gguf_source import read_gguf
from qconvert.graph import Attr, Graph
from qconvert.merge_base import choose_base, refuse_erasing
from qconvert.parallel import default_threads
from qconvert.passes.adapter_slots import AdapterSlots, alone
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.fold import Fold
from qconvert.passes.incoherence import Incoherence
from qconvert.passes.inline_shift import InlineShift
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.passes.quantize import Quantize
from qconvert.passes.split_metadata import SplitMetadata
from qconvert.passes.untie_head import has_head
from qconvert.pipeline import Pass, Pipeline, flatten
from qconvert.pooled_merges import refuse_rounding
from qconvert.qat_grids import refuse_no_grid
from qconvert.rehearsal import left_out, shortened, without_others
from qconvert.request import Request
from qconvert.scheme import scheme_of
from qconvert.shape_checkpoint import shape_checkpoint, shapes_alone
from qconvert.solver_spec import Solving
from qconvert.sources import Store, read_checkpoint
from qconvert.target import Calibrated, Format, Legal, Lowered, Mixing, Source, Stage
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
# what outputs must agree on to be made of one source; and where the base of an adapter was chosen by measurement
SAME = (
    "model", "adapters", "adapters_as", "tokenizer", "passes", "trained_on", "merge_base", "pooling",
    "allow_unused_adapter_keys", "dry_run", "rehearse",
)  # fmt: skip
MEASURED = ("calibrate", "calibrate_tokens", "allow_lossy", "check")
CANDIDATES = ("", "lsq", "gptq", "awq", "awq+gptq", "ldlq")  # of auto; "": the format's own


def read_sources(requests: Sequence[Request], stack: ExitStack) -> list[Source]:
    """A source for each, the same one where they ask for the same; `stack` closes them."""
    read: list[tuple[Request, Source]] = []
    out = []
    for request in requests:
        found = next((source for other, source in read if same_source(request, other, source)), None)
        if found is None:
            store = Store(shared_place(request))
            stack.callback(store.close)
            store.answers = {} if len(requests) > 1 else None
            found = read_source(request, store)
            read.append((request, found))
        out.append(found)
    return out


def shared_place(request: Request) -> Path | None:
    """Where what tasks read again lies: beside the output, which their machines see; None: where temporary files do."""
    elsewhere = request.executor == "ray" and not request.dry_run
    return Path(request.output or ".").absolute().parent if elsewhere else None


def same_source(a: Request, b: Request, source: Source) -> bool:
    names = (*SAME, *(MEASURED if "merge_base" in source.facts else ()))
    return all(getattr(a, name) == getattr(b, name) for name in names)


def read_source(request: Request, store: Store) -> Source:
    """Headers of the checkpoint and the adapters, and the graph with each adapter beside its linears."""
    path = store.found(request.model)
    unread = request.dry_run and path.is_dir() and shapes_alone(path)
    reader = shape_checkpoint if unread else read_checkpoint if path.is_dir() else read_gguf
    checkpoint, short, others = reader(path, store), None, list[str]()
    if request.rehearse:
        checkpoint, short, others = shortened(checkpoint)
    with located(Place(str(path / "config.json" if path.is_dir() else path))):
        base = build(checkpoint)
    if others:
        base = base.with_meta(dropped=cast(Attr, left_out(base.meta["dropped"], others)))
    adapters = []
    for i, spec in enumerate(request.adapters):
        alias = f"adapter{i}"
        folder, own = store.found(spec.path), request.trained_on == "model"
        with located(Place(str(folder))):
            adapter = read_adapter(folder, store, alias, spec.weight, request.pooling, own)
        adapters.append(without_others(adapter, short) if short else adapter)
    attach = Pipeline(tuple(AttachAdapter(a, request.allow_unused_adapter_keys) for a in adapters))
    graph = attach.run(base, request.dump_ir, log.info)
    for adapter in adapters if not request.dry_run else ():  # a dry run reads headers alone
        check_delta(adapter, store, graph)
    chosen = choose_base(request, adapters, store, graph, path if path.is_dir() else path.parent)
    graph, swap = chosen.graph, request.adapters_as == "swap"
    facts = {**({"merge_base": chosen.facts} if chosen.facts else {}), **(short.facts if short else {})}
    notes = (*(short.notes if short else ()), *chosen.notes)
    return Source(request.model, checkpoint, tuple(adapters), store, base, graph, swap, request.tokenizer, notes, facts)


class Ready(NamedTuple):
    """Where outputs of one source part: the stages so far, their pipeline and number of passes, and what each output wants."""

    stages: tuple[Stage, ...]
    spec: str
    done: int
    options: Any
    found: Calibrated


def readied(requests: Sequence[Request], source: Source, targets: Sequence[Format]) -> list[Ready]:
    """Merge once, look at what all formats are told, gather statistics of each text once."""
    stages, spec, done = transform(requests[0], source)
    merged = stages[-1].graph
    options = []
    for i, (request, target) in enumerate(zip(requests, targets, strict=True)):
        with of_output(i):
            options.append(target.options(request, source, merged))
    found = all_calibrated([(request, statistics_wanted(request)) for request in requests], source, merged)
    return [Ready(stages, spec, done, *each) for each in zip(options, found, strict=True)]


def lower(request: Request, source: Source, target: Format, ready: Ready | None = None) -> Lowered:
    """The stages up to the merged graph, the legal graph of packed weights, and the plan of its files."""
    stages, spec, done, options, found = ready or readied([request], source, [target])[0]
    merged = stages[-1].graph
    first = Pipeline((found.step,) if found.step else ())
    merged = first.run(merged, request.dump_ir, log.info, done)
    path = Path(request.output or "out")
    options, budget = budgeted(request, source, target, merged, options, path)
    solving = Solving.of(request.solver)
    told: tuple[str, ...] = ()
    if solving.auto:
        solving, told = best_solver(request, source, target, merged, options, found)
    folded, legal = solved(target, merged, options, solving)
    if folded is not merged:
        stages = (*stages, Stage(solving.fold, folded, True))
    last = Pipeline((*legal.passes, *offload(request)))
    final = last.run(folded, request.dump_ir, log.info, done + len(first.passes))
    final, refits = refit(request, source, final)
    refuse_no_grid(final, solving.solver)
    told = (*source.notes, *told, *refits, *refuse_rounding(final, request.allow_lossy))
    legal = legal._replace(notes=(*legal.notes, *told, *refuse_erasing(final, source.store, request)))
    plan = target.plan(final, options, legal, Path(request.output or target.default_path(source, merged, options)))
    plan = with_room(request, plan, final)
    if budget:
        assert plan.nbytes == budget["nbytes"], (plan.nbytes, budget["nbytes"])
    pipeline = ",".join(filter(None, (spec, str(first), solving.fold, str(last))))
    return Lowered(stages, final, options, legal, plan, pipeline, found, budget)


def solved(target: Format, graph: Graph, options: Any, solving: Solving) -> tuple[Graph, Legal]:
    """The graph, its weights folded where that is asked for, and how it is legal with the solver in place of the format's."""

    def with_solver(made: Legal) -> Legal:
        if solving.solver is None:
            return made
        passes = (replace(p, solver=solving.solver) if isinstance(p, Quantize | Incoherence) else p for p in made.passes)
        return made._replace(passes=tuple(passes))

    plain = target.legalize(graph, options)
    if not solving.fold:
        return graph, with_solver(plain)
    quantize = next((p for p in plain.passes if isinstance(p, Quantize)), None)
    if quantize is None or not any(map(scheme_of, quantize.types.values())):
        raise UnsupportedError(f"--solver {solving.fold}: no weight is quantized to a type that a fold helps")
    folded = Pipeline((Fold(solving.fold, solver=quantize.solver, types=quantize.types),)).run(graph)
    return folded, with_solver(target.legalize(folded, options))


def best_solver(
    request: Request, source: Source, target: Format, merged: Graph, options: Any, found: Calibrated
) -> tuple[Solving, tuple[str, ...]]:
    """Of all that are legal here, the one whose weights are nearest to the merged model's on text held out; and a note."""
    if request.dry_run:
        return Solving(), ("--solver auto: chosen when weights are read",)
    if not found.held_out:
        raise UsageError("--solver auto: there is no text to judge by", hint="--calibrate FILE; --statistics has none")
    with uninterrupted():
        from qconvert.quality import Model, answers  # loads torch
    text = Text("held out", [list(sequence) for sequence in found.held_out])
    scores: dict[str, float] = {}
    with torch_threads_of(request):
        for spec in CANDIDATES:
            try:
                folded, legal = solved(target, merged, options, Solving.of(spec or None))
                graph = Pipeline(legal.passes).run(folded)
            except (UnsupportedError, UsageError):
                continue
            reference, other = (Model(g, Weights(g, source.store)) for g in (merged, graph))
            scores[spec] = float(answers(reference, other, text).kl.mean(dtype=np.float64))
            log.info("auto %-14s mean KL %.4g", spec or "as usual", scores[spec])
    best = min(scores, key=scores.__getitem__)
    told = ", ".join(f"{spec or 'the usual one'} {scores[spec]:.4g}" for spec in sorted(scores, key=scores.__getitem__))
    where = f"{text.n_tokens} tokens held out of {found.coverage['text']}"
    return Solving.of(best or None), (f"--solver auto: mean KL on {where}: {told}",)


def budgeted(
    request: Request, source: Source, target: Format, merged: Graph, options: Any, path: Path
) -> tuple[Any, dict[str, Any]]:
    """The format's options with a type for each weight, where the user says a size or a KL; and how they were found."""
    wish = wish_of(request, merged)
    if wish is None:
        return options, {}
    tokenizer = tokenizer_of(source, merged)
    if not isinstance(target, Mixing):
        raise refuse(request.to, wish)
    if tokenizer is None or len(merged.outputs) > 1 or not has_head(merged):
        raise UnsupportedError(f"{wish.said}: needs a model with logits, and a tokenizer to cut a text for it", hint="--bits 4")

    solving = Solving.of(request.solver)._replace(auto=False)

    def lowered(types: Mapping[str, str]) -> tuple[Weights, int]:
        mixed = target.with_types(merged, options, types)
        folded, legal = solved(target, merged, mixed, solving)
        graph = Pipeline(legal.passes).run(folded)
        moved = any("." in graph.nodes[name].type.dtype for name in graph.apart())  # else there is nothing to move
        written = Pipeline(offload(request) if moved else ()).run(graph)
        return Weights(graph, source.store), with_room(request, target.plan(written, mixed, legal, path), written).nbytes

    with torch_threads_of(request):
        n = request.eval_tokens or affordable(merged, 3 if source.adapters else 2)
        evaluation = evaluation_text(request.eval, tokenizer, merged, n)
        calibration = calibration_text(request.calibrate, tokenizer, merged, calibration_tokens(merged))
        choice = choose(wish, target.menu(merged, options), lowered, calibration, evaluation)
    return target.with_types(merged, options, choice.types), choice.facts


def offload(request: Request) -> tuple[Pass, ...]:
    """What --offload-meta adds to a format's passes. UsageError where flags that go with it are alone."""
    if request.offload_meta is None:
        flags = ("vram", "prefetch", "link_bandwidth", "memory_bandwidth")
        if given := next((flag for flag in flags if getattr(request, flag) is not None), None):
            raise UsageError(f"--{given.replace('_', '-')} goes with --offload-meta", hint="--offload-meta cpu")
        return ()
    for flag in ("link_bandwidth", "memory_bandwidth"):
        if (speed := getattr(request, flag)) is not None and not speed > 0:
            raise UsageError(f"--{flag.replace('_', '-')} {speed:g}: GB/s, more than 0")
    device = "cpu-pinned" if request.offload_meta == "cpu" else request.offload_meta
    return (SplitMetadata(device, vram=request.vram or "", prefetch=1 if request.prefetch is None else request.prefetch),)


def transform(request: Request, source: Source) -> tuple[tuple[Stage, ...], str, int]:
    """The merge with the user's passes around it as stages, their pipeline string, and how many passes have run."""
    given = request.passes if ... in request.passes else (..., *request.passes)
    at = given.index(...)
    parts = (flatten(p for p in part if p is not ...) for part in (given[:at], given[at + 1 :]))
    before, after = (tuple(replace(p, store=source.store) if isinstance(p, InlineShift) else p for p in part) for part in parts)
    merge: tuple[Pass, ...] = (AdapterSlots() if source.swap else MergeAdapters(),) if source.adapters else ()
    graph, done = source.graph, len(source.adapters)
    stages = [stage("unmerged", graph, True, source.swap)]
    steps = (("passes before", before, False), ("slots" if source.swap else "merge", merge, True), ("passes", after, False))
    for name, passes, exact in steps:
        if passes:
            graph = Pipeline(passes).run(graph, request.dump_ir, log.info, done)
            stages.append(stage(name, graph, exact, source.swap and passes is before))
            done += len(passes)
    return tuple(stages), str(Pipeline((*before, *merge, *after))), done


def stage(name: str, graph: Graph, exact: bool, attached: bool) -> Stage:
    """attached: adapters lie beside their linears that are to be swapped, so the stage is the graph without them."""
    return Stage(name, alone(graph, None), exact, graph) if attached else Stage(name, graph, exact)


def torch_threads_of(request: Request) -> AbstractContextManager[None]:
    with uninterrupted():
        from qconvert.check import torch_threads  # loads torch
    return torch_threads(request.threads or default_threads())
