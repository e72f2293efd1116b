"""Adapters kept beside a quantized base: their factors, fitted anew, take up part of what quantization lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qconvert import adapter_refit, check, convert
from qconvert.adapter_weights import refitted, top_factors
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.errors import UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.passes.adapter_slots import AdapterSlots, filling
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.quantize import Quantize
from qconvert.passes.refit_adapter import RefitAdapter
from qconvert.pipeline import Pipeline
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

TINY, LORA = (Path(__file__).parents[1] / "golden" / name for name in ("tiny", "tiny-lora"))
RNG = np.random.default_rng(0)
SEEN, OTHER = (np.random.default_rng(seed).integers(0, 1024, (8, 64)).tolist() for seed in (1, 2))


def error_of(target: np.ndarray, pair: tuple[np.ndarray, np.ndarray]) -> float:
    a, b = pair
    return float(np.linalg.norm(target - b @ a))


def test_factors_are_the_best_of_their_rank() -> None:
    target = RNG.standard_normal((40, 24))
    s = torch.linalg.svdvals(torch.from_numpy(target)).numpy()
    np.testing.assert_allclose(error_of(target, refitted(target, 5, None)), np.sqrt(np.square(s[5:]).sum()), rtol=1e-12)
    np.testing.assert_allclose(error_of(target, refitted(target, 30, None)), 0, atol=1e-12)  # more rank than there is
    large = RNG.standard_normal((900, 600)) + 3 * RNG.standard_normal((900, 4)) @ RNG.standard_normal((4, 600))
    s = torch.linalg.svdvals(torch.from_numpy(large)).numpy()
    left, right = top_factors(large, 8)
    assert error_of(large, (right, left)) <= 1.002 * np.sqrt(np.square(s[8:]).sum())  # by iteration


def test_with_a_hessian_errors_of_outputs_are_least() -> None:
    target, x = RNG.standard_normal((40, 24)), RNG.standard_normal((200, 24)) * np.geomspace(1, 30, 24)
    hessian = x.T @ x / len(x)
    pairs = [refitted(target, 5, h) for h in (None, hessian, np.diag(hessian))]
    error = [float(np.linalg.norm(x @ (target - b @ a).T)) for a, b in pairs]
    assert error[1] < error[2] < error[0]
    s = torch.linalg.svdvals(torch.from_numpy(target @ np.linalg.cholesky(hessian))).numpy()
    best = np.sqrt(np.square(s[5:]).sum() * len(x))
    assert best <= error[1] <= 1.05 * best and error[1] < 0.7 * error[0]  # the rest is damping


# on golden/tiny ------------------------------------------------------------------------------------


def slots_and_trained(store: Store) -> tuple[Graph, Graph]:
    attached = Pipeline((AttachAdapter(read_adapter(LORA, store, "adapter0")),)).run(build(read_checkpoint(TINY, store)))
    return AdapterSlots()(attached), attached


def with_hessians(graph: Graph, store: Store, folder: Path) -> Graph:
    """W~hessian of each linear beside a slot: the mean of x x^T over tokens, gathered by a hook."""
    sums: dict[str, np.ndarray] = {}

    def note(node: Node, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2).double().numpy()
        sums[node.inputs[1]] = flat.T @ flat / len(flat)
        return x

    run(graph, Weights(graph, store), SEEN, round_input=note)
    folder.mkdir()
    save_file({f"{w}.hessian": h.astype(np.float32) for w, h in sums.items()}, folder / "model.safetensors")
    store.add("statistics", folder)
    beside = {f"{a.removesuffix('.lora_A.weight')}.weight" for a in filling(graph)["adapter0"] if ".lora_A" in a}
    loads = {
        f"{w}~hessian": Node("load", (), Type("f32", h.shape), {"tensor": f"statistics/model.safetensors#{w}.hessian"})
        for w, h in sums.items()
        if w in beside
    }
    return Graph({**loads, **graph.nodes}, (*graph.outputs, *loads), graph.meta)


def kl_of(graph: Graph, store: Store, trained: torch.Tensor) -> float:
    weights = Weights(graph, store)
    slots = {slot: torch.from_numpy(weights.real(value)) for slot, value in filling(graph)["adapter0"].items()}
    logits = run(graph, weights, OTHER, inputs=slots, want=["logits"])["logits"]
    return check.distance(trained, torch.log_softmax(logits, -1), OTHER).mean_kl


def test_kl_falls_on_text_that_was_not_seen(tmp_path: Path) -> None:
    store = Store()
    slots, attached = slots_and_trained(store)
    trained = check.log_probs(attached, Weights(attached, store), OTHER)
    graph = with_hessians(slots, store, tmp_path / "statistics")
    linears = {n.inputs[1] for n in graph.nodes.values() if n.op == "linear" and "embed" not in n.inputs[1]}
    print()
    for bits in (8, 4, 2):
        quantized = Quantize("", "mse", dict.fromkeys(linears, f"int{bits}_g32"))(graph)
        plain = Quantize("", "mse", dict.fromkeys(linears, f"int{bits}_g32"))(slots)
        kls = [kl_of(g, store, trained) for g in (quantized, RefitAdapter()(plain), RefitAdapter()(quantized))]
        print(f"int{bits}: as trained {kls[0]:.4g}, refitted {kls[1] / kls[0] - 1:+.0%}, by Hessian {kls[2] / kls[0] - 1:+.0%}")
        assert kls[2] < 0.97 * kls[0]
        assert all(n.inputs[-1].endswith("~hessian") for n in RefitAdapter()(quantized).nodes.values() if n.op == "refit")


def test_a_conversion_writes_refitted_adapters_where_they_are_nearer(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    options: dict[str, Any] = {"to": "onnx", "bits": 2, "adapters_as": "swap", "threads": 1}
    result = convert(f"{TINY}+{LORA}", output=tmp_path / "new", refit_adapters=True, **options)
    (note,) = [n for n in result.report.notes if "refit" in n]
    before, after = (float(v) for v in note.split("mean KL ")[1].split(" from")[0].split(" -> "))
    assert note.startswith("tiny-lora: refitted") and after < before
    assert not result.report.failed
    old = convert(f"{TINY}+{LORA}", output=tmp_path / "old", check=False, **options)
    files = [next(Path(r.outputs[0]).rglob("*.onnx_adapter")).read_bytes() for r in (old, result)]
    assert len(files[0]) == len(files[1]) and files[0] != files[1]


@dataclass(frozen=True)
class Worse:
    """In the place of refit-adapter: factors that are all the adapter has, halved."""

    name: ClassVar[str] = "worse"
    adapter: str = ""

    def __call__(self, graph: Graph) -> Graph:
        values = {v for pairs in filling(graph).values() for v in pairs.values() if ".lora_B" in v}

        def rule(name: str, node: Node) -> dict[str, Node] | None:
            if name not in values:
                return None
            return {f"{name}~trained": node, name: Node("scaled", (f"{name}~trained",), node.type, {"scale": 0.5})}

        return graph.rewrite(rule)


def test_a_refit_that_is_farther_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr(adapter_refit, "RefitAdapter", Worse)
    options: dict[str, Any] = {"to": "onnx", "bits": 8, "adapters_as": "swap", "threads": 1, "check": False}
    result = convert(f"{TINY}+{LORA}", output=tmp_path / "new", refit_adapters=True, **options)
    assert any("left as trained: refitting would bring it to" in n for n in result.report.notes)
    old = convert(f"{TINY}+{LORA}", output=tmp_path / "old", **options)
    files = [next(Path(r.outputs[0]).rglob("*.onnx_adapter")).read_bytes() for r in (old, result)]
    assert files[0] == files[1]


def test_merged_adapters_have_no_factors_to_refit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merged adapters have no factors") as e:
        convert(f"{TINY}+{LORA}", quant="Q4_0", output=tmp_path / "out.gguf", refit_adapters=True, dry_run=True)
    assert e.value.hint is not None and "--adapters swap" in e.value.hint


def test_weights_that_are_not_quantized_are_left_alone() -> None:
    store = Store()
    slots, _ = slots_and_trained(store)
    assert RefitAdapter()(slots).nodes.keys() == slots.nodes.keys()
