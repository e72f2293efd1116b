"""What each weight's type costs in KL, measured: one weight (or a role of some layers) is quantized at a time, and only the
layers behind it run again.

A weight's cost at a type that was not measured follows from two that were, along its squared error by inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qconvert.graph import Graph, Node
from qconvert.quality import CUT, before_rounding, layer_outputs
from qconvert.run import run
from qconvert.scheme import Array
from qconvert.weights import Weights, rows_per_block

KEPT_VALUES = 1 << 28  # of weights as real numbers: 1 GB
KEPT_LOGITS = 1 << 24
OPERATIONS = 1e12  # of all measurements: half a minute of two cores
Types = Mapping[str, str]  # weight -> type; what is not there is as it was before quantization


@dataclass
class Mixture:
    """A graph's weights, each as the type that `types` says: read from a graph in which all weights have that type."""

    graphs: Mapping[str, Weights]  # by type
    types: Types = field(default_factory=dict)
    kept: dict[tuple[str, str | None], Array] = field(default_factory=dict)
    n_kept: int = 0

    @property
    def graph(self) -> Graph:
        return next(iter(self.graphs.values())).graph

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        key = name, self.types.get(name)
        if key not in self.kept:
            rows = self.graph.nodes[name].type.rows
            if self.n_kept + math.prod(self.graph.nodes[name].type.dims) > KEPT_VALUES:
                return self.read(*key, begin, end)
            self.kept[key] = self.read(*key, 0, rows)
            self.n_kept += self.kept[key].size
        return self.kept[key][begin:end]

    def read(self, name: str, dtype: str | None, begin: int, end: int | None) -> Array:
        if dtype is not None:
            return self.graphs[dtype].real(name, begin, end)
        weights, node = next(iter(self.graphs.values())), self.graph.nodes[name]
        if node.attrs.get("apart"):  # matrices of experts, each of which is quantized by itself
            return np.concatenate([self.read(part, None, 0, None) for part in node.inputs])[begin:end]
        return weights.real(before_rounding(weights.graph, name) or name, begin, end)

    def of(self, types: Types) -> Mixture:
        self.types = types
        return self


