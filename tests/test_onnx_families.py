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
from qconvert.formats import onnx_contrib, onnx_standard

assert one_thread  # an autouse fixture
N_STEPS = 8
# heads of 16: GroupQueryAttention rotates no narrower ones, and standard nodes say those
WIDE: dict[str, dict[str, Any]] = {"GPT2": {}, "Gemma2": {"head_dim": 16}, "Gemma3": {"head_dim": 16}}
REFUSED = {
    "mixtral": ({"hidden_size": 64}, "no route"),
    "qwen3-moe": ({"head_dim": 16}, "no route"),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, options | WIDE.get(kind, {"hidden_size": 64}))
    for name, (kind, options) in CASES.items()
    if kind not in ("Mixtral", "Qwen3Moe") and name not in REFUSED and "longrope" not in name
}
MODELS |= {f"narrow {name}": CASES[name] for name in ("llama head_dim", "qwen2", "gemma2", "gemma3", "phi3 part of each head")}
SHORT, LONG = ([1 + i * step for i in range(8)] for step in (0.1, 1.0))
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": SHORT, "long_factor": LONG}
MODELS["phi3 longrope"] = (
    "Phi3", CASES["phi3"][1] | {"hidden_size": 64, "rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
)  # fmt: skip
QUANTIZED = ("llama tied", "llama biases", "mistral window", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "phi3")


EVERY_FAMILY = ("llama biases", "llama yarn", "mistral window", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")


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


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_node_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    more, said = REFUSED[name]
    folder = save_random(tmp_path / "model", kind, options | more)
    with pytest.raises(UnsupportedError, match=said):
        convert(folder, to="onnx", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attribute_that_no_node_says_is_refused() -> None:
    x, w = Node("input", (), Type("i64", ("B", "T"))), Node("load", (), Type("f32", (8, 4)), {"tensor": "base/x#w"})
    y = Node("embed", ("x", "w"), Type("f32", ("B", "T", 4)), {"padding": 0})
    with pytest.raises(UnsupportedError, match="no embed with padding"):
        check_supported(Graph({"x": x, "w": w, "y": y}, ("y",)), FORMS["ort"])


def test_every_op_that_is_understood_has_its_nodes() -> None:
    assert onnx_contrib.OPS.keys() == onnx_standard.OPS.keys() == UNDERSTOOD.keys() - {"input"}


def test_dynamic_rope_bounds_the_context_that_the_folder_declares(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", *MODELS["llama dynamic rope, long text"])
    result = convert(folder, to="onnx", quant="fp32", output=tmp_path / "out", dry_run=True)
    assert any("context_length is 16" in note for note in result.report.notes)
