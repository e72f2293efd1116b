"""ONNX files whose data lies elsewhere than they say, or whose protobuf does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from mutations import make_onnx

from abuses import Maker, hostile


def made(folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    make_onnx(folder / "m")
    path = folder / "m" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def said(**values: str) -> Callable[[onnx.ModelProto], None]:
    """Entries of the first weight's external data; "" leaves one out."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        entries = {e.key: e.value for e in tensor.external_data} | values
        del tensor.external_data[:]
        for key, value in entries.items():
            if value:
                tensor.external_data.add(key=key, value=value)

    return change


def named(name: str, change: Callable[[onnx.ModelProto], object]) -> Maker:
    def make(folder: Path) -> Path:
        return made(folder, change)

    make.__name__, make.__module__ = name, __name__
    return make


ELSEWHERE: dict[str, tuple[str, Callable[[onnx.ModelProto], object]]] = {
    "data_in_the_parent": ("leads out", said(location="../model.onnx.data")),
    "data_at_the_root": ("leads out", said(location="/etc/passwd")),
    "data_in_a_device": ("leads out", said(location="/dev/zero")),
    "data_through_a_backslash": ("is no name", said(location="..\\x")),
    "data_that_is_missing": ("is missing", said(location="other.data")),
    "data_in_the_folder_itself": ("", said(location=".")),
    "data_without_a_name": ("", said(location="")),
    "offset_that_is_negative": ("a count was wanted", said(offset="-64")),
    "offset_beyond_the_file": ("takes", said(offset=str(1 << 40))),
    "offset_that_overflows": ("a count was wanted", said(offset=str(1 << 64))),
    "offset_that_is_text": ("a count was wanted", said(offset="x")),
    "offset_in_other_digits": ("a count was wanted", said(offset="٣")),
    "length_that_is_negative": ("a count was wanted", said(length="-1")),
    "length_too_short": ("takes", said(length="16")),
    "length_that_overflows": ("a count was wanted", said(length="9" * 30)),
    "name_with_terminal_codes": ("not printable", lambda m: m.graph.initializer[0].__setattr__("name", "a\x1b[2J")),
    "shape_that_is_negative": ("counts", lambda m: m.graph.initializer[0].dims.__setitem__(0, -64)),
    "shape_beyond_counting": ("counts", lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 62)),
    "type_unknown": ("type", lambda m: m.graph.initializer[0].__setattr__("data_type", 99)),
    "nodes_in_a_circle": ("", lambda m: m.graph.node[0].input.__setitem__(0, "y")),
    "input_from_nowhere": ("", lambda m: m.graph.node[1].input.__setitem__(0, "nowhere")),
    "no_nodes": ("", lambda m: m.graph.ClearField("node")),
    "no_graph": ("", lambda m: m.ClearField("graph")),
    "no_opset": ("", lambda m: m.ClearField("opset_import")),
}
for name, (words, change) in ELSEWHERE.items():
    hostile(words, "onnx")(named(name, change))


@hostile("leads out", "onnx")
def data_through_a_link(folder: Path) -> Path:
    path = made(folder, lambda _: None)
    (path.parent / "model.onnx.data").rename(folder / "elsewhere")
    (path.parent / "model.onnx.data").symlink_to(folder / "elsewhere")
    return path


@hostile("takes", "onnx")
def data_cut_short(folder: Path) -> Path:
    path = made(folder, lambda _: None)
    data = path.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    return path


@hostile("not a", "onnx")
def protobuf_cut_short(folder: Path) -> Path:
    path = made(folder, lambda _: None)
    path.write_bytes(path.read_bytes()[:-7])
    return path


@hostile("not a", "onnx")
def protobuf_empty(folder: Path) -> Path:
    path = made(folder, lambda _: None)
    path.write_bytes(b"")
    return path


@hostile("", "onnx")
def graphs_within_graphs(folder: Path) -> Path:
    """A graph in an attribute of a node of a graph, and so on: parsers recurse on it."""
    path, body = made(folder, lambda _: None), b""
    for _ in range(2000):
        for field in (6, 5, 1):  # attribute.g, node.attribute, graph.node
            body = bytes([field << 3 | 2]) + varint(len(body)) + body
    path.write_bytes(path.read_bytes() + b"\x3a" + varint(len(body)) + body)
    return path


@hostile("", "onnx")
def length_beyond_the_file(folder: Path) -> Path:
    path = made(folder, lambda _: None)
    path.write_bytes(b"\x3a" + varint((1 << 63) - 1) + path.read_bytes())
    return path


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])
