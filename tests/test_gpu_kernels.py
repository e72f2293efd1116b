"""The Triton kernels, interpreted: every layout against the library that owns it, and products against float64."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from packed_operands import CASES, Packed, packed, weights

pytest.importorskip("triton")

from qconvert.errors import InputError, UnsupportedError
from qconvert.kernels.gpu import reference
from qconvert.kernels.gpu.check import bound, integer_error, product_error, relative
from qconvert.kernels.gpu.launch import (
    Tiles,
    dequantize,
    float8_product,
    integer_product,
    integer_sums,
    multiply,
    product,
    rounded,
    unpack,
)
from qconvert.kernels.gpu.operand import Codes, LowRank, Metadata, Operand, Part, Second, contract
from qconvert.kernels.gpu.records import place

ALL = pytest.mark.parametrize("name", CASES)


def plain(p: Packed) -> Operand:
    return dataclasses.replace(p.operand, low_rank=None)


@ALL
def test_dequantized_weights_are_the_librarys(name: str) -> None:
    p = packed(name)
    wanted = np.abs(p.theirs).max() * 2.0**-24 * p.ulps
    assert np.abs(dequantize(p.operand) - p.theirs).max() <= wanted
    assert relative(reference.dense(p.operand), p.theirs) < 2**-22


@ALL
def test_codes_are_unpacked(name: str) -> None:
    w = packed(name).operand
    if isinstance(w.codes, Codes):
        assert np.array_equal(unpack(w), reference.codes(w))


@ALL
def test_each_column_is_read_where_it_lies(name: str) -> None:
    p = packed(name)
    k = p.operand.shape[1]
    eye = np.eye(k, dtype=np.float32)
    tolerance = np.abs(p.theirs).max() * 2.0**-22
    assert np.abs(product(eye, plain(p)).T - p.theirs).max() <= tolerance
    last = eye[-1:]  # and by the kernel of one row
    assert np.abs(product(last, plain(p))[0] - p.theirs[:, -1]).max() <= tolerance


SMALL = pytest.mark.parametrize("name", ["ct uint4 32", "hqq 3 8 axis 1", "bnb nf4 double", "bitnet"])


def are_close(p: Packed, numbers: tuple[int, ...]) -> None:
    """Products of x of so many rows are within 4 sqrt(K) roundings of float64's by the library's weights."""
    k = p.operand.shape[1]
    for m in numbers:
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        wanted = x.astype(np.float64) @ p.theirs.astype(np.float64).T
        if p.operand.low_rank:
            wanted += reference.product(x, p.operand) - reference.product(x, plain(p))
        assert relative(product(x, p.operand), wanted) <= bound(k) + 2.0**-24 * p.ulps


@ALL
def test_products_are_close(name: str) -> None:
    are_close(packed(name), (1, 4))


@SMALL
def test_products_of_many_rows_are_close(name: str) -> None:
    are_close(packed(name), (32, 128, 131))


@SMALL
def test_tiles_of_a_gpu_give_the_same_products(name: str) -> None:
    """Sums of one word's codes, groups as long as a tile, and masks in each direction."""
    w = packed(name).operand
    for m, tiles in ((1, Tiles(16, 64)), (20, Tiles(16, 64, 16))):
        x = np.random.default_rng(m).standard_normal((m, w.shape[1]), np.float32)
        assert relative(product(x, w, tiles=tiles), reference.product(x, w)) <= bound(w.shape[1])


def test_a_gemm_of_groups_as_long_as_its_tiles() -> None:
    w = packed("mlx 2 64").operand
    x = np.random.default_rng(0).standard_normal((4, w.shape[1]), np.float32)
    assert relative(product(x, w, tiles=Tiles(16, 64, 16)), reference.product(x, w)) <= bound(w.shape[1])


@SMALL
def test_a_part_of_a_weight(name: str) -> None:
    w = packed(name).operand
    part = Part(5, w.shape[0] - 2, 64)
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    assert np.array_equal(unpack(w, part), unpack(w)[5:-2, :64])
    assert np.array_equal(dequantize(w, part), dequantize(w)[5:-2, :64])
    wanted = x.astype(np.float64) @ packed(name).theirs[5:-2, :64].astype(np.float64).T
    for m in (1, 3):
        assert relative(product(x[:m], w, part), wanted[:m]) <= bound(64)


def test_halves_are_multiplied_as_halves() -> None:
    w = packed("ct uint4 32").operand
    x = np.random.default_rng(0).standard_normal((4, w.shape[1]), np.float32).astype(np.float16)
    assert relative(product(x[:1], w), reference.product(x[:1], w)) <= bound(w.shape[1])
    assert relative(product(x, w), reference.product(x, w)) < 2**-11  # of weights that are rounded to f16


