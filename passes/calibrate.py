"""calibrate: lay the statistics of what each weight multiplies beside it, as loads from a file of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.graph import Attr, Graph, Node, Type
from qconvert.statistics import ALIAS, FILE, Site, shapes_of


@dataclass(frozen=True)
class Calibrate:
    """W~moments, W~hessian, W~peaks, W~histogram and W~extremes for each weight of `sites`, those of `kinds`.

    about: whose they are, for the file's header. alias: under which the store knows the file.
    """

    name: ClassVar[str] = "calibrate"
    file: str = FILE
    sites: tuple[Site, ...] = field(default=(), repr=False)
    kinds: frozenset[str] = field(default=frozenset(("moments",)), repr=False)
    about: Mapping[str, Attr] = field(default_factory=dict, repr=False)
    alias: str = ALIAS

    def __call__(self, graph: Graph) -> Graph:
        new: dict[str, Node] = {}
        for site in self.sites:
            for kind, shape in shapes_of(site, self.kinds).items():
                attrs: dict[str, Attr] = {"tensor": f"{self.alias}/{self.file}#{site.key}.{kind}"}
                of = Type("i64" if kind == "histogram" else "f32", shape)
                new |= {f"{weight}~{kind}": Node("load", (), of, attrs) for weight in site.weights}
        return replace(graph, nodes={**new, **graph.nodes}).with_meta(statistics=dict(self.about)) if new else graph
