"""ONNX models that others made, quantized: weights change, the graph around them does not, and onnxruntime proves it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert import convert
from qconvert.errors import InputError, QConvertError, UnsupportedError, VerificationError
from qconvert.formats.onnx_runtime import OnnxRuntime

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto

ROOT = Path(__file__).parents[1]
TINY = ROOT / "golden" / "tiny"
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


def saved(path: Path, nodes: list[Any], weights: dict[str, Any], kind: int = TensorProto.FLOAT, **more: Any) -> Path:
    """A model of x[batch,64] (and ids[batch]) -> y."""
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", 64]), helper.make_tensor_value_info("ids", 7, ["batch"])]
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes, "g", [i for i in inputs if i.name in used], [helper.make_tensor_value_info("y", kind, more.pop("shape", None))],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    opset = more.pop("opset", 17)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path, **more)
    return path


def quantized(path: Path, out: Path, **options: Any) -> Any:
    return convert(path, to="onnx", output=out, threads=1, **options)


def ops(folder: Path) -> list[str]:
    return [n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


PRODUCTS = [
    helper.make_node("MatMul", ["x", "w.weight"], ["a"], name="first"),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("Gemm", ["b", "v.weight", "c"], ["y"], name="second", transB=1),
]


@pytest.fixture
def products(tmp_path: Path) -> Path:
    weights = {"w.weight": normal(64, 96), "v.weight": normal(32, 96), "c": normal(32)}
    return saved(tmp_path / "m.onnx", PRODUCTS, weights)


@pytest.mark.parametrize("quant", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
def test_matmul_and_gemm_become_matmul_nbits_and_are_proven(products: Path, tmp_path: Path, quant: str) -> None:
    result = quantized(products, tmp_path / "out", quant=quant)
    rows = {r.what: r.verdict for r in result.report.checks}
    assert result.verified and rows["runtime onnxruntime, outputs"] == rows["file bytes"] == "pass"
    assert ops(tmp_path / "out") == ["MatMulNBits", "Relu", "MatMulNBits"]
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17) and model.graph.node[0].name == "first"
    fate = result.report.data()["accounting"]["tensors"]
    assert (fate["used"], fate["dropped"]) == (2, [])


def test_activations_that_a_model_rounds_itself_are_still_rounded(tmp_path: Path) -> None:
    """Found when the proof left out every rounding of the output, but none of the input."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "s", "z"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["a"]),
        helper.make_node("MatMul", ["a", "w.weight"], ["y"], name="first"),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"w.weight": normal(64, 96)})
    assert quantized(path, tmp_path / "out", bits=4).verified
    assert ops(tmp_path / "out") == ["DynamicQuantizeLinear", "DequantizeLinear", "MatMulNBits"]


def test_codes_are_those_of_a_checkpoint_of_the_same_weights(tmp_path: Path) -> None:
    """A decoder that we write in fp32, read as a foreign model; one set of codes serves its embedding and its head."""
    convert(TINY, to="onnx", quant="fp32", output=tmp_path / "fp32", check=False)
    convert(TINY, to="onnx", bits=4, output=tmp_path / "own", check=False)
    result = quantized(tmp_path / "fp32" / "model.onnx", tmp_path / "out", bits=4)
    assert result.verified
    tokens = [3, 99, 7, 650, 12, 8]
    own, got = (OnnxRuntime().open(tmp_path / n / "model.onnx", 9, 1, exact=True).logits(tokens) for n in ("own", "out"))
    assert np.linalg.norm(got - own) < 1e-5 * np.linalg.norm(own)