def int8_rows(n: int = 37, k: int = 3000) -> Operand:
    rng = np.random.default_rng(0)
    scale = Metadata(rng.random((n, 1)).astype(np.float32))
    return Operand("int8", (n, k), Codes(rng.integers(-128, 128, (n, k)).astype(np.int8), 8), scale=scale)


@pytest.mark.parametrize("m", [1, 4, 32])
def test_int32_sums_are_exact(m: int) -> None:
    w = int8_rows()
    q = np.random.default_rng(m).integers(-128, 128, (m, w.shape[1])).astype(np.int8)
    q[0], w.codes.words[0] = -128, -128  # type: ignore[union-attr]
    exact = q.astype(np.int64) @ w.codes.words.astype(np.int64).T  # type: ignore[union-attr]
    assert exact.max() > 2**24
    assert np.array_equal(integer_sums(q, w), exact)


@pytest.mark.parametrize("static", [None, 0.03])
def test_rows_of_x_are_rounded_as_compressed_tensors_does(static: float | None) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    w, x = int8_rows(k=300), weights(5, 300)
    x[2] = 0
    dynamic = static is None
    args = quantization.QuantizationArgs(num_bits=8, strategy="token" if dynamic else "tensor", dynamic=dynamic)
    tokens = x[None]
    scale, zero = torch.tensor([static or 0.0]), None
    if dynamic:
        scale, zero = compute_dynamic_scales_and_zp(tokens, args, torch.nn.Identity())
    q = quantize(tokens, scale, zero, args, dtype=torch.int8)[0].double().numpy()
    wanted = q * scale.double().reshape(-1, 1).numpy() @ reference.dense(w).T
    for m in (1, 5):
        y = integer_product(x[:m].numpy(), w, static=static)
        assert np.abs(y - wanted[:m]).max() <= np.abs(wanted).max() * 2.0**-23


INTEGERS = ("ct uint4 32", "ct uint8 24", "ct int4 None", "mlx 8 64", "hqq 1 8 axis 1", "bitnet")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("group", [0, 32])
def test_integer_products_of_groups(name: str, group: int) -> None:
    """x rounded by rows, or by groups as Q8_1 does: the products of the rounded x are as exact as floats allow."""
    w = packed(name).operand
    x = np.random.default_rng(0).standard_normal((4, w.shape[1]), np.float32)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % (group or 1)))).reshape(4, -1, group or x.shape[1])
    t = np.abs(padded).max(axis=2, keepdims=True) / np.float32(127)
    rounded = (np.rint(padded / t) * t.astype(np.float64)).reshape(4, -1)[:, : x.shape[1]]
    wanted = rounded @ reference.dense(w).T
    for m in (1, 4):
        assert relative(integer_product(x[:m], w, group, steps=127), wanted[:m]) <= bound(w.shape[1])


FLOAT8 = [("fp8 rows", 0, None), ("fp8 blocks", 128, None), ("fp8 tensor", 0, 0.01)]


@pytest.mark.parametrize(("name", "group", "static"), FLOAT8)
def test_x_is_rounded_to_eight_bit_floats_as_torch_does(name: str, group: int, static: float | None) -> None:
    w, x = packed(name).operand, weights(5, 200)
    x[:, ::3] *= 1e-3  # and subnormals
    x[2] = 0
    padded = torch.nn.functional.pad(x, (0, -200 % (group or 200))).reshape(5, -1, group or 200)
    t = padded.abs().amax(2, keepdim=True) / 448 if static is None else torch.full((1, 1, 1), static)
    t[t == 0] = 1
    q = (padded / t).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    wanted = (q * t).reshape(5, -1)[:, :200].numpy() @ packed(name).theirs.astype(np.float64).T
    for m in (1, 5):
        assert relative(float8_product(x[:m].numpy(), w, group, static), wanted[:m]) <= bound(200)


def test_every_eight_bit_float_and_the_middles_between_them_round_as_torchs() -> None:
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, exact * 1.01, exact * 0.97, torch.tensor([1e-9])])[None].clamp(max=448)
    q, _ = rounded(torch.cat([x, -x], 1), static=1.0, float8=True)
    assert torch.equal(q, torch.cat([x, -x], 1).to(torch.float8_e4m3fn).float())


def test_integer_products_have_their_low_rank_part_of_the_unrounded_x() -> None:
    w = packed("ct adapter").operand
    x = np.random.default_rng(0).standard_normal((4, w.shape[1]), np.float32)
    adapter = integer_product(x, w) - integer_product(x, plain(packed("ct adapter")))
    assert relative(adapter, reference.product(x, w) - reference.product(x, plain(packed("ct adapter")))) < 1e-5


