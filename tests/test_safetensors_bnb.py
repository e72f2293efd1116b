"""bitsandbytes' folders: the files that it and transformers write, byte for byte, and those files as input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError, VerificationError
from qconvert.layouts import layout_of
from qconvert.scheme import NF4_TABLE, QTensor, scheme_of

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8-bnb": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """golden/tiny as transformers and bitsandbytes quantize and save it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folders = {}
    for name, settings in THEIRS.items():
        model = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=BitsAndBytesConfig(**settings), dtype="auto")
        folders[name] = tmp_path_factory.mktemp("theirs") / name
        model.save_pretrained(folders[name])
    return folders


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def state_of(tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors[name].numpy().tobytes())
    return found


# layouts --------------------------------------------------------------------------------------------


def test_the_first_of_two_codes_lies_in_the_high_half() -> None:
    scheme = scheme_of("nf4_g32")
    assert scheme is not None and scheme.table == NF4_TABLE
    codes = np.resize(np.arange(16, dtype=np.uint8), (1, 32))
    packed = layout_of("bnb_bf16.nf4_g32").pack(QTensor(scheme, codes, (np.array([[0.5]], np.float32),)))
    assert packed.tobytes().hex() == "0123456789abcdef" * 2 + "0000003f"


def test_codes_of_8_bits_are_signed_and_beside_the_greatest_magnitude() -> None:
    scheme = scheme_of("int8_scb")
    assert scheme is not None
    q = QTensor(scheme, np.array([[1, 128, 255]], np.uint8), (np.array([[2]], np.float32),))
    assert layout_of("bnb_int8.int8_scb").pack(q).tobytes().hex() == "81007f" + "00000040"
    np.testing.assert_array_equal(q.dequantize(), np.array([[-2, 0, 2]], np.float32))


@pytest.mark.parametrize("name", ["bnb_bf16.nf4_g64", "bnb_f32.fp4_g512", "bnb_int8.int8_scb"])
def test_unpacked_is_what_was_packed(name: str) -> None:
    layout, rng = layout_of(name), np.random.default_rng(0)
    codes = rng.integers(0, 1 << layout.scheme.bits, (6, 512), dtype=np.uint8)
    scales = rng.standard_normal((6, layout.scheme.levels[0].entries(512)), np.float32)
    packed = layout.pack(QTensor(layout.scheme, codes, (scales,)))
    back = layout.unpack(packed)
    assert packed.shape == (6, layout.row_nbytes(512))
    np.testing.assert_array_equal(back.codes, codes)
    np.testing.assert_array_equal(back.levels[0], scales)


# written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "nf4-single", "fp4", "int8-bnb"])
def test_folder_gives_the_weights_and_logits_of_the_graph(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", require_verified=True)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    wanted = ("runtime transformers", "bytes by safetensors", "bitsandbytes' dequantization")
    assert [rows[what].verdict for what in wanted] == ["pass"] * 3
    assert {row.verdict for what, row in rows.items() if what.startswith("kernel ")} <= {"pass"}


@pytest.mark.parametrize("quant", ["nf4-single", "fp4-single", "int8-bnb"])
def test_files_are_those_of_transformers_and_bitsandbytes(quant: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant=quant, output=tmp_path / "out", check=False)
    got, want = tensors_of(tmp_path / "out"), tensors_of(theirs[quant])
    assert got.keys() == want.keys()
    assert [name for name in want if got[name].shape != want[name].shape or not torch.equal(got[name], want[name])] == []


def test_twice_quantized_files_are_theirs_but_for_last_bits_of_the_map(theirs: dict[str, Path], tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="nf4", output=tmp_path / "out", check=False)
    got, want = tensors_of(tmp_path / "out"), tensors_of(theirs["nf4"])
    assert got.keys() == want.keys()
    for name in want:
        if "quant_state" in name:
            mine, peers = state_of(got, name), state_of(want, name)
            assert mine.pop("nested_offset") == pytest.approx(peers.pop("nested_offset"), rel=3e-7) and mine == peers
        elif "nested" in name:
            assert torch.allclose(got[name], want[name], rtol=3e-7, atol=0)
        else:
            assert torch.equal(got[name], want[name]), name


def test_settings_are_those_that_transformers_saves(theirs: dict[str, Path], tmp_path: Path) -> None:
    for quant in ("nf4", "int8-bnb"):
        convert(TINY, to="safetensors", quant=quant, output=tmp_path / quant, check=False)
        folders = tmp_path / quant, theirs[quant]
        mine, peers = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders)
        same = mine.keys() - {"llm_int8_skip_modules", "bnb_4bit_compute_dtype"}
        assert {key: mine[key] for key in same} == {key: peers[key] for key in same}
        assert mine["llm_int8_skip_modules"] == ["lm_head"]


