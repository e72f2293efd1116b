"""Quantizing kernels of other libraries' formats: the bytes of bitsandbytes and mlx, with vectors and without."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from qconvert import kernels
from qconvert.bits import from_bits
from qconvert.kernels.lanes import host
from qconvert.scheme import F32, FP4_TABLE, NF4_TABLE

WIDTHS = [pytest.param(None, id="vectors"), pytest.param(1, id="scalars"), 8, 32]
BNB = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}


@pytest.fixture(params=WIDTHS)
def lanes(request: pytest.FixtureRequest) -> int | None:
    if request.param not in (None, 1) and not host()[0]:
        pytest.skip("this machine has no vectors that pay")
    width: int | None = request.param
    return width


def hard_rows(k: int = 4096) -> F32:
    """Normal rows, and those that take every branch."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24, k)) * 0.02).astype(np.float32)
    x[rng.random(x.shape) < 0.001] *= 50
    x[1], x[2, :64], x[3, 64:192] = 0, 0, 1e-39
    x[4], x[5] = 0.25, -0.5
    x[6], x[7], x[8] = np.abs(x[6]), -np.abs(x[7]) - 1, x[8] + 100
    x[9] = np.where(rng.random(k) < 0.5, np.float32(0), np.float32(-0.0))
    x[10] = rng.integers(-8, 9, k) / 8
    x[11, ::64] = 1
    return x


def halfway(table: tuple[float, ...]) -> F32:
    """Blocks of 64 that begin with 1: the middles between levels, and the floats on either side of them."""
    levels = np.unique(np.array(table, np.float32))
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    near = np.concatenate([middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))])
    x = np.resize(near, (4, 64)).astype(np.float32)
    x[:, 0] = 1
    return x


# bitsandbytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BNB)
@pytest.mark.parametrize("group", [32, 64, 512, 4096])
def test_four_bits_are_those_of_bitsandbytes(kind: str, group: int, lanes: int | None) -> None:
    bnb, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    for x in (hard_rows(), *([halfway(BNB[kind])] if group <= 64 else [])):
        got = kernels.block_codes(x, group, BNB[kind], lanes=lanes)
        packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=group, quant_type=kind)
        assert np.array_equal(got.packed.reshape(-1, 1), packed.numpy())
        assert np.array_equal(got.scales.reshape(-1), state.absmax.numpy())
        assert np.array_equal(kernels.block_peaks(x, group, lanes), got.scales)


