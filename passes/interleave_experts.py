"""interleave-experts: gate and up of all experts as one weight, their rows in turn, as fused kernels multiply them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from qconvert.graph import Graph, Node
from qconvert.ops import infer


@dataclass(frozen=True)
class InterleaveExperts:
    """Experts of the activation `act` only: fused kernels know no other."""

    name: ClassVar[str] = "interleave-experts"
    act: str = "silu"

    def __call__(self, graph: Graph) -> Graph:
        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if node.op != "experts" or node.attrs["act"] != self.act or len(node.inputs) != 5:
                return None
            x, route, gate, up, down = node.inputs
            both = f"{gate.removesuffix('.weight').rpartition('.')[0]}.gate_up_proj.weight"
            kind = infer("interleave", (graph.nodes[gate].type, graph.nodes[up].type))
            return {both: Node("interleave", (gate, up), kind), name: replace(node, inputs=(x, route, both, down))}

        return graph.rewrite(rule)
