"""Small floats byte for byte as torch and compressed-tensors make them; a search of scales that lowers the error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qconvert import kernels
from qconvert.bits import from_bits
from qconvert.kernels.float_quants import Packed
from qconvert.kernels.lanes import host
from qconvert.scheme import E2M1_TABLE, E4M3_TABLE, E8M0_TABLE, F32, Bytes

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("f32", "f16", "bf16")


@pytest.fixture(params=[None, "1", "8"], ids=["vectors", "scalars", "half vectors"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        if request.param != "1" and not host()[0]:
            pytest.skip("this machine has no vectors that pay")
        monkeypatch.setenv("QCONVERT_LANES", request.param)


def weights(kind: str = "normal", n: int = 35, k: int = 256) -> F32:
    """With a row, groups and signs of zeros."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(n, k)) if kind == "normal" else rng.standard_t(4, size=(n, k))
    x = (drawn * 0.02).astype(np.float32)
    x[3], x[4, :32], x[5, :16], x[6, ::3], x[7, 32:64] = 0, 0, -0.0, -0.0, 1e-40
    return x


def relative_error(got: F32, want: F32) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def values(q: Packed, divisor: float | None) -> F32:
    codes = from_bits(q.packed, 4, q.packed.shape[1] * 2)
    group = codes.shape[1] // q.scales.shape[1]
    table = E8M0_TABLE if divisor is None else np.array(E4M3_TABLE, np.float32) / np.float32(divisor)
    out: F32 = np.array(E2M1_TABLE, np.float32)[codes] * np.array(table, np.float32)[q.scales].repeat(group, 1)
    return out


def their_e4m3(x: F32) -> Bytes:
    torch = pytest.importorskip("torch")
    out: Bytes = torch.from_numpy(x.copy()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return out


class Theirs:
    """compressed-tensors with weights[N,K] of torch.float32 and a scheme's arguments."""

    def __init__(self, layout: str, **arguments: Any) -> None:
        quantization = pytest.importorskip("compressed_tensors.quantization")
        compressors = pytest.importorskip("compressed_tensors.compressors")
        self.args = quantization.QuantizationArgs(**arguments)
        self.scheme = quantization.QuantizationScheme(targets=["Linear"], weights=self.args)
        self.compressor = compressors.BaseCompressor.get_value_from_registry(layout)

    def scales(self, low: Tensor, high: Tensor, divisor: Tensor | None = None) -> Tensor:
        from compressed_tensors.quantization.utils import calculate_qparams

        scales: Tensor = calculate_qparams(low, high, self.args, divisor)[0]
        return scales

    def compress(self, x: F32, scales: Tensor, **more: Tensor) -> dict[str, Any]:
        import torch

        found = self.compressor.compress({"weight": torch.from_numpy(x), "weight_scale": scales, **more}, self.scheme)
        found = {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in found.items()}
        return {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in found.items()}


def test_values_of_e4m3_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    want = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(np.array(E4M3_TABLE, np.float32), want, equal_nan=True)


@pytest.mark.usefixtures("width")
def test_floats_of_every_exponent_become_what_torch_makes_of_them() -> None:
    upper, rng = np.arange(1 << 16, dtype=np.uint32) << 16, np.random.default_rng(0)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, rng.integers(0, 1 << 16, 1 << 16, np.uint32)):
        x = (upper | np.uint32(lower)).view(np.float32)
        x = x[np.isfinite(x)]
        assert np.array_equal(kernels.e4m3_codes(x[None], np.ones((1, 1), np.float32), x.size)[0], their_e4m3(x))


@pytest.mark.usefixtures("width")
def test_halves_between_codes_go_to_the_even_code() -> None:
    table = np.array(E4M3_TABLE, np.float32)[:127]
    middles = (table[1:] + table[:-1]) / 2
    got = kernels.e4m3_codes(np.concatenate([middles, -middles])[None], np.ones((1, 1), np.float32), 252)[0]
    even = np.arange(126) + np.arange(126) % 2
    assert np.array_equal(got, np.concatenate([even, even + 128]))


