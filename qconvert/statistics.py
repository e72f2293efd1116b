"""Statistics of activations as tensors of one safetensors file: which there are, how they lie there, whose they are.

    SITE.counts   i64[1] or [E]                tokens that were seen
    SITE.moments  f32[K] or [E,K]              the mean of x * x over tokens, by input channel
    SITE.hessian  f32[K,K] or [E,K,K]          the mean of x x^T, where a solver asked for it
    SITE.peaks    f32[K] or [E,K]              the greatest |x|, where a fold asked for it
    SITE.histogram i64[BINS] or [E,BINS]       of all x (histograms.py), where ranges of activations are chosen by it
    SITE.extremes f32[2] or [E,2]              with it: the least and the largest x

A site is what one or several weights multiply: q, k and v read the same activation, so they share its tensors. Experts have
two sites, each expert with the tokens that reach it: NODE.in, and NODE.inner which the last product reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.errors import InputError, ResourceError
from qconvert.graph import Graph
from qconvert.histograms import BINS
from qconvert.scheme import F32
from qconvert.sources import Store
from qconvert.text import format_node

ALIAS = "statistics"
FILE = "statistics.safetensors"
KIND = "qconvert statistics 1"
KINDS = ("moments", "hessian", "peaks", "histogram", "extremes")
SPREAD = frozenset({"histogram", "extremes"})


class Site(NamedTuple):
    """values: activations that the weights multiply, of E experts the node that does; k: their features; experts: E or 0."""

    key: str
    weights: tuple[str, ...]
    values: tuple[str, ...]
    k: int
    experts: int = 0


class Found(NamedTuple):
    """counts i64[E or 1], moments f32[E or 1,K], hessian f32[E or 1,K,K], peaks f32[E or 1,K], histogram i64[E or 1,BINS],
    extremes f32[E or 1,2]."""

    counts: npt.NDArray[np.int64]
    moments: F32
    hessian: F32 | None = None
    peaks: F32 | None = None
    histogram: npt.NDArray[np.int64] | None = None
    extremes: F32 | None = None


@dataclass(frozen=True)
class Facts:
    """Whose statistics they are. text: a file's name; length: tokens of a sequence; source: an imatrix that was read."""

    text: str
    tokens: int
    length: int
    sha256: str = ""
    source: str = ""

    @property
    def chunks(self) -> int:
        return self.tokens // max(1, self.length)


def sites_of(graph: Graph) -> tuple[Site, ...]:
    """Every weight that a linear or experts multiply is in one site."""
    reads: dict[str, list[str]] = {}
    out: list[Site] = []
    stacked: set[str] = set()
    for name, node in graph.nodes.items():
        if node.op == "linear" and node.inputs[0] not in reads.setdefault(node.inputs[1], []):
            reads[node.inputs[1]].append(node.inputs[0])
        if node.op == "experts":
            *first, down = node.inputs[2:]
            for key, stacks in ((f"{name}.in", tuple(first)), (f"{name}.inner", (down,))):
                e, _, k = graph.nodes[stacks[0]].type.dims
                out += [Site(key, stacks, (name,), k, e)] if not stacked & set(stacks) else []
                stacked |= set(stacks)
    together: dict[tuple[str, ...], list[str]] = {}
    for weight, values in reads.items():
        together.setdefault(tuple(values), []).append(weight)
    for read, shared in together.items():
        out.append(Site("+".join(read), tuple(shared), read, graph.nodes[shared[0]].type.dims[1]))
    return tuple(out)


