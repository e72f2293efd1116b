"""rope-factors: frequency scaling (llama3) as a tensor that every rope reads, as GGUF stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.graph import Graph, Node, Type

FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class RopeFactors:
    """`values`: what each rotary frequency is divided by, f32[head_dim/2]; takes the place of the scaling attribute."""

    name: ClassVar[str] = "rope-factors"
    values: tuple[float, ...] = ()

    def __call__(self, graph: Graph) -> Graph:
        factors = Node("constant", (), Type("f32", (len(self.values),)), {"values": list(self.values), "role": "rope_freqs"})

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if node.op != "rope":
                return None
            attrs = {k: v for k, v in node.attrs.items() if k != "scaling"}
            return {FACTORS: factors, name: Node("rope", (*node.inputs, FACTORS), node.type, attrs)}

        return graph.rewrite(rule)