@pytest.mark.usefixtures("width")
def test_nearest_e2m1_of_one_group_by_hand() -> None:
    x = np.array([[6, 0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5.01, 0, -0.0, -1e-9, 0.26, -3, 4.9]], np.float32)
    got = kernels.nvfp4(x, 448.0)  # 448 * 6 / 6: the group's scale is 448 / 448
    assert got.scales.tolist() == [[0x7E]]
    assert got.packed.tobytes().hex(" ") == "07 28 42 64 f6 00 18 6d"


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_nvfp4_is_that_of_compressed_tensors(kind: str) -> None:
    x, fp8 = weights(kind), "torch.float8_e4m3fn"
    theirs = Theirs("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=fp8)
    import torch
    from compressed_tensors.quantization.utils import generate_gparam

    divisor = generate_gparam(torch.tensor(x.min()), torch.tensor(x.max()))
    assert np.float32(448 * 6) / np.abs(x).max() == divisor.item()
    groups = torch.from_numpy(x).unflatten(1, (-1, 16))
    scales = theirs.scales(groups.amin(-1), groups.amax(-1), divisor)
    want, got = theirs.compress(x, scales, weight_global_scale=divisor), kernels.nvfp4(x, divisor.item())
    assert np.array_equal(want["weight_packed"], got.packed) and np.array_equal(want["weight_scale"], got.scales)
    # of scales that a search found the codes are again those of compressed-tensors
    found = kernels.nvfp4(x, divisor.item(), search=True)
    again = theirs.compress(x, torch.tensor(np.array(E4M3_TABLE, np.float32)[found.scales]), weight_global_scale=divisor)
    assert np.array_equal(again["weight_packed"], found.packed) and np.array_equal(again["weight_scale"], found.scales)


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("magnitude", [1, 1e-30, 1e30])
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_mxfp4_and_mxfp8_are_those_of_compressed_tensors(kind: str, magnitude: float) -> None:
    x = (weights(kind) * np.float64(magnitude)).astype(np.float32)
    for bits, layout in ((4, "mxfp4-pack-quantized"), (8, "mxfp8-quantized")):
        theirs = Theirs(layout, num_bits=bits, type="float", group_size=32, scale_dtype="torch.uint8")
        import torch

        groups = torch.from_numpy(x).unflatten(1, (-1, 32))
        want = theirs.compress(x, theirs.scales(groups.amin(-1), groups.amax(-1)))
        if bits == 4:
            got = kernels.mxfp4(x)
            assert np.array_equal(want["weight_packed"], got.packed) and np.array_equal(want["weight_scale"], got.scales)
        else:
            exponents = kernels.mx_exponents(kernels.group_peaks(x, 32), 8)
            assert np.array_equal(want["weight_scale"], exponents)
            codes = kernels.e4m3_codes(x, np.array(E8M0_TABLE, np.float32)[exponents], 32)
            assert np.array_equal(want["weight"], codes)


def test_a_power_of_two_is_doubled_from_seven_quarters_on() -> None:
    """Where the greatest weight of a group would be clipped to 6 from 7 and more."""
    x = np.zeros((1, 128), np.float32)
    x[0, ::32] = 4, 6.9, 7, 8
    got = kernels.mxfp4(x)
    assert got.scales.tolist() == [[127, 127, 128, 128]]
    assert got.packed[0, ::16].tolist() == [6, 7, 6, 6]


def test_no_power_of_two_is_infinite() -> None:
    x = np.full((1, 32), 3.4e38, np.float32)
    assert np.isfinite(values(kernels.mxfp4(x), None)).all()
    greatest = np.ldexp(E4M3_TABLE[0x7E], kernels.mx_exponents(kernels.group_peaks(x, 32), 8).astype(int) - 127)
    assert (greatest < np.finfo(np.float32).max).all()


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_fp8_is_that_of_compressed_tensors(strategy: str, dtype: str) -> None:
    import torch

    x = weights(n=300, k=320)  # the last blocks are smaller
    more = {"block_structure": [128, 128]} if strategy == "block" else {}
    theirs = Theirs("float-quantized", num_bits=8, type="float", strategy=strategy, **more)
    rows = kernels.group_peaks(x, 128 if strategy == "block" else 320)
    steps = np.arange(0, 300, 128 if strategy == "block" else 1 if strategy == "channel" else 300)
    peaks = np.maximum.reduceat(rows, steps, axis=0)
    high, kind = torch.tensor(peaks), {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    scales = theirs.scales(-high, high).to(kind)
    got = kernels.scales_of(peaks, 448, dtype)
    alive = peaks > 0  # of a row of zeros any scale will do
    assert np.array_equal(got[alive], scales.float().numpy()[alive])
    want = theirs.compress(x, torch.from_numpy(got).to(kind))
    spread = got.repeat(np.diff([*steps, 300]), axis=0)
    assert np.array_equal(want["weight"], kernels.e4m3_codes(x, spread, 128 if strategy == "block" else 320))


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_of_rows_is_that_of_compressed_tensors(dtype: str) -> None:
    import torch

    x = weights("heavy tails", 40, 333)
    theirs = Theirs("int-quantized", num_bits=8, strategy="channel")
    scales = kernels.scales_of(kernels.group_peaks(x, 333), 127.5, dtype)
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    high = torch.tensor(np.abs(x).max(1, keepdims=True))
    assert np.array_equal(scales[:3], theirs.scales(-high, high).to(kind).float().numpy()[:3])
    got = kernels.int8_codes(x, scales, 333)
    assert np.array_equal(theirs.compress(x, torch.from_numpy(scales).to(kind))["weight"], got)
    assert got.min() == -128 and got.max() == 127 and not got[3].any()


@pytest.mark.parametrize("k", [1, 7, 16, 63, 200])
def test_peaks_are_those_of_groups_of_any_length(k: int) -> None:
    x = weights(k=300)[:, :k]
    for group in (k, 32):
        padded = np.pad(np.abs(x), ((0, 0), (0, -k % group)))
        assert np.array_equal(kernels.group_peaks(x, group), padded.reshape(len(x), -1, group).max(-1))


@pytest.mark.parametrize(("kind", "limit"), [("normal", 0.86), ("heavy tails", 0.91)])
def test_scales_of_a_search_lower_the_error(kind: str, limit: float) -> None:
    """Measured 0.854 and 0.901; the peak at 6 or at 4, the better of them, gains less."""
    x = weights(kind, 256, 1024)
    divisor = float(np.float32(448 * 6) / np.abs(x).max())
    plain, found = (relative_error(values(kernels.nvfp4(x, divisor, search), divisor), x) for search in (False, True))
    four, six = (values(kernels.nvfp4(x, by), by) for by in (divisor * 1.5, divisor))
    groups = [np.square(v - x).reshape(256, -1, 16).sum(-1) for v in (four, six)]
    better = float(np.sqrt(np.minimum(*groups).sum()) / np.linalg.norm(x))
    assert found < limit * plain and found < 0.95 * better


@pytest.mark.usefixtures("width")
def test_codes_do_not_depend_on_vectors_nor_on_how_rows_are_cut() -> None:
    x = weights("heavy tails", 9, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QCONVERT_LANES", raising=False)
        whole = [kernels.nvfp4(x, 900.0, True), kernels.mxfp4(x)]
    for begin, end in ((0, 1), (1, 9)):
        parts = [kernels.nvfp4(x[begin:end], 900.0, True), kernels.mxfp4(x[begin:end])]
        for part, want in zip(parts, whole, strict=True):
            assert all(np.array_equal(p, w[begin:end]) for p, w in zip(part, want, strict=True))