def test_rows_of_a_table_are_gathered_quantized(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    result = quantized(saved(tmp_path / "m.onnx", nodes, {"table": normal(50, 64)}), tmp_path / "out", bits=4)
    assert result.verified and ops(tmp_path / "out") == ["GatherBlockQuantized"]


def test_half_precision_models_get_scales_of_their_own_type(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, {"w": normal(64, 32, dtype=np.float16)}, TensorProto.FLOAT16)
    assert quantized(path, tmp_path / "out", bits=4).verified
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert ops(tmp_path / "out") == ["MatMulNBits"]
    assert {t.name: t.data_type for t in model.graph.initializer}["w.scales"] == TensorProto.FLOAT16


def test_convolutions_are_quantized_by_output_at_eight_bits_only(tmp_path: Path) -> None:
    image = [helper.make_node("Unsqueeze", ["x", "one"], ["u"]), helper.make_node("Conv", ["u", "w", "c"], ["y"])]
    weights = {"one": np.array([1]), "w": normal(24, 1, 64), "c": normal(24)}
    path = saved(tmp_path / "m.onnx", image, weights)
    assert quantized(path, tmp_path / "out", bits=8).verified
    model = onnx.load(tmp_path / "out" / "model.onnx")
    codes = next(t for t in model.graph.initializer if t.name == "w.qweight")
    assert (codes.data_type, list(codes.dims)) == (TensorProto.UINT8, [24, 1, 64])
    with pytest.raises(UnsupportedError, match="Conv has no kernel for less than 8 bits"):
        quantized(path, tmp_path / "other", bits=4)


def test_data_beside_the_model_is_carried_over_byte_for_byte(tmp_path: Path) -> None:
    nodes = [*PRODUCTS, helper.make_node("Add", ["z", "big"], ["y"])]
    nodes[2] = helper.make_node("Gemm", ["b", "v.weight", "c"], ["z"], transB=1)
    weights = {"w.weight": normal(64, 96), "v.weight": normal(32, 96), "c": normal(32), "big": normal(32)}
    (tmp_path / "in").mkdir()
    path = saved(tmp_path / "in" / "m.onnx", nodes, weights, save_as_external_data=True, size_threshold=0, location="m.data")
    assert quantized(path, tmp_path / "out", bits=4).verified
    carried = {t.name: numpy_helper.to_array(t, str(tmp_path / "out")) for t in
               onnx.load(tmp_path / "out" / "model.onnx").graph.initializer if t.name in weights}  # fmt: skip
    assert carried.keys() == {"c", "big"} and all(np.array_equal(v, weights[n]) for n, v in carried.items())


def test_a_node_that_reads_the_wrong_weight_fails_and_leaves_nothing(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconvert.formats import onnx_foreign_nodes as nodes

    true = nodes.said_anew

    def without_bias(*args: Any) -> Any:
        made = true(*args)
        del made[0].input[3:]
        return made

    monkeypatch.setattr(nodes, "said_anew", without_bias)
    with pytest.raises(VerificationError, match="runtime onnxruntime, outputs"):
        quantized(products, tmp_path / "out", bits=4)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_dry_run_knows_the_exact_bytes_and_inputs_may_be_given(products: Path, tmp_path: Path) -> None:
    dry = quantized(products, tmp_path / "out", bits=4, dry_run=True)
    np.savez(tmp_path / "inputs.npz", x=normal(5, 64))
    result = quantized(products, tmp_path / "out", bits=4, inputs=tmp_path / "inputs.npz")
    assert dry.plan.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert any("on given x[5, 64]" in r.reason for r in result.report.checks)
    with pytest.raises(InputError, match="does not run on these inputs"):
        np.savez(tmp_path / "wrong.npz", z=normal(5, 64))
        quantized(products, tmp_path / "again", bits=4, inputs=tmp_path / "wrong.npz")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), InputError, "not a whole ONNX model"),
        (lambda p: p.write_bytes(b"not an onnx file at all"), InputError, "not an ONNX model"),
        (lambda p: (p.parent / "m.data").unlink(), InputError, "w.weight: its data file m.data is missing"),
        (lambda p: os.truncate(p.parent / "m.data", 100), InputError, "download is not complete"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"m.data", b"../m.d")), InputError, "leads out of the folder"),
    ],
)
def test_damaged_and_hostile_files_are_named(tmp_path: Path, change: Any, kind: type[QConvertError], said: str) -> None:
    (tmp_path / "in").mkdir()
    weights = {"w.weight": normal(64, 96), "v.weight": normal(32, 96), "c": normal(32)}
    path = saved(tmp_path / "in" / "m.onnx", PRODUCTS, weights, save_as_external_data=True, size_threshold=0, location="m.data")
    change(path)
    with pytest.raises(kind, match=said):
        quantized(path, tmp_path / "out", bits=4)
    assert os.listdir(tmp_path) == ["in"]


