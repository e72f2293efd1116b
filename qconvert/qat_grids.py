"""What a conversion says of checkpoints that were trained on a grid: that one is, and how much of it was found again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qconvert.emit import row_ranges
from qconvert.errors import UsageError
from qconvert.graph import Graph
from qconvert.recover import SOLVER, Share, recoverable, recovered, sampled
from qconvert.report import Row
from qconvert.scheme import F32, scheme_of
from qconvert.sources import Store
from qconvert.weights import Weights

N_WEIGHTS, N_ROWS = 6, 8  # of a sample
LIKELY = 0.9  # of its groups
SHOWN = 8  # weights whose groups are on no grid, each in a row of its own
GRIDS = ("int4_g32", "int4_g64", "int4_g128")


def grid_notes(base: Graph, store: Store, solver: str | None, adapters: bool) -> tuple[str, ...]:
    """Notes on a checkpoint whose plain matrices look as if fake quantization had left them."""
    names = [node.inputs[1] for node in base.nodes.values() if node.op == "linear"]
    plain = [n for n in names if base.nodes[n].op == "load" and base.nodes[n].type.dtype in ("bf16", "f16", "f32")]
    chosen = plain[:: max(1, len(plain) // N_WEIGHTS)][:N_WEIGHTS]
    weights = Weights(base, store)
    for grid in GRIDS:
        scheme = scheme_of(grid)
        assert scheme is not None
        fit = [n for n in chosen if base.nodes[n].type.dims[1] % scheme.block == 0]
        share = sampled(_first_rows(weights, fit), scheme)
        if share.n and share.found >= LIKELY * share.n:
            told = f"{share.found} of {share.n} sampled groups of {scheme.block} weights lie on grids of 4 bits"
            way = "" if solver == SOLVER else "; --solver recover keeps them exactly in a type of 4 bits without zero points"
            note = f"trained for quantization (QAT): {told}{way}"
            left = "an adapter merged into weights that were trained on a grid leaves the grid: they are rounded anew"
            return (note, left) if adapters else (note,)
    return ()


def refuse_no_grid(graph: Graph, solver: str | None) -> None:
    """UsageError where the user asked for recovered grids, and no weight of a graph of packed weights gets one."""
    nodes = [n for n in graph.nodes.values() if n.op == "quantize" and n.attrs.get("solver") == SOLVER]
    if solver == SOLVER and not any((s := scheme_of(n.type.dtype)) is not None and recoverable(s) for n in nodes):
        raise UsageError(
            "--solver recover: no weight gets a type of one scale for each group and nothing else",
            hint="--quant Q4_0 or Q8_0 (GGUF), int4 or int8 (ONNX), w4a16 or w8a16 (safetensors)",
        )


def _first_rows(weights: Weights, names: list[str]) -> Iterator[F32]:
    for name in names:
        yield np.ascontiguousarray(weights.real(name, 0, min(N_ROWS, weights.graph.nodes[name].type.rows)), np.float32)


def recovered_rows(graph: Graph, weights: Weights) -> list[Row]:
    """The share of groups whose grid was found, and the weights that have others, worst first."""
    shares = dict[str, Share]()
    for node in graph.nodes.values():
        scheme = scheme_of(node.type.dtype)
        if node.op != "quantize" or node.attrs.get("solver") != SOLVER or scheme is None or not recoverable(scheme):
            continue
        share = shares.setdefault(node.inputs[0].partition("~")[0], Share())
        for begin, end in row_ranges(node.type.dims):
            share.add(recovered(scheme, np.ascontiguousarray(weights.real(node.inputs[0], begin, end), np.float32)))
    n, found = sum(s.n for s in shares.values()), sum(s.found for s in shares.values())
    if not n:
        return []
    off = sorted((name for name, s in shares.items() if s.found < s.n), key=lambda name: shares[name].found - shares[name].n)
    told = f"{found} of {n} groups in {len(shares)} weights" + (f"; {len(off)} weights have others" if off else "")
    rows = [Row("grids recovered", "share of groups", found / n, None, "info", told)]
    for name in off[:SHOWN]:
        s = shares[name]
        rows.append(Row(f"on no grid: {name}", "groups", float(s.n - s.found), None, "info", f"of {s.n}; searched instead"))
    return rows
