"""What is in a folder, from a graph of packed weights: the tensors of each, and which are quantized."""

from __future__ import annotations

from qconvert.formats.safetensors_dialects import Wanted, Written
from qconvert.formats.safetensors_files import Stored, stored, stored_beside
from qconvert.formats.safetensors_names import linears, stored_transposed, values
from qconvert.graph import Graph
from qconvert.layouts import layout_of
from qconvert.passes.untie_head import HEAD, has_head, is_tied
from qconvert.tensor_layouts import Tensors


def all_stored(graph: Graph) -> list[Stored]:
    """Every parameter under its name in a checkpoint."""
    turned, found = stored_transposed(graph), list[Stored]()
    for name, value in values(graph).items():
        kind = graph.nodes[value].type
        layout = layout_of(kind.dtype) if "." in kind.dtype else None
        if not (isinstance(layout, Tensors) and not layout.parts):
            found.append(stored(name, value, kind, name in turned))
        if isinstance(layout, Tensors) and layout.beside:
            types = {n: node.type for n, node in graph.nodes.items() if n.startswith(f"{name}~")}
            found += stored_beside(name, layout, (kind.dims[0], kind.dims[1]), types)
    return found


def written(graph: Graph, wanted: Wanted) -> Written:
    """Of a graph of packed weights."""
    quantized, left = {}, []
    matrices = linears(graph, heads=True)
    for name in graph.apart():
        dtype = graph.nodes[name].type.dtype
        if "." in dtype:
            quantized[name] = dtype.partition(".")[2]
        elif name in matrices:
            left.append(name.removesuffix(".weight"))
    if is_tied(graph):
        left.append(HEAD.removesuffix(".weight"))  # a module of its own all the same
    if not has_head(graph):
        left.append("pooler.dense")  # which transformers makes, and no file has
    return Written(quantized, tuple(left), wanted)
