"""quantize: put a quantized (or rounded) weight under the name of each weight that has a type assigned.

Codes that a source stores are carried over where the type holds the same values; no solver runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.errors import GraphError, UnsupportedError, UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.moves import moves, nearly_moves
from qconvert.scheme import TERNARY, scheme_of
from qconvert.solver_spec import chosen

UNWEIGHTED = ("q8_0",)  # ggml rounds these alike, whatever their importance


@dataclass(frozen=True)
class Quantize:
    """`types` says weight -> scheme (q4_k) or plain dtype (f16), as the target format chose; `mix` is its usual name.

    solver: its name, with options in braces: gptq{damp=0.02}. solvers: weight -> the one that it has instead. A statistic that
    a solver wants is the last input: %W~moments or %W~hessian, which calibrate leaves.

    together: weight -> all whose scales of whole tensors are the same (it is among them), where it is not alone: what a
    runtime multiplies as one matrix. Where one of them is quantized, all are.
    """

    name: ClassVar[str] = "quantize"
    mix: str = ""
    solver: str = "search"
    types: Mapping[str, str] = field(default_factory=dict, repr=False)
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    solvers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        unknown = (self.types.keys() | self.solvers.keys()) - graph.nodes.keys()
        if unknown:
            raise GraphError(f"quantize: no weight is called {min(unknown)}")

        def kept(name: str) -> bool:
            """Its codes are those of the source."""
            return self.types.get(name, graph.nodes[name].type.dtype) == graph.nodes[name].type.dtype

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            dtype, members = self.types.get(name, node.type.dtype), self.together.get(name, (name,))
            if kept(name) and all(map(kept, members)):
                return None
            real, kind = f"{name}~real", Type(dtype, node.type.shape)
            scheme, stored = scheme_of(dtype), scheme_of(node.type.dtype)
            if scheme is not None and stored is not None and (moves(stored, scheme) or nearly_moves(stored, scheme)):
                return {f"{name}~stored": node, name: Node("transcode", (f"{name}~stored",), kind)}
            if scheme is None:
                return {real: node, name: Node("cast", (real,), kind)}
            if node.type.dims[-1] % scheme.block:
                raise GraphError(
                    f"{name}: rows of {node.type.dims[-1]} do not divide into {dtype} blocks of {scheme.block}"
                )
            solver = chosen(self.solvers.get(name, self.solver))
            if (why := solver.refuses(scheme)) is not None:
                raise UnsupportedError(f"{name}: solver {solver.name} makes no {scheme.name}: {why}", hint="--solver NAME")
            new = {real: node, name: Node("quantize", (real,), kind, solver.attrs)}
            if solver.name == "absmean" or scheme.name in TERNARY:
                mean, f32 = f"{name}~mean", Type("f32", (1,))
                new[mean] = Node("mean_magnitude", (real,), f32, {"least": 1e-5})
                new[name] = replace(new[name], inputs=(real, mean))
            elif scheme.of_tensors:
                peak = f"{members[0]}~peak"
                new[peak] = Node("amax", tuple(f"{m}~real" for m in members), Type("f32", (1,)))
                new[name] = replace(new[name], inputs=(real, peak))
            if solver.needs and not (solver.name == "search" and dtype in UNWEIGHTED):
                statistic = f"{name}~{solver.needs.removesuffix('?')}"
                if statistic in graph.nodes:
                    new[name] = replace(new[name], inputs=(*new[name].inputs, statistic))
                elif not solver.needs.endswith("?"):
                    raise UsageError(f"{name}: solver {solver.name} needs %{statistic}", hint="--calibrate FILE")
            return new

        return graph.rewrite(rule).sorted()
