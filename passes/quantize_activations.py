"""quantize-activations: say of each linear how a runtime that multiplies integers rounds what it reads, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.errors import GraphError
from qconvert.graph import Attr, Graph, Node

DYNAMIC = "u8"  # 8 bits over the whole tensor, from its own least and largest value


@dataclass(frozen=True)
class QuantizeActivations:
    """grids: linear -> attributes round_input and round_output: DYNAMIC, or {"scale", "zero"}; `kind` is their usual name."""

    name: ClassVar[str] = "quantize-activations"
    kind: str = ""
    grids: Mapping[str, Mapping[str, Attr]] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        unknown = [n for n in self.grids if n not in graph.nodes or graph.nodes[n].op != "linear"]
        if unknown:
            raise GraphError(f"quantize-activations: no linear is called {min(unknown)}")

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            return {name: replace(node, attrs={**node.attrs, **self.grids[name]})} if name in self.grids else None

        return graph.rewrite(rule)


def grid_of(low: float, high: float) -> dict[str, Attr]:
    """Scale and zero point of 256 codes from low to high; 0 is a code."""
    low, high = min(0.0, low), max(0.0, high)
    scale = (high - low) / 255 or 1.0
    return {"scale": scale, "zero": round(-low / scale)}
