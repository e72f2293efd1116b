"""Statistics of activations for a conversion: from a text, from a file of them, or from llama.cpp's imatrix."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qconvert.calibration import LENGTH, N_RANGE_TOKENS, N_TOKENS, OWN, calibration_of, cut
from qconvert.companions import tokenizer_of
from qconvert.errors import InputError, UsageError, uninterrupted
from qconvert.formats import gguf_imatrix
from qconvert.formats.gguf_imatrix import Entry, IMatrix
from qconvert.formats.gguf_names import gguf_name
from qconvert.graph import Attr, Graph
from qconvert.passes.calibrate import Calibrate
from qconvert.passes.untie_head import vocabulary_weights
from qconvert.request import Request
from qconvert.solver_spec import Solving
from qconvert.sources import Store
from qconvert.statistics import (
    ALIAS,
    FILE,
    SPREAD,
    Facts,
    Found,
    Site,
    StatisticsFile,
    fingerprint,
    read_facts,
    read_found,
    refuse_other_model,
    sha256_of,
    sites_of,
)  # fmt: skip
from qconvert.target import Calibrated, Source
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
USES = ("gguf",)  # formats whose own solver reads them


def statistics_wanted(request: Request) -> frozenset[str]:
    """Which kinds the conversion reads, of statistics.KINDS."""
    given = (request.calibrate, request.imatrix, request.statistics, request.save_imatrix, request.save_statistics)
    asked = any(x is not None for x in given)
    needs = Solving.of(request.solver).needs("moments?" if request.to in USES else "")
    needs |= SPREAD if request.activation_range not in (None, "minmax") else frozenset()
    if not needs or not (asked or any(not kind.endswith("?") for kind in needs)):
        return frozenset()
    return frozenset({"moments", *(kind.removesuffix("?") for kind in needs)})


class Gathered(NamedTuple):
    """What one run of a text has left: its file of statistics, of all kinds that outputs read; and the text's token ids."""

    path: Path
    facts: Facts
    texts: list[list[int]]
    held_out: list[list[int]]


def all_calibrated(
    outputs: Sequence[tuple[Request, frozenset[str]]], source: Source, graph: Graph
) -> list[Calibrated]:
    """Of each output with the kinds that it reads; a text is run once, for all kinds that anyone reads of it.

    UsageError for flags that do not go together; InputError for files of another model, or without what is wanted.
    """
    for request, wanted in outputs:
        refuse_contradictions(request, wanted)
    kinds, places, runs = dict[str, frozenset[str]](), dict[str, Path](), dict[str, Gathered]()
    for request, wanted in outputs:
        if wanted and reads_text(request):
            kinds[key_of(request)] = kinds.get(key_of(request), frozenset()) | wanted
            if request.save_statistics is not None:
                places.setdefault(key_of(request), request.save_statistics)

    def gathered(request: Request) -> Gathered:
        if (key := key_of(request)) not in runs:
            runs[key] = from_text(request, source, graph, places.get(key) or unused(source.store), kinds[key])
        return runs[key]

    return [_calibrated(request, source, graph, wanted, gathered) for request, wanted in outputs]


def reads_text(request: Request) -> bool:
    return request.imatrix is None and request.statistics is None and not request.dry_run


def key_of(request: Request) -> str:
    """Outputs with the same one see the same text."""
    return f"{request.calibrate} {request.calibrate_tokens} {Solving.of(request.solver).auto}"


def _calibrated(
    request: Request, source: Source, graph: Graph, wanted: frozenset[str], gathered: Callable[[Request], Gathered]
) -> Calibrated:
    if not wanted:
        return Calibrated()
    sites = sites_of(graph)
    if request.imatrix is not None:
        return from_imatrix(request, source, graph, request.imatrix, sites, wanted)
    if request.statistics is not None:
        path = request.statistics
        facts, model = read_facts(path)
        if not request.rehearse:  # statistics of all layers are of another model than a few of them
            refuse_other_model(path, model, graph, source.store)
        read_found(path, sites, wanted)
        return from_file(request, source, graph, path, facts, sites, wanted)
    if request.dry_run:
        planned = Facts(str(request.calibrate or OWN), request.calibrate_tokens or N_TOKENS, LENGTH)
        return Calibrated(Calibrate(FILE, sites, wanted, about=about_of(planned, sites, str(request.save_imatrix or ""))))
    path, facts, texts, held_out = gathered(request)
    if request.save_statistics is not None and request.save_statistics != path:
        shutil.copyfile(path, request.save_statistics)
    return replace(from_file(request, source, graph, path, facts, sites, wanted), texts=texts, held_out=held_out)


