"""What is written beside an output where it is asked for: a model card (README.md) and Ollama's Modelfile.

source and plan -> Beside, refused before the first byte; proven report -> texts -> files, each whole or not at all
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qconvert import __version__
from qconvert.companions import n_vocab
from qconvert.emit import Plan
from qconvert.errors import ResourceError, UsageError
from qconvert.formats import gguf_ollama
from qconvert.gguf_reader import read_header
from qconvert.graph import Graph
from qconvert.licenses import License, from_front_matter, joined, license_of, of_gguf, said
from qconvert.model_card import Facts, Origin, card
from qconvert.provenance import adapters_of, names_of
from qconvert.recipe import recipe_text
from qconvert.report import Report
from qconvert.request import AdapterSpec, Request
from qconvert.target import Lowered, Source
from qconvert.usage import Made, usage_of

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9]\w*(?:[.-]\w+)*/[A-Za-z0-9]\w*(?:[.-]\w+)*")
MOST = 96  # characters of an id


class Beside(NamedTuple):
    """Files to be written when the output has its name: where, which is asked again then, as several outputs may lie in one
    folder; and what makes the text of each from the report."""

    files: tuple[tuple[Callable[[], Path], Callable[[Report], str]], ...] = ()

    def write(self, report: Report) -> tuple[Path, ...]:
        return tuple(written(where(), text(report)) for where, text in self.files)


def written(path: Path, text: str) -> Path:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path}: {e.strerror}", hint="the output itself is whole") from e
    return path


def beside(request: Request, source: Source, lowered: Lowered) -> Beside:
    """UsageError for files that exist; UnsupportedError for licences that go not together, InputError for what says them."""
    if request.license is not None and not request.card:
        raise UsageError(f"--license {request.license} goes with --card")
    plan = lowered.plan

    def modelfile(force: bool = True) -> Path:
        return place(plan, "Modelfile", ".Modelfile", gguf_ollama.mark(plan), force)

    def readme(force: bool = True) -> Path:
        return place(plan, "README.md", ".md", card_mark(plan), force)

    files: list[tuple[Callable[[], Path], Callable[[Report], str]]] = []
    if request.modelfile:
        modelfile(request.force)
        text = gguf_ollama.modelfile(request, source, lowered)
        files.append((modelfile, lambda _: text))
    if request.card:
        readme(request.force)
        make = card_of(request, source, lowered)
        files.append((readme, lambda report: make(report, modelfile().name if request.modelfile else None)))
    return Beside(tuple(files))


def card_of(request: Request, source: Source, lowered: Lowered) -> Callable[[Report, str | None], str]:
    """report, name of the Modelfile -> the card."""
    plan, task = lowered.plan, task_of(source, lowered.graph)
    made = Made(name_of(plan), lowered.legal.quant, file_names(plan), folder_of(plan), task)
    origins = tuple(origins_of(request, source))
    title = " + ".join(o.id.rpartition("/")[2] if o.id else o.name for o in origins)
    known, quantized = license_from(request, origins), any("." in e.dtype for e in plan.entries)
    recipe = recipe_text((published(request, origins, plan),))

    def text(report: Report, modelfile: str | None) -> str:
        usage = usage_of(request.to, made._replace(modelfile=modelfile))
        facts = Facts(title, origins, known, quantized, source.swap, task, usage, recipe, __version__)
        return f"{card(report, facts)}\n{card_mark(plan)}\n"

    return text


def place(plan: Plan, usual: str, ending: str, mark: str, force: bool) -> Path:
    """Its usual name; beside a single file another, where the usual one is of something else. UsageError where it exists.

    mark: a line by which a file is known to be of this output.
    """
    folder = plan.folder or plan.files[0].path.parent
    path = folder / usual
    if not plan.folder and path.exists() and mark not in lines_of(path):
        path = folder / f"{name_of(plan)}{ending}"
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="--force overwrites it")
    return path


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def card_mark(plan: Plan) -> str:
    return f"<!-- card of {re.sub('[^ -~]|--|[<>]', '_', plan.paths[0].name)} -->"


def name_of(plan: Plan) -> str:
    """Of the output, without ending and number of a shard."""
    return plan.folder.name if plan.folder else SHARD.sub("", plan.files[0].path.stem)


def folder_of(plan: Plan) -> str | None:
    return plan.folder.name if plan.folder else None


def file_names(plan: Plan) -> tuple[str, ...]:
    return tuple(str(f.path.relative_to(plan.folder).as_posix()) if plan.folder else f.path.name for f in plan.files)


def task_of(source: Source, graph: Graph) -> str:
    """The Hub's pipeline_tag: text where the model gives logits of a vocabulary, else what is made of hidden states."""
    if graph.nodes[graph.outputs[0]].type.shape[-1] == n_vocab(graph):
        return "text-generation"
    sentences = (source.checkpoint.folder / "modules.json").is_file()
    return "sentence-similarity" if sentences else "feature-extraction"


