"""The graph as text, both ways: parse(format(g)) == g, so a dump is a test."""

from __future__ import annotations

import json
import re

from qconvert.errors import GraphError
from qconvert.graph import Attr, Graph, Node, Type

LINE = re.compile(r"%(\S+) : (\S+) = (\w+)\(([^)]*)\)(?: (\{.*\}))?$")


def format(graph: Graph) -> str:
    """One line a node: `%name : type = op(%a, %b) {json}`, between `meta {json}` and `return %x`."""
    lines = [f"meta {_json(dict(graph.meta))}"] if graph.meta else []
    lines += [format_node(name, node) for name, node in graph.nodes.items()]
    return "\n".join([*lines, "return " + ", ".join("%" + o for o in graph.outputs)]) + "\n"


def format_node(name: str, node: Node) -> str:
    attrs = f" {_json(dict(node.attrs))}" if node.attrs else ""
    return f"%{name} : {node.type} = {node.op}({', '.join('%' + i for i in node.inputs)}){attrs}"


def parse(text: str) -> Graph:
    """Read what `format` wrote; lines that begin with // are comments. GraphError names the line."""
    nodes: dict[str, Node] = {}
    outputs: tuple[str, ...] = ()
    meta: dict[str, Attr] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("//"):
            continue
        if line.startswith("meta "):
            meta = _attrs(line[5:], number)
        elif line.startswith("return "):
            outputs = tuple(o.strip()[1:] for o in line[7:].split(","))
        elif m := LINE.match(line):
            name, type_, op, args, attrs = m.groups()
            if name in nodes:
                raise GraphError(f"line {number}: %{name} is defined twice")
            inputs = tuple(a.strip()[1:] for a in args.split(",") if a.strip())
            try:
                kind = Type.parse(type_)
            except ValueError as e:
                raise GraphError(f"line {number}: {type_[:80]} is no type: {e}") from e
            nodes[name] = Node(op, inputs, kind, _attrs(attrs or "{}", number))
        else:
            raise GraphError(f"line {number}: cannot parse {line!r}", hint="%name : type = op(%a, %b) {json}")
    return Graph(nodes, outputs, meta)


def _attrs(text: str, number: int) -> dict[str, Attr]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise GraphError(f"line {number}: attributes are not JSON: {e}") from e
    if not isinstance(value, dict):
        raise GraphError(f"line {number}: attributes are not a JSON object: {text}")
    return value


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
