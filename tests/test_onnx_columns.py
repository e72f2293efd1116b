"""Weights that a file has as [K,N]: their bytes by hand, as the onnx package reads them, as onnxruntime computes with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert import emit
from qconvert.emit import Entry, FilePlan, Plan
from qconvert.formats.onnx_columns import LAYOUTS, PREFIX
from qconvert.graph import Graph, Node, Type
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.planes import Plane, side_by_side
from qconvert.scheme import QTensor, Scheme, scheme_of
from qconvert.sources import Store
from qconvert.together import written
from qconvert.weights import Weights

NAMES = [name.partition(".")[2] for name in LAYOUTS]


def scheme(name: str) -> Scheme:
    found = scheme_of(name)
    assert found is not None
    return found


def quantized(name: str, n: int, k: int) -> tuple[Graph, Weights, QTensor]:
    """A random weight [n,k] as a graph that packs it, and its codes."""
    values = np.random.default_rng(n * k).normal(size=(n, k)).astype(np.float32).tolist()
    graph = Graph({"w": Node("constant", (), Type("f32", (n, k)), {"values": values})}, ("w",))
    graph = Pack(PREFIX)(Quantize(types={"w": name}, solver="mse")(graph))
    weights = Weights(graph, Store())
    q = weights.rows("w~code", 0, n)
    assert isinstance(q, QTensor)
    return graph, weights, q


def entry_of(graph: Graph, n: int, k: int) -> tuple[Entry, int]:
    layout = LAYOUTS[graph.nodes["w"].type.dtype]
    planes, at = [], 64
    for nbytes, bits in zip(layout.planes(k), layout.bits, strict=True):
        planes.append(Plane(at, nbytes, bits))
        at += planes[-1].file_nbytes(n) + 3  # nothing is aligned
    return Entry("w", "w", layout.name, (n, k), sum(p.file_nbytes(n) for p in planes), 64, tuple(planes)), at


def test_codes_of_two_rows_share_a_byte_the_first_in_the_low_half() -> None:
    q = QTensor(scheme("int4_g16"), np.array([[-8] + [0] * 15, [7] + [1] * 15], np.int8), (np.array([[0.5], [2]], np.float32),))
    packed = LAYOUTS["onnx_kn.int4_g16"].pack(q)
    assert packed[0, :3].tolist() == [8, 0, 0] and packed[1, :3].tolist() == [7, 1, 1]
    assert side_by_side(packed[:, :16].T, 4)[:3].tolist() == [[0x78], [0x10], [0x10]]
    assert packed[:, 16:].copy().view("<f4").tolist() == [[0.5], [2]]


def test_four_values_of_two_bits_share_a_byte() -> None:
    assert side_by_side(np.array([[1, 2, 3, 0]], np.uint8), 2).tolist() == [[0b00111001]]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_packed_is_unpacked(name: str) -> None:
    _, _, q = quantized(name, 6, 256 * 3)
    layout = LAYOUTS[f"{PREFIX}.{name}"]
    packed = layout.pack(q)
    assert packed.shape[1] == layout.row_nbytes(q.codes.shape[1])
    got = layout.unpack(packed)
    assert np.array_equal(got.codes, q.codes)
    assert all(np.array_equal(a, b) for a, b in zip(got.levels, q.levels, strict=True))


def tensors_of(path: Path, name: str, entry: Entry) -> list[Any]:
    """The planes as the onnx package's own tensors, their bytes taken from the file."""
    onnx = pytest.importorskip("onnx")
    from qconvert.formats.onnx_proto import DTYPES

    layout, (n, k) = LAYOUTS[f"{PREFIX}.{name}"], entry.shape
    data, out = path.read_bytes(), []
    for i, (plane, dtype, dims) in enumerate(zip(entry.planes, layout.dtypes, layout.dims(n, k), strict=True)):
        raw = data[plane.offset : plane.offset + plane.file_nbytes(n)]
        out.append(onnx.TensorProto(name=f"p{i}", data_type=DTYPES[dtype], dims=dims, raw_data=raw))
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_onnx_package_reads_the_transpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, threads: int
) -> None:
    numpy_helper = pytest.importorskip("onnx").numpy_helper
    s = scheme(name)
    n, k = 778 if s.bits < 8 else 777, (s.levels[0].group or 37) * 3
    if n * s.bits % 8:
        n += 2
    graph, weights, q = quantized(name, n, k)
    entry, nbytes = entry_of(graph, n, k)
    monkeypatch.setattr(emit, "COLUMNS_NBYTES", 1)  # blocks of 256 rows, the least there are
    assert len(list(emit.entry_ranges(entry))) == 4
    plan = Plan((FilePlan(tmp_path / "data", b"", (entry,), nbytes),))
    with written(plan, weights, threads):
        pass
    codes, *levels = (numpy_helper.to_array(t) for t in tensors_of(tmp_path / "data", name, entry))
    assert np.array_equal(codes.astype(np.float32) - LAYOUTS[entry.dtype].middle, q.codes.T)
    assert all(np.array_equal(v.astype(np.float32).reshape(-1, n), w.T) for v, w in zip(levels, q.levels, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("_g32", "_row"))])
