"""pack: lay each quantized weight out in the bytes of a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.scheme import scheme_of


@dataclass(frozen=True)
class Pack:
    """Every quantized parameter (or matrix) gets the layout `format`.SCHEME beneath its name; the codes move to NAME~code.

    others: weight -> the format that it gets instead.
    """

    name: ClassVar[str] = "pack"
    format: str = "gguf"
    others: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        parameters = set(graph.apart())

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name not in parameters or scheme_of(node.type.dtype) is None:
                return None
            layout = layout_of(f"{self.others.get(name, self.format)}.{node.type.dtype}")
            return {f"{name}~code": node, name: Node("pack", (f"{name}~code",), Type(layout.name, node.type.shape))}

        return graph.rewrite(rule)
