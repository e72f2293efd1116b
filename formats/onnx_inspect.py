"""What is in an ONNX file, whoever made it: its tensors with the types that its nodes give them, its inputs and outputs.

Read from the protobuf; weights that lie in other files are not touched.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qconvert.errors import InputError, UsageError, misshapen
from qconvert.formats.onnx_schemes import gathered
from qconvert.sources import inside
from qconvert.target import Contents, Item

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

CHECKPOINT = ("*.safetensors", "*.bin")
SHORT = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16", "DOUBLE": "f64", "BOOL": "bool"}  # INT8 is i8, UINT4 is u4
SMALL = 1024  # bytes: shapes, axes and the like
# op -> the input that has codes, then those that belong to it
QUANTIZED: Mapping[str, tuple[int, ...]] = {
    "MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3), "DequantizeLinear": (0, 1, 2), "MatMulBnb4": (1, 2),
}  # fmt: skip


def model_file(path: Path) -> Path | None:
    """The .onnx file that a path is, or the one of a folder that is no checkpoint. UsageError where there are several."""
    if not path.is_dir():
        return path if path.is_file() and path.suffix == ".onnx" else None
    if (path / "genai_config.json").is_file():
        return named_by_genai(path)
    found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
    is_checkpoint = (path / "config.json").is_file() and any(f for pattern in CHECKPOINT for f in path.glob(pattern))
    if not found or is_checkpoint:
        return None
    if len(found) > 1:
        names = ", ".join(str(f.relative_to(path)) for f in found[:5])
        raise UsageError(f"{path} holds {len(found)} ONNX files: {names}", hint=f"give one of them: {found[0]}")
    return found[0]


def named_by_genai(folder: Path) -> Path:
    path = folder / "genai_config.json"
    try:
        name = json.loads(path.read_text("utf-8"))["model"]["decoder"]["filename"]
        return inside(folder, name)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: names no model.decoder.filename ({e})", hint="give the .onnx file itself") from e


def read_proto(path: Path) -> ModelProto:
    """Without the weights that lie outside. InputError for a file that is no ONNX."""
    import onnx

    try:
        model: ModelProto = onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's errors have no class that it promises
        raise InputError(f"{path}: not an ONNX file: {e}") from e
    if not model.graph.node and not model.functions:
        raise InputError(f"{path}: an ONNX file without nodes", hint="was its download cut short?")
    return model


def contents(path: Path) -> Contents:
    with misshapen(str(path)):
        return _contents(path)


def _contents(path: Path) -> Contents:
    model = read_proto(path)
    graphs = list(all_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    tensors = {t.name: t for graph in graphs for t in graph.initializer}
    files = {file_of(path, t) for t in tensors.values()} - {None}
    nbytes = sum(f.stat().st_size for f in files if f is not None and f.is_file()) + path.stat().st_size
    metadata = metadata_of(model, nodes)
    return Contents("onnx", items_of(tensors, nodes, str(metadata.get("qconvert.quant", ""))), nbytes, metadata)


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from all_graphs(inner)


def file_of(path: Path, tensor: TensorProto) -> Path | None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), None)
    return path.parent / location if location and tensor.data_location == tensor.EXTERNAL else None


# tensors ------------------------------------------------------------------------------------------


def items_of(tensors: Mapping[str, TensorProto], nodes: Iterable[NodeProto], quant: str) -> list[Item]:
    """Codes with the scheme and the shape of the weight that they are; their scales behind "of"; bytes are counted once.

    Integers and numbers that a graph computes with are left out.
    """
    found: dict[str, Scheme] = {}
    owners: dict[str, str] = {}
    for node in nodes:
        at = QUANTIZED.get(node.op_type, ())
        codes, *more = [node.input[i] if i < len(node.input) else "" for i in at] or [""]
        if codes in tensors:
            found.setdefault(codes, scheme_in(node, tensors[codes], [tensors[m] for m in more if m in tensors]))
            owners |= {m: codes for m in more if m in tensors and m not in owners}
    ours = quant if re.fullmatch(r"(u?int|nf|fp)\df?", quant) else ""
    for rows in (name for name in tensors if name.endswith(".qweight.rows") and name not in found and ours):
        scales, zeros = (rows.removesuffix("qweight.rows") + part for part in ("scales", "zero_points"))
        found[rows] = rows_scheme(tensors[rows], tensors[scales], gathered(ours))
        owners |= {name: rows for name in (scales, zeros) if name in tensors}
    aliases: dict[tuple[object, ...], str] = {}
    items = []
    for name, tensor in tensors.items():
        if is_constant(name, tensor):
            continue
        dtype, shape = found.get(name, Scheme(dtype_of(tensor), tuple(tensor.dims)))
        first = aliases.setdefault(place_of(tensor), name) if tensor.external_data else name
        owner = owners.get(name, "")
        owner = aliases.get(place_of(tensors[owner]), owner) if owner else ""
        if first != name:
            items.append(Item(name, dtype_of(tensor), tuple(tensor.dims), 0, first))
        else:
            items.append(Item(name, dtype, shape, nbytes_of(tensor), owner))
    return items


class Scheme(NamedTuple):
    """How a tensor of codes is called, and the shape of the weight that it is."""

    name: str
    shape: tuple[int, ...]


def is_constant(name: str, tensor: TensorProto) -> bool:
    small = not tensor.external_data and nbytes_of(tensor) < SMALL
    return name.startswith("const.") or (small and (dtype_of(tensor) in ("i64", "i32", "bool") or not tensor.dims))


def rows_scheme(rows: TensorProto, scales: TensorProto, quant: str) -> Scheme:
    """Rows of codes that our standard nodes gather; no node tells their bits."""
    bits = int("".join(filter(str.isdigit, quant)))
    n, k = rows.dims[0], rows.dims[1] * 8 // bits
    return Scheme(f"{quant}_g{k // scales.dims[1]}", (n, k))


def scheme_in(node: NodeProto, codes: TensorProto, more: list[TensorProto]) -> Scheme:
    """Type and shape [N,K] (or as the tensor has it) of the weight whose codes a node reads."""
    said: dict[str, Any] = {a.name: value_of(a) for a in node.attribute}
    bits, block, dims = said.get("bits"), said.get("block_size", 0), tuple(codes.dims)
    zeros, real = ("u", "f" * dtype_of(more[1]).startswith("f")) if len(more) > 1 else ("", "")
    match node.op_type:
        case "MatMulNBits":
            return Scheme(f"{zeros}int{bits}{real}_g{block}", (said["N"], said["K"]))
        case "GatherBlockQuantized":
            bits = bits or 4
            per = 8 // bits if dtype_of(codes) == "u8" else 1
            return Scheme(f"{zeros}int{bits}{real}_g{block}", (*dims[:-1], dims[-1] * per))
        case "MatMulBnb4":
            return Scheme(f"{('fp4', 'nf4')[said.get('quant_type', 1)]}_g{block}", (said["N"], said["K"]))
    kind = dtype_of(codes)
    return Scheme(f"{zeros}int{kind[1:]}_g{block}" if block and kind[0] in "iu" else kind, dims)


def value_of(attribute: AttributeProto) -> object:
    from onnx.helper import get_attribute_value

    value: object = get_attribute_value(attribute)
    return value


def dtype_of(tensor: TensorProto) -> str:
    return type_name(tensor.data_type)


def type_name(data_type: int) -> str:
    from onnx import TensorProto

    name = TensorProto.DataType.Name(data_type)
    return SHORT.get(name) or re.sub(r"^(U?)INT", lambda m: "u" if m[1] else "i", name).lower()


def nbytes_of(tensor: TensorProto) -> int:
    said = {e.key: e.value for e in tensor.external_data}
    if "length" in said:
        return int(said["length"])
    n = 1
    for d in tensor.dims:
        n *= d
    bits = re.sub(r"\D", "", dtype_of(tensor).partition("e")[0]) or "8"
    return -(-n * int(bits) // 8)


def place_of(tensor: TensorProto) -> tuple[object, ...]:
    said = {e.key: e.value for e in tensor.external_data}
    return said.get("location"), said.get("offset", "0"), said.get("length")


# the rest -----------------------------------------------------------------------------------------


def metadata_of(model: ModelProto, nodes: Iterable[NodeProto]) -> dict[str, object]:
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    producer = " ".join(filter(None, (model.producer_name, model.producer_version)))
    counts = Counter(node.op_type for node in nodes).most_common()
    found: dict[str, object] = {"ir_version": model.ir_version, "opset": opsets, "producer": producer}
    found |= {p.key: p.value for p in model.metadata_props}
    found |= {f"input {k}": v for k, v in edges(model.graph.input).items()}
    found |= {f"output {k}": v for k, v in edges(model.graph.output).items()}
    if model.functions:
        found["functions"] = ", ".join(f.name for f in model.functions)
    return found | {"nodes": ", ".join(f"{n} {op}" for op, n in counts)}


def edges(values: Iterable[ValueInfoProto]) -> dict[str, str]:
    """Name -> type; those of all layers as one, with %d for the layer."""
    found: dict[tuple[str, str], list[str]] = {}
    for value in values:
        kind = value.type.tensor_type
        dims = ",".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        found.setdefault((re.sub(r"\d+", "%d", value.name), f"{type_name(kind.elem_type)}[{dims}]"), []).append(value.name)
    return {
        (names[0] if len(names) == 1 else pattern): kind + (f" x {len(names)}" if len(names) > 1 else "")
        for (pattern, kind), names in found.items()
    }
