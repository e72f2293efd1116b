"""Weights that come quantized: which of ONNX's schemes holds their codes as they are."""

from __future__ import annotations

from qconvert.graph import Graph
from qconvert.moves import moved_offsets, moves, nearly_moves
from qconvert.passes.order_columns import OrderColumns
from qconvert.scheme import GROUPS, scheme_of


def kept(graph: Graph, name: str, quant: str, group: int | None, any_quant: bool, any_group: bool) -> str | None:
    """The scheme of `quant` that has a stored weight's codes as they are, of the largest groups; None where there is none.

    any_quant: with zero points too where the bits alone were asked for; any_group: of any groups.
    """
    node = graph.nodes[name]
    stored = scheme_of(graph.nodes[node.inputs[0]].type.dtype if node.op == "unsort" else node.type.dtype)
    if stored is None or group is None:
        return None
    offsets = moved_offsets(stored, f"{(real := 'u' * (quant[0] == 'i') + quant + 'f')}_g{stored.block}") and any_quant
    for each in (quant, *((f"u{quant}",) if any_quant else ()), *((real,) if offsets else ())):
        for g in sorted(GROUPS, reverse=True) if any_group else (group,):
            scheme = scheme_of(f"{each}_g{g}")
            if scheme is None or node.type.dims[-1] % g:
                continue
            if moves(stored, scheme) or nearly_moves(stored, scheme):
                return scheme.name
    return None


def quant_of(graph: Graph, name: str, quant: str, any_quant: bool) -> str:
    """What a weight is rounded to: with zero points where its stored grids are not centred on zero."""
    stored = scheme_of(graph.nodes[name].type.dtype)
    lopsided = stored is not None and any(level.role != "scale" for level in stored.levels)
    return "uint4" if any_quant and lopsided and quant == "int4" else quant


def ordering(graph: Graph, quant: str, group: int | None, any_quant: bool, any_group: bool) -> tuple[OrderColumns, ...]:
    """The pass that brings columns in the order of their groups, for weights whose codes are then kept."""
    scattered = [name for name, node in graph.nodes.items() if node.op == "unsort"]
    names = [name for name in scattered if kept(graph, name, quant, group, any_quant, any_group)]
    return (OrderColumns(tuple(names)),) if names else ()
