"""permute-rope: rotary pairs from halves of a head (Hugging Face) to neighbours (GGUF's llama)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.errors import GraphError
from qconvert.graph import Graph, Node
from qconvert.ops import infer


@dataclass(frozen=True)
class PermuteRope:
    """Reorder the rows of every weight and bias whose product is rotated, and rotate neighbours instead of halves.

    q and k are permuted alike, so their products, and with them the logits, stay what they were.
    """

    name: ClassVar[str] = "permute-rope"

    def __call__(self, graph: Graph) -> Graph:
        heads = rotated_parameters(graph)

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name in heads:
                real = f"{name}~halves"
                return {
                    real: node,
                    name: Node("permute_rope", (real,), infer("permute_rope", (node.type,)), {"heads": heads[name]}),
                }
            if node.op == "rope":
                return {name: Node("rope", node.inputs, node.type, {**node.attrs, "interleaved": True})}
            return None

        return graph.rewrite(rule)


def rotated_parameters(graph: Graph) -> dict[str, int]:
    """Weights and biases read by a linear whose output is rotated -> their number of heads."""
    heads: dict[str, int] = {}
    for name, node in graph.nodes.items():
        if node.op != "rope":
            continue
        linear = graph.nodes[node.inputs[0]]
        head_dim = node.attrs["head_dim"]
        if linear.op != "linear" or not isinstance(head_dim, int):
            raise GraphError(f"%{name} rotates the result of {linear.op}, not of a linear; its rows cannot be permuted")
        for parameter in linear.inputs[1:]:
            heads[parameter] = graph.nodes[parameter].type.dims[0] // head_dim
    return heads
