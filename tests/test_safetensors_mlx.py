"""MLX's folders: the tensors that mx.quantize gives, run by mlx-lm, and read back as input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import CASES, SMALL, rope, save_random

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.formats.safetensors_mlx import LAYOUTS, spelled_as_before
from qconvert.layouts import layout_of
from qconvert.scheme import QTensor, scheme_of

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


def test_codes_of_three_bits_lie_one_behind_another() -> None:
    """Of 8 codes 1, 2 … 7, 0 the bits are 001 010 011 100 101 110 111 000 from the right."""
    scheme = scheme_of("uint3o_g32_bf16")
    assert scheme is not None
    codes = np.resize(np.arange(1, 9) % 8, (1, 32)).astype(np.int8)
    q = QTensor(scheme, codes, (np.array([[0.5]], np.float32), np.array([[-2]], np.float32)))
    word = sum(int(code) << (3 * i) for i, code in enumerate(codes[0, :8]))
    assert LAYOUTS["mlx.uint3o_g32_bf16"].pack(q).tobytes().hex() == word.to_bytes(3, "little").hex() * 4 + "003f" + "00c0"
    np.testing.assert_array_equal(q.dequantize()[0, :8], [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, -2])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_unpacked_is_what_was_packed(bits: int) -> None:
    layout, rng = layout_of(f"mlx.uint{bits}o_g64_bf16"), np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (6, 192), dtype=np.uint8)
    levels = tuple(np.exp2(rng.integers(-8, 2, (6, 3))).astype(np.float32) for _ in range(2))
    packed = layout.pack(QTensor(layout.scheme, codes.view(np.int8) if bits < 8 else codes, levels))
    back = layout.unpack(packed)
    assert packed.shape == (6, layout.row_nbytes(192))
    np.testing.assert_array_equal(back.codes.view(np.uint8), codes)
    np.testing.assert_array_equal(back.levels, levels)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tensors_are_those_of_mlx(bits: int, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    convert(TINY, to="safetensors", quant=f"mlx-{bits}bit", output=tmp_path / "out", check=False)
    got, source = mx.load(str(tmp_path / "out" / "model.safetensors")), mx.load(str(TINY / "model.safetensors"))
    module = "model.layers.1.mlp.down_proj"
    want = mx.quantize(source[f"{module}.weight"], 64, bits)
    for part, value in zip(("weight", "scales", "biases"), want, strict=True):
        assert got[f"{module}.{part}"].dtype == value.dtype and mx.array_equal(got[f"{module}.{part}"], value)


@pytest.mark.parametrize("quant", ["mlx-4bit", "mlx-6bit"])
def test_folder_gives_in_mlx_lm_the_logits_of_the_graph(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", require_verified=True)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    assert [rows[what].verdict for what in ("runtime mlx-lm", "bytes by safetensors", "mx.dequantize")] == ["pass"] * 3
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "mlx"


WIDE = {"hidden_size": 128, "intermediate_size": 192}
SPELLED: dict[str, tuple[str, dict[str, Any]]] = {
    "a base of rotations": ("Llama", SMALL | WIDE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "scaled rotations": (
        "Llama", SMALL | WIDE | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=32) | WIDE,
    ),
    "part of each head": (CASES["phi3 part of each head"][0], CASES["phi3 part of each head"][1] | WIDE),
    "rotations by layer": (CASES["gemma3 linear scaling"][0], CASES["gemma3 linear scaling"][1] | WIDE),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLED)
def test_settings_of_transformers_5_reach_mlx_lm(case: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    folder = save_random(tmp_path, *SPELLED[case])
    result = convert(folder, to="safetensors", quant="mlx-4bit", output=tmp_path / "out", require_verified=True)
    assert result.report.checks[-1].verdict == "pass"


def test_a_model_that_mlx_lm_runs_otherwise_is_not_written(tmp_path: Path) -> None:
    """Its Llama has no exact GELU."""
    pytest.importorskip("mlx_lm")
    from qconvert.errors import VerificationError

    folder = save_random(tmp_path, CASES["llama gelu"][0], CASES["llama gelu"][1] | WIDE)
    with pytest.raises(VerificationError, match="runtime mlx-lm: logits, relative"):
        convert(folder, to="safetensors", quant="mlx-4bit", output=tmp_path / "out")


def test_settings_that_are_there_already_are_kept() -> None:
    config = {"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert spelled_as_before(config) == config
    assert spelled_as_before({"model_type": "llama"}) == {"model_type": "llama"}


def test_modules_of_other_groups_are_named(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "Llama", SMALL | {"hidden_size": 128, "intermediate_size": 96})
    convert(folder, to="safetensors", quant="mlx-4bit", output=tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    down = {f"model.layers.{i}.mlp.down_proj": settings | {"group_size": 32} for i in range(2)}
    assert config["quantization"] == settings | down
    with pytest.raises(UsageError, match="mlx has groups of 32, 64, 128"):
        convert(TINY, to="safetensors", quant="mlx-4bit", group=16, dry_run=True)


# as input -------------------------------------------------------------------------------------------


def theirs(folder: Path, bits: int, group: int) -> Path:
    """golden/tiny as mlx-lm converts it, embeddings and all."""
    utils = pytest.importorskip("mlx_lm.utils")
    model, config = utils.load_model(TINY)
    model, config = utils.quantize_model(model, config, group, bits)
    utils.save_model(folder, model)
    utils.save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def test_a_folder_of_mlx_lm_is_read_as_mlx_dequantizes_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    folder = theirs(tmp_path / "theirs", 6, 32)
    convert(folder, to="safetensors", quant="fp32", output=tmp_path / "out", require_verified=True)
    got, stored = mx.load(str(tmp_path / "out" / "model.safetensors")), mx.load(str(folder / "model.safetensors"))
    for module in ("model.embed_tokens", "model.layers.2.self_attn.v_proj"):
        levels = (stored[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        want = mx.dequantize(stored[f"{module}.weight"], *levels, 32, 6)
        assert mx.allclose(got[f"{module}.weight"], want, rtol=0, atol=2e-7 * mx.abs(want).max().item())


def test_codes_of_a_folder_stay_and_an_adapter_merges(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="mlx-4bit", output=tmp_path / "first", check=False)
    convert(tmp_path / "first", to="safetensors", quant="mlx-4bit", output=tmp_path / "second", check=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    both = f"{tmp_path / 'first'}+{LORA}"
    result = convert(both, to="safetensors", quant="bf16", output=tmp_path / "out", require_verified=True)
    assert all(row.verdict != "fail" for row in result.report.checks)


def test_settings_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="mlx-4bit", output=tmp_path / "out", check=False)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for settings, message, error in (
        ({"group_size": 64, "bits": 4, "mode": "mxfp4"}, "mode mxfp4: not read", UnsupportedError),
        ({"group_size": 32, "bits": 4}, r"scales: bf16\[256, 4\], but config.json says bf16\[256, 8\]", InputError),
        ({"group_size": 64}, "quantization.bits = None", InputError),
    ):
        path.write_text(json.dumps(config | {"quantization": settings, "quantization_config": settings}))
        with pytest.raises(error, match=message):
            convert(tmp_path / "out", to="safetensors", quant="bf16", output=tmp_path / "again", check=False)
