"""Whether an attached adapter changes anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qconvert.adapters import Adapter
from qconvert.errors import AdapterError, Place
from qconvert.graph import Graph, Node
from qconvert.sources import Store
from qconvert.weights import Weights, rows_per_block


def check_delta(adapter: Adapter, store: Store, graph: Graph) -> None:
    """AdapterError where the adapter, attached in `graph`, changes nothing. Reads until the first value that counts."""
    weights = Weights(graph, store)
    for node in graph.nodes.values():
        own = [i for i in node.inputs if str(graph.root(i).attrs.get("tensor", "")).startswith(f"{adapter.alias}/")]
        if own and node.op in _CHANGES and _CHANGES[node.op](weights, node):
            return
        if node.op == "load" and "role" in node.attrs and str(node.attrs["tensor"]).startswith(f"{adapter.alias}/"):
            return  # a resized vocabulary
    raise AdapterError(
        f"{adapter.name}: the adapter changes nothing: every update in it is zero",
        hint="it was never trained, or saved before training; converting the base alone would give the same file",
        place=Place(str(adapter.folder)),
    )


def _changes_path(w: Weights, node: Node) -> bool:
    return (_any(w, node.inputs[1]) and _any(w, node.inputs[2])) or any(_any(w, i) for i in node.inputs[3:])


def _changes_dora(w: Weights, node: Node) -> bool:
    """With B = 0, DoRA changes nothing where m is the norm of W: by row, or by column for an embedding."""
    _, base, a, b, m = node.inputs
    if _any(w, a) and _any(w, b):
        return True
    square = 0.0 if node.op == "dora_embed" else None
    norms = []
    for begin, end in _blocks(w, base):
        rows = np.square(w.real(base, begin, end).astype(np.float64))
        if square is None:
            norms.append(np.sqrt(rows.sum(1)))
        else:
            square = square + rows.sum(0)
    norm = np.concatenate(norms) if square is None else np.sqrt(square)
    coarse = w.graph.nodes[m].type.dtype in ("f16", "bf16")
    return not np.allclose(w.real(m), norm, rtol=2e-2 if coarse else 1e-4)  # an untrained m is the norm, rounded


def _changes_blend(w: Weights, node: Node) -> bool:
    _, base, new = node.inputs
    return any(not np.array_equal(w.real(base, i, j), w.real(new, i, j)) for i, j in _blocks(w, new))


def _changes_rows(w: Weights, node: Node) -> bool:
    _, base, new = node.inputs
    indices = node.attrs["indices"]
    assert isinstance(indices, list)
    rows = w.real(new)
    return any(not np.array_equal(w.real(base, int(i), int(i) + 1)[0], rows[j]) for j, i in enumerate(indices))  # type: ignore[arg-type]


def _any(w: Weights, name: str) -> bool:
    return any(w.real(name, begin, end).any() for begin, end in _blocks(w, name))


def _blocks(w: Weights, name: str) -> Iterator[tuple[int, int]]:
    n, *rest = w.graph.nodes[name].type.dims
    step = rows_per_block(math.prod(rest))
    return ((begin, min(n, begin + step)) for begin in range(0, n, step))


_CHANGES: Mapping[str, Callable[[Weights, Node], bool]] = {
    "lora": _changes_path, "lora_embed": _changes_path, "dora_path": _changes_dora, "dora_embed": _changes_dora,
    "blend": _changes_blend, "set_rows": _changes_rows,
}  # fmt: skip
