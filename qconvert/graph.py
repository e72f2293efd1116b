"""The graph: frozen, named, typed nodes in evaluation order. A value is its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from qconvert.errors import GraphError

Attr = str | int | float | bool | None | list["Attr"] | dict[str, "Attr"]  # what JSON can say


@dataclass(frozen=True)
class Type:
    """What a value is. dtype is a plain dtype, a scheme or a layout by name; a str dimension is symbolic ("B", "T")."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @classmethod
    def parse(cls, text: str) -> Type:
        dtype, _, dims = text.removesuffix("]").partition("[")
        return cls(dtype, tuple(int(d) if d.isdecimal() else d for d in dims.split(",") if d))

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of a weight: all numbers. GraphError for a symbolic dimension."""
        dims = tuple([d for d in self.shape if not isinstance(d, str)])
        if len(dims) < len(self.shape):
            raise GraphError(f"{self} has a symbolic dimension; a weight was wanted")
        return dims

    @property
    def rows(self) -> int:
        """Rows of a weight, counted through: N of [N,K], E*N of stacked experts [E,N,K], the length of a vector."""
        return n_rows(self.dims)


STATISTICS = ("~moments", "~hessian", "~peaks", "~histogram", "~extremes")


def n_rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


@dataclass(frozen=True)
class Node:
    """How a value is made: an op of ops.OPS, the names it reads, the type it has, attributes that JSON can say."""

    op: str
    inputs: tuple[str, ...]
    type: Type
    attrs: Mapping[str, Attr] = field(default_factory=dict)


Rule = Callable[[str, Node], Mapping[str, Node] | None]


@dataclass(frozen=True)
class Graph:
    """Nodes keyed by the value they define, in evaluation order.

    A parameter keeps its checkpoint name; a pass that changes it moves the old node to name~what, so no consumer is
    ever rewired. Suffixes in use: ~base (before adapters), ~real (before quantization), ~code (before packing).
    ~moments, ~hessian, ~peaks and ~histogram lie beside a weight as long as it is there, for a solver or a format to read.
    """

    nodes: Mapping[str, Node]
    outputs: tuple[str, ...]
    meta: Mapping[str, Attr] = field(default_factory=dict)

    def users(self) -> dict[str, list[str]]:
        """For each value, the values that read it (once per read)."""
        out: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, node in self.nodes.items():
            for i in node.inputs:
                out[i].append(name)
        return out

    def rewrite(self, rule: Rule) -> Graph:
        """Replace each node by the nodes `rule` gives for it (None keeps it), then drop what nothing uses."""
        nodes: dict[str, Node] = {}
        for name, node in self.nodes.items():
            new = rule(name, node)
            for key, value in ({name: node} if new is None else new).items():
                if nodes.get(key, value) != value:
                    raise GraphError(f"%{key} would be defined twice, by {nodes[key].op} and by {value.op}")
                nodes[key] = value
        return replace(self, nodes=nodes).prune()

    def prune(self) -> Graph:
        live = self.needed(self.outputs)
        live |= self.needed(n for n in self.nodes if n.endswith(STATISTICS) and n.rpartition("~")[0] in live)
        return replace(self, nodes={n: v for n, v in self.nodes.items() if n in live or (v.op == "input" and not v.inputs)})

    def sorted(self) -> Graph:
        """In evaluation order, where a rewrite made nodes read later ones."""
        nodes: dict[str, Node] = {}
        for name in self.nodes:
            todo = [name]
            while todo:
                if missing := [i for i in self.nodes[todo[-1]].inputs if i not in nodes]:
                    todo += missing[::-1]
                else:
                    last = todo.pop()
                    nodes.setdefault(last, self.nodes[last])
        return replace(self, nodes=nodes)

    def needed(self, wanted: Iterable[str], known: Container[str] = ()) -> set[str]:
        """All values that `wanted` reach, themselves included, but nothing that only `known` ones reach."""
        live: set[str] = set()
        todo = list(wanted)
        while todo:
            name = todo.pop()
            if name not in live:
                live.add(name)
                todo += () if name in known else self.nodes[name].inputs
        return live

    def constants(self) -> set[str]:
        """Values that reach no input: the weights and what is computed from them."""
        fixed: set[str] = set()
        for name, node in self.nodes.items():
            if node.op != "input" and fixed.issuperset(node.inputs):
                fixed.add(name)
        return fixed

    def parameters(self) -> list[str]:
        """Constants that activations read (or are outputs), in evaluation order: what a format writes.

        What adapters put into slots is apart: it changes as the model runs.
        """
        fixed = self.constants()
        read = {i for name, node in self.nodes.items() if name not in fixed and node.op != "input" for i in node.inputs}
        return [n for n in self.nodes if n in fixed and (n in read or n in self.outputs)]

    def apart(self) -> list[str]:
        """Parameters, but what a stack keeps apart in its place."""
        whole = {n: self.nodes[n] for n in self.parameters()}
        return [m for n, node in whole.items() for m in (node.inputs if node.attrs.get("apart") else (n,))]

    def root(self, name: str) -> Node:
        """The load (or constant) that a weight began as: follow first inputs. Its attrs name role and layer."""
        node = self.nodes[name]
        while node.inputs:
            node = self.nodes[node.inputs[0]]
        return node

    def sources(self, name: str) -> list[str]:
        """Names of all loads that a weight is made from, in evaluation order."""
        need = self.needed([name])
        return [n for n in self.nodes if n in need and self.nodes[n].op == "load"]

    def with_meta(self, **more: Attr) -> Graph:
        return replace(self, meta={**self.meta, **more})
