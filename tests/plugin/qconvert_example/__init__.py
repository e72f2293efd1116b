"""What a third party writes: a pass, a family, a format and a runtime. The tests use it as installed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from qconvert.emit import FilePlan, Plan
from qconvert.families import LLAMA
from qconvert.graph import Graph, Node, Type
from qconvert.report import Row
from qconvert.target import Legal

OTHER_LLAMA = replace(LLAMA, name="otherllama", model_type="otherllama", hf=("OtherLlamaForCausalLM",))


@dataclass(frozen=True)
class ScaleWeights:
    """Multiply every weight whose name `match` is found in by `factor`."""

    name: ClassVar[str] = "scale-weights"
    match: str = ""
    factor: float = 1.0

    def __call__(self, graph: Graph) -> Graph:
        parameters = set(graph.parameters())

        def rule(name: str, node: Node) -> dict[str, Node] | None:
            if name not in parameters or not re.search(self.match, name):
                return None
            plain = f"{name}~plain"
            return {plain: node, name: Node("scaled", (plain,), Type("f32", node.type.shape), {"scale": self.factor})}

        return graph.rewrite(rule)


class Names:
    """A format that writes nothing but the names of the weights."""

    name: ClassVar[str] = "names"

    def options(self, request: Any, source: Any, graph: Graph) -> None:
        return None

    def legalize(self, graph: Graph, options: None) -> Legal:
        return Legal((), "none")

    def default_path(self, source: Any, graph: Graph, options: None) -> Path:
        return Path("names.txt")

    def plan(self, graph: Graph, options: None, legal: Legal, path: Path) -> Plan:
        header = "\n".join(graph.parameters()).encode()
        return Plan((FilePlan(path, header, (), len(header)),))

    def prove(self, source: Any, lowered: Any, weights: Any, parts: Any, threads: int) -> tuple[list[Row], None]:
        return [Row("runtime", "not verified", None, None, "skip", "a list of names runs nowhere")], None


class Nothing:
    """A runtime that is never there."""

    name = "nothing"

    def missing(self) -> str | None:
        return "there is nothing to run"

    def version(self) -> str:
        return ""
