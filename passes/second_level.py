"""second-level: quantize scales and zero points themselves, with a level of their own above them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from qconvert.errors import UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.scheme import is_real, scheme_of
from qconvert.second_level import ENTRIES, Kind, second_level_name

log = logging.getLogger("qconvert")
FEWEST = 8  # entries that share a second level: with fewer it takes more than it saves


@dataclass(frozen=True)
class SecondLevel:
    """u8: step * code + low for up to 128 entries of a row; u6: super * code for 8, as K-quants have. Runs before pack."""

    name: ClassVar[str] = "second-level"
    kind: str = "u8"

    def __call__(self, graph: Graph) -> Graph:
        if self.kind not in ENTRIES:
            raise UsageError(f"{self.name}: kind={self.kind}: there are {', '.join(ENTRIES)}")
        parameters = set(graph.parameters())

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            scheme = scheme_of(node.type.dtype)
            if name not in parameters or scheme is None or len({level.role for level in scheme.levels}) < len(scheme.levels):
                return None  # plain, or it has a second level
            if not any(is_real(level) for level in scheme.levels) or any(level.group is None for level in scheme.levels):
                return None
            new = second_level_name(scheme, node.type.dims[-1], cast(Kind, self.kind))
            if int(new.rpartition("x")[2]) < FEWEST:
                log.debug("%s: left %%%s alone: too few groups a row", self.name, name)
                return None
            made = Node("second_level", (f"{name}~first",), Type(new, node.type.shape), {"kind": self.kind})
            return {f"{name}~first": node, name: made}

        return graph.rewrite(rule)
