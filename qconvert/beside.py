"""What is written beside an output where it is asked for: a model card (README.md) and Ollama's Modelfile.

source and plan -> Beside, refused before the first byte; proven report -> texts -> files, each whole or not at all
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Files to be written when the output has its name, and what makes the text of each from the report."""

    files: Mapping[Path, Callable[[Report], str]] = {}

    def write(self, report: Report) -> tuple[Path, ...]:
        for path, text in self.files.items():
            part = path.with_name(f".{path.name}.part")
            try:
                part.write_text(text(report), encoding="utf-8")
                part.replace(path)
            except OSError as e:
                part.unlink(missing_ok=True)
                raise ResourceError(f"cannot write {path}: {e.strerror}", hint="the output itself is whole") from e
        return tuple(self.files)


def beside(request: Request, source: Source, lowered: Lowered) -> Beside:
    """UsageError for files that exist; UnsupportedError for licences that go not together, InputError for what says them."""
    if request.license is not None and not request.card:
        raise UsageError(f"--license {request.license} goes with --card")
    plan, graph = lowered.plan, lowered.graph
    files: dict[Path, Callable[[Report], str]] = {}
    modelfile: Path | None = None
    if request.modelfile:
        modelfile = place(request, plan, "Modelfile", ".Modelfile", gguf_ollama.mark(plan))
        text = gguf_ollama.modelfile(request, source, lowered)
        files[modelfile] = lambda _: text
    if request.card:
        task = task_of(source, graph)
        made = Made(name_of(plan), lowered.legal.quant, file_names(plan), folder_of(plan), task,
                    None if modelfile is None else modelfile.name)  # fmt: skip
        origins = tuple(origins_of(request, source))
        title = " + ".join(o.id.rpartition("/")[2] if o.id else o.name for o in origins)
        facts = Facts(
            title, origins, license_from(request, origins), any("." in e.dtype for e in plan.entries), source.swap,
            task, usage_of(request.to, made), recipe_text((published(request, origins, plan),)), __version__,
        )  # fmt: skip
        at = place(request, plan, "README.md", ".md", card_mark(plan))
        files[at] = lambda report: f"{card(report, facts)}\n{card_mark(plan)}\n"
    return Beside(files)


def place(request: Request, plan: Plan, usual: str, ending: str, mark: str) -> Path:
    """Its usual name; beside a single file another, where the usual one is of something else. UsageError where it exists.

    mark: a line by which a file is known to be of this output.
    """
    folder = plan.folder or plan.files[0].path.parent
    path = folder / usual
    if not plan.folder and path.exists() and mark not in lines_of(path):
        path = folder / f"{name_of(plan)}{ending}"
    if path.exists() and not request.force:
        raise UsageError(f"{path} exists already", hint="--force overwrites it")
    return path


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def card_mark(plan: Plan) -> str:
    return f"<!-- card of {re.sub('[^ -~]|--|[<>]', '_', (plan.folder or plan.files[0].path).name)} -->"


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
    return replace(request, output=Path((plan.folder or plan.files[0].path).name), dump_ir=None)
