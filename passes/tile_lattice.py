"""tile-lattice: weights that are points of a lattice, turned, are laid out as quip-sharp's tensors: codes, signs and unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.graph import Graph, Node, Type
from qconvert.ops import infer
from qconvert.scheme import FOLDED, LATTICES


@dataclass(frozen=True)
class TileLattice:
    """Of every parameter whose codes are points, in the layout `format`.SCHEME; signs are f16 (or whatever they became)."""

    name: ClassVar[str] = "tile-lattice"
    format: str = "quip"

    def __call__(self, graph: Graph) -> Graph:
        parameters = set(graph.apart())

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            code = graph.nodes[node.inputs[0]].type if node.op == "coherent" else None
            if name not in parameters or code is None or code.dtype not in LATTICES:
                return None
            below, (n, k) = node.inputs[0], node.type.dims
            beside = {
                f"{name}~{FOLDED}": Node("tile", (below,), infer("tile", (code,))),
                f"{name}~signs_in": Node("cast", (node.inputs[1],), Type("f16", (k,))),
                f"{name}~signs_out": Node("cast", (node.inputs[2],), Type("f16", (n,))),
                f"{name}~unit": Node("lattice_unit", (below,), infer("lattice_unit", (code,))),
            }
            packed = Node("pack", (f"{name}~plain", *beside), Type(f"{self.format}.{code.dtype}", node.type.shape))
            return {f"{name}~plain": node, **beside, name: packed}

        return graph.rewrite(rule)