def test_onnxruntime_multiplies_by_the_same_values(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    s, n = scheme(name), 40
    k = (s.levels[0].group or 33) * 3
    graph, weights, q = quantized(name, n, k)
    entry, nbytes = entry_of(graph, n, k)
    with written(Plan((FilePlan(tmp_path / "data", b"", (entry,), nbytes),)), weights, 1):
        pass
    got = product(tensors_of(tmp_path / "data", name, entry), s, n, k)
    want = np.eye(k, dtype=np.float32) @ q.dequantize().T
    assert np.allclose(got, want, rtol=1e-6, atol=0)  # one product each: measured 0


def product(planes: list[Any], s: Scheme, n: int, k: int) -> Any:
    """DequantizeLinear and MatMul, as written: without onnxruntime's fusion, which rounds activations."""
    import onnxruntime
    from onnx import helper

    how = {"axis": 0, "block_size": s.levels[0].group} if s.levels[0].group else {"axis": 1}
    if s.levels[0].group is None:
        planes.append(helper.make_tensor("zeros", 2, [n], [128] * n))
    nodes = [helper.make_node("DequantizeLinear", [p.name for p in planes], ["w"], **how),
             helper.make_node("MatMul", ["x", "w"], ["y"])]  # fmt: skip
    info = [helper.make_tensor_value_info(*v) for v in (("x", 1, [k, k]), ("y", 1, [k, n]))]
    opset = 25 if s.bits == 2 else 23
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], planes), ir_version=13 if s.bits == 2 else 11,
                              opset_imports=[helper.make_opsetid("", opset)])  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(k, dtype=np.float32)})[0]


def test_every_part_of_a_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What progress is told adds up to what the plan says the entry takes."""
    graph, weights, _ = quantized("uint4_g32", 600, 96)
    entry, nbytes = entry_of(graph, 600, 96)
    monkeypatch.setattr(emit, "COLUMNS_NBYTES", 1)
    told: list[int] = []
    with written(Plan((FilePlan(tmp_path / "data", b"", (entry,), nbytes),)), weights, 2, told.append):
        pass
    assert sum(told) == entry.nbytes == 600 * 96 // 2 + 600 * 3 * 4 + 600 * 3 // 2 and len(told) == 3


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "int8_row"])
def test_the_check_reads_any_rows_back(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from qconvert.formats.onnx_check import Place, read_rows

    n, k = 600, 64
    graph, weights, _ = quantized(name, n, k)
    entry, nbytes = entry_of(graph, n, k)
    with written(Plan((FilePlan(tmp_path / "data", b"", (entry,), nbytes),)), weights, 1):
        pass
    places = [Place(tmp_path / "data", p.offset, p.file_nbytes(n), (), p.bits) for p in entry.planes]
    whole = weights.encoded("w", 0, n).reshape(n, -1)
    for begin, end in itertools.combinations((0, 1, 2, 5, 256, 599, 600), 2):
        assert np.array_equal(read_rows(places, n, begin, end), whole[begin:end])
