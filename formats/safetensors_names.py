"""From the graph's parameters to the tensors that a checkpoint of the family has: names, orientation, offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.families import Family
from qconvert.graph import Graph, Node, Type
from qconvert.passes.untie_head import has_head, head_of
from qconvert.registry import entries, find


def family_of(graph: Graph) -> Family:
    name = str(graph.meta["family"])
    found = find("families", name if name in entries("families") else name.replace("_", "-"))
    assert isinstance(found, Family)
    return found


def linears(graph: Graph, heads: bool = False) -> set[str]:
    """Weights of linear maps that are modules of their own; the head's, and routers, only where `heads`."""
    found = {node.inputs[1] for node in graph.nodes.values() if node.op == "linear"}
    found |= set(graph.apart()) - set(graph.parameters())  # matrices of experts
    if not heads:
        found -= {graph.nodes[head_of(graph)].inputs[1]} if has_head(graph) else set()
        found -= {name for name in found if str(graph.root(name).attrs.get("role")) == "ffn_gate_inp"}
        found -= stored_transposed(graph)
    return found - {node.inputs[1] for node in graph.nodes.values() if node.op == "embed"}


def stored_transposed(graph: Graph) -> set[str]:
    """Weights that the family's checkpoints have as [K,N]."""
    roles = family_of(graph).stored_transposed
    return {name for name in graph.parameters() if len(graph.nodes[name].type.dims) == 2 and role_of(graph, name) in roles}


def role_of(graph: Graph, name: str) -> str:
    return str(graph.root(name).attrs.get("role", ""))


KEPT = "~kept"  # what a file has of a parameter that the graph makes from it


def values(graph: Graph) -> dict[str, str]:
    """Name in a checkpoint -> the graph's value that lies there."""
    return {name: f"{name}{KEPT}" if f"{name}{KEPT}" in graph.nodes else name for name in graph.apart()}


@dataclass(frozen=True)
class KeepOffset:
    """Norms that a model adds `by` to are rounded to `dtype` as checkpoints have them, without it."""

    name: ClassVar[str] = "keep-offset"
    by: float = 1.0
    dtype: str = "bf16"

    def __call__(self, graph: Graph) -> Graph:
        names = offset_norms(graph)

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name not in names:
                return None
            below: dict[str, Node] = {}
            real = node.inputs[0] if node.op == "shifted" and node.attrs["by"] == self.by else f"{name}~less"
            if real == f"{name}~less":
                f32 = Type("f32", node.type.shape)
                below = {f"{name}~sum": node, real: Node("shifted", (f"{name}~sum",), f32, {"by": -self.by})}
            kept = Node("cast", (real,), Type(self.dtype, node.type.shape))
            return {**below, f"{name}{KEPT}": kept, name: Node("shifted", (f"{name}{KEPT}",), node.type, {"by": self.by})}

        return graph.rewrite(rule)


def offset_norms(graph: Graph) -> set[str]:
    """Parameters to which the model adds a number that its checkpoints leave out."""
    by = family_of(graph).norm_offset
    return {name for name in graph.parameters() if by and role_of(graph, name).endswith("_norm")}
