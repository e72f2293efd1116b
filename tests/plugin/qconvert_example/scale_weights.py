"""A pass: multiply every weight whose name `match` is found in by `factor`."""

import re
from dataclasses import dataclass
from typing import ClassVar

from qconvert import Graph, Node, Type


@dataclass(frozen=True)
class ScaleWeights:
    name: ClassVar[str] = "scale-weights"
    match: str = ""
    factor: float = 1.0

    def __call__(self, graph: Graph) -> Graph:
        parameters = set(graph.parameters())

        def rule(name: str, node: Node) -> dict[str, Node] | None:
            if name not in parameters or not re.search(self.match, name):
                return None  # this node stays as it is
            plain = f"{name}~plain"
            return {plain: node, name: Node("scaled", (plain,), Type("f32", node.type.shape), {"scale": self.factor})}

        return graph.rewrite(rule)
