"""incoherence: weights of a lattice's scheme are turned by random Hadamard matrices before they are rounded to its points.

    NAME~su : f32[K] = signs()  NAME~sv : f32[N] = signs()      NAME~code : e8p[N,K] = quantize(NAME~turned[, hessian])
    NAME~turned : f32[N,K] = incoherent(NAME~real, NAME~su, NAME~sv)
    NAME : f32[N,K] = coherent(NAME~code, NAME~su, NAME~sv)

A weight that its source has so already is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar
from zlib import crc32

from qconvert.errors import GraphError, UnsupportedError
from qconvert.graph import Graph, Node, Type
from qconvert.scheme import LATTICES
from qconvert.solver_spec import chosen


@dataclass(frozen=True)
class Incoherence:
    """types: weight -> scheme. solver: nearest, or ldlq, which wants NAME~hessian. Signs come from `seed` and the name."""

    name: ClassVar[str] = "incoherence"
    solver: str = "nearest"
    seed: int = 0
    types: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        solver = chosen(self.solver)

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            scheme = self.types.get(name)
            if scheme not in LATTICES or (node.op == "coherent" and graph.nodes[node.inputs[0]].type.dtype == scheme):
                return None
            if (why := solver.refuses(LATTICES[scheme])) is not None:
                raise UnsupportedError(f"{name}: solver {solver.name} makes no {scheme}: {why}", hint="--solver ldlq")
            (n, k), shape = node.type.dims, node.type.shape
            real, su, sv, turned, code = (f"{name}~{part}" for part in ("real", "su", "sv", "turned", "code"))
            new = {
                real: node,
                su: Node("signs", (), Type("f32", (k,)), {"seed": crc32(f"{self.seed} {su}".encode())}),
                sv: Node("signs", (), Type("f32", (n,)), {"seed": crc32(f"{self.seed} {sv}".encode())}),
                turned: Node("incoherent", (real, su, sv), Type("f32", shape)),
            }
            inputs: tuple[str, ...] = (turned,)
            if self.solver == "ldlq":
                hessian, both = f"{name}~hessian", f"{name}~hessian_turned"
                if hessian not in graph.nodes:
                    raise GraphError(f"{self.name}: %{name} has no %{hessian}", hint="calibrate first, or solver=nearest")
                new[both] = Node("incoherent", (hessian, su, su), Type("f32", (k, k)))
                inputs = turned, both
            new[code] = Node("quantize", inputs, Type(scheme, shape), {"solver": self.solver})
            return {**new, name: Node("coherent", (code, su, sv), Type("f32", shape))}

        return graph.rewrite(rule).sorted()