def shapes_of(site: Site, kinds: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Those of KINDS that are in `kinds`, and the shape of each."""
    each = (site.experts,) if site.experts else ()
    ends = {"hessian": (site.k, site.k), "histogram": (BINS,), "extremes": (2,)}
    return {kind: (*each, *ends.get(kind, (site.k,))) for kind in KINDS if kind in kinds}


def tensors_of(site: Site, kinds: Collection[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> safetensors dtype and shape."""
    whole, shapes = {"histogram": "I64"}, shapes_of(site, kinds)
    out = {f"{site.key}.{kind}": (whole.get(kind, "F32"), shape) for kind, shape in shapes.items()}
    return {f"{site.key}.counts": ("I64", (max(1, site.experts),)), **out}


class StatisticsFile:
    """A file of statistics as it is written, a site at a time: Hessians of a whole model need not fit into memory."""

    def __init__(self, path: Path, sites: Iterable[Site], kinds: Collection[str], facts: Facts, model: str) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.at, entries, end = dict[str, int](), {}, 0
        for site in sites:
            for name, (dtype, shape) in tensors_of(site, kinds).items():
                begin, end = end, end + math.prod(shape) * (8 if dtype == "I64" else 4)
                entries[name], self.at[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}, begin
        about = {"kind": KIND, "model": model, **{k: str(v) for k, v in vars(facts).items()}}
        text = json.dumps({"__metadata__": about, **entries}).encode()
        text += b" " * (-len(text) % 8)
        self.begin = 8 + len(text)
        try:
            self.file = self.part.open("wb")
            self.file.write(len(text).to_bytes(8, "little") + text)
            self.file.truncate(self.begin + end)
        except OSError as e:
            raise ResourceError(f"{path}: {e.strerror}", hint="--save-statistics names a place to write") from e

    def write(self, site: Site, found: Found) -> None:
        for kind, value in found._asdict().items():
            if value is not None:
                self.file.seek(self.begin + self.at[f"{site.key}.{kind}"])
                self.file.write(np.ascontiguousarray(value).data)

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whole, or not at all."""
        self.file.close()
        if kind is None:
            self.part.replace(self.path)
        else:
            self.part.unlink()


def read_facts(path: Path) -> tuple[Facts, str]:
    """What a file of statistics says of itself, and the fingerprint of its model. InputError where it is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be read: {e}", hint="--statistics takes what --save-statistics wrote") from e
    if about.get("kind") != KIND:
        raise InputError(f"{path}: not a file of statistics", hint="--statistics takes what --save-statistics wrote")
    try:
        numbers = int(about["tokens"]), int(about["length"])
        return Facts(about["text"], *numbers, about["sha256"], about["source"]), about["model"]
    except (KeyError, ValueError) as e:
        raise InputError(f"{path}: its metadata is damaged: {e}", hint="calibrate again") from e


def refuse_other_model(path: Path, model: str, graph: Graph, store: Store) -> None:
    if model != fingerprint(graph, store):
        raise InputError(
            f"{path}: statistics of another model, or of other adapters or weights of them",
            hint="--calibrate takes them anew; --save-statistics keeps them",
        )


def fingerprint(graph: Graph, store: Store) -> str:
    """SHA-256 of the nodes, and of the first row of every tensor that they load."""
    digest = hashlib.sha256()
    for name, node in graph.nodes.items():
        digest.update(format_node(name, node).encode())
        if node.op == "load":
            read = store.read_stacked if len(node.type.shape) > 2 else store.read
            digest.update(np.ascontiguousarray(read(str(node.attrs["tensor"]), 0, 1)).tobytes())
    return digest.hexdigest()


def read_found(path: Path, sites: Iterable[Site], kinds: Collection[str]) -> Mapping[str, Found]:
    """Counts and moments by site's key. InputError where a tensor of `kinds` is not there."""
    from safetensors import safe_open

    out = {}
    with safe_open(path, "np") as file:
        have = set(file.keys())
        for site in sites:
            for name, (_, shape) in tensors_of(site, kinds).items():
                if name not in have or tuple(file.get_slice(name).get_shape()) != shape:
                    raise InputError(f"{path}: {name} {list(shape)} is not there", hint="calibrate again")
            found = (file.get_tensor(f"{site.key}.{kind}") for kind in ("counts", "moments"))
            counts, moments = found
            out[site.key] = Found(counts, moments.reshape(len(counts), -1))
    return out


def sha256_of(texts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