def test_a_block_of_nf4_by_hand() -> None:
    """Peak 2: 1, 0.72 and 0 of it are levels 15, 14 and 7; the first of a pair lies in the high half."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = -2, 1.44, 2, 0.1
    got = kernels.block_codes(x, 32, NF4_TABLE)
    assert got.scales.tolist() == [[2]]
    assert got.packed.tobytes().hex() == "0ef8" + "77" * 14
    assert kernels.block_codes(x, 32, NF4_TABLE, high_first=False).packed.tobytes().hex() == "e08f" + "77" * 14


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_second_levels_are_those_of_bitsandbytes(rows: int) -> None:
    """Of its mean and its map, the last bits of which depend on the machine and the number of threads."""
    bnb, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((rows, 4032), np.float32)
    _, state = bnb.quantize_4bit(torch.from_numpy(x), quant_type="nf4", compress_statistics=True)
    peaks = kernels.block_peaks(x, 64).reshape(-1)
    got = kernels.nested_codes(peaks - state.offset.numpy(), state.state2.code.numpy())
    assert np.array_equal(got.codes, state.absmax.numpy()) and np.array_equal(got.scales, state.state2.absmax.numpy())
    assert abs(float(state.offset) - peaks.mean(dtype=np.float64)) < 4 * np.spacing(np.float32(state.offset))
    assert np.array_equal(kernels.nested_codes(peaks - state.offset.numpy(), kernels.dynamic_map()).codes, got.codes)


def test_second_levels_near_the_places_of_the_look_up_are_those_of_bitsandbytes() -> None:
    bnb, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    levels = bnb.create_dynamic_map().numpy()
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    places = (np.rint((middles + 1) / 2 * 65535)[:, None] + np.array([-0.5, 0.5])) / 65535 * 2 - 1
    bits = places.astype(np.float32).reshape(-1, 1).view(np.int32) + np.arange(-60, 60, dtype=np.int32)
    v = np.clip(bits.view(np.float32), -1, 1).reshape(-1)
    v = np.insert(v, np.arange(0, v.size, 255), 1)
    want, _ = bnb.quantize_blockwise(torch.from_numpy(v), blocksize=256)
    assert np.array_equal(kernels.nested_codes(v, levels).codes, want.numpy())


def test_scales_that_are_all_alike_have_no_second_level() -> None:
    got = kernels.nested_codes(np.zeros(300, np.float32), kernels.dynamic_map())
    assert not got.codes.any() and not got.scales.any()


def test_the_map_of_second_levels_is_bitsandbytes_but_for_last_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    got, want = kernels.dynamic_map(), bnb.create_dynamic_map().numpy()
    assert np.array_equal(got == 0, want == 0) and np.all(np.diff(got) > 0)
    assert np.max(np.abs(got - want) / np.spacing(np.maximum(np.abs(want), np.float32(1e-9)))) <= 1


@pytest.mark.parametrize("k", [4096, 77])
def test_rows_of_8_bits_are_those_of_bitsandbytes(k: int, lanes: int | None) -> None:
    bnb, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    x = np.concatenate([hard_rows()[:, :k], np.random.default_rng(1).standard_normal((300, k))]).astype(np.float32)
    codes, peaks = kernels.int8_rows(x, lanes)
    want, scb, _ = bnb.int8_vectorwise_quant(torch.from_numpy(x))
    assert np.array_equal(codes, want.numpy()) and np.array_equal(peaks, scb.numpy())


# mlx ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_lines_are_those_of_mlx(bits: int, group: int, lanes: int | None) -> None:
    mx = pytest.importorskip("mlx.core")
    x = hard_rows(1024)
    half = mx.array(x).astype(mx.bfloat16)
    for array, kept in ((mx.array(x), "f32"), (half, "bf16")):
        got = kernels.mlx_affine(np.array(array.astype(mx.float32)), group, bits, lanes)
        codes, *levels = mx.quantize(array, group, bits)
        assert np.array_equal(got.packed, np.array(codes).view(np.uint8))
        for mine, theirs in zip((got.scales, got.biases), levels, strict=True):
            mine = mine if kept == "f32" else kernels.widen_bf16(kernels.narrow_bf16(mine))
            assert np.array_equal(mine, np.array(theirs.astype(mx.float32)))
        again = kernels.line_codes(np.array(array.astype(mx.float32)), group, bits, got.scales, got.biases, lanes)
        assert np.array_equal(again, got.packed)


def test_a_group_of_mlx_by_hand() -> None:
    """-2 is the end of greater magnitude, so the scale is positive: 3 / 15, and zero is code 10."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = -2, 0, 1, 0.31
    got = kernels.mlx_affine(x, 32, 4)
    assert got.scales[0, 0] == np.float32(0.2) and got.biases[0, 0] == -2
    assert got.packed.tobytes().hex() == "a0cf" + "aa" * 14


def test_lines_of_coarser_scales_have_the_nearest_codes(lanes: int | None) -> None:
    x = hard_rows(256)[10:]
    found = kernels.mlx_affine(x, 64, 4)
    scales, biases = (kernels.widen_bf16(kernels.narrow_bf16(v)) for v in (found.scales, found.biases))
    codes = from_bits(kernels.line_codes(x, 64, 4, scales, biases, lanes), 4, 256).reshape(len(x), -1, 64)
    levels = np.arange(16, dtype=np.float32) * scales[..., None] + biases[..., None]
    far = np.abs(x.reshape(len(x), -1, 64, 1) - levels[:, :, None])
    chosen = np.take_along_axis(far, codes[..., None].astype(np.int64), -1)[..., 0]
    assert np.all(chosen <= far.min(-1) + 1e-6 * np.abs(x).reshape(chosen.shape))


# ternary ------------------------------------------------------------------------------------------


def ternary_rows() -> Iterator[F32]:
    yield np.random.default_rng(0).standard_normal((6, 77), np.float32)
    yield np.array([[0.5, -0.5, 0.50001, 1.5, -9, 0, -0.0]], np.float32)


def test_codes_of_three_values_are_those_of_torch(lanes: int | None) -> None:
    torch = pytest.importorskip("torch")
    for x in ternary_rows():
        for factor in (1.0, 0.7):
            want = (torch.from_numpy(x) * factor).round().clamp(-1, 1).to(torch.int8).numpy()
            assert np.array_equal(kernels.ternary_codes(x, factor, lanes), want)


def test_sums_of_magnitudes_are_those_of_numpy() -> None:
    x = next(ternary_rows())
    assert np.allclose(kernels.magnitude_sums(x), np.abs(x).astype(np.float64).sum(1), rtol=1e-14)


def test_codes_do_not_depend_on_how_rows_are_cut_into_blocks() -> None:
    x = hard_rows(256)
    for begin, end in ((0, 5), (5, 6), (6, 24)):
        part = np.ascontiguousarray(x[begin:end])
        for make in (
            lambda v: kernels.block_codes(v, 64, NF4_TABLE), kernels.int8_rows, lambda v: kernels.mlx_affine(v, 32, 3),
        ):  # fmt: skip
            assert all(np.array_equal(p, w[begin:end]) for p, w in zip(make(part), make(x), strict=True))
