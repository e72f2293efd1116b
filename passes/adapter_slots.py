"""adapter-slots: keep adapters out of the weights: each linear that one lies beside gets a low-rank path, filled as it runs.

A slot is a pair of inputs A[R,K] and B[N,R] that read what each adapter puts there; unfilled, R is 0 and the path adds
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from qconvert.errors import UnsupportedError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import infer
from qconvert.passes.untie_head import HEAD, Site, embedding_of, is_sum, sites

MERGE = "--adapters merge writes it into the weights"
WHY_NOT = {
    "dora_path": "is DoRA: it scales the weight itself",
    "dora_embed": "changes an embedding",
    "lora_embed": "changes an embedding",
}


@dataclass(frozen=True)
class AdapterSlots:
    """linear(x, W) + lora(x, A0, B0) + lora(x, A1, B1) becomes linear(x, W) + lora(x, slot A, slot B).

    Scales go into B. UnsupportedError for an adapter that is more than low-rank paths of linears.
    """

    name: ClassVar[str] = "adapter-slots"

    def __call__(self, graph: Graph) -> Graph:
        edits: dict[str, dict[str, Node]] = {}
        for (_, weight), found in sites(graph).items():
            for site in found:
                if paths := list(_paths(graph, site)):
                    edits[site.result] = _slot(graph, weight, site, paths)
        out = graph.rewrite(lambda name, _: edits.get(name))
        for name in out.parameters():
            for source in out.sources(name):
                if (alias := alias_of(out, source)) is not None:
                    raise _refused(graph, alias, f"{name} has values of its own")
        return out.with_meta(adapters=[], slots=graph.meta["adapters"]) if "adapters" in graph.meta else out


def _paths(graph: Graph, site: Site) -> Iterator[str]:
    """The adapters' paths over a linear or embed, lowest first. UnsupportedError for one that no slot can take."""
    found, name = [], site.result
    while name != site.base:
        name, path = graph.nodes[name].inputs
        found.append(path)
    for path in reversed(found):
        node = graph.nodes[path]
        why = WHY_NOT.get(node.op) or ("has a bias beside its factors" if len(node.inputs) > 3 else None)
        if why is not None:
            raise _refused(graph, owner(graph, path) or path, f"{_module(graph, path)} {why}")
        yield path


def _slot(graph: Graph, weight: str, site: Site, paths: list[str]) -> dict[str, Node]:
    """What takes the place of the sum of all paths."""
    base, stem = graph.nodes[site.base], site.base.removesuffix("~base")
    slots = slot_names(HEAD if weight == embedding_of(graph) else weight)
    nodes, made = dict[str, Node](), list[list[str]]()
    for path in paths:
        _, *factors = graph.nodes[path].inputs
        how: tuple[tuple[str, dict[str, Attr]], ...] = ("cast", {}), ("scaled", {"scale": graph.nodes[path].attrs["scale"]})
        made.append([f"{slot}~{owner(graph, path)}" for slot in slots])
        sums = graph.nodes[graph.nodes[path].inputs[0]]
        if sums.op == "group_sums":  # a group's sum times a column is each of its inputs times that column
            how = ("spread_columns", {"times": sums.attrs["group"]}), how[1]
        for name, factor, (op, attrs) in zip(made[-1], factors, how, strict=True):
            nodes[name] = Node(op, (factor,), Type("f32", graph.nodes[factor].type.shape), attrs)
            if op == "spread_columns":
                nodes[name] = replace(nodes[name], type=infer(op, (graph.nodes[factor].type,), **attrs))
    for axis, (slot, names) in enumerate(zip(slots, zip(*made, strict=True), strict=True)):
        attrs = {"slot": axis}
        nodes[slot] = Node("input", names, infer("input", tuple(nodes[n].type for n in names), **attrs), attrs)
    path = f"{stem}~slot"
    nodes[path] = Node("lora", (base.inputs[0], *slots), base.type, {"scale": 1.0})
    return {**nodes, site.result: Node("add", (site.base, path), base.type)}


def slot_names(weight: str) -> tuple[str, str]:
    """The inputs A and B beside a weight."""
    stem = weight.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _refused(graph: Graph, alias: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{_name_of(graph, alias)}: {what}; --adapters swap takes low-rank paths alone", hint=MERGE)


# whose is what ------------------------------------------------------------------------------------


def alias_of(graph: Graph, value: str) -> str | None:
    """adapter0, adapter1 … where a weight is read from an adapter."""
    alias = str(graph.root(value).attrs.get("tensor", "")).partition("/")[0]
    return alias if alias.startswith("adapter") else None


def owner(graph: Graph, path: str) -> str | None:
    """Whose path it is; None for a slot's, which is nobody's."""
    factors = [i for i in graph.nodes[path].inputs[1:] if graph.nodes[i].op != "input"]
    return next((alias for i in factors if (alias := alias_of(graph, i)) is not None), None)


def _module(graph: Graph, path: str) -> str:
    """As the adapter names it, for a person."""
    return graph.nodes[path].inputs[-1].partition(".lora_")[0]


def _name_of(graph: Graph, alias: str) -> str:
    number, listed = alias.removeprefix("adapter"), graph.meta.get("adapters")
    entry = listed[int(number)] if isinstance(listed, list) and number.isdigit() and int(number) < len(listed) else None
    return str(entry["name"]) if isinstance(entry, dict) else alias


def alone(graph: Graph, alias: str | None) -> Graph:
    """The graph without the paths of all adapters but one; of all, for None."""

    def below(node: Node) -> Node:
        while is_sum(graph, node) and owner(graph, node.inputs[1]) not in (None, alias):
            node = graph.nodes[node.inputs[0]]
        return node

    return graph.rewrite(lambda name, node: {name: below(node)})


def filling(graph: Graph) -> dict[str, dict[str, str]]:
    """Adapter -> slot -> the weight that the adapter puts there."""
    found: dict[str, dict[str, str]] = {}
    for slot, node in graph.nodes.items():
        for value in node.inputs if "slot" in node.attrs else ():
            found.setdefault(alias_of(graph, value) or value, {})[slot] = value
    return found