class Bench:
    """A text and the answers of the model before quantization, against which mixtures are measured."""

    def __init__(self, mixture: Mixture, sequences: Sequence[list[int]]) -> None:
        self.mixture, self.tokens = mixture, torch.tensor(sequences)
        graph = mixture.graph
        self.layers = layer_outputs(graph, graph)
        self.squares: dict[str, Tensor] = {}

        def observe(name: str, node: Node, inputs: tuple[Tensor, ...]) -> None:
            if node.op == "linear":
                self.squares[node.inputs[1]] = inputs[0].double().square().flatten(0, -2).mean(0)

        wanted = [*self.layers, *([CUT] if CUT in graph.nodes else []), *graph.outputs]
        self.stream = run(graph, mixture.of({}), self.tokens, want=wanted, observe=observe)
        exact = self.stream.pop(graph.outputs[0])
        self.exact = exact if exact.numel() > KEPT_LOGITS else None
        self.known = probabilities(exact) if self.exact is None else None

    def kl(self, types: Types) -> float:
        """Mean KL in nats of the model with these types to the one before quantization."""
        graph = self.mixture.graph
        if not types:
            return 0.0
        start = min((self.first(name) for name in types), default=0)
        known = {name: self.stream[name] for name in [*self.layers[:start], *([CUT] if start > len(self.layers) else [])]}
        (found,) = run(graph, self.mixture.of(types), self.tokens, known=known).values()
        total = 0.0
        for i in range(len(found)):
            p, entropy = (x[i] for x in self.known) if self.known else self.probabilities(i)
            q = found[i].double()
            total += float((entropy + torch.logsumexp(q, -1) - (p * q).sum(-1)).clamp_min(0).sum())
        return total / self.tokens.numel()

    def probabilities(self, i: int) -> tuple[Tensor, Tensor]:
        assert self.exact is not None
        return probabilities(self.exact[i])

    def first(self, name: str) -> int:
        """The first layer that reads a weight; behind the last for a head alone."""
        attrs = self.mixture.graph.root(name).attrs
        layer = attrs.get("layer")
        if isinstance(layer, int):
            return layer
        return len(self.layers) + 1 if attrs.get("role") == "output" and CUT in self.stream else 0

    def operations(self, name: str) -> float:
        """Of one measurement of a weight."""
        return 2.0 * self.tokens.numel() * self.n_weights * max(0.1, 1 - self.first(name) / max(1, len(self.layers)))

    @property
    def n_weights(self) -> int:
        graph = self.mixture.graph
        return sum(math.prod(graph.nodes[name].type.dims) for name in graph.parameters())


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and sum of p log p, f64."""
    log = torch.log_softmax(logits.double(), -1)
    return log.exp(), (log.exp() * log).sum(-1)


# what each weight costs ---------------------------------------------------------------------------


class Costs(NamedTuple):
    """cost: weight -> type -> KL; measured: how many were, one by one, of how many."""

    cost: Mapping[str, Mapping[str, float]]
    n_measured: int
    n_all: int
    units: Mapping[str, tuple[str, ...]]


def costs(
    bench: Bench, choices: Mapping[str, Sequence[str]], errors: Mapping[str, Mapping[str, float]],
    together: Sequence[Sequence[str]],
) -> Costs:  # fmt: skip
    """choices: weight -> its types, from the fewest bytes to the most; errors: of each, see relative_error.

    together: weights that always have one type, and are measured at once.
    """
    units, n_types = planned(bench, choices, together)
    measured: dict[str, dict[str, float]] = {}
    todo = [(unit, members, t) for unit, members in units.items() for t in spread(choices[members[0]], n_types)]
    for unit, members, t in todo:
        measured.setdefault(unit, {})[t] = bench.kl({w: t if t in choices[w] else choices[w][-1] for w in members})
    cost: dict[str, dict[str, float]] = {}
    for unit, members in units.items():
        sums = {t: sum(errors[w].get(t, 0.0) for w in members) for t in dict.fromkeys(t for w in members for t in choices[w])}
        points = sorted((sums[t], kl) for t, kl in measured[unit].items())
        for w in members:
            cost[w] = {t: along(points, sums[t]) * errors[w][t] / max(sums[t], 1e-30) for t in choices[w]}
    return Costs(cost, len(todo), sum(map(len, choices.values())), units)


def planned(
    bench: Bench, choices: Mapping[str, Sequence[str]], together: Sequence[Sequence[str]]
) -> tuple[dict[str, tuple[str, ...]], int]:
    """What is measured together, and at how many types each: as much as OPERATIONS allow."""
    graph, n_layers, first = bench.mixture.graph, len(bench.layers), {w: ws[0] for ws in together for w in ws}
    for segment, n_types in ((1, 6), (1, 3), *((s, 2) for s in range(1, n_layers + 1))):
        units: dict[str, list[str]] = {}
        for w, types in choices.items():
            attrs = graph.root(first[w]).attrs
            layer = attrs.get("layer")
            place = f"{attrs.get('role')}, {types[0]}" if isinstance(layer, int) else first[w]
            units.setdefault(f"{place} {layer // segment}" if isinstance(layer, int) else place, []).append(w)
        price = sum(bench.operations(ws[0]) * min(n_types, len(choices[ws[0]])) for ws in units.values())
        if price <= OPERATIONS:
            break
    return {unit: tuple(ws) for unit, ws in units.items()}, n_types


def spread(types: Sequence[str], n: int) -> list[str]:
    """n of them, the first and others evenly from it on; the last ones, whose KL is all but 0, come last."""
    if n >= len(types):
        return list(types)
    at = sorted({round(i * (len(types) - 1) / n) for i in range(n)})
    return [types[i] for i in at]


def along(points: Sequence[tuple[float, float]], error: float) -> float:
    """KL at a squared error, from measured (error, KL): a power law between neighbours, of an exponent from 1/2 to 2."""
    x, known = max(error, 1e-30), [(max(e, 1e-30), max(kl, 1e-12)) for e, kl in points]
    if len(known) == 1:
        return known[0][1] * x / known[0][0]
    i = min(max(1, sum(e < x for e, _ in known)), len(known) - 1)
    (x0, y0), (x1, y1) = known[i - 1], known[i]
    slope = math.log(y1 / y0) / math.log(x1 / x0) if x1 > x0 else 1.0
    near = (x0, y0) if x < math.sqrt(x0 * x1) else (x1, y1)
    return near[1] * math.exp(min(2.0, max(0.5, slope)) * math.log(x / near[0]))


def relative_error(bench: Bench, name: str, dtype: str) -> float:
    """|W - Q|^2 / |W|^2, input channels by their mean square on the text where they are known."""
    mixture, kind, sums = bench.mixture, bench.mixture.graph.nodes[name].type, np.zeros(2)
    found = bench.squares.get(name)
    for i in range(0, kind.rows, rows_per_block(kind.dims[-1])):
        end = min(kind.rows, i + rows_per_block(kind.dims[-1]))
        w = np.asarray(mixture.of({}).real(name, i, end), np.float64)
        q = np.asarray(mixture.of({name: dtype}).real(name, i, end), np.float64)
        each = np.ones(w.shape[-1]) if found is None or len(found) != w.shape[-1] else found.numpy()
        sums += (np.square(q - w) @ each).sum(), (np.square(w) @ each).sum()
    return float(sums[0] / max(sums[1], 1e-30))


