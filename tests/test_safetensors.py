"""--to safetensors: bytes worked by hand and by compressed-tensors, whole folders in transformers, and read back as input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError, VerificationError
from qconvert.formats.safetensors_ct import LAYOUTS
from qconvert.layouts import layout_of
from qconvert.planes import Plane, pieces_of, stored_range
from qconvert.scheme import QTensor, scheme_of
from qconvert.sources import Store
from qconvert.tensor_layouts import Tensors, rows_of

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
SCHEMES = ("int4_g32_bf16", "uint4_g128", "int8_g64_f16", "int8_row_bf16", "int4_row")


def random_q(name: str, n: int, k: int) -> QTensor:
    scheme, rng = scheme_of(name), np.random.default_rng(0)
    assert scheme is not None
    high = 1 << scheme.bits
    codes = rng.integers(0, high, (n, k)) - scheme.centre
    levels = []
    for level in scheme.levels:
        shape = (n, level.entries(k))
        zeros = rng.integers(0, high, shape).astype(np.float32)
        levels.append(zeros if level.role == "zero" else np.exp2(rng.integers(-8, 2, shape)).astype(np.float32))
    return QTensor(scheme, codes.astype(np.int8), tuple(levels))


# planes: where pieces of rows lie ------------------------------------------------------------------


@pytest.mark.parametrize(
    "plane",
    [
        Plane(0, 6), Plane(0, 6, rows=4), Plane(0, 6, rows=None), Plane(0, 6, bits=4), Plane(0, 6, bits=2),
        Plane(0, 6, bits=16), Plane(0, 6, bits=4, word=32), Plane(0, 6, bits=2, word=8),
        Plane(0, 6, bits=4, order=(0, 2, 4, 6, 1, 3, 5, 7)),
        Plane(0, 6, bits=4, word=32, order=(0, 2, 4, 6, 1, 3, 5, 7)),
    ],
)  # fmt: skip
def test_pieces_of_rows_come_back_from_where_they_were_laid_out(plane: Plane) -> None:
    n, rng = 24, np.random.default_rng(0)
    high = 1 << plane.bits if plane.bits and plane.bits < 8 else 256
    rows = rng.integers(0, high, (n, plane.nbytes), dtype=np.uint8)
    if plane.rows != 1:
        rows = np.repeat(rows[:: plane.rows or n], plane.rows or n, axis=0)
    laid = plane.laid_out(rows)
    assert len(laid) == plane.file_nbytes(n)
    for begin, end in ((0, n), (8, 17), (3, 5), (23, 24)):
        first, last = stored_range(plane, n, begin, end)
        lines = laid.reshape(plane.depth if plane.columns else lines_of(plane, n), -1)
        lines = lines[:, first:last] if plane.columns else lines[first:last]
        np.testing.assert_array_equal(pieces_of(plane, lines, begin, end), rows[begin:end])


def lines_of(plane: Plane, n: int) -> int:
    if plane.word and plane.bits:
        return n * plane.bits // plane.word
    return -(-n // plane.rows) if plane.rows else 1


def test_awq_order_puts_the_third_column_second() -> None:
    values = np.arange(8, dtype=np.uint8)[:, None]  # eight rows of one value, which are columns of the file
    laid = Plane(0, 1, bits=4, order=(0, 2, 4, 6, 1, 3, 5, 7)).laid_out(values)
    assert laid.view("<u4").tolist() == [0x75316420]


def test_rows_share_words_the_first_in_the_low_bits() -> None:
    assert Plane(0, 1, bits=4, word=32).laid_out(np.arange(9, dtype=np.uint8)[:, None]).view("<u4").tolist() == [0x76543210, 8]


# layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_unpacked_is_what_was_packed(name: str) -> None:
    layout, q = layout_of(f"ct.{name}"), random_q(name, 16, 256)
    packed = layout.pack(q)
    assert packed.shape == (16, layout.row_nbytes(256))
    back = layout.unpack(packed)
    np.testing.assert_array_equal(back.codes, q.codes)
    for a, b in zip(back.levels, q.levels, strict=True):
        np.testing.assert_array_equal(a, b)


def test_codes_of_four_bits_are_offset_by_eight_the_first_in_the_low_half() -> None:
    scheme = scheme_of("int4_g8_bf16")
    assert scheme is not None
    q = QTensor(scheme, np.array([[-8, -7, 0, 7, 1, 2, 3, -1]], np.int8), (np.array([[0.5]], np.float32),))
    assert LAYOUTS["ct.int4_g8_bf16"].pack(q).tobytes().hex() == "10f8a97b" + "003f"


@pytest.mark.parametrize("name", ["int4_g32_bf16", "uint4_g32_f16", "int8_g64", "int8_row_bf16"])
def test_compressed_tensors_packs_the_same_words(name: str) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors")
    q, layout = random_q(name, 24, 128), layout_of(f"ct.{name}")
    assert isinstance(layout, Tensors)
    planes = layout.planes(128)
    cut = planes[0].nbytes
    codes = torch.from_numpy(q.codes.astype(np.int16) - (8 if name.startswith("uint4") else 0)).to(torch.int8)
    want = packing.pack_to_int32(codes, q.scheme.bits)
    np.testing.assert_array_equal(layout.pack(q)[:, :cut].copy().view("<i4"), want.numpy())
    if name.startswith("uint4"):
        zeros = torch.from_numpy(q.levels[1] - 8).to(torch.int8)
        words = packing.pack_to_int32(zeros, 4, packed_dim=0).contiguous()
        got = planes[2].laid_out(layout.pack(q)[:, cut + planes[1].nbytes :])
        np.testing.assert_array_equal(got.view("<i4"), words.numpy().reshape(-1))


def test_rows_of_a_file_are_those_that_were_packed(tmp_path: Path) -> None:
    q, layout = random_q("uint4_g32", 24, 64), layout_of("ct.uint4_g32")
    assert isinstance(layout, Tensors)
    packed, found, at = layout.pack(q), dict[str, torch.Tensor](), 0
    for part, plane in zip(layout.parts, layout.planes(64), strict=True):
        laid = plane.laid_out(packed[:, at : at + plane.nbytes].copy())
        dtype = torch.int32 if part.dtype == "I32" else torch.float32
        found[part.name] = torch.from_numpy(laid.copy()).view(dtype).reshape(part.shape(layout.scheme, 24, 64))
        at += plane.nbytes
    save_file(found, tmp_path / "m.safetensors")
    store = Store()
    store.add("base", tmp_path / "m.safetensors")
    refs = [f"base/m.safetensors#{part.name}" for part in layout.parts]
    for begin, end in ((0, 24), (5, 19), (8, 9)):
        np.testing.assert_array_equal(rows_of(layout, store, refs, 24, 64, begin, end), packed[begin:end])
    store.close()


# folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["w4a16", "w4a16-asym", "w8a16", "bf16"])
def test_folder_gives_in_transformers_the_logits_of_the_graph(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", require_verified=True)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    assert rows["runtime transformers"].verdict == rows["bytes by safetensors"].verdict == "pass"
    if quant != "bf16":
        assert rows["compressed-tensors' decompressor"].verdict == "pass"
    size = result.report.accounting["size"]
    assert size["total"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and ("quantization_config" in config) == (quant != "bf16")


def test_bits_and_zero_points_choose_the_type(tmp_path: Path) -> None:
    for options, quant in (({"bits": 4}, "w4a16"), ({"bits": 8}, "w8a16"), ({"zero_point": "int"}, "w4a16-asym")):
        result = convert(TINY, to="safetensors", dry_run=True, **options)
        assert result.report.quant == quant
    with pytest.raises(UsageError, match="--bits 5"):
        convert(TINY, to="safetensors", bits=5, dry_run=True)
    with pytest.raises(UsageError, match="--quant nf4 and --bits 8"):
        convert(TINY, to="safetensors", quant="nf4", bits=8, dry_run=True)
    with pytest.raises(UsageError, match="no such type") as caught:
        convert(TINY, to="safetensors", quant="w4a61", dry_run=True)
    assert caught.value.hint == "did you mean w4a16?"
    with pytest.raises(UnsupportedError, match="--layout"):
        convert(TINY, to="safetensors", layout="genai", dry_run=True)


def test_shards_have_an_index_and_load(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    convert(TINY, to="safetensors", output=tmp_path / "out", split_max_size="300k", require_verified=True)
    where = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 2 and set(where.values()) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}


def test_a_wrong_scale_is_found_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    from qconvert.formats import safetensors_check

    def damaged(folder: Path, *args: object) -> object:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = next(n for n in tensors if n.endswith("weight_scale"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, path)
        return real(folder, *args)

    real = safetensors_check.bytes_row
    monkeypatch.setattr(safetensors_check, "bytes_row", damaged)
    with pytest.raises(VerificationError, match="bytes by safetensors"):
        convert(TINY, to="safetensors", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_says_nothing_proves_nothing(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "zeros")
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "zeros" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="all logits are alike"):
        convert(tmp_path / "zeros", to="safetensors", quant="bf16", output=tmp_path / "out")


# as input -------------------------------------------------------------------------------------------


def quantized(tmp_path: Path, quant: str) -> Path:
    convert(TINY, to="safetensors", quant=quant, output=tmp_path / quant, check=False)
    return tmp_path / quant


@pytest.mark.parametrize("quant", ["w4a16", "w4a16-asym", "w8a16"])
def test_codes_of_a_folder_move_to_matmulnbits_and_back_without_loss(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source, bits = quantized(tmp_path, quant), 8 if quant.startswith("w8") else 4
    result = convert(source, to="onnx", bits=bits, output=tmp_path / "onnx")
    assert any(row.what == "codes moved: 21 tensors, exact" and row.verdict == "pass" for row in result.report.checks)
    again = convert(source, to="safetensors", bits=bits, output=tmp_path / "again", check=False)
    assert again.report.quant in quant
    first, second = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_whose_shapes_are_not_its_configuration_is_refused(tmp_path: Path) -> None:
    source = quantized(tmp_path, "w4a16")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"weight_scale: bf16\[256, 2\], but config.json says bf16\[256, 8\]"):
        convert(source, to="onnx", output=tmp_path / "out")


def test_forms_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    source = quantized(tmp_path, "w4a16")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="group_0 has the format marlin-24"):
        convert(source, to="onnx", output=tmp_path / "out")
    shutil.rmtree(source)


# looked into, and proven whoever made them -----------------------------------------------------------


def test_a_folder_is_verified_against_what_it_was_made_from_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from qconvert.verification import verify_file

    convert(f"{TINY}+{LORA}", to="safetensors", output=tmp_path / "out", check=False)
    good = verify_file(tmp_path / "out", f"{TINY}+{LORA}")
    assert good.verified and not good.failed
    bad = verify_file(tmp_path / "out", str(TINY))  # without its adapter
    assert [row.what for row in bad.failed] == ["weights"] and "proj.weight" in bad.failed[0].reason


def test_a_checkpoint_that_peft_merged_is_verified(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from qconvert.verification import verify_file

    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), str(LORA))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = verify_file(tmp_path / "merged", f"{TINY}+{LORA}")
    assert report.verified and not report.failed


def test_inspect_shows_schemes_with_the_tensors_that_hold_them(tmp_path: Path) -> None:
    from qconvert.inspection import inspect_file

    facts = inspect_file(str(quantized(tmp_path, "awq")))
    assert facts["types"] == {"bf16": 8, "uint4_g128_f16": 21}
    assert facts["bpw"]["codes"] == 4 and facts["bpw"]["linear"] == 4 + (16 + 4) / 128
    assert facts["metadata"] == {"model_type": "llama", "quant_method": "awq"}


def test_planning_loads_no_torch() -> None:
    """Dialects are light: 2.5 seconds and 230 MB less for each conversion without its proof."""
    code = (
        "import sys; from qconvert import registry; from qconvert.formats import safetensors\n"
        "for name in registry.entries('dialects'): registry.find('dialects', name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "QCONVERT_PLUGINS": "off"})