def test_what_an_onnx_model_cannot_be_asked_for_is_named(products: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"adapters": ["x"]}, "no longer the names"),
        ({"quant": "fp16"}, "only quantized"),
        ({"quant": "nf4"}, "integer codes and zero points"),
        ({"zero_point": "float"}, "integer codes and zero points"),
        ({"accuracy_level": 0}, "--accuracy-level"),
        ({"form": "portable"}, "--form portable"),
        ({"to": "gguf"}, "only --to onnx takes an ONNX model"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            convert(products, **{"to": "onnx", "output": tmp_path / "out", **options})


@pytest.mark.parametrize(("name", "length", "most"), [("silero_vad_16k_op15", 576, 0.03), ("silero_vad_half", 288, 0.2)])
def test_voice_detectors_of_others_keep_what_they_hear(
    tmp_path: Path, shared_data: Path, name: str, length: int, most: float
) -> None:
    """Probabilities over 3 s of tones and noise, the state carried on: measured to differ by 0.013 and 0.13 at 8 bits."""
    source = shared_data / "silero-vad" / f"{name}.onnx"
    assert quantized(source, tmp_path / "out", bits=8).verified
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 0.3 * source.stat().st_size
    t = np.arange(3 * 16000) / 16000
    tones = 0.3 * np.sin(2 * np.pi * 140 * t) + 0.2 * np.sin(2 * np.pi * 700 * t) * (np.sin(2 * np.pi * 4 * t) > 0)
    sound = ((tones + 0.02 * np.random.default_rng(0).standard_normal(len(t))) * (np.sin(4.4 * t) > 0)).astype(np.float32)
    heard = []
    for path in (source, tmp_path / "out" / "model.onnx"):
        session, state, found = ort.InferenceSession(path), np.zeros((2, 1, 128), np.float32), []
        more = {i.name: np.array(16000) for i in session.get_inputs() if i.name == "sr"}
        for at in range(0, len(sound) - length, length):
            y, state = session.run(None, {"input": sound[None, at : at + length], "state": state, **more})
            found.append(float(y.ravel()[0]))
        heard.append(np.array(found))
    assert np.abs(heard[0] - heard[1]).max() < most


# what others' exporters write -----------------------------------------------------------------------


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    path: Path, nodes: list[Any], weights: dict[str, Any], inputs: list[Any], shape: Any = None, **more: Any
) -> Path:
    tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", shape)], tensors)
    ir, opset = more.pop("ir_version", 8), more.pop("opset", 17)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path, **more)
    return path


def test_a_weight_that_is_transposed_on_its_way_to_a_product_needs_no_transpose_any_more(tmp_path: Path) -> None:
    """As torch.onnx writes linears: [N,K] and a Transpose."""
    nodes = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), helper.make_node("MatMul", ["x", "wt"], ["y"])]
    assert quantized(saved(tmp_path / "m.onnx", nodes, {"w": normal(96, 64)}), tmp_path / "out", bits=4).verified
    assert ops(tmp_path / "out") == ["MatMulNBits"]


