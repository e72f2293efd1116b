"""The types that each weight of a folder may have, for a budget of bytes: compressed-tensors' groups of 4 and 8 bits, or none.

Codes have no zero points: transformers 5.23 loads those of one group size only. Linears that read the same and lie in one
module (q, k and v; gate and up) get one type, since vLLM multiplies them as one; so do all experts, see safetensors_experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qconvert.dtypes import DTYPES
from qconvert.formats.safetensors_ct import GROUPS, PackQuantized
from qconvert.formats.safetensors_dialects import Dialect, Wanted
from qconvert.formats.safetensors_experts import SplitExperts, expert_matrices
from qconvert.formats.safetensors_files import stored
from qconvert.formats.safetensors_names import linears
from qconvert.graph import Graph, Type
from qconvert.scheme import affine_name, scheme_of
from qconvert.target import Menu
from qconvert.transcoded import stored_dtype

MIXED = PackQuantized("mixed", "int4", 4)
KINDS = {"int4": 4, "int8": 8}
STOCK = {"w4a16": ("int4", 128), "w4a16, groups of 32": ("int4", 32), "w8a16": ("int8", 128)}
SMALLER = "4 bits are the least here, and embeddings stay as they are; --to onnx has 2 bits, --to gguf less"


def menu(graph: Graph, dialect: Dialect, wanted: Wanted) -> Menu:
    """Of linear maps; all else is plain. Experts are there as the stack of all of a layer, and are never plain beside others:
    transformers loads none."""
    graph = SplitExperts()(graph)
    matrices, experts = linears(graph), expert_matrices(graph)
    stacks = {n: node.inputs for n, node in graph.nodes.items() if experts & set(node.inputs) and node.attrs.get("apart")}
    shared = [types_of(graph, name, dialect, wanted) for name in sorted(experts)]
    sizes: dict[str, dict[str, int]] = {}
    for name in graph.parameters():
        if name in stacks:
            types = [t for t in (shared[0] if shared else ()) if all(t in others for others in shared)]
        elif name in matrices:
            types = [*types_of(graph, name, dialect, wanted), wanted.dtype]
        else:
            continue
        members = stacks.get(name, (name,))
        of = {t: sum(nbytes_of(t, graph.nodes[m].type.dims) for m in members) for t in types}
        if of:
            sizes[name] = dict(sorted(of.items(), key=lambda each: each[1]))
    groups = [*together(graph, sizes), tuple(name for name in stacks if name in sizes)]
    stock = {name: each for name, of in STOCK.items() if (each := alike(sizes, affine_name(*of, wanted.dtype), wanted.dtype))}
    return Menu(sizes, stock, [group for group in groups if len(group) > 1], False, SMALLER)


def types_of(graph: Graph, name: str, dialect: Dialect, wanted: Wanted) -> list[str]:
    """Schemes that rows divide into, and that in which codes of a source are kept."""
    n, k = graph.nodes[name].type.dims
    groups = [wanted.group] if wanted.group is not None else GROUPS
    found = [affine_name(kind, g, wanted.dtype) for kind, bits in KINDS.items() for g in groups
             if k % g == 0 and k * bits % 32 == 0 and g * bits % 32 == 0]  # fmt: skip
    codes = scheme_of(stored_dtype(graph, name))
    kept = dialect.carrying(codes, n, k, wanted) if codes else None
    return [*found, *([kept] if kept and kept not in found else ())]


def nbytes_of(dtype: str, dims: tuple[int, ...]) -> int:
    if scheme_of(dtype) is None:
        return math.prod(dims) * DTYPES[dtype].nbytes
    return stored("weight", "weight", Type(f"ct.{dtype}", dims)).nbytes


def together(graph: Graph, sizes: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for node in graph.nodes.values():
        if node.op == "linear" and node.inputs[1] in sizes:
            x, weight = node.inputs[:2]
            parent = weight.removesuffix(".weight").rpartition(".")[0]
            groups.setdefault((x, parent), {})[weight] = None
    found = [tuple(group) for group in groups.values()]
    return [group for group in found if len({tuple(sizes[w]) for w in group}) == 1]


def alike(sizes: Mapping[str, Mapping[str, int]], wanted: str, plain: str) -> dict[str, str] | None:
    """That type for all weights whose rows divide into it, and the others plain; None where it is for none."""
    types = {w: wanted if wanted in of else plain for w, of in sizes.items()}
    return types if wanted in types.values() and all(t in sizes[w] for w, t in types.items()) else None


def of_matrices(graph: Graph, types: Mapping[str, str]) -> dict[str, str]:
    """The same, but for stacks of experts, which give their types to their matrices."""
    nodes = SplitExperts()(graph).nodes
    return {m: t for w, t in types.items() for m in (nodes[w].inputs if nodes[w].attrs.get("apart") else (w,))}
