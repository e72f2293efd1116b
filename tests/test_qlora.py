"""Adapters trained beside a base in 4 bits: the base they saw, which of the two they are merged into, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_oracle import edit_config, edit_tensors

from qconvert import check, convert
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.errors import AdapterError, UnsupportedError, UsageError
from qconvert.graph import Graph
from qconvert.merge_base import ratios_of
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.passes.quantize import Quantize
from qconvert.passes.round_base import RoundBase
from qconvert.pipeline import Pipeline
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

TINY, LORA = (Path(__file__).parents[1] / "golden" / name for name in ("tiny", "tiny-lora"))
PROMPTS = np.random.default_rng(0).integers(0, 1024, (4, 48)).tolist()


def adapter(folder: Path, times: float, base: str = "tiny-bnb-4bit") -> Path:
    """golden/tiny-lora with B times a number."""
    shutil.copytree(LORA, folder)
    edit_tensors(folder, lambda ts: {k: v * times if "lora_B" in k else v for k, v in ts.items()})
    edit_config(folder, base_model_name_or_path=base)
    return folder


SIZES = {"strong": 1.0, "middling": 0.1, "weak": 0.009}  # q/delta measured 0.21, 2.1 and 23


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qlora")
    return {name: adapter(root / name, times) for name, times in SIZES.items()}


def attached(folder: Path, store: Store) -> Graph:
    base = build(read_checkpoint(TINY, store))
    return Pipeline((AttachAdapter(read_adapter(folder, store, "adapter0")),)).run(base)


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_the_base_is_rounded_as_bitsandbytes_rounds_it(kind: str, double: bool, folders: dict[str, Path]) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    store = Store()
    graph = RoundBase(kind, double)(attached(folders["weak"], store))
    name, weights = "model.layers.1.mlp.down_proj.weight", Weights(graph, store)
    original = torch.from_numpy(weights.real(f"{name}~original"))
    packed, state = bnb.quantize_4bit(original, blocksize=64, quant_type=kind, compress_statistics=double)
    # the mean of the scales is a sum in another order: one step of f32
    rtol = 2.4e-7 if double else 0
    np.testing.assert_allclose(weights.real(name), bnb.dequantize_4bit(packed, state).numpy(), rtol=rtol, atol=0)


def rounded_again(types: str, solver: str) -> Callable[[Graph], Graph]:
    def apply(graph: Graph) -> Graph:
        names = [n for n, node in graph.nodes.items() if node.op == "merge"]
        return Quantize("", solver, dict.fromkeys(names, types))(graph)

    return apply


POLICIES: dict[str, tuple[str, Callable[[Graph], Graph]]] = {
    "original + delta": ("original", rounded_again("f16", "")),
    "dequantized + delta, f16": ("dequantized", rounded_again("f16", "")),
    "dequantized + delta, bf16": ("dequantized", rounded_again("bf16", "")),
    "dequantized + delta, NF4 again": ("dequantized", rounded_again("nf4_g64", "absmax")),
    "dequantized + delta, int4": ("dequantized", rounded_again("int4_g32", "mse")),
    "dequantized + delta, Q8_0": ("dequantized", rounded_again("q8_0", "search")),
}


def gains(folder: Path) -> tuple[float, dict[str, float]]:
    """q/delta, and of each policy how much of the fine-tune survives: 1 - KL / KL of the base alone."""
    store = Store()
    bases = {"original": attached(folder, store)}
    bases["dequantized"] = RoundBase()(bases["original"])
    q, d = map(sum, zip(*ratios_of(bases["original"], bases["dequantized"], store).values(), strict=True))
    trained = check.log_probs(bases["dequantized"], Weights(bases["dequantized"], store), PROMPTS)

    def kl(graph: Graph) -> float:
        return check.distance(trained, check.log_probs(graph, Weights(graph, store), PROMPTS), PROMPTS).mean_kl

    alone = RoundBase()(build(read_checkpoint(TINY, Store())))
    dropped, kept = kl(alone), {}
    for name, (base, rounding) in POLICIES.items():
        kept[name] = 1 - kl(rounding(MergeAdapters()(bases[base]))) / dropped
    return math.sqrt(q / d), kept


def test_what_survives_of_strong_and_weak_fine_tunes(folders: dict[str, Path]) -> None:
    """The ordering of a table that was measured on a trained model: strong ones survive all, weak ones only fine grids."""
    strong, kept = gains(folders["strong"])
    weak, of_weak = gains(folders["weak"])
    print(f"\nq/delta {strong:.2f} and {weak:.1f}")
    for name in kept:
        print(f"{name:32} {kept[name]:8.1%} {of_weak[name]:8.1%}")
    assert strong < 1 and weak > 5
    assert min(kept.values()) > 0.9 and kept["dequantized + delta, f16"] > 0.9999
    assert of_weak["dequantized + delta, f16"] > 0.99
    assert of_weak["dequantized + delta, f16"] > of_weak["dequantized + delta, bf16"]
    assert of_weak["dequantized + delta, bf16"] > of_weak["dequantized + delta, NF4 again"]
    assert of_weak["dequantized + delta, f16"] > of_weak["original + delta"]
    assert of_weak["dequantized + delta, Q8_0"] > of_weak["dequantized + delta, int4"]
    assert of_weak["dequantized + delta, NF4 again"] < 0.3


# whole conversions ---------------------------------------------------------------------------------


def test_auto_takes_the_base_that_was_trained_on_and_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    result = convert(f"{TINY}+{folders['weak']}", quant="F16", output=tmp_path / "out.gguf", threads=1)
    told = "\n".join(result.report.notes)
    assert "trained on nf4: q/delta is" in told and "merged into the dequantized base (auto)" in told
    assert "merged into the original base: mean KL" in told and "merged into the dequantized base: mean KL" in told
    facts = result.report.accounting["merge_base"]
    assert facts["q_over_delta"]["all"] > 5 and len(facts["q_over_delta"]) == 13  # 4 weights of 3 layers
    assert facts["dequantized"]["mean_kl"] < 1e-6 < facts["original"]["mean_kl"]
    merge = next(r for r in result.report.checks if r.what == "merge")
    assert merge.verdict == "pass"  # the reference is the adapter beside the rounded base


def test_the_original_base_is_refused_where_the_adapter_is_small_beside_the_rounding(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"quant": "F16", "merge_base": "original", "check": False, "threads": 1}
    with pytest.raises(UnsupportedError, match="moved the base by more than the adapter does") as e:
        convert(f"{TINY}+{folders['weak']}", output=tmp_path / "a.gguf", **options)
    assert e.value.hint is not None and "--merge-base dequantized" in e.value.hint
    convert(f"{TINY}+{folders['weak']}", output=tmp_path / "b.gguf", allow_lossy=True, **options)
    caplog.clear()
    result = convert(f"{TINY}+{folders['middling']}", output=tmp_path / "c.gguf", **options)
    assert 1 < result.report.accounting["merge_base"]["q_over_delta"]["all"] < 5
    assert any("q/delta is" in r.message for r in caplog.records if r.levelname == "WARNING")
    caplog.clear()
    convert(f"{TINY}+{folders['strong']}", output=tmp_path / "d.gguf", **options)
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "q/delta" in r.message]


def test_an_adapter_that_nf4_would_erase_is_not_written_in_nf4(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"to": "safetensors", "quant": "nf4", "check": False, "threads": 1}
    with pytest.raises(UnsupportedError, match="rounded to 4 bits again is mostly erased: in (9.|100)% of blocks"):
        convert(f"{TINY}+{folders['weak']}", output=tmp_path / "a", **options)
    result = convert(f"{TINY}+{folders['weak']}", output=tmp_path / "b", allow_lossy=True, **options)
    assert any("less than half a step" in note for note in result.report.notes)
    convert(f"{TINY}+{folders['strong']}", output=tmp_path / "c", **options)


def test_how_the_base_was_trained_is_found_or_told(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", 1.0, "org/tiny")
    result = convert(f"{TINY}+{plain}", quant="F16", output=tmp_path / "a.gguf", dry_run=True)
    assert "merge_base" not in result.report.accounting
    with pytest.raises(UsageError, match="nothing says that the adapter was trained on a base in 4 bits"):
        convert(f"{TINY}+{plain}", quant="F16", output=tmp_path / "a.gguf", merge_base="dequantized")
    result = convert(
        f"{TINY}+{plain}", quant="F16", output=tmp_path / "a.gguf", trained_on="nf4-single", check=False, threads=1
    )
    assert result.report.accounting["merge_base"]["trained_on"] == "nf4-single"
    bnb = tmp_path / "bnb"
    shutil.copytree(TINY, bnb)
    config = json.loads((TINY / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True}  # fmt: skip
    (bnb / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    local = adapter(tmp_path / "local", 1.0, str(bnb))
    result = convert(f"{TINY}+{local}", quant="F16", output=tmp_path / "b.gguf", check=False, threads=1)
    assert result.report.accounting["merge_base"]["trained_on"] == "nf4"


def test_a_base_in_4_bits_is_what_it_was_trained_on(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="nf4", output=tmp_path / "nf4", check=False, threads=1)
    model = f"{tmp_path / 'nf4'}+{folders['weak']}"
    result = convert(model, quant="F16", output=tmp_path / "a.gguf", check=False, threads=1)
    assert any("weights in nf4 that they were trained beside" in note for note in result.report.notes)
    with pytest.raises(UsageError, match="has weights in nf4 alone"):
        convert(model, quant="F16", output=tmp_path / "b.gguf", merge_base="original")


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora", "corda", "eva"])
def test_an_initialisation_that_changed_the_base_is_refused_but_on_that_base(init: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / init, 1.0, "org/tiny")
    edit_config(folder, init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{init}'") as e:
        convert(f"{TINY}+{folder}", quant="F16", output=tmp_path / "out.gguf", dry_run=True)
    assert e.value.hint is not None and "--trained-on model" in e.value.hint
    convert(f"{TINY}+{folder}", quant="F16", output=tmp_path / "out.gguf", dry_run=True, trained_on="model")
