"""Quantizing kernels against ggml's own, byte for byte, with vectors and without; arithmetic kernels against numpy, torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ggml_oracle
import numpy as np
import pytest

from qconvert import kernels
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.formats.gguf_values import dequantized
from qconvert.kernels.lanes import Lanes, choose, host
from qconvert.scheme import F32, SCHEMES

DATA = Path(__file__).parents[2] / "shared" / "data"
search = kernels.search
NAMES = sorted(SCHEMES)
WIDTHS = [pytest.param(None, id="vectors"), pytest.param(1, id="scalars")]
needs_ggml = pytest.mark.skipif(ggml_oracle.library() is None, reason="xllamacpp is not installed")


def normal_rows(n: int, k: int, seed: int = 0) -> F32:
    """Rows like a trained model's: normal, each of its own spread, a few outliers."""
    rng = np.random.default_rng(seed)
    spread = 0.02 * np.exp(0.3 * rng.standard_normal((n, 1)))
    x = rng.standard_normal((n, k), np.float32) * spread.astype(np.float32)
    x[rng.random(x.shape) < 0.001] *= 6
    return x


def hard_rows() -> Iterator[tuple[str, F32]]:
    """Rows that take every branch of ggml's quantizers: what is special, and f32[N, 512] or so."""
    rng = np.random.default_rng(1)
    x = normal_rows(16, 512)
    yield "normal", x
    yield "a number of blocks that fills no vector", normal_rows(3, 768)
    yield "one block", x[:1, :256]
    yield "zeros", np.zeros((2, 512), np.float32)
    zeros = np.where(rng.random((16, 512)) < 0.5, np.float32(0), np.float32(-0.0))
    yield "zeros of both signs", zeros
    yield "zeros of both signs among positives", np.where(x > 0, x, zeros)
    yield "constants", np.repeat(np.array([1, -1, 3e-5, -7.7], np.float32)[:, None], 512, 1)
    yield "one sign", np.concatenate([np.abs(x), -np.abs(x), x + 1])
    yield "outliers", np.where(rng.random(x.shape) < 0.01, x * 1000, x)
    yield "ties", rng.integers(-8, 9, (16, 512)).astype(np.float32) / 8
    yield "few values", rng.integers(-2, 3, (16, 512)).astype(np.float32)
    for power in (-4, -6, -8, -12, -15, -20, -36, -38, -40, -43):  # scales that vanish in f16, then f32's subnormals
        yield f"magnitudes of 1e{power}", (x.astype(np.float64) * 50 * 10.0**power).astype(np.float32)
    powers = np.float32(2) ** np.repeat(np.arange(-8, 24), 256).reshape(16, 512)
    yield "powers of two", powers
    yield "just below powers of two", np.nextafter(powers, np.float32(0))
    yield "magnitudes of 1e4", x * np.float32(1e5)
    for group in (16, 32):  # sub-blocks whose rounded scale is 0 keep the codes of the search
        spread = np.exp(5 * rng.standard_normal((16, 512 // group))).astype(np.float32)
        yield f"groups of {group} of unequal spread", x * spread.repeat(group, 1)


@needs_ggml
@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_search_writes_the_bytes_of_ggml(name: str, lanes: int | None) -> None:
    for what, x in hard_rows():
        x = np.ascontiguousarray(x)
        wrong = np.flatnonzero((search(name, x, lanes) != ggml_oracle.quantize(name, x)).any(1))
        assert not wrong.size, f"{what}: rows {wrong.tolist()}"


def importances(k: int) -> Iterator[tuple[str, F32]]:
    """Importance matrices of every kind: what is special, and f32[k]."""
    rng = np.random.default_rng(5)
    usual = np.exp(rng.standard_normal(k))
    yield "usual", usual.astype(np.float32)
    yield "of unequal channels", np.exp(4 * rng.standard_normal(k)).astype(np.float32)
    yield "zeros among", np.where(rng.random(k) < 0.5, 0, usual).astype(np.float32)
    yield "blocks of zeros", np.repeat(np.where(rng.random(k // 16) < 0.5, 0, 1), 16).astype(np.float32)
    yield "all zero", np.zeros(k, np.float32)
    yield "tiny", (usual * 1e-30).astype(np.float32)
    yield "huge", (usual * 1e20).astype(np.float32)


@needs_ggml
@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_search_writes_the_bytes_of_ggml_with_importance(name: str, lanes: int | None) -> None:
    (normal, x), *others = hard_rows()
    cases = [(normal, x, kind) for kind in range(7)] + [(what, y, i % 7) for i, (what, y) in enumerate(others)]
    for what, x, i in cases:
        x = np.ascontiguousarray(x)
        kind, importance = list(importances(x.shape[1]))[i]
        wanted = ggml_oracle.quantize(name, x, importance=importance)
        wrong = np.flatnonzero((search(name, x, lanes, importance=importance) != wanted).any(1))
        assert not wrong.size, f"{what}, importance {kind}: rows {wrong.tolist()}"


@pytest.mark.parametrize("wrong", [np.ones(255), np.ones((1, 256)), np.full(256, -1), np.full(256, np.nan)])
def test_importance_that_is_no_row_of_weights_is_refused(wrong: F32) -> None:
    with pytest.raises(InputError, match="importance"):
        search("q4_k", np.zeros((1, 256), np.float32), importance=wrong)


@needs_ggml
@pytest.mark.parametrize("name", NAMES)
def test_search_writes_the_bytes_of_ggml_on_a_trained_matrix(name: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = next(DATA.glob("models/novels-13m/*.safetensors"), None)
    if path is None:
        pytest.skip("the real models are not beside this checkout")
    tensors = safetensors.load_file(path)
    tensor = next(v for n, v in sorted(tensors.items()) if n.endswith("proj.weight") and v.shape[1] % 256 == 0)
    x = np.ascontiguousarray(tensor[:64].float().numpy())
    assert np.array_equal(search(name, x), ggml_oracle.quantize(name, x))


@pytest.mark.parametrize("name", NAMES)
def test_what_search_wrote_dequantizes_like_gguf_py(name: str) -> None:
    packed = search(name, normal_rows(4, 512))
    wanted = dequantized(packed, name.upper())
    assert np.array_equal(LAYOUTS[f"gguf.{name}"].unpack(packed).dequantize(), wanted)


def test_the_environment_turns_vectors_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCONVERT_LANES", "1")
    assert choose(16, 32) == Lanes(1, False)


@pytest.mark.skipif(not host()[0], reason="this machine has no AVX2: there is one path only")
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_every_vector_width_writes_the_same_bytes(lanes: int) -> None:
    x = normal_rows(4, 256)
    assert np.array_equal(search("q4_0", x, lanes), search("q4_0", x, 1))


def test_an_empty_matrix_becomes_no_bytes() -> None:
    assert search("q4_k", np.zeros((0, 256), np.float32)).shape == (0, 144)


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="rows of 96 weights do not divide into blocks of 256"):
        search("q4_k", np.zeros((1, 96), np.float32))


def test_an_unknown_scheme_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match="q4_k"):
        search("q9_k", np.zeros((1, 256), np.float32))


def special_floats() -> F32:
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 1 << 32, 20000, np.uint64).astype(np.uint32)
    halves = (rng.integers(0, 1 << 16, 1000).astype(np.uint32) << 16) | np.uint32(0x8000)  # halfway between two bf16
    x = np.concatenate([bits, halves]).view(np.float32)
    return np.concatenate([x[~np.isnan(x)], np.array([0, -0.0, np.inf, -np.inf, 3.4e38], np.float32)])


def test_narrowing_to_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    x = special_floats()
    wanted = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(kernels.narrow_bf16(x), wanted)


def test_narrowing_keeps_nan() -> None:
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32)
    assert np.isnan(kernels.widen_bf16(kernels.narrow_bf16(nan))).all()


def test_widening_every_bf16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(kernels.widen_bf16(bits).view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_one_infinity_or_nan_among_bf16_is_found_as_they_are_widened(bits: int) -> None:
    x = np.array([0x7F7F, 0xFF7F, 0x8000, 1] * 40, np.uint16).reshape(4, 40)  # the greatest numbers, -0 and the least
    value, finite = kernels.widen_and_check(x)
    assert finite and np.array_equal(value, kernels.widen_bf16(x))
    x[3, 17] = bits
    assert not kernels.widen_and_check(x)[1]


@pytest.mark.parametrize(("n", "k", "r"), [(8, 256, 16), (7, 100, 5), (1, 33, 1), (5, 1100, 3)])
def test_a_low_rank_update_sums_in_the_order_it_says(n: int, k: int, r: int) -> None:
    rng = np.random.default_rng(3)
    w, a, b = (rng.standard_normal(shape, np.float32) for shape in ((n, k), (r, k), (n, r)))
    total = np.zeros_like(w)
    for j in range(r):
        total += b[:, j : j + 1] * a[j]
    wanted = w + total * np.float32(0.3)
    assert kernels.add_low_rank(w, a, b, 0.3) is w
    assert np.array_equal(w, wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(dtype: type[np.floating], bad: float) -> None:
    x = np.full((3, 5000), np.finfo(dtype).max, dtype)
    assert kernels.all_finite(x)
    x[2, 4999] = bad
    assert not kernels.all_finite(x)


def test_no_kernel_is_hidden_by_a_module_of_its_name() -> None:
    """`kernels.affine` was a module once qconvert/kernels/affine.py was imported by name."""
    assert not kernels._WHERE.keys() & {p.stem for p in Path(kernels.__file__).parent.glob("*.py")}