def test_weights_in_branches_and_in_constants_are_quantized_and_both_branches_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["t"])], "then", [], [value("t", ["n", 32])],
                             [numpy_helper.from_array(normal(64, 32), "w")])  # fmt: skip
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(normal(64, 32), "v"))
    other = helper.make_graph([constant, helper.make_node("MatMul", ["x", "v"], ["e"])], "else", [], [value("e", ["n", 32])])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    (tmp_path / "in").mkdir()
    path = model_of(
        tmp_path / "in" / "m.onnx", nodes, {}, [value("x", ["n", 64]), value("c", [], TensorProto.BOOL)],
        save_as_external_data=True, size_threshold=0, location="d", convert_attribute=True,
    )  # fmt: skip
    result = quantized(path, tmp_path / "out", bits=4)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    branches = [a.g for a in model.graph.node[0].attribute]
    assert result.verified and [[n.op_type for n in g.node] for g in branches] == [["MatMulNBits"], ["MatMulNBits"]]
    from qconvert.formats import onnx_foreign_nodes as nodes_of

    true = nodes_of.said_anew
    for broken in ("t", "e"):  # whichever branch is wrong, one of the two draws takes it

        def negated(q: Any, use: Any, *rest: Any, broken: str = broken) -> Any:
            made = true(q, use, *rest)
            if use.node.output[0] != broken:
                return made
            product = made[0].output[0]
            made[0].output[0] = f"{product}.neg"
            return [*made, helper.make_node("Neg", [f"{product}.neg"], [product])]

        monkeypatch.setattr(nodes_of, "said_anew", negated)
        with pytest.raises(VerificationError, match="runtime onnxruntime, outputs"):
            quantized(path, tmp_path / "broken", bits=4)


def test_products_without_names_and_with_biases_of_two_dimensions_keep_them_as_sums(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["a"]), helper.make_node("Gemm", ["a", "v", "c"], ["y"])]
    weights = {"w": normal(64, 64), "v": normal(64, 32), "b": normal(1, 64), "c": normal(1, 32)}
    assert quantized(saved(tmp_path / "m.onnx", nodes, weights), tmp_path / "out", bits=8).verified
    assert ops(tmp_path / "out") == ["MatMulNBits", "Add", "MatMulNBits", "Add"]


def test_models_of_the_first_years_list_initializers_among_inputs_and_still_do(tmp_path: Path) -> None:
    nodes, weights = [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(64, 32)}
    inputs = [value("x", ["n", 64]), value("w", [64, 32])]
    path = model_of(tmp_path / "old.onnx", nodes, weights, inputs, ["n", 32], ir_version=3, opset=8)
    result = quantized(path, tmp_path / "out", bits=4)
    assert {r.what: r.verdict for r in result.report.checks}["onnx.checker"] == "pass" and result.verified
    path = model_of(tmp_path / "new.onnx", nodes, weights, inputs, ir_version=8)
    with pytest.raises(UnsupportedError, match="a caller may replace it"):
        quantized(path, tmp_path / "other", bits=4)


def test_each_row_of_a_recurrent_layer_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """With one scale for the whole tensor these rows, of which some are 100 times smaller, cost 0.05."""
    sizes = (10 ** np.linspace(-2, 0, 256)).astype(np.float32)[None, :, None]
    weights = {"w": normal(1, 256, 32) * sizes, "r": normal(1, 256, 64) * np.float32(0.1)}
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=64)]
    path = model_of(tmp_path / "m.onnx", nodes, weights, [value("x", ["t", "b", 32])])
    result = quantized(path, tmp_path / "out", bits=8)
    price = next(r.value for r in result.report.checks if r.what == "price of the bits")
    assert result.verified and price < 0.015
    scales = {t.name: list(t.dims) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer if "scales" in t.name}
    assert scales == {"w.scales": [256], "r.scales": [256]}


def test_what_is_read_otherwise_than_by_a_quantized_node_is_left_and_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "both"], ["b"]),
        helper.make_node("Gather", ["both", "ids"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Add", ["d", "table"], ["e"]),
        helper.make_node("Gemm", ["e", "halved"], ["y"], alpha=0.5),
    ]
    weights = {"w": normal(64, 64), "both": normal(64, 64), "table": normal(1, 64, dtype=np.float32), "halved": normal(64, 32)}
    result = quantized(saved(tmp_path / "m.onnx", nodes, weights), tmp_path / "out", bits=4)
    left = {f["tensor"]: f["reason"] for f in result.report.fallbacks}
    assert result.verified and left.keys() == {"both", "halved"}
    assert "Gather and MatMul" in left["both"] and "alpha" in left["halved"]
    assert "1 of 4 constants quantized" in result.report.notes[0]


@pytest.mark.parametrize("opset", [17, 21])
def test_torch_exports_are_proven(tmp_path: Path, opset: int) -> None:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = torch.nn.Embedding(50, 64), torch.nn.Conv1d(64, 48, 3)
            self.rnn, self.head = torch.nn.GRU(48, 32, batch_first=True), torch.nn.Linear(32, 96)

        def forward(self, ids: Any) -> Any:
            x = self.conv(self.embed(ids).transpose(1, 2)).relu().transpose(1, 2)
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 50, (1, 12))
    torch.onnx.export(net, (ids,), tmp_path / "m.onnx", dynamo=False, opset_version=opset, input_names=["ids"])
    result = quantized(tmp_path / "m.onnx", tmp_path / "out", bits=8)
    assert result.verified and {f["tensor"] for f in result.report.fallbacks} == set()
    assert {"GatherBlockQuantized", "MatMulNBits", "DequantizeLinear"} <= set(ops(tmp_path / "out"))
    (got,) = ort.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"ids": ids.numpy()})
    want = net(ids).detach().numpy()
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)  # 8 bits; measured 0.005