def refuse_contradictions(request: Request, wanted: frozenset[str]) -> None:
    given = [flag for flag in ("calibrate", "imatrix", "statistics") if getattr(request, flag) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]}: statistics come from one of them", hint=f"drop --{given[1]}")
    if request.save_statistics is not None and (kept := request.imatrix or request.statistics):
        raise UsageError(f"--save-statistics {request.save_statistics}: {kept} has them", hint="--calibrate FILE")
    flags = ("imatrix", "statistics", "save_imatrix", "save_statistics")
    for flag in (*flags, *(("calibrate",) if request.to in USES else ())):
        if not wanted and (value := getattr(request, flag)) is not None:
            solver = f"solver {request.solver} reads" if request.solver else f"the solver of --to {request.to} reads"
            hint = "--solver gptq, or --to gguf with its own"
            raise UsageError(f"--{flag.replace('_', '-')} {value}: {solver} no statistics", hint=hint)
    if request.calibrate_tokens is not None and (request.imatrix or request.statistics):
        raise UsageError(f"--calibrate-tokens {request.calibrate_tokens}: no text is read", hint="--calibrate FILE")


def from_text(request: Request, source: Source, graph: Graph, path: Path, kinds: frozenset[str]) -> Gathered:
    """Run the graph on the text and write what was seen."""
    calibration = calibration_of(request, source.store, tokenizer_of(source, graph))
    n_tokens = N_RANGE_TOKENS if kinds <= {"moments", *SPREAD} else N_TOKENS
    texts, sites = cut(calibration, graph, n_tokens), sites_of(graph)
    held = max(1, len(texts) // 8) if Solving.of(request.solver).auto and len(texts) > 1 else 0
    texts, held_out = texts[: len(texts) - held], texts[len(texts) - held :]
    facts = Facts(calibration.whose, sum(map(len, texts)), max(map(len, texts)), sha256_of(texts))
    with uninterrupted():
        from qconvert.check import torch_threads  # loads torch
        from qconvert.layerwise import run_layerwise
        from qconvert.observers import SiteWatcher
    start = time.perf_counter()
    model = fingerprint(graph, calibration.store)
    with torch_threads(calibration.threads), StatisticsFile(path, sites, kinds, facts, model) as file:
        run_layerwise(graph, Weights(graph, calibration.store), texts, SiteWatcher(sites, kinds, file.write))
    log.info("calibrate         %6.1f s   %d tokens", time.perf_counter() - start, facts.tokens)
    return Gathered(path, facts, texts, held_out)


def from_file(
    request: Request, source: Source, graph: Graph, path: Path, facts: Facts, sites: tuple[Site, ...], kinds: frozenset[str]
) -> Calibrated:
    alias = known_as(source.store, path)
    found = read_found(path, sites, kinds)
    if request.save_imatrix is not None:
        entries = {s.key: Entry(found[s.key].moments, found[s.key].counts) for s in sites}
        named = {gguf_name(graph, w): entries[s.key] for s in sites for w in s.weights}
        gguf_imatrix.write(request.save_imatrix, IMatrix(named, (facts.text,), facts.chunks, facts.length))
    step = Calibrate(path.name, sites, kinds, about_of(facts, sites, str(request.save_imatrix or "")), alias)
    notes, coverage = told(request, sites, found, facts)
    return Calibrated(step, notes, coverage)


def known_as(store: Store, path: Path) -> str:
    """The alias of a file of statistics; of several outputs each may have another."""
    n = 0
    while store.roots.get(alias := f"{ALIAS}{n or ''}", path.parent) != path.parent:
        n += 1
    store.add(alias, path)
    return alias


def unused(store: Store) -> Path:
    """Where a file of statistics can be put that is not kept."""
    names = (f"{n or ''}{FILE}" for n in count())
    return next(path for name in names if not (path := store.scratch() / name).exists())


def from_imatrix(
    request: Request, source: Source, graph: Graph, path: Path, sites: tuple[Site, ...], kinds: frozenset[str]
) -> Calibrated:
    """Each weight is a site of its own, since the file has an entry for each."""
    if more := kinds - {"moments"}:
        raise UsageError(f"--imatrix {path}: it has moments only, the solver reads {min(more)}", hint="--calibrate FILE")
    imatrix = gguf_imatrix.read(path)
    if request.save_imatrix is not None:
        gguf_imatrix.write(request.save_imatrix, imatrix)
    own = [site._replace(key=w, weights=(w,)) for site in sites for w in site.weights]
    names = {site.key: gguf_name(graph, site.key) for site in own}
    if not names.keys() & {w for w, name in names.items() if name in imatrix.entries}:
        raise InputError(f"{path}: no entry is of this model, first: {min(imatrix.entries)}", hint="is it of another model?")
    found, missing = {}, []
    for site in own:
        if (entry := imatrix.entries.get(names[site.key])) is None:
            missing.append(site.key)
            continue
        found[site.key] = fitted(path, names[site.key], entry, site)
    heads = vocabulary_weights(graph)
    if request.no_data == "error" and (first := next((w for w in missing if w not in heads), None)):
        raise InputError(f"{path}: no entry for {names[first]}", hint="--no-data search quantizes it as without an imatrix")
    text = imatrix.datasets[0] if imatrix.datasets else ""
    facts = Facts(text, imatrix.chunks * imatrix.length, imatrix.length, "", str(path))
    have = tuple(site for site in own if site.key in found)
    alias, name = ALIAS, FILE
    if not request.dry_run:
        target = unused(source.store)
        with StatisticsFile(target, have, kinds, facts, fingerprint(graph, source.store)) as file:
            for site in have:
                file.write(site, found[site.key])
        alias, name = known_as(source.store, target), target.name
    about = {**about_of(facts, have, str(path)), "entries": len(imatrix.entries), "chunks": imatrix.chunks}
    notes, coverage = told(request, have, found, facts)
    quiet = [names[w] for w in missing if w not in heads]
    notes += (f"{len(quiet)} tensors have no entry in {path} and are quantized without, first {quiet[0]}",) if quiet else ()
    return Calibrated(Calibrate(name, have, kinds, about, alias), notes, coverage)


def fitted(path: Path, name: str, entry: Entry, site: Site) -> Found:
    """An entry as the graph's weight has it. InputError where their sizes differ."""
    n = max(1, site.experts)
    if entry.moments.size != n * site.k:
        wanted = f"{site.experts} x {site.k}" if site.experts else str(site.k)
        what = f"{path}: {name} has {entry.moments.size} values, {wanted} were wanted"
        raise InputError(what, hint="is it of another model?")
    return Found(np.broadcast_to(entry.counts, n).copy(), entry.moments.reshape(n, site.k))


def about_of(facts: Facts, sites: tuple[Site, ...], file: str = "") -> dict[str, Attr]:
    n = sum(len(site.weights) for site in sites)
    return {"text": facts.text, "file": file, "chunks": facts.chunks, "entries": n, "tokens": facts.tokens}


def told(
    request: Request, sites: tuple[Site, ...], found: Mapping[str, Found], facts: Facts
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Notes, and tokens of each weight. InputError for one that no token reached, under --no-data error."""
    weights: dict[str, Any] = {}
    idle, dead = [], []
    for site in sites:
        counts, moments = found[site.key].counts, found[site.key].moments
        never = int((moments[counts > 0] == 0).sum())
        entry: dict[str, Any] = {"tokens": int(counts.sum()), "idle_channels": never}
        if site.experts:
            entry |= {"experts": counts.tolist()}
        empty = np.flatnonzero(counts == 0)
        if len(empty) and request.no_data == "error":
            what = f"expert {empty[0]} of {site.weights[0]}" if site.experts else site.weights[0]
            raise InputError(f"{what}: no token of the text reaches it", hint="more text, or --no-data search")
        for weight in site.weights:
            weights[weight] = entry
            idle += [(weight, len(empty))] if len(empty) else []
            dead += [(weight, never)] if never else []
    many = f"{facts.tokens} tokens of " if facts.tokens else ""
    notes = [f"statistics of activations are of {many}{facts.source or facts.text}"]
    if idle:
        n, (first, _) = sum(n for _, n in idle), idle[0]
        notes.append(f"{n} matrices of experts got no token, and count all inputs alike, first of {first}")
    if dead:
        n, (first, k) = sum(n for _, n in dead), dead[0]
        notes.append(f"{n} input channels are 0 on all of the text, first {k} of {first}")
    coverage = {"text": facts.text, "tokens": facts.tokens, "source": facts.source, "weights": weights}
    return tuple(notes), coverage
