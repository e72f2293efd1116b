"""merge-adapters: fold every adapter path into the weight it lies beside, algebraically; no data moves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

from qconvert.errors import GraphError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import infer
from qconvert.passes.untie_head import PATHS, Site, UntieHead, embedding_of, is_tied, sites
from qconvert.pooled_merges import why_not_shifted

log = logging.getLogger("qconvert")
Attrs = tuple[tuple[str, Attr], ...]


@dataclass(frozen=True)
class MergeAdapters:
    """linear(x, W) + lora(x, A, B) becomes linear(x, merge(W, A, B)); DoRA and embeddings alike.

    Paths are linear in what they add to W, so several adapters chain: W~base, W~a0, W~a1 … W. A tied head whose
    updates differ from the embedding's gets its own weight. GraphError where a path cannot be folded, with the reason.
    """

    name: ClassVar[str] = "merge-adapters"

    def __call__(self, graph: Graph) -> Graph:
        reasons: list[str] = []
        plan = _plan(graph, reasons)
        if len(_different(plan.get(embedding_of(graph) or "", []))) > 1 and is_tied(graph):
            log.info("merge-adapters: untied the head: its weight is not changed as the embedding's is")
            graph, reasons = UntieHead()(graph), []
            plan = _plan(graph, reasons)
        merging = _Merging(graph)
        for weight, found in plan.items():
            if len(_different(found)) > 1:
                reasons.append(f"left {weight} alone: it is read {len(found)} times, and changed differently")
            elif found[0].updates:
                merging.fold(weight, found)
        out = _replaced(graph.rewrite(lambda name, _: merging.edits.get(name)))
        for reason in reasons:
            log.info("merge-adapters: %s", reason)
        left = [f"%{name} ({node.op})" for name, node in out.nodes.items() if node.op in PATHS]
        if left:
            why = "; ".join(reasons) or "they do not lie beside a linear or an embedding"
            raise GraphError(f"merge-adapters left {len(left)} adapter paths, first {left[0]}: {why}")
        return out


class Update(NamedTuple):
    """What a path does to the weight beside it: op(w, *inputs) {attrs}; what a lora_bias does to the bias."""

    op: str
    inputs: tuple[str, ...]
    attrs: Attrs
    bias: tuple[str, float] | None = None


class Reading(NamedTuple):
    site: Site
    updates: tuple[Update, ...]


def _different(found: list[Reading]) -> set[tuple[Update, ...]]:
    return {r.updates for r in found}


def _plan(graph: Graph, reasons: list[str]) -> dict[str, list[Reading]]:
    """weight -> where it is read and how it is changed there, in evaluation order."""
    order = {name: i for i, name in enumerate(graph.nodes)}
    out: dict[str, list[Reading]] = {}
    for (_, weight), found in sites(graph).items():
        out.setdefault(weight, []).extend(Reading(s, tuple(_updates(graph, s, reasons))) for s in found)
    for readings in out.values():
        readings.sort(key=lambda r: order[r.site.result])
    return out


def _updates(graph: Graph, site: Site, reasons: list[str]) -> Iterator[Update]:
    """Of the paths over a linear or embed, lowest first; none where one of them cannot be folded."""
    paths = []
    name = site.result
    while name != site.base:
        name, path = graph.nodes[name].inputs
        paths.append(path)
    for path in reversed(paths):
        node = graph.nodes[path]
        if node.inputs[0] != (x := graph.nodes[site.base].inputs[0]) and _sums(graph, node) != x:
            reasons.append(f"left %{path} alone: it reads %{node.inputs[0]}, the weight beside it does not")
            return
    yield from (_update(graph, graph.nodes[path]) for path in reversed(paths))


def _sums(graph: Graph, path: Node) -> str | None:
    """What a path reads sums of groups of; None where it reads no such sums."""
    x = graph.nodes[path.inputs[0]]
    return x.inputs[0] if x.op == "group_sums" else None


def _update(graph: Graph, node: Node) -> Update:
    scale, weight = _number(node, "scale"), node.attrs.get("weight", 1.0)
    if node.op == "lora":
        a, b, *bias = node.inputs[1:]
        if _sums(graph, node) is not None:
            return Update("merge_pooled", (a, b), (("scale", scale), ("group", graph.nodes[node.inputs[0]].attrs["group"])))
        return Update("merge", (a, b), (("scale", scale),), (bias[0], scale) if bias else None)
    if node.op == "lora_embed":
        a, b = node.inputs[1:]
        return Update("merge", (f"{b}~transposed", f"{a}~transposed"), (("scale", scale),))
    attrs: Attrs = (("scale", scale), ("weight", weight))
    if node.op == "dora_path":
        return Update("dora", node.inputs[1:], attrs)
    base, a, b, m = node.inputs[1:]
    return Update("dora", (base, f"{b}~transposed", f"{a}~transposed", m), attrs)


def _number(node: Node, attr: str) -> float:
    value = node.attrs[attr]
    assert isinstance(value, int | float)
    return value


@dataclass
class _Merging:
    graph: Graph
    edits: dict[str, dict[str, Node]] = field(default_factory=dict)  # node -> what takes its place

    def fold(self, weight: str, found: list[Reading]) -> None:
        """Change a weight once, before its first reader, and let every reader read the result."""
        first, updates = found[0].site, found[0].updates
        names = _free(self.graph, weight)
        below = next(names)
        self.edits[weight] = {below: self.graph.nodes[weight]}
        chain = self._chain(weight, below, names, updates)
        bias = self._biases(weight, first, updates)
        for reading in found:
            base = self.graph.nodes[reading.site.base]
            inputs = (*base.inputs[:2], bias) if bias else base.inputs
            nodes = {reading.site.result: Node(base.op, inputs, base.type, base.attrs)}
            self.edits[reading.site.result] = {**self.edits.get(reading.site.result, {}), **nodes}
        self.edits[first.result] = {**chain, **self.edits[first.result]}

    def _chain(self, weight: str, below: str, names: Iterator[str], updates: tuple[Update, ...]) -> dict[str, Node]:
        base = self.graph.nodes[weight]
        shape = base.type.shape
        out: dict[str, Node] = {}
        current = below
        for i, u in enumerate(updates):
            inputs = tuple(below if name == weight else name for name in u.inputs)
            for name in inputs:
                if name.endswith("~transposed"):
                    out |= self._transposed(name)
            if u.op == "dora" and u.inputs[1].endswith("~transposed"):  # an embedding's magnitude is by column
                norm = f"{weight}~norm{i}"
                out[norm] = Node("column_norm", inputs[:3], Type("f32", shape[1:]), dict(u.attrs[:1]))
                inputs = (*inputs, norm)
            name, attrs, lower = weight if i == len(updates) - 1 else next(names), dict(u.attrs), out.get(current, base)
            kind = Type("f32", shape)
            if u.op == "merge_pooled":
                attrs |= {"why": why} if (why := why_not_shifted(lower, int(str(attrs["group"])))) else {}
                kind = infer(u.op, (lower.type, *(self.graph.nodes[n].type for n in inputs)), **attrs)
            out[name] = Node(u.op, (current, *inputs), kind, attrs)
            current = name
        return out

    def _transposed(self, name: str) -> dict[str, Node]:
        source = name.removesuffix("~transposed")
        t = self.graph.nodes[source].type
        return {name: Node("transpose", (source,), Type(t.dtype, t.shape[::-1]))}

    def _biases(self, weight: str, site: Site, updates: tuple[Update, ...]) -> str | None:
        """The bias after all updates, its nodes put before the reader; None where no update has one."""
        added = [u.bias for u in updates if u.bias is not None]
        if not added:
            return None
        base = self.graph.nodes[site.base]
        if len(base.inputs) > 2:
            bias = base.inputs[2]
            names = _free(self.graph, bias)
            current = next(names)
            self.edits[bias] = {current: self.graph.nodes[bias]}
        else:
            bias, current = f"{weight.removesuffix('.weight')}.bias", ""
            names = _free(self.graph, bias)
            self._give_role(added[0][0], weight)
        nodes: dict[str, Node] = {}
        for i, (name, scale) in enumerate(added):
            target = bias if i == len(added) - 1 else next(names)
            op, inputs = ("add_scaled", (current, name)) if current else ("scaled", (name,))
            nodes[target] = Node(op, inputs, Type("f32", base.type.shape[-1:]), {"scale": scale})
            current = target
        self.edits[site.result] = nodes
        return bias

    def _give_role(self, load: str, weight: str) -> None:
        """A bias that the base has not takes the role and layer of its weight."""
        attrs = self.graph.root(weight).attrs
        role = {k: attrs[k] for k in ("role", "layer") if k in attrs}
        node = self.graph.nodes[load]
        self.edits[load] = {load: replace(node, attrs={**node.attrs, **role})}


def _free(graph: Graph, weight: str) -> Iterator[str]:
    """Names for what a weight was before: ~base, ~a0, ~a1 …, without those in use."""
    if f"{weight}~base" not in graph.nodes:
        yield f"{weight}~base"
    n = 0
    while True:
        if f"{weight}~a{n}" not in graph.nodes:
            yield f"{weight}~a{n}"
        n += 1


# whole replacements -------------------------------------------------------------------------------


def _replaced(graph: Graph) -> Graph:
    """blend(w, w, new) {"weight": 1} is new: read it in w's place, with w's role, and w no longer."""
    same: dict[str, str] = {}
    roles: dict[str, dict[str, Attr]] = {}

    def final(name: str) -> str:
        return same.get(name, name)

    for name, node in graph.nodes.items():
        if node.op == "blend" and node.attrs["weight"] == 1 and final(node.inputs[0]) == final(node.inputs[1]):
            same[name] = final(node.inputs[2])
            attrs = graph.root(name).attrs
            roles[_root(graph, same[name])] = {k: attrs[k] for k in ("role", "layer") if k in attrs}
    read = {o for o in same if "~" not in o}  # parameters keep their name
    passed = {k: v for k, v in same.items() if k not in read}
    return graph.rewrite(_rule(graph, passed, {k: same[k] for k in read}, roles))


def _rule(
    graph: Graph, same: Mapping[str, str], copies: Mapping[str, str], roles: Mapping[str, dict[str, Attr]]
) -> Callable[[str, Node], Mapping[str, Node] | None]:
    def rule(name: str, node: Node) -> Mapping[str, Node] | None:
        source = copies.get(name, name)
        node = graph.nodes[source]
        attrs = {**node.attrs, **roles.get(source, {})}
        inputs = tuple(same.get(i, i) for i in node.inputs)
        return {name: Node(node.op, inputs, node.type, attrs)}

    return rule


def _root(graph: Graph, name: str) -> str:
    while graph.nodes[name].inputs:
        name = graph.nodes[name].inputs[0]
    return name
