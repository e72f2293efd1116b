"""GPTQ's and AWQ's tensors: against packers written here from the formats' descriptions, and as steps of a chain of formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.layouts import layout_of
from qconvert.scheme import QTensor, scheme_of
from qconvert.sources import Store
from qconvert.tensor_layouts import Tensors, rows_of

TINY = Path(__file__).parents[1] / "golden" / "tiny"
N, K, GROUP = 32, 64, 32
Ints = npt.NDArray[np.int64]


def stream(values: Ints, bits: int) -> npt.NDArray[np.int32]:
    """Unsigned numbers along the last axis as one little endian stream of bits in int32."""
    single = (values[..., None] >> np.arange(bits) & 1).astype(np.uint8)
    joined = np.packbits(single.reshape(len(values), -1), axis=1, bitorder="little")
    return joined.view("<i4")


def awq_words(columns: Ints) -> npt.NDArray[np.int32]:
    """[r, N] -> [r, N/8], the half bytes of a word from columns 0, 2, 4, 6, 1, 3, 5, 7."""
    picked = columns.reshape(len(columns), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return stream(picked.reshape(len(columns), -1), 4)


def random_weight(kind: str, bits: int) -> tuple[QTensor, Ints, Ints, npt.NDArray[np.float16]]:
    """The quantized weight, and its unsigned codes [N,K], zero points and scales [N,G]."""
    rng, scheme = np.random.default_rng(0), scheme_of(f"{kind}{bits}_g{GROUP}_f16")
    assert scheme is not None
    half = 1 << (bits - 1)
    codes, shape = rng.integers(0, 2 * half, (N, K)), (N, K // GROUP)
    zeros = rng.integers(0, 2 * half, shape) if kind == "uint" else np.full(shape, half)
    scales = rng.uniform(0.01, 0.1, shape).astype(np.float16)
    signed = (codes - (half if kind == "int" else 0)).astype(np.uint8 if kind == "uint" and bits == 8 else np.int8)
    levels = (scales.astype(np.float32), *((zeros.astype(np.float32),) if kind == "uint" else ()))
    return QTensor(scheme, signed, levels), codes, zeros, scales


def file_of(layout: Tensors, q: QTensor) -> dict[str, npt.NDArray[np.uint8]]:
    """Each tensor's bytes."""
    packed, found, at = layout.pack(q), {}, 0
    for part, plane in zip(layout.parts, layout.planes(K), strict=True):
        found[part.name] = plane.laid_out(packed[:, at : at + plane.nbytes].copy())
        at += plane.nbytes
    return found


@pytest.mark.parametrize("prefix", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("kind", "bits"), [("int", 4), ("uint", 4), ("int", 8), ("uint", 8), ("int", 2)])
def test_gptq_words_are_those_of_its_description(prefix: str, kind: str, bits: int) -> None:
    q, codes, zeros, scales = random_weight(kind, bits)
    layout = layout_of(f"{prefix}.{q.scheme.name}")
    assert isinstance(layout, Tensors)
    found = file_of(layout, q)
    assert found["qweight"].tobytes() == np.ascontiguousarray(stream(codes, bits).T).tobytes()
    stored = zeros.T - (1 if prefix == "gptq" else 0)
    assert found["qzeros"].tobytes() == stream(stored % (1 << bits), bits).tobytes()
    assert found["scales"].tobytes() == np.ascontiguousarray(scales.T).tobytes()


@pytest.mark.parametrize("kind", ["int", "uint"])
def test_awq_words_are_those_of_its_description(kind: str) -> None:
    q, codes, zeros, scales = random_weight(kind, 4)
    layout = layout_of(f"awq.{q.scheme.name}")
    assert isinstance(layout, Tensors)
    found = file_of(layout, q)
    assert found["qweight"].tobytes() == awq_words(codes.T).tobytes()
    assert found["qzeros"].tobytes() == awq_words(zeros.T).tobytes()
    assert found["scales"].tobytes() == np.ascontiguousarray(scales.T).tobytes()


