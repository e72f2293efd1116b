"""What is in a folder, from a graph of packed weights: the tensors of each, and which are quantized."""

from __future__ import annotations

import numpy as np

from qconvert.dtypes import DTYPES
from qconvert.formats.safetensors_dialects import Wanted, Written
from qconvert.formats.safetensors_files import Stored, Tensor, stored, stored_beside
from qconvert.formats.safetensors_names import linears, stored_transposed, values
from qconvert.graph import Graph
from qconvert.kernels import narrow_bf16
from qconvert.layouts import layout_of
from qconvert.passes.untie_head import HEAD, has_head, is_tied
from qconvert.scheme import F32
from qconvert.tensor_layouts import Tensors


def all_stored(graph: Graph) -> list[Stored]:
    """Every parameter under its name in a checkpoint."""
    turned, ranges, found = stored_transposed(graph), ranges_of(graph), list[Stored]()
    for name, value in values(graph).items():
        kind = graph.nodes[value].type
        layout = layout_of(kind.dtype) if "." in kind.dtype else None
        if not (isinstance(layout, Tensors) and not layout.parts):
            each = stored(name, value, kind, name in turned)
            found.append(each._replace(tensors=(*each.tensors, *ranges.get(name, ()))))
        if isinstance(layout, Tensors) and layout.beside:
            types = {n: node.type for n, node in graph.nodes.items() if n.startswith(f"{name}~")}
            found += stored_beside(name, layout, (kind.dims[0], kind.dims[1]), types)
    return found


def ranges_of(graph: Graph) -> dict[str, tuple[Tensor]]:
    """Weight -> the range of what its linear reads, where it is fixed."""
    found = {}
    for node in graph.nodes.values():
        if isinstance(at := node.attrs.get("round_input"), dict):
            dtype, name = DTYPES[str(at["dtype"])], f"{node.inputs[1].removesuffix('.weight')}.{at['name']}"
            data = as_bytes(str(at["dtype"]), np.array([at["value"]], np.float32))
            found[node.inputs[1]] = (Tensor(name, dtype.safetensors, (1,), len(data), None, data),)
    return found


def as_bytes(dtype: str, value: F32) -> bytes:
    return narrow_bf16(value).tobytes() if dtype == "bf16" else value.astype(DTYPES[dtype].numpy).tobytes()


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
