"""Forms of an ONNX file: which nodes each may have, and that bodies of functions compute what onnxruntime's kernels do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert import convert
from qconvert.errors import UsageError, VerificationError
from qconvert.formats.onnx_arch import FORMS
from qconvert.formats.onnx_runtime import Model, OnnxRuntime

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
TOKENS = [5, 9, 700, 3, 21, 44, 8, 2, 77, 650]


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(form, a proven fp32 folder)"""
    out = tmp_path_factory.mktemp("forms") / request.param
    assert convert(f"{TINY}+{LORA}", to="onnx", quant="fp32", form=request.param, output=out, threads=1).verified
    return FORMS[request.param], out


def inlined(folder: Path) -> Any:
    from onnx.inliner import inline_local_functions

    return inline_local_functions(onnx.load(folder / "model.onnx", load_external_data=False))


def decoder(proto: Any, folder: Path) -> Model:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return Model(folder / "model.onnx", 99, ort.InferenceSession(proto.SerializeToString(), options))


def test_a_form_has_its_opset_and_only_its_domains(folder: Any) -> None:
    form, out = folder
    model = onnx.load(out / "model.onnx", load_external_data=False)
    domains = {"", "com.microsoft"} if form.contrib else {""}
    assert {n.domain for n in model.graph.node} == {o.domain for o in model.opset_import} == domains
    assert (model.ir_version, model.opset_import[0].version) == (form.ir_version, form.opset)
    assert {f.name for f in model.functions} == ({n.op_type for n in model.graph.node if n.domain} if form.bodies else set())


def test_every_edge_has_a_shape(folder: Any, tmp_path: Path) -> None:
    form, out = folder
    convert(TINY, to="onnx", quant="uint4", form=form.name, output=tmp_path / "out", check=False)
    for path in (out, tmp_path / "out"):
        graph = onnx.load(path / "model.onnx", load_external_data=False).graph
        known = {v.name for v in (*graph.input, *graph.output, *graph.value_info)}
        assert {o for n in graph.node for o in n.output if o} <= known


def test_every_node_has_its_body_and_standard_nodes_alone_give_the_same_logits(tmp_path: Path) -> None:
    """Inlined by the onnx package, run by onnxruntime without one node of its own."""
    for quant in ("fp32", "int4", "uint4"):
        out = tmp_path / quant
        convert(f"{TINY}+{LORA}", to="onnx", quant=quant, output=out, check=False)
        (out / "inlined.onnx").write_bytes(inlined(out).SerializeToString())
        onnx.checker.check_model(out / "inlined.onnx")
        assert {n.domain for n in inlined(out).graph.node} == {""}
        got = decoder(inlined(out), out).decoded(TOKENS, 3)
        want = OnnxRuntime().open(out / "model.onnx", 99, 1, exact=True).decoded(TOKENS, 3)
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)  # f32 in another order of sums: measured 1e-6


def test_a_body_that_computes_something_else_fails_in_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would never notice: it does not read bodies."""
    from qconvert.formats import onnx_functions

    true = onnx_functions.BODIES["FusedMatMul"]

    def doubled(model: Any, node: Any) -> Any:
        body = true(model, node)
        twice = "half = MatMul (A, turned)\n  Y = Add (half, half)"
        return body._replace(text=body.text.replace("Y = MatMul (A, turned)", twice))

    monkeypatch.setitem(onnx_functions.BODIES, "FusedMatMul", doubled)
    with pytest.raises(VerificationError, match="onnx.reference"):
        convert(TINY, to="onnx", quant="fp32", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["int4", "uint4", "int8"])
def test_the_portable_form_is_quantized_in_standard_nodes_that_onnxruntime_fuses(tmp_path: Path, quant: str) -> None:
    out = tmp_path / "out"
    result = convert(f"{TINY}+{LORA}", to="onnx", quant=quant, form="portable", group=64, output=out, threads=1)
    rows = {r.what: r.verdict for r in result.report.checks}
    assert result.verified and {rows["onnx.reference"], rows[f"kernel {quant}_g64 x 512"]} == {"pass"}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(out / "fused.onnx")
    ort.InferenceSession(out / "model.onnx", options)
    fused, plain = (onnx.load(out / name, load_external_data=False).graph for name in ("fused.onnx", "model.onnx"))
    kinds = [n.op_type for n in fused.node]
    assert kinds.count("MatMulNBits") == [n.op_type for n in plain.node].count("MatMul") and "DequantizeLinear" not in kinds


def test_outputs_that_do_not_fill_bytes_get_eight_bits_in_the_portable_form(tmp_path: Path) -> None:
    from tiny_models import SMALL, save_random

    folder = save_random(tmp_path / "model", "Llama", SMALL | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 61})
    result = convert(folder, to="onnx", form="portable", output=tmp_path / "out", threads=1)
    found = {f["tensor"]: (f["got"], f["reason"]) for f in result.report.fallbacks}
    assert result.verified and found == {"lm_head.weight": ("int8_g32", "61 outputs do not fill bytes side by side")}


def test_padding_on_the_left_changes_nothing_in_the_portable_form(tmp_path: Path) -> None:
    convert(TINY, to="onnx", quant="fp32", form="portable", output=tmp_path / "out", check=False)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    past = {i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if "past" in i.name}
    ids, mask = np.array([TOKENS, [0] * 4 + TOKENS[:6]]), np.array([[1] * 10, [0] * 4 + [1] * 6])
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0]
    alone = OnnxRuntime().open(tmp_path / "out" / "model.onnx", 99, 1).logits(TOKENS[:6])
    assert np.isfinite(logits).all()
    assert np.allclose(logits[1, 4:], alone, atol=1e-4)  # logits of up to 10


def test_genai_is_told_whether_past_and_present_may_share_a_buffer(folder: Any) -> None:
    form, out = folder
    assert f'"past_present_share_buffer": {str(form.contrib).lower()}' in (out / "genai_config.json").read_text()


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(UsageError, match="--form tflite: there are ort, portable, legacy"):
        convert(TINY, to="onnx", form="tflite", dry_run=True)
