"""untie-head: give the output head a weight of its own where it reads the embedding's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from qconvert.errors import GraphError
from qconvert.graph import STATISTICS, Attr, Graph, Node

HEAD = "lm_head.weight"  # what a checkpoint calls it where it is not tied, in every family
PATHS = ("lora", "dora_path", "lora_embed", "dora_embed")


@dataclass(frozen=True)
class UntieHead:
    """Let the head read lm_head.weight, made as the embedding is; a graph that is not tied stays as it is."""

    name: ClassVar[str] = "untie-head"

    def __call__(self, graph: Graph) -> Graph:
        embedding = embedding_of(graph)
        if embedding is None or not is_tied(graph):
            return graph
        head = head_of(graph)
        linear = graph.nodes[head]
        beside = [f"{embedding}{kind}" for kind in STATISTICS if f"{embedding}{kind}" in graph.nodes]  # of what the head reads

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name in beside:
                return {HEAD + name.removeprefix(embedding): node}
            if name == head:
                own = copied(graph, embedding, HEAD, "output")
                return {**own, head: replace(linear, inputs=(linear.inputs[0], HEAD, *linear.inputs[2:]))}
            if node.op == "dora_path" and node.inputs[1].partition("~")[0] == embedding:
                weight = HEAD + node.inputs[1].removeprefix(embedding)
                return {name: replace(node, inputs=(node.inputs[0], weight, *node.inputs[2:]))}
            return None

        return untied(graph.rewrite(rule))


def untied(graph: Graph) -> Graph:
    config = graph.meta.get("config")
    return graph.with_meta(config={**config, "tied": False}) if isinstance(config, dict) else graph


def copied(graph: Graph, old: str, new: str, role: str) -> dict[str, Node]:
    """The nodes that make weight `old`, as nodes that make `new`; loads are read twice, its root has the new role."""
    mine = [n for n in graph.nodes if n in graph.needed([old]) and n.partition("~")[0] == old]
    names = {n: new + n.removeprefix(old) for n in mine}
    root = old
    while graph.nodes[root].inputs:
        root = graph.nodes[root].inputs[0]
    out: dict[str, Node] = {}
    for n in mine:
        node = graph.nodes[n]
        attrs: dict[str, Attr] = {k: v for k, v in node.attrs.items() if k != "layer"}
        if n == root:
            attrs["role"] = role
        out[names[n]] = Node(node.op, tuple(names.get(i, i) for i in node.inputs), node.type, attrs)
    return out


# where weights are read ---------------------------------------------------------------------------


class Site(NamedTuple):
    """A linear or an embed, and the value its consumers read: the last sum where adapter paths lie beside it."""

    base: str
    result: str


def sites(graph: Graph) -> dict[tuple[str, str], list[Site]]:
    """(op, weight) -> where it is read, for linear and embed."""
    above = {n.inputs[0]: name for name, n in graph.nodes.items() if is_sum(graph, n)}
    out: dict[tuple[str, str], list[Site]] = {}
    for name, node in graph.nodes.items():
        if node.op in ("linear", "embed"):
            result = name
            while result in above:
                result = above[result]
            out.setdefault((node.op, node.inputs[1]), []).append(Site(name, result))
    return out


def is_sum(graph: Graph, node: Node) -> bool:
    """Whether a node adds an adapter's path to what lies below it."""
    return node.op == "add" and graph.nodes[node.inputs[1]].op in PATHS


def head_of(graph: Graph) -> str:
    """The linear that makes the logits. GraphError where something else does."""
    name = _below_output(graph)
    if graph.nodes[name].op != "linear":
        raise GraphError(f"%{name} makes the logits and is {graph.nodes[name].op}, not a linear")
    return name


def has_head(graph: Graph) -> bool:
    """Whether the graph gives logits; an encoder gives its hidden states."""
    return graph.nodes[_below_output(graph)].op == "linear"


def _below_output(graph: Graph) -> str:
    name = graph.outputs[0]
    while graph.nodes[name].op == "softcap" or is_sum(graph, graph.nodes[name]):
        name = graph.nodes[name].inputs[0]
    return name


def embedding_of(graph: Graph) -> str | None:
    """The weight whose rows the tokens choose."""
    tokens = {n for n, node in graph.nodes.items() if node.op == "input"}
    return next((v.inputs[1] for v in graph.nodes.values() if v.op == "embed" and v.inputs[0] in tokens), None)


def vocabulary_weights(graph: Graph) -> tuple[str, ...]:
    """The weights with a row for each token: the embedding, and the head's where there is a head."""
    embedding = embedding_of(graph)
    head = (graph.nodes[head_of(graph)].inputs[1],) if has_head(graph) else ()
    return (*(() if embedding is None else (embedding,)), *head)


def is_tied(graph: Graph) -> bool:
    return has_head(graph) and graph.nodes[head_of(graph)].inputs[1] == embedding_of(graph)