@pytest.mark.parametrize("role", ["scale", "zero", "offset"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_metadata_that_is_not_finite_is_refused(role: str, value: float) -> None:
    data = np.ones((37, 1), np.float32)
    data[3] = value
    with pytest.raises(InputError, match=r"int8: .* \[3, 0\] is (nan|inf)"):
        product(np.ones((1, 3000), np.float32), dataclasses.replace(int8_rows(), **{role: Metadata(data)}))


def test_damaged_operands_are_refused() -> None:
    """Kernels check no bounds, so that arrays which are too short must not reach them."""
    w, b, nf4 = packed("ct uint4 32").operand, packed("bitnet").operand, packed("bnb nf4 double").operand
    ones, damaged = np.ones((1, 1), np.float32), np.array([[0xFF]], np.uint8)
    second = Second(np.ones(2, np.float32), 1)
    assert isinstance(w.codes, Codes) and isinstance(b.codes, Codes) and isinstance(w.zero, Metadata)
    assert isinstance(w.zero.data, Codes)
    zeros = w.zero.data._replace(words=w.zero.data.words[:-1])
    for base, wrong in (
        (w, {"scale": Metadata(damaged, "e8m0")}),
        (w, {"scale": Metadata(damaged, "e4m3")}),
        (w, {"scale": Metadata(np.array([[0x7F80]], np.uint16), "bf16")}),
        (w, {"scale": Metadata(np.ones((37, 7), np.float32))}),
        (w, {"scale": Metadata(ones, divisor=0)}),
        (w, {"scale": Metadata(damaged, "int", second=dataclasses.replace(second, scale=np.array([np.nan])))}),
        (w, {"scale": Metadata(damaged, "int", second=dataclasses.replace(second, table=np.ones(16)))}),
        (w, {"scale": Metadata(damaged, "int", second=dataclasses.replace(second, zero=np.ones(3)))}),
        (w, {"zero": Metadata(zeros, "int")}),
        (w, {"codes": w.codes._replace(words=w.codes.words[:, :-1])}),
        (b, {"codes": b.codes._replace(words=b.codes.words[:-1])}),
        (w, {"g_idx": np.full(96, 3, np.int32)}),
        (w, {"g_idx": np.full(95, 0, np.int32)}),
        (nf4, {"table": (0.0,) * 8}),
        (w, {"low_rank": LowRank(np.ones((2, 95), np.float32), np.ones((37, 2), np.float32), 1.0)}),
        (w, {"low_rank": LowRank(np.ones((2, 96), np.float32), np.full((37, 2), np.inf, np.float32), 1.0)}),
        (packed("fp8 rows").operand, {"codes": np.full((150, 200), 0x7F, np.uint8)}),
    ):
        with pytest.raises(InputError):
            place(dataclasses.replace(base, **wrong))


def test_what_kernels_cannot_do_is_refused() -> None:
    w = packed("ct uint4 32").operand
    x = torch.ones((2, 96))
    with pytest.raises(UnsupportedError, match="rows of 100"):
        place(dataclasses.replace(w, width=100))
    with pytest.raises(UnsupportedError, match="bf16"):
        multiply(x.bfloat16(), place(w, "cpu"))
    with pytest.raises(UnsupportedError, match="95 columns"):
        multiply(x[:, :95], place(w, "cpu"))
    with pytest.raises(UnsupportedError, match="table"):
        multiply(x[:, :80].to(torch.int8), place(packed("ct nvfp4").operand, "cpu"))
    with pytest.raises(UnsupportedError, match="groups of 32"):
        integer_sums(np.ones((1, 96), np.int8), w)


def test_a_weights_products_are_judged_and_named() -> None:
    found = product_error(packed("bnb double adapter").operand)
    assert found.passed and found.contract == "table, second level, low rank"
    assert contract(packed("ct uint4 32").operand, integers=True) == "affine group x int8"
    for static in (None, 0.03):
        found = integer_error(int8_rows(), static=static)
        assert found.passed and found.contract == "int32 sums of rows"


def test_threads_may_multiply_at_once() -> None:
    w = packed("ct uint4 32").operand
    x = np.random.default_rng(0).standard_normal((2, 96), np.float32)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: product(x, w), range(8)))
    assert all(np.array_equal(y, several[0]) for y in several)
    assert relative(several[0], reference.product(x, w)) <= bound(96)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the compiled kernels run")
def test_a_kernel_that_forgets_zero_points_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert.kernels.gpu.launch import kernels

    monkeypatch.setattr(kernels(True), "scaled", lambda w, part, *rest: part)
    assert not product_error(packed("ct uint4 32").operand).passed