# bytes ----------------------------------------------------------------------------------------------


def test_large_constants_of_any_type_are_carried_over_byte_for_byte_nan_and_infinity_too(tmp_path: Path) -> None:
    mask = np.triu(np.full((40, 40), -np.inf, np.float32), 1)
    mask[0, 1] = np.nan
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Identity", ["mask"], ["m"]),
        helper.make_node("Identity", ["table"], ["t"]),
        helper.make_node("Identity", ["fours"], ["f"]),
        helper.make_node("Identity", ["words"], ["s"]),
    ]
    weights = {"w": normal(64, 32), "mask": mask, "table": np.arange(900).reshape(30, 30)}
    path = saved(tmp_path / "m.onnx", nodes, weights, opset=21)
    model = onnx.load(path)
    model.ir_version = 10
    fours = helper.make_tensor("fours", TensorProto.INT4, [3, 1001], RNG.integers(-8, 8, 3003))  # rows end within bytes
    model.graph.initializer.extend([fours, helper.make_tensor("words", TensorProto.STRING, [2], ["a", "b"])])
    onnx.save(model, path)
    result = quantized(path, tmp_path / "out", bits=4)
    rows = {r.what: (r.verdict, r.metric) for r in result.report.checks}
    assert result.verified and rows["carried bytes"] == ("pass", "of 4 tensors differ")
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert found["mask"].tobytes() == mask.tobytes() and np.array_equal(found["fours"], numpy_helper.to_array(fours))


def test_a_constant_that_is_not_the_inputs_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.weights import Weights

    true = Weights.encoded

    def wrong(self: Weights, name: str, begin: int, end: int) -> Any:
        data = true(self, name, begin, end)
        return data ^ np.uint8(name == "kept")

    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "kept"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, {"w": normal(64, 512), "kept": normal(512)})
    monkeypatch.setattr(Weights, "encoded", wrong)
    with pytest.raises(VerificationError, match="carried bytes.*kept"):
        quantized(path, tmp_path / "out", bits=4)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_numbers_written_one_by_one_are_read_like_those_in_raw_bytes(tmp_path: Path) -> None:
    """float_data, and f16 as int32_data, as older converters write them."""
    w, v = normal(64, 96), normal(96, 32, dtype=np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["b", "v"], ["c"]), helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    path, files = saved(tmp_path / "m.onnx", nodes, {"w": w, "v": v}), []
    model = onnx.load(path)
    for tensor, array in zip(model.graph.initializer, (w, v), strict=True):
        half = array.dtype == np.float16
        tensor.ClearField("raw_data")
        numbers = (array.view(np.uint16) if half else array).ravel().tolist()
        (tensor.int32_data if half else tensor.float_data).extend(numbers)
    onnx.save(model, tmp_path / "numbers.onnx")
    for name in ("m", "numbers"):
        assert quantized(tmp_path / f"{name}.onnx", tmp_path / name, bits=4).verified
        files.append((tmp_path / name / "model.onnx.data").read_bytes())
    assert files[0] == files[1]


