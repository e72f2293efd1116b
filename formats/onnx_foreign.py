"""An ONNX model that others made, quantized: its weights streamed, its graph otherwise as it was.

read the protobuf -> choose by what reads each tensor -> graph of weights alone -> plan, protobuf rewritten -> emit
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from onnx import ModelProto

from qconvert import __version__
from qconvert.certificate import KEY as CERTIFICATE
from qconvert.emit import Entry, FilePlan, Plan
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_columns import PREFIX as CHANNELS
from qconvert.formats.onnx_foreign_job import Rewritten
from qconvert.formats.onnx_foreign_layouts import PREFIX as HALF
from qconvert.formats.onnx_foreign_nodes import (
    Quantized,
    names_in,
    opset_of,
    quantized,
    rewrite_nodes,
    set_external,
    set_inline,
)
from qconvert.formats.onnx_foreign_sites import (
    DEQUANTIZE_OPSET,
    MIN_VALUES,
    Tensor,
    Wish,
    bare_node,
    odd_name,
    tensors_of,
    wish_of,
)
from qconvert.formats.onnx_foreign_tensors import DAMAGED, MIN_NBYTES, Place, View, adopt, bytes_at, dtype_of, place_of, read
from qconvert.formats.onnx_proto import DATA_FILE
from qconvert.graph import Graph, Node, Type, n_rows
from qconvert.layouts import layout_of
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pipeline
from qconvert.planes import Plane
from qconvert.request import Request
from qconvert.scheme import GROUPS, PER_ROW
from qconvert.sources import Store

ALIGNMENT = 64
MIN_OPSET = 7  # from it on Gemm and Add broadcast as they do today
MAX_INTEGERS_NBYTES = 1 << 16  # shapes and axes, which a runtime wants to see as it loads
MAX_ROW_NBYTES = 1 << 24
ROW_SCHEME = next(iter(PER_ROW))


class Choice(NamedTuple):
    """What becomes of a constant: its layout, or None and the reason; a reason too where the group is not the one asked for."""

    tensor: Tensor
    place: Place
    wish: Wish | None
    layout: str | None
    reason: str


def rewrite(request: Request, quant: str, group: int, store: Store) -> Rewritten:
    """All but the bytes. InputError for a file that is no ONNX model, or whose data is not there; quant: int4, uint4, int8 …"""
    refuse(request)
    path = Path(request.model).expanduser()
    model = read(path)
    choices = choose(path, model, quant, group)
    if request.fallback == "error":
        refuse_fallbacks(choices)
    if not any(c.layout for c in choices):
        raise UnsupportedError(f"{path}: no weight can be quantized to {quant}: {counted(choices)}", hint=HINT)
    refs = adopt(store, path, {c.tensor.key: view_of(c) for c in choices if streamed(c)})
    graph, pipeline = weights_graph(request, choices, refs, quant)
    entries, nbytes = places(graph, choices)
    header, changed = protobuf(path, model, choices, entries, {"qconvert.version": __version__, "qconvert.quant": quant})
    folder = Path(request.output or f"{path.stem}-{quant}-onnx")
    files = (FilePlan(folder / "model.onnx", header, (), len(header)),
             FilePlan(folder / DATA_FILE, b"", tuple(entries.values()), nbytes))  # fmt: skip
    grouped = any(c.wish is not None and c.wish.kind == "groups" for c in choices)
    return Rewritten(
        path, graph, Plan(files, folder), f"{quant}_g{group}" if grouped else quant,
        {} if request.fallback == "allow" else left(choices), tuple(refs.values()), pipeline, (counted(choices),),
        tuple(changed), request.inputs,
    )  # fmt: skip


HINT = "--bits 8 takes convolutions and recurrent layers too"


def refuse(request: Request) -> None:
    """UnsupportedError for what an ONNX model cannot be asked for."""
    if request.adapters:
        raise UnsupportedError(
            f"{request.adapters[0].path}: an ONNX model has no longer the names that adapters go by",
            hint="MODEL+ADAPTER --to onnx, with the checkpoint as MODEL",
        )
    if request.form != "ort":
        raise UnsupportedError(f"--form {request.form}: an ONNX model keeps its own opset", hint="leave --form out")
    if request.passes != (...,):
        raise UnsupportedError("--passes: an ONNX model's graph is kept as it is", hint="with a checkpoint they run")


# what becomes of each tensor ----------------------------------------------------------------------


def choose(path: Path, model: ModelProto, quant: str, group: int) -> list[Choice]:
    if (odd := odd_name(model)) is not None:
        raise InputError(f"{path}: the name {odd!a} is not text in UTF-8", hint=DAMAGED)
    if (bare := bare_node(model)) is not None:
        raise InputError(f"{path}: {bare} has no output", hint=DAMAGED)
    opset = opset_of(model)
    if opset < MIN_OPSET:
        raise UnsupportedError(f"{path}: opset {opset}; {MIN_OPSET} and later are read", hint="onnx.version_converter lifts it")
    return [choice(path, tensor, quant, group, opset) for tensor in tensors_of(model)]


def choice(path: Path, tensor: Tensor, quant: str, group: int, opset: int) -> Choice:
    if tensor.proto.data_type == tensor.proto.STRING:
        return Choice(tensor, Place("", 0, 0), None, None, "text")
    place, wish = place_of(path, tensor.proto), wish_of(tensor)
    if isinstance(wish, str):
        return Choice(tensor, place, None, None, wish)
    half = dtype_of(tensor.proto) == "f16"
    if wish.kind == "channels":
        layout, reason = for_channels(tensor, quant, opset)
    else:
        layout, reason = for_groups(tensor, wish, quant, group, half)
    return Choice(tensor, place, wish if layout else None, layout, reason)


def for_channels(tensor: Tensor, quant: str, opset: int) -> tuple[str | None, str]:
    if not quant.endswith("int8"):
        readers = sorted({use.node.op_type for use in tensor.uses if use.node is not None})
        return None, f"{', '.join(readers)} has no kernel for less than 8 bits"
    if opset < DEQUANTIZE_OPSET:
        return None, f"opset {opset}: DequantizeLinear has an axis from {DEQUANTIZE_OPSET} on"
    return f"{CHANNELS}.{ROW_SCHEME}", ""


def for_groups(tensor: Tensor, wish: Wish, quant: str, group: int, half: bool) -> tuple[str | None, str]:
    """The largest group that divides rows; the reason where it is none, or not the one that was asked for."""
    _, k = matrix(tensor, wish)
    fits = next((g for g in GROUPS[::-1] if g <= group and k % g == 0), None)
    reason = "" if fits == group else f"rows of {k} do not divide into groups of {group}"
    if fits is None:
        return None, reason
    return f"{HALF if half else 'onnx'}.{quant}_g{fits}", reason


def matrix(tensor: Tensor, wish: Wish) -> tuple[int, int]:
    """N and K: rows of the tensor, of its transpose, or what lies along an axis beside all the rest."""
    if wish.kind == "channels":
        n = tensor.dims[wish.axis]
        return n, math.prod(tensor.dims) // n
    n, k = tensor.dims[::-1] if wish.transposed else tensor.dims
    return n, k


def refuse_fallbacks(choices: Sequence[Choice]) -> None:
    for c in choices:
        if "do not divide" in c.reason:
            raise UnsupportedError(f"{c.tensor.key}: {c.reason}", hint="--fallback warn takes what divides")


def counted(choices: Sequence[Choice]) -> str:
    """Where all constants ended, the most frequent reason first."""
    reasons = Counter(c.reason for c in choices if c.layout is None)
    n = len(choices) - reasons.total()
    carried = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return f"{n} of {len(choices)} constants quantized" + (f", the others carried over: {carried}" if carried else "")


# the graph of its weights -------------------------------------------------------------------------


def streamed(c: Choice) -> bool:
    """Whether its bytes go through the data file: all that is large but short lists of integers."""
    if c.layout is not None:
        return True
    integers = dtype_of(c.tensor.proto) in ("int64", "int32") and c.place.nbytes <= MAX_INTEGERS_NBYTES
    return c.place.nbytes >= MIN_NBYTES and not (integers and len(c.tensor.dims) < 2)


def view_of(c: Choice) -> View:
    """A quantized tensor by its values, [K,N] where its transpose is wanted; any other by its bytes."""
    if c.wish is None:
        n = n_rows(carried_shape(c))
        return View(c.place, "u8", (n, c.place.nbytes // n))
    n, k = matrix(c.tensor, c.wish)
    return View(c.place, dtype_of(c.tensor.proto), (k, n) if c.wish.transposed else (n, k))


def carried_shape(c: Choice) -> tuple[int, ...]:
    """Its dims, where its rows are whole bytes and not too long to be read at once; else each byte is a row."""
    dims, n = c.tensor.dims or (1,), n_rows(c.tensor.dims or (1,))
    width = c.place.nbytes // n
    short = len(dims) > 1 or c.place.nbytes <= MAX_ROW_NBYTES  # a vector is read whole
    return dims if width * n == c.place.nbytes and width <= MAX_ROW_NBYTES and short else (c.place.nbytes, 1)


def weights_graph(request: Request, choices: Sequence[Choice], refs: Mapping[str, str], quant: str) -> tuple[Graph, str]:
    """Every streamed tensor under its key, quantized and packed where so chosen; and the passes that did it."""
    nodes: dict[str, Node] = {}
    types, others = {}, {}
    for c in filter(streamed, choices):
        key, view = c.tensor.key, view_of(c)
        embeds = c.wish is not None and all(u.node is not None and u.node.op_type == "Gather" for u in c.tensor.uses)
        attrs = {"tensor": refs[key], **({"role": "token_embd"} if embeds else {})}
        loaded = Node("load", (), Type(view.dtype, view.shape), attrs)
        if c.layout is None or c.wish is None:
            nodes[key] = loaded
            continue
        prefix, _, types[key] = c.layout.partition(".")
        others[key] = prefix
        if c.wish.transposed:
            nodes[f"{key}~kn"] = loaded
            loaded = Node("transpose", (f"{key}~kn",), Type(view.dtype, view.shape[::-1]))
        nodes[key] = loaded
    graph = Graph(nodes, tuple(n for n in nodes if not n.endswith("~kn")))
    passes = Pipeline((Quantize(quant, "mse", types), Pack("onnx", others)))
    return passes.run(graph, request.dump_ir), str(passes)


def places(graph: Graph, choices: Sequence[Choice]) -> tuple[dict[str, Entry], int]:
    """Where each streamed tensor lies in the data file, and that file's nbytes."""
    entries: dict[str, Entry] = {}
    at = 0
    for c in filter(streamed, choices):
        key, kind = c.tensor.key, graph.nodes[c.tensor.key].type
        shape, widths = (carried_shape(c), kind.dims[1:]) if c.layout is None else (kind.dims, row_planes(kind))
        planes = []
        for width in widths:
            planes.append(Plane(at, width))
            at += width * kind.dims[0]
            at += -at % ALIGNMENT
        total = sum(plane.nbytes for plane in planes) * kind.dims[0]
        dtype = dtype_of(c.tensor.proto) if c.layout is None else kind.dtype
        entries[key] = Entry(key, key, dtype, shape, total, planes[0].offset, tuple(planes))
    return entries, at


