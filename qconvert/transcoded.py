"""What became of weights that came quantized: codes carried over, proved bit for bit, or rounded a second time, measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, cast

import numpy as np

from qconvert.emit import row_ranges
from qconvert.graph import Graph
from qconvert.moves import moves, nearly_moves
from qconvert.report import Row, judged
from qconvert.scheme import Array, Scheme, scheme_of
from qconvert.weights import Weights

SHIFTS = ("zero", "offset")
# dtype of zero points or offsets -> how far they move weights: 2^-24 of them, so 6e-8 of weights as large; 2^-12, which is up
# to 15 codes, measured 4.5e-4; 2^-9, measured 3.9e-3
LIMITS = {"f32": 1e-6, "f16": 4e-3, "bf16": 3e-2}
log = logging.getLogger("qconvert")


class Reals(Protocol):
    """A file's weights as real numbers."""

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...


class Carried(NamedTuple):
    """A parameter and what it was in the source; `exact`: as it was; else with codes as they were, or rounded anew."""

    name: str
    stored: str  # a value of the graph
    schemes: tuple[str, str]
    exact: bool
    codes: bool


def notes(graph: Graph, types: Mapping[str, str]) -> tuple[str, ...]:
    """For a report, from the types that weights will get."""
    told: dict[str, int] = {}
    for name, dtype in types.items():
        stored = stored_dtype(graph, name)
        source, target = scheme_of(stored), scheme_of(dtype)
        if source is None or target is None:
            continue
        moved = stored == dtype or moves(source, target) or nearly_moves(source, target)
        whole = graph.nodes[name].op not in ("unsort", "rows", "across") and moved
        fate = "keep their codes" if whole else "are rounded a second time"
        label = f"{fate}, {stored} -> {dtype}"
        told[label] = told.get(label, 0) + 1
    return tuple(f"{n} weights {label}" for label, n in told.items())


def stored_dtype(graph: Graph, name: str) -> str:
    """The scheme that a value was stored in, columns in whatever order or turned or along another axis, or its plain dtype."""
    node = graph.nodes[name]
    while node.op in ("unsort", "coherent", "rows"):
        node = graph.nodes[node.inputs[0]]
    return str(node.attrs["scheme"]) if node.op == "across" else node.type.dtype


def carried(graph: Graph) -> Iterator[Carried]:
    """Parameters of a graph of packed weights that a source has quantized."""
    for name, packed in graph.nodes.items():
        code = graph.nodes[packed.inputs[0]] if packed.op == "pack" else None
        if code is not None and code.op == "coherent":
            code = graph.nodes[code.inputs[0]]
        if code is None:
            continue
        if code.op not in ("quantize", "transcode"):
            yield Carried(name, packed.inputs[0], (code.type.dtype, code.type.dtype), True, True)
        elif scheme_of(stored := stored_dtype(graph, code.inputs[0])) is not None:
            source, target = (scheme_of(s) for s in (stored, code.type.dtype))
            exact = code.op == "transcode" and source is not None and target is not None and moves(source, target)
            yield Carried(name, code.inputs[0], (stored, code.type.dtype), exact, code.op == "transcode")


def stored_rows(graph: Graph, weights: Weights, file: Reals) -> list[Row]:
    """One row for all codes that were carried over; for each pair of schemes the worst of those that were not."""
    exact, wrong, errors = 0, "", dict[str, list[tuple[float, str]]]()
    for c in carried(graph):
        if c.exact:
            exact += 1
            if not equal(graph, weights, file, c):
                wrong = wrong or c.name
            continue
        what = f"{'codes moved, zero points rounded' if c.codes else 'rounded again'}: {c.schemes[0]} -> {c.schemes[1]}"
        errors.setdefault(what, []).append((relative_error(graph, weights, file, c), c.name))
        log.debug("%s: %s, relative error %.3g", c.name, what, errors[what][-1][0])
    rows = []
    if exact:
        what = f"codes moved: {exact} tensors, exact"
        rows.append(judged(what, "tensors with another value", float(bool(wrong)), 0.0, wrong))
    for what, found in errors.items():
        worst, name = max(found)
        mean = sum(e for e, _ in found) / len(found)
        reason = f"worst is {name}; mean of {len(found)} is {mean:.2g}"
        rows.append(Row(what, "relative RMSE", worst, None, "info", reason))
        if what.startswith("codes moved"):
            limit = LIMITS[next(v.dtype for v in cast(Scheme, scheme_of(what.rpartition(" ")[2])).levels if v.role in SHIFTS)]
            rows[-1] = judged(what, "relative RMSE", worst, limit, reason)
    return rows


def blocks(graph: Graph, weights: Weights, file: Reals, c: Carried) -> Iterator[tuple[Array, Array]]:
    """(in the source, in the file) of some rows."""
    for begin, end in row_ranges(graph.nodes[c.name].type.dims):
        yield weights.real(c.stored, begin, end), file.real(c.name, begin, end)


def equal(graph: Graph, weights: Weights, file: Reals, c: Carried) -> bool:
    pairs = blocks(graph, weights, file, c)
    return all(np.array_equal(a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32)) for a, b in pairs)


def relative_error(graph: Graph, weights: Weights, file: Reals, c: Carried) -> float:
    """Root of the mean square of the difference, over that of the source."""
    difference = norm = 0.0
    for a, b in blocks(graph, weights, file, c):
        difference += float(np.square(a.astype(np.float64) - b).sum())
        norm += float(np.square(a.astype(np.float64)).sum())
    return float(np.sqrt(difference / max(norm, 1e-300)))
