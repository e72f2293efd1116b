"""Read a PEFT folder into a frozen record: what each tensor is, what it belongs to, and its scale. Headers only.

Several adapters with weights mean W + sum_i weight_i * (W_i - W), where W_i is the base with adapter i alone merged
into it. So one adapter at weight 1.0 is exactly itself, whatever its kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from qconvert.adapter_config import (
    CONFIG,
    in_modules_to_save,
    kind_of,
    names_of,
    pattern_value,
    read_config,
    text_of,
)
from qconvert.adapter_pooling import ELASTIC, Pooled, pooled_of
from qconvert.dtypes import FLOATS
from qconvert.errors import AdapterError, Place, UnsupportedError, UsageError, located
from qconvert.sources import Store, TensorInfo

PREFIX = "base_model.model."
# A part of a key, then what follows it: an adapter's name, "weight", "bias".
PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_\w+|token_adapter\.trainable_tokens_delta|token_adapter\.base_layer|base_layer|"
    r"modules_to_save|original_module)(?:\.(?P<rest>.+))?$"
)
IGNORED = {"lora_velora_embed": "read in training only"}


class Factors(NamedTuple):
    """A low-rank update of one module: scale * B @ A. Linear: A[r,K], B[N,r]; embedding: A[r,V], B[D,r]."""

    module: str  # as the adapter names it: model.layers.0.self_attn.q_proj
    a: TensorInfo
    b: TensorInfo
    scale: float
    embedding: bool
    magnitude: TensorInfo | None  # DoRA: [N] of a linear, [D] of an embedding
    bias: TensorInfo | None  # lora_bias: [N]
    pooled: Pooled | None = None  # QA-LoRA: A[r,K/g] reads what its inputs were pooled to


class Replacement(NamedTuple):
    """A whole parameter. base: the weight that the adapter lies on (resized vocabulary, trained biases), which tied
    layers share; saved: one of modules_to_save, trained beside the base, which they do not."""

    parameter: str
    tensor: TensorInfo
    kind: Literal["base", "saved"]


class TokenRows(NamedTuple):
    """Rows of an embedding or head that were trained: row indices[j] becomes row j of the tensor [n,D]."""

    module: str
    tensor: TensorInfo
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter. Tensor infos carry refs into the store under `alias`."""

    name: str
    alias: str
    folder: Path
    weight: float
    kind: str  # "lora", "rslora", "dora", "dora+rslora"
    base: str | None  # base_model_name_or_path and its revision, as recorded
    base_revision: str | None
    revision: str | None  # the adapter's own commit, where the folder is a snapshot of the Hugging Face cache
    factors: tuple[Factors, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    rows: tuple[TokenRows, ...] = ()
    unknown: tuple[str, ...] = ()  # refs of tensors that are no part of a LoRA
    dropped: Mapping[str, str] = field(default_factory=dict)  # refs of tensors left out -> why
    twins: frozenset[str] = frozenset()  # refs of the head's tensors that equal the embedding's
    ensure_weight_tying: bool = False
    modules_to_save: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()  # target_modules, where every module that they match must be in the file

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    def place(self, ref: str) -> Place:
        return place_in(self.folder, ref)

    def tensors(self) -> Iterator[TensorInfo]:
        for f in self.factors:
            yield from (t for t in (f.a, f.b, f.magnitude, f.bias, *(f.pooled.elastic if f.pooled else ())) if t is not None)
        yield from (r.tensor for r in self.replacements)
        yield from (r.tensor for r in self.rows)


def place_in(folder: Path, ref: str) -> Place:
    """Of a tensor, ALIAS/FILE#KEY, in the folder that the store knows as ALIAS."""
    file, _, key = ref.partition("#")
    return Place(str(folder / file.partition("/")[2]), key=key)


def read_adapter(
    folder: Path, store: Store, alias: str, weight: float = 1.0, pooling: str | None = None, own_base: bool = False
) -> Adapter:
    """Read the config and the headers of a PEFT folder, which `store` will then know as `alias`.

    pooling: of a QA-LoRA adapter that does not say how its inputs were pooled, a name of adapter_pooling.FACTORS.
    own_base: the model is the very one that it was trained on, whatever the initialisation did to it.
    AdapterError where the two do not fit each other, or its base is not the plain one; UnsupportedError for another
    kind of adapter or a setting that is not understood; UsageError for a weight of 0, inf or nan.
    """
    if not math.isfinite(weight) or weight == 0:
        raise UsageError(f"{folder}: an adapter's weight is a number other than 0, not {weight:g}")
    config = read_config(folder, own_base)
    store.add(alias, folder)
    found = _Found(folder, config, pooling)
    for key, info in store.tensors(alias).items():
        with located(place_in(folder, info.ref)):
            found.take(key, info)
    factors = tuple(found.factors())
    rows = tuple(found.rows_of(module, info) for module, info in found.rows.items())
    replacements = tuple(found.replacements())
    if not (factors or rows or replacements):
        raise AdapterError(f"{folder}: has no adapter tensor", hint=_some_keys(store.tensors(alias)))
    name, revision = _named(folder)
    targets = config.get("target_modules")
    partial = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    return Adapter(
        name=name, alias=alias, folder=folder, weight=weight, kind=kind_of(config),
        base=text_of(config, "base_model_name_or_path"),
        base_revision=text_of(config, "revision"), revision=revision,
        factors=factors, replacements=replacements, rows=rows, unknown=tuple(found.unknown), dropped=found.dropped,
        twins=_twins(store, factors, replacements, rows), ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        modules_to_save=names_of(config, "modules_to_save"),
        targets=tuple(map(str, targets)) if isinstance(targets, list) and not partial else (),
    )  # fmt: skip


# the tensors --------------------------------------------------------------------------------------


@dataclass
class _Found:
    """Keys of one file, sorted by what they are."""

    folder: Path
    config: Mapping[str, object]
    pooling: str | None = None
    parts: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # module -> part -> tensor
    rows: dict[str, TensorInfo] = field(default_factory=dict)
    base: dict[str, TensorInfo] = field(default_factory=dict)  # parameter -> tensor
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    copies: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, info: TensorInfo) -> None:
        if info.dtype not in FLOATS:
            raise UnsupportedError(f"{info.ref}: is {info.dtype}; adapters in {', '.join(FLOATS)} can be read")
        name = key.removeprefix(PREFIX)
        m = PART.match(name)
        if m is None:
            self._take_parameter(name, info)
            return
        module, part, rest = m["module"], m["part"], m["rest"] or ""
        tail = rest.rpartition(".")[2]
        if part in ("lora_A", "lora_B") and tail not in ("weight", "bias"):
            self.unknown.append(info.ref)
        elif part in ("lora_A", "lora_B"):
            self._put(self.parts.setdefault(module, {}), part + (".bias" if tail == "bias" else ""), info)
        elif part in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", *ELASTIC):
            self._put(self.parts.setdefault(module, {}), part, info)
        elif part.endswith("trainable_tokens_delta"):
            self._put(self.rows, module, info)
        elif part == "modules_to_save":
            self.copies[f"{module}.{rest.removeprefix('default.')}"] = info
        elif part.endswith("base_layer") or part == "original_module":
            self._put(self.base, f"{module}.{rest}", info)
        elif part in IGNORED:
            self.dropped[info.ref] = IGNORED[part]
        else:
            self.unknown.append(info.ref)

    def _take_parameter(self, name: str, info: TensorInfo) -> None:
        if name.rpartition(".")[2] not in ("weight", "bias"):
            self.unknown.append(info.ref)
        else:
            names = names_of(self.config, "modules_to_save")
            tied = is_head(name) and names and self.config.get("ensure_weight_tying")  # PEFT then lists the embedding
            saved = tied or in_modules_to_save(names, name)
            self._put(self.saved if saved else self.base, name, info)

    def _put(self, where: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
        if name in where:
            raise AdapterError(
                f"{self.folder}: {where[name].ref} and {info.ref} are the same part of one module",
                hint="are there two adapters in one file? save each in a folder of its own",
            )
        where[name] = info

    def factors(self) -> Iterator[Factors]:
        for module, parts in self.parts.items():
            with located(place_in(self.folder, next(iter(parts.values())).ref)):
                yield self.factors_of(module)

    def factors_of(self, module: str) -> Factors:
        parts = self.parts[module]
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for want in (a, b):
            if want not in parts:
                there = next(iter(parts.values())).ref
                raise AdapterError(f"{there}: its partner {want} of {module} is missing", hint="the file is incomplete")
        pooled = pooled_of(self.folder, self.config, module, parts, self.pooling)
        self._check_extra(module, parts, {a, b, *(ELASTIC if pooled else ())})
        scale = self._scale(module, parts[a], parts[b])
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        return Factors(module, parts[a], parts[b], scale, embedding, magnitude, bias, pooled)

    def _check_extra(self, module: str, parts: Mapping[str, TensorInfo], wanted: set[str]) -> None:
        for part, key in (("lora_magnitude_vector", "use_dora"), ("lora_B.bias", "lora_bias")):
            on = bool(self.config.get(key))
            if on:
                wanted |= {part}
            if on and part not in parts:
                what = f"{self.folder}: {key} is true, but {module} has no {part}"
                raise AdapterError(what, hint="the file is incomplete")
        for part, info in parts.items():
            if part not in wanted:
                raise AdapterError(
                    f"{info.ref}: {CONFIG} does not say that there is a {part}",
                    hint="use_dora and lora_bias must be as they were in training",
                )

    def _scale(self, module: str, a: TensorInfo, b: TensorInfo) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, by the patterns for this module."""
        rank = pattern_value(self.config.get("rank_pattern"), module, self.config.get("r", 8), "rank")
        alpha = pattern_value(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8), "alpha")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise AdapterError(
                f"{a.ref}: A is {list(a.shape)} and B {list(b.shape)}; matrices were wanted",
                hint="an empty or flat tensor was saved from a sharded model (ZeRO-3, FSDP) without gathering it",
            )
        if not a.shape[0] == b.shape[1] == rank > 0:
            raise AdapterError(
                f"{a.ref}: A has rank {a.shape[0]} and B {b.shape[1]}, but {CONFIG} says {rank:g} for {module}",
                hint="r or rank_pattern is not the one of the training; the scale would be wrong",
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def replacements(self) -> Iterator[Replacement]:
        for name, info in self.copies.items():
            if name in self.saved:
                self.dropped[info.ref] = "a second copy; PEFT reads the other"
            else:
                self.saved[name] = info
        for name, info in self.base.items():
            yield Replacement(name, info, "base")
        for name, info in self.saved.items():
            yield Replacement(name, info, "saved")

    def rows_of(self, module: str, info: TensorInfo) -> TokenRows:
        wanted = self.config.get("trainable_token_indices")
        if isinstance(wanted, Mapping):
            lists = [value for name, value in wanted.items() if module.endswith(str(name))]
            # tied layers are trained as one: where the head's copy was saved too, it has the embedding's indices
            wanted = lists[0] if lists else next(iter(wanted.values()), None)
        indices = tuple(i for i in wanted if isinstance(i, int) and i >= 0) if isinstance(wanted, list) else ()
        if len(info.shape) != 2 or not len(set(indices)) == len(indices) == info.shape[0]:
            raise AdapterError(
                f"{info.ref}: {list(info.shape)} rows, but trainable_token_indices in {CONFIG} is {str(wanted)[:80]}",
                hint="one row for each token, each token once",
                place=place_in(self.folder, info.ref),
            )
        return TokenRows(module, info, indices)


def _named(folder: Path) -> tuple[str, str | None]:
    """What to call an adapter, and its commit: the repository's name for models--org--name/snapshots/COMMIT."""
    real = Path(folder).resolve()
    if real.parent.name == "snapshots":
        return real.parent.parent.name.rpartition("--")[2], real.name
    return real.name, None


def _some_keys(tensors: Mapping[str, TensorInfo]) -> str:
    return f"its tensors are {', '.join(list(tensors)[:3]) or 'none'}"


# twins: a tied head's copy of the embedding's tensors ----------------------------------------------


def is_head(name: str) -> bool:
    return "lm_head" in name.split(".")


def _is_embedding(name: str) -> bool:
    return any(part in ("embed_tokens", "wte") for part in name.split("."))


def _twins(
    store: Store, factors: tuple[Factors, ...], replacements: tuple[Replacement, ...], rows: tuple[TokenRows, ...]
) -> frozenset[str]:
    """Refs of the head's tensors whose bytes are the embedding's: the layers were tied, and may stay so."""
    out = set()
    for r in replacements:
        others = (e.tensor for e in replacements if e.kind == r.kind and _is_embedding(e.parameter))
        if is_head(r.parameter) and any(_equal(store, r.tensor, e) for e in others):
            out.add(r.tensor.ref)
    for t in rows:
        others = (e.tensor for e in rows if _is_embedding(e.module) and e.indices == t.indices)
        if is_head(t.module) and any(_equal(store, t.tensor, e) for e in others):
            out.add(t.tensor.ref)
    plain = [f for f in factors if f.magnitude is None and f.bias is None]
    for f in plain:
        for e in plain:
            same = is_head(f.module) and e.embedding and not f.embedding and e.scale == f.scale
            if same and _equal(store, f.a, e.b, True) and _equal(store, f.b, e.a, True):
                out |= {f.a.ref, f.b.ref}
    return frozenset(out)


def _equal(store: Store, x: TensorInfo, y: TensorInfo, transposed: bool = False) -> bool:
    """Whether two tensors hold the same bits (x those of y.T where `transposed`), read in blocks of rows."""
    if x.dtype != y.dtype or x.shape != (y.shape[::-1] if transposed else y.shape):
        return False
    n, k = x.shape[0], max(1, math.prod(x.shape[1:]))
    step = max(1, (1 << 20) // k)
    for begin in range(0, n, step):
        end = min(n, begin + step)
        other = store.read_columns(y.ref, begin, end).T if transposed else store.read(y.ref, begin, end)
        if not np.array_equal(store.read(x.ref, begin, end), other):
            return False
    return True
