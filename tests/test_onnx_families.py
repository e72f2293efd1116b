"""Every family as ONNX: onnxruntime's logits against transformers' own, whole prompts and by the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CASES, N_TOKENS, one_thread, save_random, some_tokens, their_logits

from qconvert import convert
from qconvert.errors import UnsupportedError
from qconvert.formats.onnx_arch import FORMS, UNDERSTOOD, check_supported
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.graph import Graph, Node, Type

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx

from qconvert.formats import onnx_contrib, onnx_encoder, onnx_standard

assert one_thread  # an autouse fixture
N_STEPS = 8
# heads of 16: GroupQueryAttention rotates no narrower ones, and standard nodes say those
WIDE: dict[str, dict[str, Any]] = {
    "GPT2": {}, "Gemma2": {"head_dim": 16}, "Gemma3": {"head_dim": 16},
    "Qwen3Moe": {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, options | WIDE.get(kind, {"hidden_size": 64}))
    for name, (kind, options) in CASES.items()
    if "longrope" not in name
}
MODELS |= {f"narrow {name}": CASES[name] for name in ("llama head_dim", "qwen2", "gemma2", "gemma3", "phi3 part of each head")}
SHORT, LONG = ([1 + i * step for i in range(8)] for step in (0.1, 1.0))
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": SHORT, "long_factor": LONG}
MODELS["phi3 longrope"] = (
    "Phi3", CASES["phi3"][1] | {"hidden_size": 64, "rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
)  # fmt: skip
# phi-4-mini's: 48 of the 64 values of a head rotate, which GroupQueryAttention says by tables of that width
PART = CASES["phi3"][1] | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS["phi3 48 of 64"] = (
    "Phi3", PART | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}},
)  # fmt: skip
FACTORS = {"short_factor": [1 + i * 0.05 for i in range(24)], "long_factor": [1 + i * 0.5 for i in range(24)]}
PART_LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75, "factor": 2.5, **FACTORS}
MODELS["phi3 longrope, 48 of 64"] = (
    "Phi3", PART | {"rope_parameters": PART_LONGROPE, "original_max_position_embeddings": 48},
)  # fmt: skip
QUANTIZED = ("llama tied", "llama biases", "mistral window", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "phi3", "mixtral")
EVERY_FAMILY = (
    "llama biases", "llama yarn", "mistral window", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral", "qwen3-moe",
    "mixtral tied, window, one expert a token", "qwen3-moe every other layer, biases, window",
    "phi3 longrope", "phi3 48 of 64", "phi3 longrope, 48 of 64",
)  # fmt: skip


def relative_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", MODELS)
def test_an_fp32_folder_gives_transformers_logits_at_once_and_by_the_cache(tmp_path: Path, name: str) -> None:
    folder = save_random(tmp_path / "model", *MODELS[name])
    result = convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", threads=1)
    assert result.verified
    n = 16 if name == "llama dynamic rope, long text" else N_TOKENS
    tokens = some_tokens(n=n)
    want = their_logits(folder, tokens)[0].numpy()
    model = OnnxRuntime().open(tmp_path / "out" / "model.onnx", n, 1)
    ids = tokens[0].tolist()
    for got in (model.logits(ids), model.decoded(ids, N_STEPS)):
        assert relative_error(got, want) < 1e-5  # f32 in another order of sums: measured below 1e-6


@pytest.mark.parametrize("form", ["portable", "legacy"])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_other_forms_give_the_same_logits(tmp_path: Path, name: str, form: str) -> None:
    folder = save_random(tmp_path / "model", *MODELS[name])
    assert convert(folder, to="onnx", quant="fp32", form=form, output=tmp_path / "out", threads=1).verified
    tokens = some_tokens()
    want = their_logits(folder, tokens)[0].numpy()
    model = OnnxRuntime().open(tmp_path / "out" / "model.onnx", N_TOKENS, 1)
    for got in (model.logits(tokens[0].tolist()), model.decoded(tokens[0].tolist(), N_STEPS)):
        assert relative_error(got, want) < 1e-5


def test_heads_that_no_node_of_opset_21_turns_are_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", *CASES["llama head_dim"])
    with pytest.raises(UnsupportedError, match="heads of 12.*multiples of 16"):
        convert(folder, to="onnx", form="legacy", output=tmp_path / "out")


@pytest.mark.parametrize("quant", ["int4", "uint4", "int8", "fp16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_folder_is_proven_in_onnxruntime(tmp_path: Path, name: str, quant: str) -> None:
    folder = save_random(tmp_path / "model", *MODELS[name])
    result = convert(folder, to="onnx", quant=quant, output=tmp_path / "out", threads=1)
    assert result.verified, result.report.checks


@pytest.mark.parametrize("name", ["phi3 48 of 64", "phi3 longrope, 48 of 64"])
def test_part_of_a_head_is_rotated_by_group_query_attention(tmp_path: Path, name: str) -> None:
    """Its body too, which the onnx package's reference runs."""
    folder = save_random(tmp_path / "model", *MODELS[name])
    result = convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", threads=1)
    rows = {r.what: r.verdict for r in result.report.checks}
    assert result.verified and rows["onnx.reference"] == "pass"
    ops = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert ops.count("GroupQueryAttention") == 2 and "RotaryEmbedding" not in ops


@pytest.mark.parametrize("name", ["phi3 longrope", "phi3 longrope, 48 of 64"])
def test_longrope_bounds_the_context_to_that_of_its_short_factors(tmp_path: Path, name: str) -> None:
    folder = save_random(tmp_path / "model", *MODELS[name])
    result = convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", dry_run=True)
    assert any("context_length is 48" in note for note in result.report.notes)


def test_a_window_hides_what_lies_before_it(tmp_path: Path) -> None:
    """Else the case "mistral window" would pass without one."""
    folder = save_random(tmp_path / "model", *MODELS["mistral window"])
    convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", check=False)
    model = OnnxRuntime().open(tmp_path / "out" / "model.onnx", 64, 1)
    ids = some_tokens()[0].tolist()
    other = [(ids[0] + 1) % 61, *ids[1:]]
    a, b = model.decoded(ids, N_STEPS), model.decoded(other, N_STEPS)
    assert np.abs(a[0] - b[0]).max() > 1e-2
    assert np.array_equal(a[20:], b[20:])  # two layers with windows of 8 see 14 tokens back


def test_an_attribute_that_no_node_says_is_refused() -> None:
    x, w = Node("input", (), Type("i64", ("B", "T"))), Node("load", (), Type("f32", (8, 4)), {"tensor": "base/x#w"})
    y = Node("embed", ("x", "w"), Type("f32", ("B", "T", 4)), {"padding": 0})
    with pytest.raises(UnsupportedError, match="no embed with padding"):
        check_supported(Graph({"x": x, "w": w, "y": y}, ("y",)), FORMS["ort"])


def test_every_op_that_is_understood_has_its_nodes() -> None:
    assert onnx_contrib.OPS.keys() | onnx_encoder.OPS.keys() == UNDERSTOOD.keys() - {"input"}
    assert onnx_standard.OPS.keys() == onnx_contrib.OPS.keys() - {"experts"}  # which a pass makes linears of


def test_dynamic_rope_bounds_the_context_that_the_folder_declares(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", *MODELS["llama dynamic rope, long text"])
    result = convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", dry_run=True)
    assert any("context_length is 16" in note for note in result.report.notes)
