"""Encoders as ONNX: hidden states and embeddings of padded texts in onnxruntime, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_encoders import CASES, SMALL, kept, padded, save_random, sentence_model, theirs
from tiny_models import one_thread, some_tokens
from transformers import AutoModel

from qconvert import convert
from qconvert.errors import UnsupportedError, VerificationError
from qconvert.formats.onnx_arch import FORMS, check_supported
from qconvert.graph import Graph, Node, Type

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime

from qconvert.formats import onnx_encoder

assert one_thread  # an autouse fixture
WIDE = SMALL | {"hidden_size": 64, "intermediate_size": 96}  # rows that divide into groups of 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding model, of the mean over tokens."""
    return sentence_model(tmp_path_factory.mktemp("bert"), "mean", True, True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("wide"), WIDE)


def outputs(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that transformers.js reads."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    feeds = {"input_ids": some_tokens(), "attention_mask": inputs["attention_mask"], "token_type_ids": inputs["token_types"]}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {k: v.numpy() for k, v in feeds.items()})), strict=True))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_of_padded_texts_equal_those_of_transformers(tmp_path: Path, name: str, form: str) -> None:
    folder, inputs = save_random(tmp_path / "model", CASES[name]), padded()
    assert convert(folder, to="onnx", quant="fp32", form=form, output=tmp_path / "out", threads=1).verified
    got = outputs(tmp_path / "out", inputs)
    assert list(got) == ["last_hidden_state"]
    assert error(kept(got["last_hidden_state"], inputs), kept(theirs(folder, inputs), inputs)) < 1e-5  # measured 1e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_embeddings_equal_those_of_sentence_transformers(tmp_path: Path, mode: str, unit: bool, form: str) -> None:
    modules = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="sentence-transformers is the reference here"
    )
    folder, inputs = sentence_model(tmp_path / "model", mode, unit, False), padded()
    assert convert(folder, to="onnx", quant="fp32", form=form, output=tmp_path / "out", threads=1).verified
    features = {"token_embeddings": theirs(folder, inputs), "attention_mask": inputs["attention_mask"]}
    want = modules.Pooling(32, pooling_mode=mode)(features)["sentence_embedding"]
    want = modules.Normalize()({"sentence_embedding": want})["sentence_embedding"] if unit else want
    assert error(outputs(tmp_path / "out", inputs)["sentence_embedding"], want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", ["int4", "uint4", "int8", "fp16", "int8-dynamic", "w8a8"])
def test_a_quantized_encoder_is_proven_in_onnxruntime(tmp_path: Path, wide: Path, quant: str, form: str) -> None:
    result = convert(wide, to="onnx", quant=quant, form=form, output=tmp_path / "out", threads=1)
    assert result.verified, result.report.checks
    dtypes = {e.name: e.dtype.rpartition(".")[2] for e in result.plan.entries}
    assert dtypes["embeddings.token_type_embeddings.weight"] in ("f32", "f16")
    wanted = {"fp16": "f16", "int8-dynamic": "int8_g32", "w8a8": "int8_g32"}.get(quant, f"{quant}_g32")
    assert dtypes["embeddings.word_embeddings.weight"] == wanted


def test_each_check_there_is_has_run(tmp_path: Path, folder: Path) -> None:
    result = convert(folder, to="onnx", quant="int8", output=tmp_path / "out", threads=1)
    rows = [(r.what, r.metric) for r in result.report.checks if r.verdict == "pass"]
    for what in ("onnx.reference", "runtime onnxruntime, texts", "runtime onnxruntime, 8-bit activations, texts"):
        assert {(what, "relative error of hidden states"), (what, "relative error of embeddings")} <= set(rows)
    assert ("kernel int8_g32 x 32", "relative error") in rows
    price = {r.metric: r.value for r in result.report.checks if r.what == "price of the bits"}
    assert 0.99 < (price["worst cosine of embeddings"] or 0) <= (price["mean cosine of embeddings"] or 0) <= 1


def test_an_encoder_has_no_cache_and_no_configuration_of_genai(tmp_path: Path, folder: Path) -> None:
    (folder / "vocab.txt").write_text("[PAD]\n")
    convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", check=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data", "vocab.txt"]
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert [v.name for v in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [v.name for v in graph.output] == ["last_hidden_state", "sentence_embedding"]
    known = {v.name for v in (*graph.input, *graph.output, *graph.value_info)}
    assert {o for n in graph.node for o in n.output} <= known


def test_a_mask_that_is_not_read_fails_in_the_runtime(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(e: Any, name: str, node: Node) -> None:
        e.say("Attention", name, list(node.inputs[:3]), q_num_heads=4, kv_num_heads=4, scale=node.attrs["scale"])

    monkeypatch.setitem(onnx_encoder.OPS, "attention", blind)
    with pytest.raises(VerificationError, match="relative error of hidden states"):
        convert(folder, to="onnx", quant="fp32", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_of_nothing_but_padding_has_a_finite_embedding(tmp_path: Path, folder: Path) -> None:
    """As a batch may have; the mean of no token is 0."""
    convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", check=False)
    inputs = padded()
    inputs["attention_mask"][1] = 0
    got = outputs(tmp_path / "out", inputs)["sentence_embedding"]
    assert torch.isfinite(got).all()


def test_an_adapter_on_an_encoder_is_merged_and_proven(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", SMALL)
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=4, target_modules=["query", "intermediate.dense"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    result = convert(f"{base}+{tmp_path / 'adapter'}", to="onnx", quant="fp32", output=tmp_path / "out", threads=1)
    assert result.verified
    assert [r.verdict for r in result.report.checks if r.what == "merge"] == ["pass"]
    inputs = padded()
    names = {"token_types": "token_type_ids"}
    with torch.no_grad():
        want = model.eval()(some_tokens(), **{names.get(k, k): v for k, v in inputs.items()}).last_hidden_state
    assert error(kept(outputs(tmp_path / "out", inputs)["last_hidden_state"], inputs), kept(want, inputs)) < 1e-5


def test_adapters_of_an_encoder_are_not_swapped(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", SMALL)
    get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=4, target_modules=["key"])).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="--adapters swap: this model is an encoder"):
        convert(f"{base}+{tmp_path / 'a'}", to="onnx", adapters_as="swap", output=tmp_path / "out", dry_run=True)


def test_a_merge_that_drops_a_delta_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert import weights

    base = save_random(tmp_path / "base", SMALL)
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=4, target_modules=["key"]))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({k: v + 0.1 for k, v in tensors.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    monkeypatch.setitem(weights.OPS, "merge", lambda w, name, node, begin, end: w.real(node.inputs[0], begin, end))
    with pytest.raises(VerificationError, match=r"at merge.*first difference at %l0\.k \(encoder\.layer\.0\.attention"):
        convert(f"{base}+{tmp_path / 'adapter'}", to="onnx", quant="fp32", output=tmp_path / "out")


def test_attention_that_no_encoders_node_says_is_refused() -> None:
    x, mask = (Node("input", (), Type("i64", ("B", "T")), {"default": 1}) for _ in range(2))
    w = Node("load", (), Type("f32", (8, 4)), {"tensor": "base/x#w"})
    h = Node("embed", ("tokens", "w"), Type("f32", ("B", "T", 4)))
    attrs: dict[str, Any] = {"heads": 2, "kv_heads": 2, "scale": 1.0, "causal": False}
    for inputs, more, said in (
        (("h", "h", "h", "attention_mask"), {"window": 4}, "with window"),
        (("h", "h", "h", "attention_mask"), {"softcap": 4.0}, "with softcap"),
        (("h", "h", "h"), {}, "all tokens of attention_mask"),
    ):
        y = Node("attention", inputs, h.type, attrs | more)
        graph = Graph({"tokens": x, "attention_mask": mask, "w": w, "h": h, "y": y}, ("y",))
        with pytest.raises(UnsupportedError, match=said):
            check_supported(graph, FORMS["ort"])


def test_kinds_of_text_reach_the_model(tmp_path: Path, folder: Path) -> None:
    """Else a test of padded texts of two kinds could pass without them."""
    convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", check=False)
    one, two = padded(), padded()
    two["token_types"][1] = 1
    a, b = (outputs(tmp_path / "out", x)["sentence_embedding"].numpy() for x in (one, two))
    assert np.array_equal(a[0], b[0]) and np.abs(a[1] - b[1]).max() > 1e-3
