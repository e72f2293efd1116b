"""What a format is to the driver: names, layouts and header for a graph, and the proof of what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from qconvert import registry
from qconvert.adapters import Adapter
from qconvert.emit import Plan
from qconvert.findings import Finding
from qconvert.graph import Graph
from qconvert.pipeline import Function, Pass
from qconvert.report import Report, Row
from qconvert.request import Request
from qconvert.sources import Checkpoint, Store
from qconvert.weights import Weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Source(NamedTuple):
    """The inputs, read: `base` without adapters, `graph` with each beside its linears (the reference of all checks)."""

    name: str
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    store: Store
    base: Graph
    graph: Graph
    swap: bool = False  # adapters stay out of the weights; each is used alone
    tokenizer: Path | None = None  # a folder that the user named
    notes: tuple[str, ...] = ()  # on how adapters and base go together
    facts: Mapping[str, Any] = MappingProxyType({})  # the same, for the report's accounting


def tokenizer_folder(source: Source) -> Path:
    """The folder that was named, else the last adapter's that brings a tokenizer (added tokens, a chat template), else the
    model's own.

    Where adapters are swapped the model's comes first: it serves them all.
    """
    if source.tokenizer is not None:
        return source.tokenizer
    folders = [source.checkpoint.folder, *(source.store.roots[a.alias] for a in source.adapters)]
    order = folders if source.swap else folders[::-1]
    return next((f for f in order if any((f / name).exists() for name in TOKENIZER_FILES)), folders[0])


class Legal(NamedTuple):
    """How a graph is said in a format: the passes that get it there, and what had to give.

    quant: the mix's usual name. fallbacks: {tensor, wanted, got, reason}. notes: what the format cannot say.
    """

    passes: tuple[Pass | Function, ...]
    quant: str
    fallbacks: tuple[Mapping[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    header: Any = None  # the format's own


class Menu(NamedTuple):
    """What one file of a format may hold: for each weight its types, and the bytes that each takes with its padding.

    stock: usual mixes by name, as types of the same weights. together: weights that get one type, since what loads the file
    multiplies them as one matrix, or knows one type for them. exact: bytes add up to the file's; else headers differ by types,
    and a file is planned to know its bytes. smaller: what allows files smaller than the smallest of these.
    """

    sizes: Mapping[str, Mapping[str, int]]
    stock: Mapping[str, Mapping[str, str]]
    together: Sequence[Sequence[str]] = ()
    exact: bool = True
    smaller: str = ""


class Stage(NamedTuple):
    """A graph on the way from what was trained to what is written; `exact`: it computes what the one before it does.

    attached: where adapters are swapped, `graph` (without them) with each beside its linears, as long as it has no slots.
    """

    name: str
    graph: Graph
    exact: bool
    attached: Graph | None = None


@dataclass(frozen=True)
class Calibrated:
    """step: the pass that lays statistics beside the weights, None where nothing asks for any; and what is said of them.

    coverage: text, tokens, and for each weight those that reached it. texts: their token ids, where a text was read.
    """

    step: Pass | None = None
    notes: tuple[str, ...] = ()
    coverage: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[Sequence[int]] = ()
    held_out: Sequence[Sequence[int]] = ()  # of the same text


class Lowered(NamedTuple):
    """`stages` begin with the unmerged graph; `graph` is the legal one, of packed weights. calibrated: on what."""

    stages: tuple[Stage, ...]
    graph: Graph
    options: Any
    legal: Legal
    plan: Plan
    pipeline: str
    calibrated: Calibrated = Calibrated()
    budget: Mapping[str, Any] = {}  # how types were found, where they were chosen by size or KL


class Rewritten(Protocol):
    """A file of a format as input and output: other weights, the same graph around them."""

    @property
    def graph(self) -> Graph: ...  # of the weights alone
    @property
    def plan(self) -> Plan: ...
    @property
    def quant(self) -> str: ...
    @property
    def left(self) -> Mapping[str, str]: ...  # weight -> why it is as it was
    @property
    def refs(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def pipeline(self) -> str: ...


class Rewriter(Protocol):
    """A format whose own files are inputs too."""

    def rewrite(self, request: Request, store: Store) -> Rewritten: ...

    def prove_rewritten(
        self, job: Any, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]: ...


class Format(Protocol):
    """A way to write graphs; `options` is the format's own record of what the user asked for."""

    name: ClassVar[str]

    def options(self, request: Request, source: Source, graph: Graph) -> Any: ...

    def legalize(self, graph: Graph, options: Any) -> Legal: ...

    def default_path(self, source: Source, graph: Graph, options: Any) -> Path: ...

    def plan(self, graph: Graph, options: Any, legal: Legal, path: Path) -> Plan: ...

    def prove(
        self, source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]: ...


@runtime_checkable
class Mixing(Protocol):
    """A format whose files may have another type for each weight."""

    def menu(self, graph: Graph, options: Any) -> Menu: ...

    def with_types(self, graph: Graph, options: Any, types: Mapping[str, str]) -> Any:
        """The options with which these weights get these types."""
        ...


class Item(NamedTuple):
    """A tensor of a file. of: the tensor whose scales, zero points or codes once more it holds; such hold no weights."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    of: str = ""


class Contents(NamedTuple):
    """What is in a file, or in several that are one output; metadata is what else the header says."""

    format: str
    items: Sequence[Item]
    nbytes: int
    metadata: Mapping[str, object]


class Reader(Protocol):
    """A format whose files can be looked into and proven, whoever made them."""

    def find(self, path: Path) -> Path | None:
        """The file of this format that `path` is, or that the folder holds."""
        ...

    def inspect(self, path: Path) -> Contents: ...

    def verify(self, path: Path, source: Source, merged: Graph, threads: int) -> Report: ...


@runtime_checkable
class Examiner(Protocol):
    """A reader that can say what is wrong with a file by itself; without `values`, from its headers."""

    def diagnose(self, path: Path, values: bool) -> list[Finding]: ...


def reader_of(path: Path) -> tuple[Reader, Path] | None:
    """The format that knows a file or folder, and the file to open; None where none does."""
    for name in registry.entries("formats"):
        reader = cast(type[Reader], registry.find("formats", name))()
        if hasattr(reader, "find") and (found := reader.find(path)):
            return reader, found
    return None
