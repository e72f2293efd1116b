"""Bytes of quantized ONNX weights: by hand, there and back, and as onnxruntime's own kernels read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qconvert.bits import from_bits, to_bits
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.scheme import AFFINE, FP4_TABLE, NF4_TABLE, TABLES, Array, QTensor, Scheme

SCHEMES = AFFINE | TABLES
NAMES = sorted(SCHEMES)
GATHERED = [name for name in sorted(AFFINE) if AFFINE[name].zero_point != "float"]


def random_codes(scheme: Scheme, n: int = 6, groups: int = 3) -> QTensor:
    """An odd number of groups, so that the zero points of a row end inside a byte."""
    rng = np.random.default_rng(0)
    signed = scheme.centre > 0
    low = -(1 << (scheme.bits - 1)) if signed else 0
    codes = rng.integers(low, low + (1 << scheme.bits), (n, groups * scheme.block)).astype(np.int8 if signed else np.uint8)
    levels = [rng.normal(size=(n, groups)).astype(np.float32)]
    if scheme.zero_point == "int":
        levels.append(rng.integers(0, 1 << scheme.bits, (n, groups)).astype(np.float32))
    elif scheme.zero_point == "float":
        levels.append(rng.normal(1 << (scheme.bits - 1), 3, (n, groups)).astype(np.float32))
    return QTensor(scheme, codes, tuple(levels))


def packed(name: str, codes: list[int], *levels: list[float]) -> Array:
    """One row of a scheme whose codes begin with those given; the rest are 0."""
    scheme = SCHEMES[name]
    groups = len(levels[0])
    row = np.zeros((1, groups * scheme.block), np.int8)
    row[0, : len(codes)] = codes
    arrays = tuple(np.array([level], np.float32) for level in levels)
    return LAYOUTS[f"onnx.{name}"].pack(QTensor(scheme, row, arrays))[0]


def test_four_bit_codes_lie_low_half_first_and_centred_on_8() -> None:
    row = packed("int4_g16", [-8, 7, 0, 1], [0.5])
    assert row[:8].tobytes().hex() == "f098888888888888"
    assert row[8:].view("<f4").tolist() == [0.5]


def test_two_bit_codes_lie_four_in_a_byte_and_centred_on_2() -> None:
    assert packed("int2_g16", [-2, -1, 0, 1, 1], [0.5])[:4].tobytes().hex() == "e4abaaaa"  # 0 1 2 3, 3 2 2 2


def test_eight_bit_codes_are_centred_on_128_or_kept() -> None:
    assert packed("int8_g16", [-128, 127, 0], [1])[:4].tolist() == [0, 255, 128, 128]
    assert packed("uint8_g16", [1, 2], [1], [200])[[0, 1, 2, 16 + 4]].tolist() == [1, 2, 0, 200]


def test_zero_points_follow_the_scales_as_tightly_as_codes() -> None:
    assert packed("uint4_g16", [], [1, 1, 1], [1, 2, 3])[24 + 12 :].tobytes().hex() == "2103"
    assert packed("uint2_g16", [], [1] * 5, [1, 2, 3, 0, 3])[20 + 20 :].tobytes().hex() == "3903"


def test_float_zero_points_follow_as_they_are() -> None:
    row = packed("uint4f_g16", [15], [1, 1], [2.5, -3])
    assert row[0] == 15 and row[16 + 8 :].view("<f4").tolist() == [2.5, -3]


def test_codes_of_a_table_lie_high_half_first() -> None:
    row = packed("nf4_g16", [1, 2, 15], [0.5])
    assert row[:8].tobytes().hex() == "12f0000000000000" and row[8:].view("<f4").tolist() == [0.5]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_packed_is_unpacked(name: str) -> None:
    q = random_codes(SCHEMES[name])
    layout = LAYOUTS[f"onnx.{name}"]
    rows = layout.pack(q)
    assert rows.shape[1] == layout.row_nbytes(q.codes.shape[1])
    got = layout.unpack(rows)
    assert got.codes.dtype == q.codes.dtype and np.array_equal(got.codes, q.codes)
    assert all(np.array_equal(a, b) for a, b in zip(got.levels, q.levels, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_weight_are_as_long_as_their_planes(name: str) -> None:
    layout = LAYOUTS[f"onnx.{name}"]
    n, k = 6, 3 * layout.scheme.block
    sizes = [int(np.prod(part.dims)) * {"u8": 1, "f32": 4}[part.dtype] for part in layout.parts(n, k)]
    assert sizes == [n * nbytes for nbytes in layout.planes(k)]


def through_onnxruntime(name: str, op: str) -> tuple[Array, Array]:
    """(what its kernel takes the values for, what they are) of random codes."""
    pytest.importorskip("onnxruntime")
    from qconvert.formats.onnx_kernels import Quantized, gathered, product

    layout, q = LAYOUTS[f"onnx.{name}"], random_codes(SCHEMES[name])
    weight = Quantized("w", layout, layout.pack(q), op)
    n, k = q.codes.shape
    got = gathered(weight, np.arange(n)) if op == "embed" else product(weight, np.eye(k, dtype=np.float32), 0).T
    return got, q.dequantize()


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_multiplies_by_the_same_values(name: str) -> None:
    got, want = through_onnxruntime(name, "linear")
    assert np.allclose(got, want, rtol=1e-6, atol=1e-6)  # one product each: measured 0


@pytest.mark.parametrize("name", GATHERED)
def test_onnxruntime_gathers_the_same_values(name: str) -> None:
    got, want = through_onnxruntime(name, "embed")
    assert np.array_equal(got, want)


@pytest.mark.parametrize(("quant_type", "table"), [(1, NF4_TABLE), (0, FP4_TABLE)])
def test_tables_are_those_of_onnxruntime(quant_type: int, table: tuple[float, ...]) -> None:
    pytest.importorskip("onnxruntime")
    from qconvert.formats.onnx_kernels import run_node

    every = np.array([i << 4 | i + 1 for i in range(0, 16, 2)], np.uint8)
    inputs: list[Any] = [np.eye(16, dtype=np.float32), every, np.ones(1, np.float32)]
    got = run_node("MatMulBnb4", inputs, (16, 1), K=16, N=1, block_size=16, quant_type=quant_type)
    assert np.array_equal(got[:, 0], np.array(table, np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_bits_there_and_back_at_odd_lengths(m: int, bits: int) -> None:
    values = ((np.arange(3 * m).reshape(3, m) * 7) % (1 << bits)).astype(np.uint8)
    assert np.array_equal(from_bits(to_bits(values, bits), bits, m), values)


def test_a_scheme_that_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="holds int4_g32, not int4_g64"):
        LAYOUTS["onnx.int4_g32"].pack(random_codes(AFFINE["int4_g64"]))


def test_rows_of_a_wrong_number_of_bytes_are_refused() -> None:
    with pytest.raises(InputError, match="no row takes 21 bytes"):
        LAYOUTS["onnx.int4_g32"].unpack(np.zeros((1, 21), np.uint8))
