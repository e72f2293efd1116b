"""fold-rows: codes whose rows share bytes with rows far away are laid out as a value of their own, beside the packed weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.tensor_layouts import Tensors


@dataclass(frozen=True)
class FoldRows:
    """dtype: of a scale that is the weight's mean magnitude."""

    name: ClassVar[str] = "fold-rows"
    high_first: bool = False
    dtype: str = "bf16"

    def __call__(self, graph: Graph) -> Graph:
        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            layout = layout_of(node.type.dtype) if node.op == "pack" else None
            if not isinstance(layout, Tensors) or "folded" not in {each.suffix for each in layout.beside}:
                return None
            (n, k), code = node.type.dims, node.inputs[0]
            parts = 8 // layout.scheme.bits
            attrs = {"parts": parts, "high_first": self.high_first}
            new = {f"{name}~folded": Node("fold", (code,), Type("u8", (n // parts, k)), attrs)}
            if "scale" in {each.suffix for each in layout.beside}:
                mean = f"{name}~mean"  # else codes are those of a source, beside its scale
                known = mean if mean in graph.nodes else graph.nodes[code].inputs[1]
                new[f"{name}~scale"] = Node("cast", (known,), Type(self.dtype, (1,)))
            return {**new, name: replace(node, inputs=(code, *new))}

        return graph.rewrite(rule)
