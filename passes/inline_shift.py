"""inline-shift: where a grid lies leaves the weight and becomes a path beside it, so that codes alone are multiplied.

    y = scale * (code - zero) x = scale * (code - middle) x + T (sums of groups of x),  T = scale * (middle - zero)

T as factors on x has as many ranks as T[N,G] has: one, where a row has one zero point and one scale, most often all G.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qconvert.errors import UnsupportedError, UsageError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.moves import centred, shifted
from qconvert.ops import infer
from qconvert.scheme import scheme_of
from qconvert.sources import Store
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
EXACT = 1e-6  # of the greatest shift: how far factors may be from it


@dataclass(frozen=True)
class InlineShift:
    """form: lora, factors of T, refused with the rank they need where that is more than `rank`; pooled, sums of groups times
    T; auto: the cheaper one. What it costs, in multiplications a token, is in meta under inline_shift.

    Declined where columns are in no order of groups, or metadata are not one scale and one zero point or offset a group.
    """

    name: ClassVar[str] = "inline-shift"
    form: str = "auto"
    rank: int = 1
    store: Store | None = field(default_factory=lambda: None, repr=False, compare=False)  # without it ranks are not counted

    def __call__(self, graph: Graph) -> Graph:
        if self.form not in ("auto", "lora", "pooled"):
            raise UsageError(f"inline-shift: form is auto, lora or pooled, not {self.form}")
        edits: dict[str, Mapping[str, Node]] = {}
        costs: list[Attr] = []
        users = graph.users()
        for name, node in graph.nodes.items():
            if node.op != "linear" or (scheme := scheme_of(graph.nodes[node.inputs[1]].type.dtype)) is None:
                continue
            weight = node.inputs[1]
            if len(scheme.levels) < 2 or shifted(scheme) is None or centred(scheme) is None or users[weight] != [name]:
                log.info("inline-shift: left %s alone: %s is not one scale and one shift a group", weight, scheme.name)
                continue
            (n, k), group = graph.nodes[weight].type.dims, scheme.block
            needed = self.needed(graph, weight, k // group)
            if self.form == "lora" and needed > self.rank:
                raise UnsupportedError(
                    f"inline-shift: the shift of {weight} needs rank {needed}, {self.rank} is allowed: as factors of fewer it "
                    "would be another model",
                    hint="form=pooled is exact: one sum of each group of inputs",
                )
            low = self.form == "lora" or (self.form == "auto" and needed * (n + k) < n * (k // group))
            edits[weight], edits[name] = _unshifted(graph, weight), _paths(graph, name, needed if low else None)
            macs = needed * (n + k) if low else n * (k // group)
            form = f"rank {needed}" if low else f"sums of {group}"
            costs.append({"weight": weight, "form": form, "rank": needed, "macs": macs, "dense": n * k})
        return graph.rewrite(lambda name, _: edits.get(name)).with_meta(**({"inline_shift": costs} if costs else {}))

    def needed(self, graph: Graph, weight: str, groups: int) -> int:
        """The fewest factors that give T within EXACT; as many as there are groups where nothing can be read."""
        if self.store is None:
            return groups
        above = Graph({**graph.nodes, "~T": _shift(graph, weight, weight)}, ("~T",), {})
        table = Weights(above, self.store).real("~T").astype(np.float64)
        u, s, v = np.linalg.svd(table, full_matrices=False)
        peak, low = float(np.abs(table).max()), 0
        high = len(s)
        while low < high:  # the error falls as the rank grows
            r = (low + high) // 2
            near = np.abs(table - (u[:, :r] * s[:r]) @ v[:r]).max() <= EXACT * peak
            low, high = (low, r) if near else (r + 1, high)
        return low


def _shift(graph: Graph, weight: str, of: str) -> Node:
    (n, k), scheme = graph.nodes[weight].type.dims, scheme_of(graph.nodes[weight].type.dtype)
    assert scheme is not None
    return Node("shift", (of,), Type("f32", (n, k // scheme.block)))


def _unshifted(graph: Graph, weight: str) -> dict[str, Node]:
    node = graph.nodes[weight]
    below, kind = f"{weight}~shifted", infer("unshifted", (node.type,))
    return {below: node, weight: Node("unshifted", (below,), kind)}


def _paths(graph: Graph, name: str, rank: int | None) -> dict[str, Node]:
    """The linear moves to ~unshifted, what it lost is added under its name."""
    node, weight = graph.nodes[name], graph.nodes[name].inputs[1]
    x, (n, k), stem = node.inputs[0], graph.nodes[weight].type.dims, weight.removesuffix(".weight")
    shift = _shift(graph, weight, f"{weight}~shifted")
    group = k // shift.type.dims[1]
    nodes = {f"{name}~unshifted": node}
    if rank is None:
        sums, kind = f"{x}~sums{group}", infer("group_sums", (graph.nodes[x].type,), group=group)
        nodes |= {sums: Node("group_sums", (x,), kind, {"group": group}), f"{stem}.shift": shift}
        nodes[f"{name}~shift"] = Node("shift_path", (sums, f"{stem}.shift"), node.type)
    else:
        factors = f"{stem}.shift_A", f"{stem}.shift_B"
        nodes[f"{stem}~shift"] = shift
        for part, factor, dims in zip("ab", factors, ((rank, k), (n, rank)), strict=True):
            which: dict[str, Attr] = {"part": part, "rank": rank, "group": group}
            nodes[factor] = Node("shift_factor", (f"{stem}~shift",), Type("f32", dims), which)
        nodes[f"{name}~shift"] = Node("lora", (x, *factors), node.type, {"scale": 1.0})
    return {**nodes, name: Node("add", (f"{name}~unshifted", f"{name}~shift"), node.type)}
