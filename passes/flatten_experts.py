"""flatten-experts: a mixture of experts as one wide feed-forward layer, for runtimes that have no such thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import infer


@dataclass(frozen=True)
class FlattenExperts:
    """Every token passes through all experts, and what those that it did not choose say is multiplied by 0.

    Gates and ups lie one below the other, downs one beside the other: ordinary weights of ordinary linears.
    """

    name: ClassVar[str] = "flatten-experts"

    def __call__(self, graph: Graph) -> Graph:
        arranged: dict[str, str] = {}  # weight -> the op that arranges it
        for node in graph.nodes.values():
            if node.op == "experts" and len(node.inputs) == 5:
                arranged |= dict(zip(node.inputs[2:], ("flat", "flat", "beside"), strict=True))

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name in arranged:
                stacked = f"{name}~stacked"
                return {stacked: node, name: Node(arranged[name], (stacked,), infer(arranged[name], (node.type,)))}
            if node.op != "experts" or len(node.inputs) != 5:
                return None
            return wide_layer(graph, name, node)

        return graph.rewrite(rule)


def wide_layer(graph: Graph, name: str, node: Node) -> dict[str, Node]:
    """Nodes of act(gate(x)) * up(x) * (the share of each expert) -> down."""
    x, route, gate, up, down = node.inputs
    e, f, _ = graph.nodes[gate].type.dims
    kind = Type("f32", (*node.type.shape[:-1], e * f))
    made: dict[str, Node] = {}

    def add(part: str, op: str, *inputs: str, **attrs: Attr) -> str:
        made[f"{name}_{part}"] = Node(op, inputs, kind, attrs)
        return f"{name}_{part}"

    acted = add("act", str(node.attrs["act"]), add("gate", "linear", x, gate))
    gated = add("gated", "mul", acted, add("up", "linear", x, up))
    shared = add("shared", "mul", gated, add("shares", "spread", route, times=f))
    return {**made, name: Node("linear", (shared, down), node.type)}