def test_blocks_are_those_that_bitsandbytes_has(tmp_path: Path) -> None:
    result = convert(TINY, to="safetensors", quant="nf4-single", group=256, output=tmp_path / "out", check=False)
    assert result.report.quant == "nf4-single"
    state = state_of(tensors_of(tmp_path / "out"), "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4")
    assert state == {"quant_type": "nf4", "blocksize": 256, "dtype": "bfloat16", "shape": [512, 256]}
    with pytest.raises(UsageError, match="blocks of 32, 64, 128"):
        convert(TINY, to="safetensors", quant="nf4", group=48, dry_run=True)


def test_a_wrong_scale_of_the_second_level_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.formats import safetensors_check

    def damaging(folder: Path, *args: Any) -> Any:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = next(n for n in tensors if n.endswith("nested_absmax"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, path)
        return real(folder, *args)

    real = safetensors_check.bytes_row
    monkeypatch.setattr(safetensors_check, "bytes_row", damaging)
    with pytest.raises(VerificationError, match="bytes by safetensors"):
        convert(TINY, to="safetensors", quant="nf4", output=tmp_path / "out")


# as input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", THEIRS)
def test_weights_that_they_wrote_are_read_as_bitsandbytes_dequantizes_them(
    quant: str, theirs: dict[str, Path], tmp_path: Path
) -> None:
    from qconvert.formats.safetensors_bnb_check import value
    from qconvert.formats.safetensors_files import opened_tensors

    convert(theirs[quant], to="safetensors", quant="fp32", output=tmp_path / "plain", check=False)
    plain, names = tensors_of(tmp_path / "plain"), ("self_attn.q_proj", "mlp.down_proj")
    with opened_tensors(theirs[quant]) as tensors:
        for name in (f"model.layers.1.{part}.weight" for part in names):
            want = value(tensors, name)
            limit = 0 if quant != "int8-bnb" else 1e-7 * float(np.abs(want).max())
            assert np.abs(plain[name].numpy() - want).max() <= limit, name


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on(theirs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    result = convert(f"{theirs['nf4']}+{LORA}", to="safetensors", quant="w8a16", output=tmp_path / "out", require_verified=True)
    assert all(row.verdict != "fail" for row in result.report.checks)


def test_codes_of_a_folder_keep_their_values(theirs: dict[str, Path], tmp_path: Path) -> None:
    convert(theirs["nf4-single"], to="safetensors", quant="nf4-single", output=tmp_path / "again", check=False)
    got, want = tensors_of(tmp_path / "again"), tensors_of(theirs["nf4-single"])
    assert all(torch.equal(got[name], want[name]) for name in want)


def damaged(source: Path, target: Path, suffix: str, change: Any) -> Path:
    target.mkdir()
    tensors = tensors_of(source)
    name = next(n for n in tensors if n.endswith(suffix))
    tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_damaged_folders_are_refused_by_name(theirs: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        "quant_state.bitsandbytes__nf4": (lambda t: t[:-1], "this is no JSON object", InputError),
        "nested_absmax": (lambda t: t[:-1], r"nested_absmax: f32\[\d+\], but config.json says f32", InputError),
        "weight.quant_map": (lambda t: t + 0.1, "levels are not those of NF4", UnsupportedError),
    }
    for i, (suffix, (change, message, error)) in enumerate(cases.items()):
        folder = damaged(theirs["nf4"], tmp_path / str(i), suffix, change)
        with pytest.raises(error, match=message):
            convert(folder, to="safetensors", quant="bf16", output=tmp_path / "out", check=False)


def test_codes_stored_as_other_numbers_are_refused(theirs: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(theirs["nf4"], tmp_path / "source", "quant_map", lambda t: t)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="bnb_4bit_quant_storage is bfloat16"):
        convert(folder, to="safetensors", quant="bf16", output=tmp_path / "out", check=False)
