"""adapter-slots: keep adapters out of the weights: each linear that one targets gets a low-rank path, to be filled later.

A slot is a pair of inputs A[R,K] and B[N,R]; unfilled, R is 0 and the path adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qconvert.adapters import Adapter, Factors
from qconvert.errors import GraphError, UnsupportedError
from qconvert.graph import Graph, Node, Type
from qconvert.passes.attach_adapter import find_parameter

MERGE = "--adapters merge writes it into the weights"


@dataclass(frozen=True)
class AdapterSlots:
    """targets: weights of linears, with commas between them. GraphError for one that no single linear reads."""

    name: ClassVar[str] = "adapter-slots"
    targets: str = ""

    def __call__(self, graph: Graph) -> Graph:
        wanted = self.targets.split(",") if self.targets else []
        for weight in wanted:
            readers = [n for n, node in graph.nodes.items() if node.op == "linear" and node.inputs[1] == weight]
            if len(readers) != 1:
                raise GraphError(f"adapter-slots: {weight} is read by {len(readers)} linears, one was wanted")

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if node.op != "linear" or node.inputs[1] not in wanted:
                return None
            (a, b), (n, k) = slot_names(node.inputs[1]), graph.nodes[node.inputs[1]].type.dims
            return {
                a: Node("input", (), Type("f32", ("R", k)), {"slot": True}),
                b: Node("input", (), Type("f32", (n, "R")), {"slot": True}),
                f"{name}~base": node,
                f"{name}~slot": Node("lora", (node.inputs[0], a, b), node.type, {"scale": 1.0}),
                name: Node("add", (f"{name}~base", f"{name}~slot"), node.type),
            }

        return graph.rewrite(rule)


def slot_names(weight: str) -> tuple[str, str]:
    """The inputs A and B beside a weight."""
    stem = weight.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def slots_for(graph: Graph, adapters: Sequence[Adapter]) -> AdapterSlots:
    """A slot at every target of any adapter. UnsupportedError for an adapter that is more than low-rank paths of linears."""
    targets = {weight for adapter in adapters for weight in filled(graph, adapter)}
    return AdapterSlots(",".join(name for name in graph.nodes if name in targets))


def filled(graph: Graph, adapter: Adapter) -> dict[str, Factors]:
    """Weight -> what the adapter puts into its slot. UnsupportedError as in slots_for."""
    found = {}
    for f in adapter.factors:
        if f.magnitude is not None:
            raise refused(adapter, f.module, "is DoRA: it scales the weight itself")
        if f.bias is not None:
            raise refused(adapter, f.module, "has a bias beside its factors")
        if f.embedding:
            raise refused(adapter, f.module, "changes an embedding")
        weight = find_parameter(graph, f"{f.module}.weight")
        if weight is None:
            raise refused(adapter, f.module, "changes a head that is tied to the embedding, or no weight of this model")
        found[weight] = f
    for replacement in adapter.replacements:
        raise refused(adapter, replacement.parameter, "has a whole parameter of its own")
    for rows in adapter.rows:
        raise refused(adapter, rows.module, "has trained rows of tokens")
    return found


def refused(adapter: Adapter, where: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{adapter.name}: {where} {why}; --adapters swap takes low-rank paths alone", hint=MERGE)
