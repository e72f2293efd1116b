"""refit-adapter: the factors of adapters that stay beside quantized weights take up what quantization lost, as far as their
rank goes: B'A' = the best approximation of W + BA - Q.

    slot~adapter0~trained : f32[R,K] = cast(A)       slot~adapter0 : f32[R,K] = refit(W~real, W, A', B'[, W~hessian]) {part}
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from qconvert.graph import Graph, Node
from qconvert.passes.adapter_slots import alias_of
from qconvert.passes.untie_head import is_sum

log = logging.getLogger("qconvert")


@dataclass(frozen=True)
class RefitAdapter:
    """Of the adapters that slots are filled with; adapter: of one alone. Weighted by W~hessian or W~moments, where
    the graph has one.

    Left alone: adapters beside weights whose codes are a source's, or that are not quantized.
    """

    name: ClassVar[str] = "refit-adapter"
    adapter: str = ""

    def __call__(self, graph: Graph) -> Graph:
        edits: dict[str, dict[str, Node]] = {}
        for node in graph.nodes.values():
            if not is_sum(graph, node) or graph.nodes[node.inputs[0]].op != "linear":
                continue
            base, path = (graph.nodes[i] for i in node.inputs)
            weight, (x, a, b) = base.inputs[1], path.inputs[:3]
            if "slot" not in graph.nodes[a].attrs or x != base.inputs[0]:
                continue
            if (real := quantized_from(graph, weight)) is None:
                log.info("refit-adapter: left %s alone: nothing was lost there", weight)
                continue
            for pair in zip(graph.nodes[a].inputs, graph.nodes[b].inputs, strict=True):
                if self.adapter in ("", alias_of(graph, pair[0])):
                    edits |= _refitted(graph, real, weight, pair)
        return graph.rewrite(lambda name, _: edits.get(name)).sorted()


def quantized_from(graph: Graph, weight: str) -> str | None:
    """The real weight that a packed one was quantized from; None where it was not."""
    node = graph.nodes[weight]
    while node.op in ("pack", "second_level"):
        node = graph.nodes[node.inputs[0]]
    return node.inputs[0] if node.op == "quantize" else None


def _refitted(graph: Graph, real: str, weight: str, pair: tuple[str, ...]) -> dict[str, dict[str, Node]]:
    trained = [f"{name}~trained" for name in pair]
    hessian = [h for h in (f"{weight}~hessian", f"{weight}~moments") if h in graph.nodes][:1]
    out = {}
    for part, name, below in zip("ab", pair, trained, strict=True):
        node = Node("refit", (trained[0], trained[1], real, weight, *hessian), graph.nodes[name].type, {"part": part})
        out[name] = {below: graph.nodes[name], name: node}
    return out