def row_planes(kind: Type) -> tuple[int, ...]:
    planes: tuple[int, ...] = layout_of(kind.dtype).planes(kind.dims[1])  # type: ignore[attr-defined]
    return planes


# the protobuf and the report ----------------------------------------------------------------------


def protobuf(
    path: Path, model: ModelProto, choices: Sequence[Choice], entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> tuple[bytes, list[Quantized]]:
    """The model's file, and which initializers each quantized tensor has in it; `model` is used up."""
    taken = names_in(model)
    changed = [quantized(c.tensor, c.wish, entries[c.tensor.key], taken) for c in choices if c.wish is not None]
    for c in choices:
        if c.wish is None:
            relocate(path, c, entries)
    rewrite_nodes(model, [c.tensor for c in choices], changed, taken)
    said = {p.key: p.value for p in model.metadata_props if p.key != CERTIFICATE} | dict(metadata)
    model.ClearField("metadata_props")
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data, changed


def relocate(path: Path, c: Choice, entries: Mapping[str, Entry]) -> None:
    """A carried tensor's place: the data file, or the protobuf as for all small ones."""
    proto, entry = c.tensor.proto, entries.get(c.tensor.key)
    if entry is not None:
        set_external(proto, DATA_FILE, entry.offset, entry.nbytes)
    elif proto.external_data:
        set_inline(proto, bytes_at(path, c.place))


def left(choices: Sequence[Choice]) -> dict[str, str]:
    """Matrices of real numbers that have another type than was asked for, and why."""
    real = [c for c in choices if c.reason and dtype_of(c.tensor.proto) in ("f32", "f16", "bf16", "f64")]
    return {c.tensor.key: c.reason for c in real if len(c.tensor.dims) > 1 and math.prod(c.tensor.dims) >= MIN_VALUES}
