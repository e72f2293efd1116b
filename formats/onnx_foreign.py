"""Quantize an ONNX model that others made: weights and the nodes that read them change, all else stays as it is.

    read (protobuf, no weights) -> sites -> graph of weights alone -> plan -> emit, and nodes that read what was emitted
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert import __version__
from qconvert.emit import Entry, FilePlan, Plan, Plane
from qconvert.errors import InputError, UnsupportedError, require
from qconvert.formats.onnx_columns import PREFIX as ONE_BYTE
from qconvert.formats.onnx_foreign_job import Rewritten
from qconvert.formats.onnx_foreign_sites import LEAST, Site, readers_of, site_of
from qconvert.formats.onnx_foreign_tensors import BYTES, FLOATS, OnnxTensors, named_tensors
from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass, Pipeline
from qconvert.request import Request
from qconvert.scheme import GROUPS
from qconvert.sources import Store

if TYPE_CHECKING:
    from qconvert.formats.onnx_foreign_nodes import Parts

ALIGNMENT, INLINE = 64, 1024  # nbytes: a smaller tensor stays in the protobuf
MODEL, DATA = "model.onnx", "model.onnx.data"
SCHEME_OF_DEQUANTIZED = "int8_row"


def rewrite(request: Request, quant: str, group: int, store: Store) -> Rewritten:
    """All but the bytes. InputError for a file that is no ONNX model, or whose data is not there; quant: int4, uint4, int8 …"""
    require("onnx", "a .onnx file as input", '"qconvert[onnx]"')
    from qconvert.formats.onnx_foreign_nodes import quantized_nodes

    if request.adapters:
        hint = "MODEL+ADAPTER --to onnx, with the checkpoint as MODEL"
        raise UnsupportedError("an ONNX model has no longer the names that adapters go by", hint=hint)
    path = Path(request.model)
    source = read_model(path)
    tensors = dict(named_tensors(source))
    file = OnnxTensors(path, tensors)
    store.add("base", path)
    store.adopt("base", path.name, file)
    sites, left = choose(source, tensors, quant, group)
    external = [t.name for t in source.graph.initializer if t.name not in sites and lies_outside(t)]
    graph, pipeline = weights_graph(path, file, sites, external, quant, group)
    entries, nbytes = places(graph, sites)
    parts = {e.name: e for e in entries}
    proto = quantized_nodes(source, {name: made(name, sites[name], graph, parts[name], tensors[name]) for name in sites}, parts)
    proto.producer_name, proto.producer_version = "qconvert", __version__
    header = proto.SerializeToString(deterministic=True)
    output = request.output or Path(f"{path.stem}-{quant}-onnx")
    files = (FilePlan(output / MODEL, header, (), len(header)), FilePlan(output / DATA, b"", tuple(entries), nbytes))
    refs = tuple(f"base/{path.name}#{name}" for name in (*sites, *(BYTES + name for name in external)))
    label = quant if all(s.dequantized for s in sites.values()) else f"{quant}_g{group}"
    return Rewritten(path, source, proto, graph, Plan(files, output), label, sites, left, refs, pipeline, request.inputs)


def read_model(path: Path) -> Any:
    """A protobuf without its external data."""
    import onnx

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's DecodeError, by way of its C library
        raise InputError(f"{path}: not an ONNX model: {e}", hint="is the file whole?") from e
    if not model.graph.node:
        raise InputError(f"{path}: an ONNX model without a node", hint="is the file whole?")
    return model


def choose(model: Any, tensors: Mapping[str, Any], quant: str, group: int) -> tuple[dict[str, Site], dict[str, str]]:
    """Weights that are quantized, and why the others are not."""
    bits, readers = int(quant.strip("uintf")), readers_of(model)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    outer = {t.name for t in model.graph.initializer} | {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    sites, left = dict[str, Site](), dict[str, str]()
    for name, tensor in tensors.items():
        site = site_of(name, tensor, readers, bits, opset) if name in outer else "in a branch"
        if isinstance(site, Site) and not site.dequantized and fitting(site.k, group) is None:
            site = f"rows of {site.k} do not divide into groups of {GROUPS[0]}"
        if isinstance(site, Site):
            sites[name] = site
        elif tensor.data_type in FLOATS and math.prod(tensor.dims) >= LEAST:
            left[name] = site
    if not sites:
        why = sorted(set(left.values()))
        hint = "--bits 8 takes convolutions too"
        raise UnsupportedError(f"no weight can be quantized to {quant}: {'; '.join(why[:4])}", hint=hint)
    return sites, left


def fitting(k: int, group: int) -> int | None:
    return next((g for g in GROUPS[::-1] if g <= group and k % g == 0), None)


def lies_outside(tensor: Any) -> bool:
    """Whether an initializer's bytes go to the data file: shapes and the like must stay in the protobuf."""
    from onnx import TensorProto

    if tensor.data_location == TensorProto.EXTERNAL:
        return True
    wide = tensor.data_type not in (TensorProto.INT64, TensorProto.STRING)
    return wide and len(tensor.raw_data) >= INLINE


# weights ------------------------------------------------------------------------------------------


def weights_graph(
    path: Path, file: OnnxTensors, sites: Mapping[str, Site], external: list[str], quant: str, group: int
) -> tuple[Graph, str]:
    """A value for each weight as it is written, and the passes that made it. There are no activations."""
    nodes: dict[str, Node] = {}
    for name in external:
        dtype, shape = file.types[BYTES + name]
        nodes[name] = Node("load", (), Type(dtype, shape), {"tensor": f"base/{path.name}#{BYTES}{name}"})
    types = {}
    for name, site in sites.items():
        dtype, shape = file.types[name]
        stored = Node("load", (), Type(dtype, shape), {"tensor": f"base/{path.name}#{name}"})
        nodes[f"{name}~stored" if site.turned else name] = stored
        if site.turned:
            nodes[name] = Node("transpose", (f"{name}~stored",), Type(dtype, shape[::-1]))
        types[name] = SCHEME_OF_DEQUANTIZED if site.dequantized else f"{quant}_g{fitting(site.k, group)}"
    others = {name: ONE_BYTE for name, site in sites.items() if site.dequantized}
    passes: tuple[Pass, ...] = (Quantize(quant, "mse", types), Pack("onnx", others))
    pipeline = Pipeline(passes)
    return pipeline.run(Graph(nodes, (*external, *sites))), str(pipeline)


def places(graph: Graph, sites: Mapping[str, Site]) -> tuple[list[Entry], int]:
    """An entry for every value of the graph's outputs, and the data file's nbytes. All planes are rows."""
    entries, at = [], 0
    for name in graph.outputs:
        kind, begin, planes = graph.nodes[name].type, at, []
        widths = layout_of(kind.dtype).planes(kind.dims[1]) if name in sites else (kind.dims[1],)  # type: ignore[attr-defined]
        for nbytes in widths:
            planes.append(Plane(at, nbytes))
            at += nbytes * kind.dims[0]
            at += -at % ALIGNMENT
        total = sum(widths) * kind.dims[0]
        entries.append(Entry(name, name, kind.dtype, kind.dims, total, begin, tuple(planes)))
    return entries, at


def made(name: str, site: Site, graph: Graph, entry: Entry, tensor: Any) -> Parts:
    """What the new nodes read of a weight."""
    from qconvert.formats.onnx_foreign_nodes import Parts

    scheme = layout_of(graph.nodes[name].type.dtype).scheme
    return Parts(site, scheme, entry, tuple(tensor.dims), tensor.data_type)