def test_memory_does_not_grow_with_a_model_whose_weights_lie_in_the_protobuf(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (8, 200):
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Identity", ["kept"], ["z"])]
        weights = {"w": normal(64, 32), "kept": np.zeros((megabytes, 512, 512), np.float32)}
        path = saved(tmp_path / f"{megabytes}.onnx", nodes, weights)
        code = (
            "import re, sys, qconvert; "
            "qconvert.convert(sys.argv[1], to='onnx', bits=4, output=sys.argv[2], check=False, threads=1); "
            r"print(int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) >> 10)"
        )
        command = [sys.executable, "-c", code, str(path), str(tmp_path / path.stem)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40  # MB; the models differ by 192


def test_no_byte_that_is_cut_or_changed_makes_more_than_an_error(products: Path, tmp_path: Path) -> None:
    whole, rng = products.read_bytes(), np.random.default_rng(1)
    head = 300  # all but the weights
    damaged = [whole[:n] for n in (0, 1, 50, *range(head, len(whole), 4001))]
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(head) if rng.random() < 0.8 else -rng.integers(1, head)] = rng.integers(256)
        damaged.append(bytes(data))
    n_errors = 0
    for data in damaged:
        (tmp_path / "damaged.onnx").write_bytes(data)
        try:
            quantized(tmp_path / "damaged.onnx", tmp_path / "out", bits=4, dry_run=True)
        except (InputError, UnsupportedError):
            n_errors += 1
    assert n_errors > len(damaged) // 3


def test_what_cannot_be_run_on_made_up_inputs_is_not_verified_and_says_so(tmp_path: Path) -> None:
    words = [helper.make_node("StringNormalizer", ["s"], ["t"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = [value("x", ["n", 64]), value("s", [1], TensorProto.STRING)]
    noise = [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    for name, nodes, given, said in (("words", words, inputs, "its input s"), ("noise", noise, inputs[:1], "two answers")):
        path = model_of(tmp_path / f"{name}.onnx", nodes, {"w": normal(64, 32)}, given)
        result = quantized(path, tmp_path / f"{name}.out", bits=4)
        assert not result.verified and any(said in r.reason for r in result.report.checks if r.verdict == "skip")


def test_codes_times_scales_are_the_weights_that_the_onnx_package_reads(tmp_path: Path, shared_data: Path) -> None:
    """And the one tensor that this model shares with the checkpoint beside it: the rest was trained anew."""
    from safetensors.numpy import load_file

    source = shared_data / "silero-vad" / "silero_vad_16k_op15.onnx"
    quantized(source, tmp_path / "out", bits=8, check=False)
    wanted = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    made = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    basis = load_file(source.with_name("silero_vad_16k.safetensors"))["stft_conv.weight"]
    assert np.array_equal(basis, wanted["model.stft.forward_basis_buffer"])
    errors = {}
    for name, w in wanted.items():
        if name in made:
            assert np.array_equal(made[name], w)
            continue
        stem = name.removesuffix(".weight")
        real = (made[f"{stem}.qweight"].astype(np.float32) - 128) * made[f"{stem}.scales"].reshape(-1, *[1] * (w.ndim - 1))
        errors[name] = float(np.linalg.norm(real - w) / np.linalg.norm(w))
    assert len(errors) == 7 and max(errors.values()) < 0.03  # 8 bits a row, some with outliers; measured 0.005 to 0.024


def test_an_encoder_that_torch_exports_still_gives_what_transformers_gives(tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config)

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask)[0]

    torch.manual_seed(0)
    encoder, ids, mask = Encoder().eval(), torch.randint(0, 200, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    axes = {name: {0: "batch", 1: "sequence"} for name in ("ids", "mask")}
    torch.onnx.export(
        encoder, (ids, mask), tmp_path / "m.onnx", dynamo=False, input_names=list(axes), output_names=["y"], dynamic_axes=axes
    )
    result = quantized(tmp_path / "m.onnx", tmp_path / "out", bits=8)
    assert result.verified and ops(tmp_path / "out").count("MatMulNBits") == 12
    mask[1, 7:] = 0
    (got,) = ort.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    want = encoder(ids, mask).detach().numpy()
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)  # 8 bits, activations too; measured 0.006