# what it was made from -----------------------------------------------------------------------------


def origins_of(request: Request, source: Source) -> Iterator[Origin]:
    """The model and its adapters, their ids on the Hub and their licences."""
    model, *names = names_of(source, source.graph)
    folder, gguf = source.checkpoint.folder, source.checkpoint.gguf
    config = {} if gguf else source.checkpoint.config
    bases = {a.base for a in source.adapters}
    recorded = [*(bases if len(bases) == 1 else ()), config.get("_name_or_path")]
    place = gguf.file if gguf else folder
    kv = read_header(gguf.file).kv if gguf else {}
    read = request.card and request.license is None
    found = None
    if read:
        found = of_gguf(kv, place) or from_front_matter(place.with_name("README.md")) if gguf else license_of(folder)
    yield Origin("model", model, hub_id(source.name, place, recorded), source.checkpoint.revision, 1.0, found)
    for name, spec, adapter in zip(names, request.adapters, source.adapters, strict=True):
        root = source.store.roots[adapter.alias]
        weight = dict(adapters_of(source.graph)).get(name, spec.weight)
        yield Origin("adapter", name, hub_id(spec.path, root, ()), adapter.revision, weight, license_of(root) if read else None)


def hub_id(name: str, place: Path, recorded: Sequence[object]) -> str | None:
    """org/name: as it was asked for, else the cached repository's, else what files say that were made of it; never a path."""
    asked = name.partition("@")[0]
    if is_id(asked) and not Path(name).exists():
        return asked
    for folder in (p for start in (place.absolute(), place.resolve()) for p in (start, *start.parents)):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return next((text for text in recorded if isinstance(text, str) and is_id(text) and not leads_to(text, place)), None)


def is_id(text: str) -> bool:
    return len(text) <= MOST and ID.fullmatch(text) is not None and not text.endswith((".git", ".ipynb"))


def leads_to(text: str, place: Path) -> bool:
    """Whether it is a path, from here or from any folder above the model."""
    return any(os.path.lexists(folder / text) for folder in (Path(), *place.resolve().parents))


def license_from(request: Request, origins: Sequence[Origin]) -> License | None:
    if request.license is not None:
        return said(request.license)
    changed = any(o.kind == "adapter" for o in origins)
    return joined([(f"the {o.kind} {o.name}", o.license) for o in origins], changed)


def published(request: Request, origins: Sequence[Origin], plan: Plan) -> Request:
    """The request without paths of the machine that it was run on."""
    model, *adapters = origins
    known = [f"{o.id}@{o.revision}" if o.id and o.revision else o.id or o.name for o in (model, *adapters)]
    paths: dict[str, Any] = {name: Path(value.name) for name, value in vars(request).items() if isinstance(value, Path)}
    named = tuple(AdapterSpec(each, o.weight) for each, o in zip(known[1:], adapters, strict=True))
    request = replace(request, **paths, model=known[0], adapters=named, threads=None, force=False)
    return replace(request, output=Path(plan.paths[0].name), dump_ir=None)
