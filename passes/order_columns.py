"""order-columns: a weight whose groups are scattered over its columns is multiplied group by group."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.graph import Graph, Node
from qconvert.ops import infer

log = logging.getLogger("qconvert")


@dataclass(frozen=True)
class OrderColumns:
    """linear(x, unsort(w, order)) becomes linear(take(x, order), w), so that w stays as stored.

    weights: those that it is done for; None: all. Declined where something else than a linear reads the weight.
    """

    name: ClassVar[str] = "order-columns"
    weights: Collection[str] | None = field(default=None, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        users = graph.users()
        named = graph.nodes if self.weights is None else self.weights
        scattered = {w for w in named if graph.nodes[w].op == "unsort"}
        chosen = {w for w in scattered if {graph.nodes[u].op for u in users[w]} == {"linear"}}
        for w in sorted(scattered - chosen):
            log.debug("order-columns: left %s alone: not only linears read it", w)

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name in chosen:
                return {name: graph.nodes[node.inputs[0]]}
            if node.op != "linear" or node.inputs[1] not in chosen:
                return None
            x, weight, *bias = node.inputs
            order, taken = graph.nodes[weight].inputs[1], f"{name}_x"
            kind = infer("take", (graph.nodes[x].type, graph.nodes[order].type))
            return {taken: Node("take", (x, order), kind), name: replace(node, inputs=(taken, weight, *bias))}

        return graph.rewrite(rule)
