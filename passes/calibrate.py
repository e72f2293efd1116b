"""calibrate: lay the statistics of what each weight multiplies beside it, as loads from a file of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.graph import Attr, Graph, Node, Type
from qconvert.statistics import ALIAS, FILE, Site


@dataclass(frozen=True)
class Calibrate:
    """W~moments and, for `hessians` (keys of sites), W~hessian, which quantize reads where its solver wants them.

    without: weights of these sites that the statistics say nothing of. about: whose they are, for the file's header.
    """

    name: ClassVar[str] = "calibrate"
    file: str = FILE
    sites: tuple[Site, ...] = field(default=(), repr=False)
    hessians: frozenset[str] = field(default=frozenset(), repr=False)
    without: frozenset[str] = field(default=frozenset(), repr=False)
    about: Mapping[str, Attr] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        new: dict[str, Node] = {}
        for site in self.sites:
            lead = (site.experts,) if site.experts else ()
            kinds = {"moments": (*lead, site.k)} | ({"hessian": (*lead, site.k, site.k)} if site.key in self.hessians else {})
            for weight in (w for w in site.weights if w not in self.without):
                for kind, shape in kinds.items():
                    attrs: dict[str, Attr] = {"tensor": f"{ALIAS}/{self.file}#{site.key}.{kind}"}
                    new[f"{weight}~{kind}"] = Node("load", (), Type("f32", shape), attrs)
        return replace(graph, nodes={**new, **graph.nodes}).with_meta(statistics=dict(self.about)) if new else graph
