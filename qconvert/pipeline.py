"""Passes and how they are run: each is timed, verified and dumped here, so that a pass is one rewrite and nothing else."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from qconvert import registry
from qconvert.errors import GraphError, QConvertError, UsageError
from qconvert.graph import Graph
from qconvert.ops import verify
from qconvert.text import format

Function = Callable[[Graph], Graph]


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options; leaves a valid graph; a declined rewrite is logged."""

    name: ClassVar[str]

    def __call__(self, graph: Graph) -> Graph: ...


class Step(NamedTuple):
    """What one pass did."""

    name: str
    seconds: float
    peak_rss_nbytes: int
    nodes_before: int
    nodes_after: int

    def __str__(self) -> str:
        nodes = f"nodes {self.nodes_before} -> {self.nodes_after}"
        return f"{self.name:<17} {self.seconds:6.1f} s   peak {self.peak_rss_nbytes / 1e6:4.0f} MB   {nodes}"


@dataclass(frozen=True)
class Pipeline:
    passes: tuple[Pass | Function, ...]

    def run(self, graph: Graph, dump: Path | None = None, log: Callable[[str], None] = lambda _: None, done: int = 0) -> Graph:
        """Apply each pass in turn. `dump`: a folder that gets 00-input.ir, 01-NAME.ir …; `done`: passes run before."""
        verify(graph)
        if not done:
            write_dump(dump, 0, "input", graph)
        for number, each in enumerate(self.passes, done + 1):
            name = name_of(each)
            start, before = time.perf_counter(), len(graph.nodes)
            new = each(graph)
            if not isinstance(new, Graph):
                raise GraphError(f"{name} returned {type(new).__name__}, not a Graph")
            try:
                verify(new)
            except QConvertError as e:
                raise GraphError(f"{name} left an invalid graph: {e.message}", hint=e.hint) from e
            graph = new
            log(str(Step(name, time.perf_counter() - start, peak_rss_nbytes(), before, len(graph.nodes))))
            write_dump(dump, number, name, graph)
        return graph

    def __str__(self) -> str:
        return ",".join(spec_of(p) for p in self.passes)


def peak_rss_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_dump(folder: Path | None, number: int, name: str, graph: Graph) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.ir").write_text(format(graph), encoding="utf-8")


def name_of(p: Pass | Function) -> str:
    return str(getattr(p, "name", None) or getattr(p, "__name__", type(p).__name__))


def spec_of(p: Pass | Function) -> str:
    """The text that parses back to the pass: `quantize{solver=search}`; defaults are left out."""
    if not is_dataclass(p) or isinstance(p, type):
        return name_of(p)
    given = [
        f"{f.name}={getattr(p, f.name)}"
        for f in fields(p)
        if f.init and getattr(p, f.name) != f.default and not callable(f.default_factory)
    ]
    return name_of(p) + (f"{{{' '.join(given)}}}" if given else "")


def parse_passes(text: str) -> tuple[Pass, ...]:
    """`a,b{x=1 y=z}` to passes, by the names in the registry. UsageError names a wrong option."""
    return tuple(cast(Pass, parsed(spec, "passes")) for spec in split_passes(text))


def split_passes(text: str) -> list[str]:
    """The specs of a pipeline: commas outside of braces part them."""
    return [spec.strip() for spec in re.findall(r"[^,{]+(?:\{[^}]*\})?", text) if spec.strip()]


def parsed(spec: str, group: str) -> object:
    """`name{option=value}` as the object of a group of the registry, made with those options. UsageError names a wrong one."""
    m = re.fullmatch(r"([\w.-]+)(?:\{([^}]*)\})?", spec)
    if not m:
        raise UsageError(f"cannot read {spec!r} of {group}", hint="name{option=value option=value}")
    cls = registry.find(group, m[1])
    if not isinstance(cls, type):  # a plain function Graph -> Graph, or what needs no options
        if m[2]:
            raise UsageError(f"{m[1]}: no option {m[2]!r}; it has none")
        return cls
    known = {f.name: f for f in fields(cls)}
    options: dict[str, object] = {}
    for item in (m[2] or "").split():
        key, eq, value = item.partition("=")
        if key not in known or not eq:
            raise UsageError(f"{m[1]}: no option {item!r}; it has {', '.join(known) or 'none'}")
        kind = known[key].type  # text, where its module postpones annotations
        options[key] = _convert(value, getattr(kind, "__name__", str(kind)), f"{m[1]}: option {key}")
    made: object = cls(**options)
    return made


def _convert(value: str, annotation: str, what: str) -> object:
    """The text of an option as the field's type says. UsageError where it is none."""
    bools = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        match annotation:
            case "bool":
                return bools[value.lower()]
            case "int":
                return int(value)
            case "float":
                return float(value)
    except (KeyError, ValueError):
        raise UsageError(f"{what} is {annotation}, not {value!r}") from None
    return value


def flatten(passes: Iterable[Pass | Function | str]) -> tuple[Pass | Function, ...]:
    """Passes as given by a user: objects, functions, or spec strings."""
    return tuple(q for p in passes for q in (parse_passes(p) if isinstance(p, str) else (p,)))
