"""A rehearsal: the whole recipe on the first layers of a model, so that what would go wrong late goes wrong in seconds.

request -> little text, outputs in a folder that is removed     checkpoint, adapters -> as if the model had a few layers
It has two, or as many as it takes until each kind of layer was there (windows, experts): which comes where is fixed in
runtimes, so none is left out in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from qconvert.adapters import Adapter
from qconvert.config_reader import Reader
from qconvert.errors import UnsupportedError, UsageError
from qconvert.families import Family, family_of
from qconvert.request import Request
from qconvert.settings import Settings, read_settings
from qconvert.sources import Checkpoint, TensorInfo
from qconvert.stored_forms import SAID_IN, stored_form

LAYERS, MOST = 2, 8
EVAL_TOKENS, CALIBRATE_TOKENS = 256, 2048
REASON = "its layer has no part in a rehearsal"


@dataclass(frozen=True)
class Rehearsal:
    """layers: that are left, of so many; module: matches what is of a layer, whose number is its group."""

    layers: int
    of: int
    module: re.Pattern[str]
    missing: bool = False  # a kind of layer that comes too late

    def keeps(self, name: str) -> bool:
        found = self.module.search(name)
        return found is None or int(found[1]) < self.layers

    @property
    def notes(self) -> tuple[str, ...]:
        late = (f"rehearsal: a kind of layer that comes after the first {MOST} has no part in it",) if self.missing else ()
        return (f"rehearsal: {self.layers} of {self.of} layers, on little text; nothing is kept", *late)

    @property
    def facts(self) -> dict[str, object]:
        return {"rehearsal": {"layers": self.layers, "of": self.of}}


def refuse_rehearsing(request: Request) -> None:
    if request.dry_run:
        raise UsageError("--rehearse and --dry-run: a rehearsal reads weights", hint="drop one of them")
    if request.keeps_graph:
        raise UnsupportedError("--rehearse: an ONNX model's layers are not known apart", hint="--dry-run, or the checkpoint")


def rehearsing(request: Request, folder: Path) -> Request:
    """The same with little text, and all that it writes in `folder`."""
    folder.mkdir()
    text = request.imatrix is None and request.statistics is None
    n = min(request.calibrate_tokens or CALIBRATE_TOKENS, CALIBRATE_TOKENS) if text else request.calibrate_tokens
    tokens = EVAL_TOKENS if request.eval_tokens is None else min(request.eval_tokens, EVAL_TOKENS)
    output = folder / "out" / (Path(request.output).name if request.output else "rehearsal")
    files = ("save_imatrix", "save_statistics", "manifest")
    kept = {key: folder / path.name for key in files if (path := getattr(request, key))}
    return replace(request, output=output, calibrate_tokens=n, eval_tokens=tokens, **kept)


# fewer layers -------------------------------------------------------------------------------------


def shortened(checkpoint: Checkpoint) -> tuple[Checkpoint, Rehearsal, list[str]]:
    """A model of its first layers, and the refs of the tensors of all others."""
    where, config = str(checkpoint.place), checkpoint.config
    family = family_of(config, where)
    form = stored_form(config, where)
    ours = {k: v for k, v in config.items() if form is None or k not in SAID_IN}
    found = rehearsal_of(read_settings(family.in_gguf() if checkpoint.gguf else family, ours, where), family)
    keys = [k for k in family.config["layers"].spellings if k in config]
    cut = {**config, **dict.fromkeys(keys or [Reader(family, config, where).key("layers")], found.layers)}
    if isinstance(kinds := config.get("layer_types"), list):
        cut["layer_types"] = kinds[: found.layers]
    kept, others = parted(checkpoint.tensors, found)
    return checkpoint._replace(config=cut, tensors=kept), found, others


def rehearsal_of(settings: Settings, family: Family) -> Rehearsal:
    sparse = settings.experts.layers if settings.experts else ()
    kinds = [(window is None, i in sparse) for i, window in enumerate(settings.windows)]
    enough = next(n for n in range(min(LAYERS, len(kinds)), len(kinds) + 1) if set(kinds[:n]) == set(kinds))
    n = enough if enough <= MOST else LAYERS
    stems = {m[1] for name in family.names.values() if (m := re.search(r"(\w+)\.\{i\}\.", name))}
    return Rehearsal(n, len(kinds), re.compile(rf"(?:^|\.)(?:{'|'.join(sorted(stems))})\.(\d+)\."), enough > MOST)


def parted(tensors: Mapping[str, TensorInfo], rehearsal: Rehearsal) -> tuple[dict[str, TensorInfo], list[str]]:
    kept = {name: info for name, info in tensors.items() if rehearsal.keeps(name)}
    return kept, [info.ref for name, info in tensors.items() if name not in kept]


def without_others(adapter: Adapter, rehearsal: Rehearsal) -> Adapter:
    """What the adapter has for layers that are left."""
    factors = tuple(f for f in adapter.factors if rehearsal.keeps(f"{f.module}."))
    replacements = tuple(r for r in adapter.replacements if rehearsal.keeps(r.parameter))
    rows = tuple(r for r in adapter.rows if rehearsal.keeps(f"{r.module}."))
    short = replace(adapter, factors=factors, replacements=replacements, rows=rows)
    unknown = tuple(ref for ref in adapter.unknown if rehearsal.keeps(ref.partition("#")[2]))
    gone = refs(adapter.tensors()) - refs(short.tensors()) | set(adapter.unknown) - set(unknown)
    return replace(short, unknown=unknown, dropped={**adapter.dropped, **dict.fromkeys(sorted(gone), REASON)})


def refs(tensors: Iterable[TensorInfo]) -> set[str]:
    return {info.ref for info in tensors}


def left_out(dropped: object, others: Iterable[str]) -> list[dict[str, str]]:
    """graph.meta's list of what was dropped, with these."""
    return [*cast(list[dict[str, str]], dropped), *({"tensor": ref, "reason": REASON} for ref in others)]
