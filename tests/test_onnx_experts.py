"""Mixtures of experts as ONNX: onnxruntime's MoE and QMoE, or one wide layer; each against transformers and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CASES, N_TOKENS, one_thread, save_random, some_tokens, their_logits

from qconvert import convert
from qconvert.build import build
from qconvert.errors import VerificationError
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.ops import verify
from qconvert.passes.flatten_experts import FlattenExperts
from qconvert.passes.interleave_experts import InterleaveExperts
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx

from qconvert.formats.onnx_expert_kernels import Trial, error, weight_of
from qconvert.formats.onnx_experts import SWIGLU
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.scheme import AFFINE, QTensor

assert one_thread  # an autouse fixture
MOE: dict[str, Any] = CASES["qwen3-moe"][1] | {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("moe"), "Qwen3Moe", MOE)


def nodes(folder: Path) -> list[Any]:
    return list(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("rewrite", [InterleaveExperts(), FlattenExperts()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen3-moe every other layer, biases, window"])
def test_experts_compute_the_same_in_another_arrangement(tmp_path: Path, name: str, rewrite: Any) -> None:
    store = Store()
    before = build(read_checkpoint(save_random(tmp_path, *CASES[name]), store))
    after = rewrite(before)
    verify(after)
    assert after != before
    a, b = (run(g, Weights(g, store), some_tokens())["logits"] for g in (before, after))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("form", "quant", "op", "level", "note"),
    [
        ("ort", "fp32", "MoE", None, "1.23"),
        ("ort", "fp16", "MoE", None, "1.23"),
        ("ort", "int4", "QMoE", 4, "1.31"),
        ("ort", "uint4", "QMoE", 4, "1.31"),
        ("ort", "int8", "QMoE", None, "1.23"),
        ("legacy", "int4", "QMoE", None, "1.23"),
        ("legacy", "uint4", "QMoE", None, "1.31"),  # rows of 32 are one group; longer ones need 1.24
        ("portable", "int4", None, None, "all experts"),
        ("ort", "int8-dynamic", None, None, "all experts"),
        ("ort", "w8a8", None, None, "all experts"),
    ],
)
def test_a_form_says_experts_by_the_nodes_it_has(
    tmp_path: Path, folder: Path, form: str, quant: str, op: str | None, level: int | None, note: str
) -> None:
    result = convert(folder, to="onnx", quant=quant, form=form, output=tmp_path / "out", threads=1)
    assert result.verified, result.report.checks
    assert any(note in n for n in result.report.notes)
    said = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).metadata_props
    assert op is None or any(p.key == "qconvert.runs_in" and note in p.value for p in said)
    found = [n for n in nodes(tmp_path / "out") if n.op_type in ("MoE", "QMoE")]
    assert [n.op_type for n in found] == ([op] * 2 if op else [])
    assert [attributes(n).get("accuracy_level") for n in found] == [level] * len(found)
    kernels = [r.what for r in result.report.checks if r.what.startswith("kernel experts")]
    assert len(kernels) == (0 if op != "QMoE" else 1 if form == "legacy" else 2)


def test_a_router_stays_real(tmp_path: Path, folder: Path) -> None:
    result = convert(folder, to="onnx", quant="int4", output=tmp_path / "out", dry_run=True)
    dtypes = {e.name: e.dtype for e in result.plan.entries}
    assert dtypes["model.layers.0.mlp.gate.weight"] == "f32"
    assert dtypes["model.layers.0.mlp.experts.gate_up_proj.weight"] == "onnx.int4_g32"


def test_both_weights_of_an_expert_get_the_same_group(tmp_path: Path) -> None:
    """QMoE has one block size; each of 64 and 48 alone would have got another."""
    folder = save_random(tmp_path / "model", "Qwen3Moe", MOE | {"moe_intermediate_size": 48})
    result = convert(folder, to="onnx", quant="int4", output=tmp_path / "out", threads=1)
    assert result.verified
    got = {f["tensor"].removeprefix("model.layers.0.mlp.experts."): f["got"] for f in result.report.fallbacks}
    assert got["gate_up_proj.weight"] == got["down_proj.weight"] == "int4_g16"
    assert "rows of 64 and 48, which get groups alike" in result.report.fallbacks[0]["reason"]


@pytest.mark.parametrize("form", ["ort", "portable"])
def test_experts_of_another_activation_become_a_wide_layer(tmp_path: Path, form: str) -> None:
    """MoE with gelu and a gate is not implemented in onnxruntime's CPU kernels."""
    folder = save_random(tmp_path / "model", "Mixtral", CASES["mixtral"][1] | {"hidden_size": 64, "hidden_act": "gelu"})
    assert convert(folder, to="onnx", quant="int4", form=form, output=tmp_path / "int4", threads=1).verified
    assert convert(folder, to="onnx", quant="fp32", form=form, output=tmp_path / "out", threads=1).verified
    tokens = some_tokens()
    want = their_logits(folder, tokens)[0].numpy()
    got = OnnxRuntime().open(tmp_path / "out" / "model.onnx", N_TOKENS, 1).decoded(tokens[0].tolist(), 8)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_another_activation_than_the_models_fails_in_the_runtime(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SWIGLU, "activation_alpha", 1.702)
    with pytest.raises(VerificationError, match="runtime onnxruntime, prompts"):
        convert(folder, to="onnx", quant="fp32", form="legacy", output=tmp_path / "out")
    with pytest.raises(VerificationError, match="kernel experts int4_g32"):
        convert(folder, to="onnx", quant="int4", form="legacy", output=tmp_path / "out")


@pytest.mark.parametrize("name", ["int4_g16", "int4_g32", "int4_g256", "uint4_g16", "uint4_g64", "int8_g32", "int8_g128"])
def test_qmoe_multiplies_by_the_values_that_were_packed(name: str) -> None:
    """Two experts of random codes against f64, with activations in f32 and rounded as the kernel rounds them."""
    scheme, layout, rng = AFFINE[name], LAYOUTS[f"onnx.{name}"], np.random.default_rng(0)

    def weight(n: int, k: int) -> Any:
        zeros, codes = len(scheme.levels) > 1, []
        for _ in range(2):
            low = 0 if zeros else -(1 << (scheme.bits - 1))
            values = rng.integers(low, low + (1 << scheme.bits), (n, k)).astype(np.int8)
            scales = rng.uniform(0.5, 1.5, (n, k // scheme.block)).astype(np.float32) / (k**0.5 * (1 << scheme.bits - 1))
            more = [rng.integers(0, 16, scales.shape).astype(np.float32)] if zeros else []
            codes.append(QTensor(scheme, values, (scales, *more)))
        return weight_of(layout, codes)

    f = 3 * scheme.block  # an odd number of groups: zero points end inside a byte
    trial = Trial(layout, weight(2 * f, 2 * scheme.block), weight(2 * scheme.block, f))
    assert error(trial, False) < 1e-5  # measured 3e-7
    assert error(trial, True) < 5e-3
    wrong = replace_codes(trial)
    assert error(wrong, False) > 1e-2 and error(wrong, True) > 1e-2


def replace_codes(trial: Trial) -> Trial:
    """One code in a hundred is another; the values are as before."""
    (codes, *more), values = trial.down
    other = codes.copy()
    other.reshape(-1)[::100] ^= 0x77
    return trial._replace(down=([other, *more], values))
