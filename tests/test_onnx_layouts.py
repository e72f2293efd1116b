"""Bytes of quantized ONNX weights: by hand, there and back, and as onnxruntime's own kernels read them."""

from __future__ import annotations

import numpy as np
import pytest

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_layouts import LAYOUTS, from_bits, to_bits
from qconvert.scheme import AFFINE, QTensor, Scheme

NAMES = sorted(AFFINE)


def random_codes(scheme: Scheme, n: int = 6, groups: int = 3) -> QTensor:
    """An odd number of groups, so that the zero points of a row end inside a byte."""
    rng = np.random.default_rng(0)
    zeros = len(scheme.levels) > 1
    low = 0 if zeros else -(1 << (scheme.bits - 1))
    codes = rng.integers(low, low + (1 << scheme.bits), (n, groups * scheme.block)).astype(np.int8)
    levels = [rng.normal(size=(n, groups)).astype(np.float32)]
    if zeros:
        levels.append(rng.integers(0, 16, (n, groups)).astype(np.float32))
    return QTensor(scheme, codes, tuple(levels))


def test_four_bit_codes_lie_low_half_first_and_centred_on_8() -> None:
    codes = np.zeros((1, 16), np.int8)
    codes[0, :4] = -8, 7, 0, 1
    packed = LAYOUTS["onnx.int4_g16"].pack(QTensor(AFFINE["int4_g16"], codes, (np.array([[0.5]], np.float32),)))
    assert packed[0, :8].tobytes().hex() == "f098888888888888"
    assert packed[0, 8:].view("<f4").tolist() == [0.5]


def test_zero_points_follow_the_scales_two_in_a_byte() -> None:
    scales, zeros = np.ones((1, 3), np.float32), np.array([[1, 2, 3]], np.float32)
    packed = LAYOUTS["onnx.uint4_g16"].pack(QTensor(AFFINE["uint4_g16"], np.zeros((1, 48), np.int8), (scales, zeros)))
    assert packed[0, 24 + 12 :].tobytes().hex() == "2103"


@pytest.mark.parametrize("name", NAMES)
def test_what_was_packed_is_unpacked(name: str) -> None:
    q = random_codes(AFFINE[name])
    layout = LAYOUTS[f"onnx.{name}"]
    packed = layout.pack(q)
    assert packed.shape[1] == layout.row_nbytes(q.codes.shape[1])
    got = layout.unpack(packed)
    assert np.array_equal(got.codes, q.codes)
    assert all(np.array_equal(a, b) for a, b in zip(got.levels, q.levels, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", ["MatMulNBits", "GatherBlockQuantized"])
def test_onnxruntime_reads_the_same_values(name: str, op: str) -> None:
    pytest.importorskip("onnxruntime")
    from qconvert.formats.onnx_kernels import Quantized, planes, run_node

    q = random_codes(AFFINE[name])
    (n, k), bits, block = q.codes.shape, q.scheme.bits, q.scheme.block
    layout = LAYOUTS[f"onnx.{name}"]
    codes, scales, *zeros = planes(Quantized("w", layout, layout.pack(q), op), k)
    more = [scales.view(np.float32), *zeros]
    if op == "MatMulNBits":
        inputs = [np.eye(k, dtype=np.float32), codes.reshape(n, k // block, -1), *more]
        got = run_node(op, inputs, (k, n), K=k, N=n, bits=bits, block_size=block, accuracy_level=0).T
    else:
        inputs = [codes, np.arange(n), *more]
        got = run_node(op, inputs, (n, k), gather_axis=0, quantize_axis=1, block_size=block, bits=bits)
    assert np.allclose(got, q.dequantize(), rtol=1e-6, atol=1e-6)  # one product each: measured 0


@pytest.mark.parametrize("m", [1, 2, 5])
def test_bits_there_and_back_at_odd_lengths(m: int) -> None:
    values = np.arange(3 * m, dtype=np.uint8).reshape(3, m) % 16
    assert np.array_equal(from_bits(to_bits(values, 4), 4, m), values)


def test_a_scheme_that_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="holds int4_g32, not int4_g64"):
        LAYOUTS["onnx.int4_g32"].pack(random_codes(AFFINE["int4_g64"]))


def test_rows_of_a_wrong_number_of_bytes_are_refused() -> None:
    with pytest.raises(InputError, match="no row takes 21 bytes"):
        LAYOUTS["onnx.int4_g32"].unpack(np.zeros((1, 21), np.uint8))
