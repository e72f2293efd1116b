"""Every byte has one name: what each part of a file is, and what a 7B model takes in each storage, from its shapes alone.

The sizes of Llama-2-7B are those of the files that were released: mobiuslabsgmbh/Llama-2-7b-hf_1bitgs8_hqq (qmodel.pt 3 GB,
adapter_v0.1.lora 93.3 MB), AQLM's README (1.34, 2.2 and 2.4 GB), TheBloke/Llama-2-7B-GGUF (Q4_K_M 4.08 GB).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qconvert import convert
from qconvert.accountant import STORAGES, Span, account, summed
from qconvert.build import build
from qconvert.errors import InputError, UnsupportedError
from qconvert.graph import Graph
from qconvert.inspection import inspect_file, inspection_text
from qconvert.shape_checkpoint import shape_checkpoint
from qconvert.sources import Store

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 32000,
    "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-2-7b")
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return folder


@pytest.fixture(scope="module")
def llama(config_alone: Path) -> Graph:
    return build(shape_checkpoint(config_alone, Store()))


# GB: codes, level 1, level 2, what is not quantized, adapter, all; bits of a linear's weight; GPU if level 1 is on the host
TABLE = {
    "fp16": (0, 0, 0, 13.477, 0, 13.477, 16, 13.477),
    "HQQ 1-bit g8, f16 scale, f16 zero": (0.810, 3.238, 0, 0.525, 0, 4.572, 5, 1.334),
    "HQQ 1-bit g8, f16 scale, u8 zero": (0.810, 2.429, 0, 0.525, 0, 3.763, 4, 1.334),
    "HQQ 1-bit g8, as released": (0.810, 1.619, 0.051, 0.525, 0, 3.004, 3.0625, 1.385),
    "HQQ+ 1-bit g8": (0.810, 1.619, 0.051, 0.525, 0.093, 3.097, 3.0625, 1.478),
    "HQQ 2-bit g8": (1.619, 1.619, 0.051, 0.525, 0, 3.813, 4.0625, 2.194),
    "HQQ+ 2-bit g8": (1.619, 1.619, 0.051, 0.525, 0.093, 3.907, 4.0625, 2.288),
    "NF4 g64, twice quantized": (3.238, 0.101, 0.002, 0.525, 0, 3.866, 4.127, 3.764),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_bytes_of_llama_2_7b_are_those_of_the_published_table(llama: Graph, name: str) -> None:
    found = account(llama, STORAGES[name])
    kinds = ("codes", "meta1", "meta2", "dense", "adapter")
    got = [*(found.classes.get(kind, 0) / 1e9 for kind in kinds), found.nbytes / 1e9]
    assert got == pytest.approx(TABLE[name][:6], abs=6e-4)
    assert found.bits["linear"] == pytest.approx(TABLE[name][6], abs=5e-4)
    moved = found.without("meta1")
    devices = moved.by_device()
    assert sum(devices["gpu"].values()) / 1e9 == pytest.approx(TABLE[name][7], abs=6e-4)
    assert sum(sum(of.values()) for of in devices.values()) == found.nbytes


def test_sizes_that_others_published_are_met(llama: Graph) -> None:
    gb = {name: account(llama, storage).nbytes / 1e9 for name, storage in STORAGES.items()}
    assert gb["QuIP# E8P 2-bit"] == pytest.approx(2.148, abs=2e-3)
    assert account(llama, STORAGES["QuIP# E8P 2-bit"]).bits["linear"] == pytest.approx(2.006, abs=5e-4)
    readme = {"AQLM 1x8 g8": 1.34, "AQLM 2x8 g8": 2.15, "AQLM 1x16 g8": 2.38}
    assert {name: round(gb[name], 2) for name in readme} == readme
    assert gb["IQ2_XXS, Q4_K embedding, Q6_K head"] == pytest.approx(1.851, abs=5e-4)


def test_scales_on_the_host_are_copied_for_every_token(llama: Graph) -> None:
    moved = account(llama, STORAGES["HQQ 1-bit g8, as released"]).without("meta1")
    assert moved.h2d_nbytes == pytest.approx(1.619e9, rel=1e-3)
    assert moved.staging_nbytes == 2 * moved.slot_nbytes


def test_a_dry_run_of_config_json_alone_has_the_size_of_the_real_file(config_alone: Path) -> None:
    report = convert(config_alone, to="gguf:Q4_K_M", dry_run=True).report
    assert sum(report.accounting["parts"].values()) == report.outputs[0]["nbytes"]
    assert report.outputs[0]["nbytes"] == pytest.approx(4.081e9, rel=1e-3)
    facts = inspect_file(str(config_alone))
    assert facts["weights"] == 6_476_005_376 + 262_144_000 + 266_240
    assert "HQQ 1-bit g8, as released" in inspection_text(facts)


def test_a_conversion_needs_the_weights(config_alone: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        convert(config_alone, output=tmp_path / "x.gguf")


def test_a_quantized_config_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_2_7B, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(UnsupportedError, match="quantization_config"):
        convert(tmp_path, dry_run=True)


def test_shapes_alone_give_the_plan_that_the_weights_give(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    plans = [convert(m, to="safetensors:w4a16", dry_run=True, output=tmp_path / "out").plan for m in (TINY, tmp_path)]
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in plans[0].entries] == [
        (e.name, e.dtype, e.shape, e.nbytes) for e in plans[1].entries
    ]


OUTPUTS: dict[str, dict[str, Any]] = {
    "gguf Q4_K_M": {"to": "gguf:Q4_K_M"},
    "gguf Q8_0": {"to": "gguf:Q8_0"},
    "gguf F16": {"to": "gguf:F16"},
    "gguf in shards": {"to": "gguf:Q4_K_M", "split_max_size": "400k"},
    "gguf with adapter": {"to": "gguf:IQ4_XS", "adapters": [str(LORA)]},
    "onnx int4": {"to": "onnx"},
    "onnx uint4 float zeros": {"to": "onnx", "bits": 4, "zero_point": "float"},
    "onnx fp16": {"to": "onnx:fp16"},
    "onnx portable": {"to": "onnx", "form": "portable"},
    "onnx scales apart": {"to": "onnx", "offload_meta": "cpu"},
    "onnx weights in safetensors": {"to": "onnx", "weights_in": "safetensors"},
    "onnx for a browser": {"to": "onnx", "layout": "transformersjs"},
    "onnx adapters apart": {"to": "onnx", "adapters": [str(LORA)], "adapters_as": "swap"},
    "safetensors bf16": {"to": "safetensors:bf16"},
    "safetensors w4a16": {"to": "safetensors:w4a16"},
    "safetensors in shards": {"to": "safetensors:w4a16-asym", "split_max_size": "600k"},
    "safetensors scales apart": {"to": "safetensors:w4a16", "offload_meta": "cpu"},
    "safetensors gptq": {"to": "safetensors:gptq"},
    "safetensors nf4": {"to": "safetensors:nf4"},
    "safetensors hqq": {"to": "safetensors:hqq"},
    "safetensors mlx": {"to": "safetensors:mlx-4bit"},
    "safetensors fp8": {"to": "safetensors:fp8"},
    "safetensors int8 bitsandbytes": {"to": "safetensors:int8-bnb"},
}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_parts_of_every_file_add_up_to_its_size(output: str, tmp_path: Path) -> None:
    options = OUTPUTS[output]
    if options["to"].startswith("onnx"):
        pytest.importorskip("onnx")
    path = tmp_path / ("out.gguf" if options["to"].startswith("gguf") else "out")
    result = convert(TINY, output=path, check=False, **options)
    found = result.report.accounting["files"]
    root = result.plan.folder or tmp_path
    assert {f["path"]: sum(f["parts"].values()) for f in found} == {f["path"]: (root / f["path"]).stat().st_size for f in found}
    on_disk = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert sum(result.report.accounting["parts"].values()) == on_disk
    devices = result.report.accounting["placement"]["devices"]
    weights = sum(n for of in devices.values() for n in of.values())
    assert weights == on_disk - result.report.accounting["placement"]["file_overhead"]


def test_bytes_of_two_tensors_cannot_lie_in_one_place() -> None:
    with pytest.raises(AssertionError):
        summed([Span(0, 8, {"header": 8}), Span(4, 12, {"dense": 8})], 12)
    assert summed([Span(0, 8, {"header": 8}), Span(16, 24, {"dense": 8})], 32) == {"header": 8, "dense": 8, "padding": 16}