@pytest.mark.parametrize("name", ["gptq.uint4", "gptq_v2.int8", "awq.uint4", "awq.int4"])
def test_rows_of_a_file_are_those_that_were_packed(name: str, tmp_path: Path) -> None:
    prefix, _, kind = name.partition(".")
    q, *_ = random_weight(kind[:-1], int(kind[-1]))
    layout = layout_of(f"{prefix}.{q.scheme.name}")
    assert isinstance(layout, Tensors)
    tensors = {}
    for part in layout.parts:
        dtype = torch.int32 if part.dtype == "I32" else torch.float16
        laid = torch.from_numpy(file_of(layout, q)[part.name].copy())
        tensors[part.name] = laid.view(dtype).reshape(part.shape(layout.scheme, N, K))
    save_file(tensors, tmp_path / "m.safetensors")
    store = Store()
    store.add("base", tmp_path / "m.safetensors")
    refs = [f"base/m.safetensors#{part.name}" for part in layout.parts]
    for begin, end in ((0, N), (3, 21), (9, 10)):
        got = layout.unpack(rows_of(layout, store, refs, N, K, begin, end))
        np.testing.assert_array_equal(got.codes, q.codes[begin:end])
        np.testing.assert_array_equal(got.dequantize(), q.dequantize()[begin:end])
    store.close()


def test_zero_points_that_a_symmetric_grid_has_not_are_an_error() -> None:
    q, *_ = random_weight("int", 4)
    layout = layout_of(f"gptq.{q.scheme.name}")
    packed = layout.pack(q)
    packed[0, K // 2] ^= 1  # of the first zero point
    with pytest.raises(InputError, match="qzeros: a zero point is"):
        layout.unpack(packed)


def test_codes_go_through_all_formats_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    first = tmp_path / "0"
    convert(TINY, to="safetensors", quant="awq", output=first, check=False)
    source = first
    for i, quant in enumerate(("w4a16-asym", "gptq-v2-asym", "gptq-asym", "awq"), 1):
        if quant == "w4a16-asym":  # its scales have the dtype of the plain weights
            config = json.loads((source / "config.json").read_text())
            tensors = load_file(source / "model.safetensors")
            tensors |= {name: t.half() for name, t in tensors.items() if t.dtype == torch.bfloat16}
            save_file(tensors, source / "model.safetensors", {"format": "pt"})
            (source / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        result = convert(source, to="safetensors", quant=quant, output=tmp_path / str(i))
        row = next(row for row in result.report.checks if row.what.startswith("codes moved"))
        assert (row.verdict, row.what) == ("pass", "codes moved: 21 tensors, exact")
        source = tmp_path / str(i)
    a, b = load_file(first / "model.safetensors"), load_file(source / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_scales_that_do_not_fit_are_rounded_a_second_time_and_the_report_says_so(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="gptq", output=tmp_path / "gptq", check=False)
    result = convert(tmp_path / "gptq", to="safetensors", output=tmp_path / "ct")
    row = next(row for row in result.report.checks if row.what.startswith("rounded again"))
    assert row.what == "rounded again: int4_g128_f16 -> int4_g128_bf16" and row.value is not None and 0 < row.value < 0.02
    assert "21 weights are rounded a second time, int4_g128_f16 -> int4_g128_bf16" in result.report.notes


def test_codes_move_to_ggufs_blocks(tmp_path: Path) -> None:
    """Q4_0 has a symmetric grid's values, Q4_1 an offset for each zero point, which f16 rounds."""
    for quant, kind, what in (
        ("gptq", "Q4_0", "codes moved: 21 tensors, exact"),
        ("awq", "Q4_1", "codes moved, zero points rounded: uint4_g128_f16 -> q4_1"),
    ):
        convert(TINY, to="safetensors", quant=quant, output=tmp_path / quant, check=False)
        result = convert(tmp_path / quant, to="gguf", quant=kind, output=tmp_path / f"{quant}.gguf")
        row = next(row for row in result.report.checks if row.what.startswith("codes moved"))
        assert (row.what, row.verdict) == (what, "pass") and row.value is not None and row.value < 1e-3
        assert not result.report.failed


def test_bits_of_gptq_are_the_users(tmp_path: Path) -> None:
    result = convert(TINY, to="safetensors", quant="gptq", bits=8, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == (8, 128, True, "gptq")
    assert not result.report.failed
    with pytest.raises(UsageError, match="--quant awq --bits 8: it has 4"):
        convert(TINY, to="safetensors", quant="awq", bits=8, dry_run=True)


def test_versions_of_awq_that_lie_otherwise_are_refused(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="awq", output=tmp_path / "awq", check=False)
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="AWQ version 'gemv'"):
        convert(tmp_path / "awq", to="onnx", output=tmp_path / "out")
