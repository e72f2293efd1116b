"""What is in a folder, from a graph of packed weights: the tensors of each, and which are quantized."""

from __future__ import annotations

from qconvert.formats.safetensors_dialects import Wanted, Written
from qconvert.formats.safetensors_files import Stored, stored
from qconvert.formats.safetensors_names import linears, stored_transposed, values
from qconvert.graph import Graph


def all_stored(graph: Graph) -> list[Stored]:
    """Every parameter under its name in a checkpoint."""
    turned = stored_transposed(graph)
    return [stored(name, value, graph.nodes[value].type, name in turned) for name, value in values(graph).items()]


def written(graph: Graph, wanted: Wanted) -> Written:
    """Of a graph of packed weights."""
    quantized, left = {}, []
    matrices = linears(graph, heads=True)
    for name in graph.parameters():
        dtype = graph.nodes[name].type.dtype
        if "." in dtype:
            quantized[name] = dtype.partition(".")[2]
        elif name in matrices:
            left.append(name.removesuffix(".weight"))
    return Written(quantized, tuple(left), wanted)
