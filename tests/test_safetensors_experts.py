"""Mixtures of experts as safetensors: a tensor for each expert, read again, and what nothing loads rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CASES, one_thread, save_random, some_tokens

from qconvert import convert
from qconvert.build import build
from qconvert.errors import GraphError, InputError, UnsupportedError
from qconvert.formats.safetensors_experts import SplitExperts, not_run
from qconvert.graph import Graph, Node, Type
from qconvert.ops import infer, verify
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

assert one_thread  # an autouse fixture
WIDE = {"hidden_size": 64, "intermediate_size": 64}
MOE = CASES["qwen3-moe normalized"][1] | WIDE | {"head_dim": 16, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", CASES["mixtral"][1] | WIDE),
    "qwen3-moe": ("Qwen3Moe", MOE),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp(request.param), *MODELS[request.param])


def fused(folder: Path, source: Path) -> Path:
    """The same model with all experts in one tensor, as transformers may save it."""
    found = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found.save_pretrained(folder, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(folder / "model.safetensors"))
    return folder


def test_experts_are_apart_whether_the_source_has_them_so_or_in_one_tensor(source: Path, tmp_path: Path) -> None:
    first = load_file(source / "model.safetensors")
    for i, folder in enumerate((source, fused(tmp_path / "fused", source))):
        out = tmp_path / f"out{i}"
        assert convert(folder, to="safetensors", quant="fp32", output=out, threads=1).verified
        second = load_file(out / "model.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_splitting_keeps_the_function(source: Path) -> None:
    store = Store()
    graph = build(read_checkpoint(source, store))
    split = SplitExperts()(graph)
    verify(split)
    before, after = (run(g, Weights(g, store), some_tokens())["logits"] for g in (graph, split))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert any(".experts.1." in name for name in split.apart()) and split.parameters() == graph.parameters()
    store.close()


@pytest.mark.parametrize("quant", ["w4a16", "w8a16"])
def test_quantized_experts_are_proven_and_routers_stay_real(source: Path, quant: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    assert convert(source, to="safetensors", quant=quant, output=tmp_path / "out", threads=1).verified
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    routers = [n.removesuffix(".weight") for n in names if n.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight"))]
    assert len(routers) == 2 and {*routers, "lm_head"} == set(settings["ignore"])
    assert any(n.endswith(".weight_packed") and ".experts.3." in n for n in names)


def test_experts_of_one_layer_have_one_group_size(tmp_path: Path) -> None:
    """transformers decompresses all experts by one scheme, which it finds by an expression with "experts"."""
    pytest.importorskip("compressed_tensors")
    folder = save_random(tmp_path / "model", "Qwen3Moe", MOE | {"moe_intermediate_size": 32})
    assert convert(folder, to="safetensors", quant="w4a16", output=tmp_path / "out", threads=1).verified
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    of_experts = [g for g in groups.values() if any("experts" in t for t in g["targets"])]
    assert len(groups) == 2 and len(of_experts) == 1 and of_experts[0]["weights"]["group_size"] == 32
    assert of_experts[0]["targets"][-1].startswith("re:")


def test_zero_points_of_experts_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="neither vLLM nor transformers runs experts with zero points"):
        convert(source, to="safetensors", quant="w4a16-asym", output=tmp_path / "out")


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_what_transformers_leaves_random_is_never_called_proven(source: Path, quant: str, tmp_path: Path) -> None:
    result = convert(source, to="safetensors", quant=quant, output=tmp_path / "out", threads=1)
    (row,) = (row for row in result.report.checks if row.what == "runtime transformers")
    assert not result.verified and row.verdict == "skip" and f"experts of {quant.upper()} mixtures random" in row.reason


@pytest.mark.parametrize(("quant", "why"), [("nvfp4a16", "drops the global scales"), ("w8a8", "experts of 8-bit integers")])
def test_experts_that_transformers_reads_wrongly_or_not_are_not_run(source: Path, quant: str, why: str, tmp_path: Path) -> None:
    result = convert(source, to="safetensors", quant=quant, output=tmp_path / "out", threads=1)
    (row,) = (row for row in result.report.checks if row.what == "runtime transformers")
    assert not result.verified and row.verdict == "skip" and why in row.reason


def test_gate_and_up_of_an_expert_share_their_global_scale(source: Path, tmp_path: Path) -> None:
    """vLLM keeps one for both."""
    convert(source, to="safetensors", quant="nvfp4a16", output=tmp_path / "out", threads=1, check=False)
    scales = {n: t for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if n.endswith("weight_global_scale")}
    pairs = (("w1", "w3"), ("gate_proj", "up_proj"))
    same = [torch.equal(t, scales[n.replace(a, b)]) for a, b in pairs for n, t in scales.items() if f".{a}." in n]
    assert len(same) >= 8 and all(same)


def test_a_mixture_without_quantization_is_run() -> None:
    assert not_run({}, True) is None


@pytest.mark.parametrize("quant", ["w4a16", "w8a16", "awq", "gptq"])
def test_codes_of_experts_come_back_as_they_were(source: Path, quant: str, tmp_path: Path) -> None:
    convert(source, to="safetensors", quant=quant, output=tmp_path / "one", check=False, threads=1)
    result = convert(tmp_path / "one", to="safetensors", quant=quant, output=tmp_path / "two", threads=1)
    assert any(row.what.startswith("codes moved") and row.verdict == "pass" for row in result.report.checks)
    assert any("keep their codes" in note for note in result.report.notes)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_codes_of_experts_move_into_qmoe(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    convert(source, to="safetensors", quant="w4a16", output=tmp_path / "one", check=False, threads=1)
    result = convert(tmp_path / "one", to="onnx", bits=4, output=tmp_path / "onnx", threads=1)
    moved = [row for row in result.report.checks if row.what.startswith("codes moved")]
    assert result.verified and [row.verdict for row in moved] == ["pass"]
    assert not any("rounded" in note for note in result.report.notes)


def test_a_dialect_without_mixtures_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.formats import safetensors_experts

    monkeypatch.setattr(safetensors_experts, "METHODS", {})
    with pytest.raises(UnsupportedError, match="--quant w4a16: mixtures of experts are not written so"):
        convert(source, to="safetensors", quant="w4a16", output=tmp_path / "out")


def test_experts_that_no_group_fits_stay_plain_beside_quantized_attention(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = save_random(tmp_path / "model", "Qwen3Moe", MOE | {"moe_intermediate_size": 20})
    result = convert(folder, to="safetensors", quant="w4a16", output=tmp_path / "out", threads=1)
    (row,) = (row for row in result.report.checks if row.what == "runtime transformers")
    assert row.verdict == "skip" and "loads no plain experts" in row.reason
    assert {f["got"] for f in result.report.fallbacks} == {"f32"}
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(".experts." in n and n.endswith("_packed") for n in names) and any(n.endswith("_packed") for n in names)


def test_an_expert_that_is_stored_otherwise_is_named(source: Path, tmp_path: Path) -> None:
    convert(source, to="safetensors", quant="w4a16", output=tmp_path / "one", check=False, threads=1)
    path = tmp_path / "one" / "model.safetensors"
    tensors = load_file(path)
    module = next(n for n in tensors if ".experts.2." in n).rpartition(".")[0]
    tensors = {n: t for n, t in tensors.items() if n.rpartition(".")[0] != module} | {f"{module}.weight": torch.zeros(64, 64)}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{module}.weight is f32\[64,64\], but .*experts.0.* is int4_g64"):
        convert(tmp_path / "one", to="safetensors", output=tmp_path / "two")


# ops ------------------------------------------------------------------------------------------------


def test_an_expert_is_its_rows_of_the_whole() -> None:
    values = np.arange(24, dtype=np.float32).reshape(3, 8).tolist()
    kind = Type("f32", (2, 4))
    matrices = {f"m{e}": Node("constant", (), kind, {"values": np.reshape(values[e], (2, 4)).tolist()}) for e in range(3)}
    stack = Node("stack", tuple(matrices), Type("f32", (3, 2, 4)), {"apart": True})
    nodes = {**matrices, "w": stack, "second": Node("expert", ("w",), kind, {"e": 1})}
    graph = Graph(nodes, ("second",))
    verify(graph)
    np.testing.assert_array_equal(Weights(graph, Store()).real("second"), np.reshape(values[1], (2, 4)))
    with pytest.raises(GraphError, match="has no matrix 3"):
        infer("expert", (stack.type,), e=3)
    with pytest.raises(GraphError, match="differ"):
        infer("stack", (kind, Type("int4_g32", (2, 4))))
