"""The op `quantize` by a solver that is found by name: what it is given, and the rows that it sees together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from qconvert import registry
from qconvert.errors import GraphError, UnsupportedError
from qconvert.float_weights import has_rtn, whole_blocks
from qconvert.graph import Graph, Node
from qconvert.hessians import Factor, Factors, factored
from qconvert.own_solvers import Own
from qconvert.scheme import CODEBOOKS, F32, Array, Device, QTensor, Scheme, scheme_of

GPU_SOLVERS = ("rtn", "lsq", "gptq")  # those that take weights by columns


class Values(Protocol):
    """What an op reads: weights.Weights."""

    graph: Graph
    factors: Factors
    dtype: type[np.floating[Any]]
    device: Device

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array: ...


def gives_codes(node: Node) -> bool:
    """Whether its solver does; the others make packed rows, as rtn of small floats and int8 does: float_weights' own."""
    name = str(node.attrs.get("solver"))
    if name == "rtn" and has_rtn(cast(Scheme, scheme_of(node.type.dtype))):
        return False
    solver = registry.find("solvers", name)
    return not (isinstance(solver, Own) and solver.packed)


def on_gpu(node: Node) -> bool:
    """Whether a GPU chooses its codes. Of lsq it also makes the levels: without them there is too little to do."""
    name, scheme = node.attrs.get("solver"), scheme_of(node.type.dtype)
    if name not in GPU_SOLVERS or scheme is None or scheme.name in CODEBOOKS or not gives_codes(node):
        return False
    from qconvert.solving import levels_apart

    return made(node).refuses(scheme) is None and (name != "lsq" or levels_apart(scheme) is None)


def left_to_cpu(node: Node) -> tuple[str, ...]:
    """What of a node that a GPU solves is made on the CPU all the same, and why."""
    if node.attrs.get("solver") != "gptq":
        return ()
    from qconvert.solving import levels_apart

    why = levels_apart(cast(Scheme, scheme_of(node.type.dtype)))
    return "gptq's Cholesky factors, in f64", *((f"levels of {node.type.dtype}, for want of a kernel: {why}",) if why else ())


def made(node: Node) -> Any:
    """The solver of a node, with the options in its attributes."""
    cls = cast(Any, registry.find("solvers", str(node.attrs["solver"])))
    return cls(**{f.name: node.attrs[f.name] for f in fields(cls) if f.name in node.attrs})


def solved(w: Values, name: str, node: Node, begin: int, end: int, check: Callable[[str, Array], None]) -> QTensor:
    """Rows begin..end of a weight [N,K] or [E,N,K]; check(name, rows) raises where they are not finite."""
    scheme, solver = cast(Scheme, scheme_of(node.type.dtype)), made(node)
    if (why := solver.refuses(scheme)) is not None:
        raise UnsupportedError(f"{name}: {solver.name} makes no {scheme.name}: {why}")
    n, parts = node.type.dims[-2], []
    for e in range(begin // n, -(-end // n)):
        i, j = max(begin, e * n), min(end, (e + 1) * n)
        low, high = whole_blocks(scheme, n, i - e * n, j - e * n)
        low, high = low + e * n, high + e * n
        value = w.real(node.inputs[0], low, high)
        check(node.inputs[0], value)
        q = solver.solve(scheme, np.ascontiguousarray(value, np.float32), given(w, name, node, solver, e))
        parts.append(QTensor(scheme, q.codes[i - low : j - low], tuple(v[i - low : j - low] for v in q.levels)))
    if len(parts) == 1:
        return parts[0]
    levels = zip(*(q.levels for q in parts), strict=True)
    return QTensor(scheme, np.concatenate([q.codes for q in parts]), tuple(map(np.concatenate, levels)))


def given(w: Values, name: str, node: Node, solver: Any, expert: int) -> Any:
    """What node's inputs beside the weight say, of one expert (0 where there are none)."""
    from qconvert.solving import Given

    others = list(node.inputs[1:])
    whole = next((float(w.real(i)[0]) for i in others if w.graph.nodes[i].type.dims == (1,)), None)
    statistic = next((i for i in others if w.graph.nodes[i].type.dims != (1,)), None)
    moments, factor = None, None
    k, n = node.type.dims[-1], node.type.dims[-2]
    if statistic is None and solver.needs == "hessian":
        raise GraphError(f"{name}: {solver.name} needs the Hessian of its inputs", hint="calibrate first")
    if statistic is not None and solver.needs == "hessian":
        source = w.graph.nodes[statistic]

        def factor_of(damp: float, ordered: bool) -> Factor:
            key: Hashable = (str(source.attrs.get("tensor", statistic)), expert, damp, ordered)
            read = partial(w.real, statistic, expert * k, (expert + 1) * k)
            return w.factors.of(key, lambda: factored(read(), damp, ordered, name))

        factor = factor_of
    elif statistic is not None:
        rows = w.real(statistic)
        moments = np.ascontiguousarray(rows if rows.ndim == 1 else rows[expert], np.float32)

    def over_all(f: Callable[[Iterable[F32]], int]) -> int:
        def blocks() -> Iterator[F32]:
            step = max(1, (1 << 19) // k)
            for i in range(0, n, step):
                value = w.real(node.inputs[0], expert * n + i, expert * n + min(n, i + step))
                yield np.ascontiguousarray(value, np.float32)

        return w.factors.number((id(w.graph), name, expert), lambda: f(blocks()))  # factors may be shared with other graphs

    if w.device == "cuda" and on_gpu(node):
        from qconvert.kernels.gpu.columns import GpuColumns

        return Given(whole, moments, factor, over_all, GpuColumns)
    return Given(whole, moments, factor, over_all)
