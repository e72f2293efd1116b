"""Kernels in CUDA C: what they compute, run on a CPU, and what NVRTC makes of the same source for old GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Launch

from qconvert.errors import MissingDependency, UnsupportedError
from qconvert.kernels import nvrtc

Kernels = Callable[[str], Launch]
U = 2.0**-24  # of f32, in which sums are accumulated
# outputs, columns, group, rows of x: tails of a unit and of a group, groups from 8, one group of all, more than 32 units a lane
SHAPES = [(5, 96, 8, 1), (3, 77, 8, 4), (9, 333, 24, 1), (6, 1000, 40, 2), (4, 517, 128, 3), (2, 2600, 2600, 1), (1, 9, 16, 33)]
OF_32 = [(n, k, -(-group // 32) * 32, m) for n, k, group, m in SHAPES]


@pytest.fixture(scope="module", params=[520, 610], ids=["bytes", "dp4a"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if cuda_on_cpu.GXX is None:
        pytest.skip("needs g++")
    return cuda_on_cpu.built("gemv", request.param, tmp_path_factory.mktemp("cuda"))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def packed(codes: np.ndarray, bits: int, dtype: type) -> np.ndarray:
    """codes [N,K] as words [N, ceil(K bits / word)], column 0 in the lowest bits, written digit by digit."""
    per_word = 8 * np.dtype(dtype).itemsize // bits
    padded = np.zeros((len(codes), ceil_div(codes.shape[1], per_word) * per_word), np.uint64)
    padded[:, : codes.shape[1]] = codes
    weights = np.uint64(2**bits) ** np.arange(per_word, dtype=np.uint64)
    return (padded.reshape(len(codes), -1, per_word) * weights).sum(-1, dtype=np.uint64).astype(dtype)


def per_column(values: np.ndarray, group: int, n_columns: int) -> np.ndarray:
    return np.repeat(values.astype(np.float64), group, axis=-1)[..., :n_columns]


def group_sums(products: np.ndarray, group: int) -> np.ndarray:
    return np.add.reduceat(products, np.arange(0, products.shape[-1], group), axis=-1)


def assert_close(y: np.ndarray, wanted: np.ndarray, magnitude: np.ndarray, n_columns: int) -> None:
    """Within 4 sqrt(K) u of the sum of the terms' magnitudes."""
    worst = (np.abs(y - wanted) / magnitude).max()
    assert worst <= 4 * math.sqrt(n_columns) * U, worst


def halves(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16)


class Activations:
    """x f16[M,K] in 8 bits as quantize_x makes it: q, t, sums; `codes` is q [M,K] in the order of columns."""

    def __init__(self, kernels: Kernels, x: np.ndarray, group: int, even_odd: bool) -> None:
        m, k = x.shape
        n_groups, stride = ceil_div(k, group), ceil_div(k, 16) * 16
        self.q = np.full((m, stride), 99, np.int8)
        self.t = np.full((m, n_groups), np.nan, np.float32)
        self.sums = np.zeros((m, n_groups), np.int32)
        kernels("quantize_x")((ceil_div(n_groups, 4), m), x, k, group, int(even_odd), self.q, self.t, self.sums)
        order = [0, 4, 1, 5, 2, 6, 3, 7] if even_odd else list(range(8))
        plain = self.q.reshape(m, -1, 8)[:, :, order].reshape(m, -1)
        self.codes = plain[:, :k].astype(np.int64)
        assert not plain[:, k:].any()


@pytest.mark.parametrize("even_odd", [False, True])
@pytest.mark.parametrize(("k", "group"), [(96, 8), (77, 8), (333, 24), (2600, 2600), (9, 16)])
def test_activations_in_8_bits_are_those_of_numpy(kernels: Kernels, k: int, group: int, even_odd: bool) -> None:
    x = halves(np.random.default_rng(k), 3, k)
    x[1, :group] = 0
    made = Activations(kernels, x, group, even_odd)
    peaks = np.maximum.reduceat(np.abs(x.astype(np.float32)), np.arange(0, k, group), axis=1)
    inverse = np.divide(np.float32(127), peaks, out=np.zeros_like(peaks), where=peaks > 0)
    codes = np.rint(x.astype(np.float32) * np.repeat(inverse, group, axis=1)[:, :k]).astype(np.int64)
    assert np.array_equal(made.codes, codes)
    assert np.array_equal(made.t, peaks / np.float32(127))
    assert np.array_equal(made.sums, group_sums(codes, group))


@pytest.mark.parametrize(("n", "k", "group", "m"), SHAPES)
def test_4_bit_codes_times_8_bits_and_times_halves(kernels: Kernels, n: int, k: int, group: int, m: int) -> None:
    rng, g = np.random.default_rng(n + k), ceil_div(k, group)
    codes, s, x = rng.integers(0, 16, (n, k)), halves(rng, n, g), halves(rng, m, k)
    points, minima = rng.integers(0, 256, (n, g)).astype(np.uint8), halves(rng, n, g)
    q, words, grid = Activations(kernels, x, group, even_odd=True), packed(codes, 4, np.uint32), (ceil_div(n, 4), m)

    dots = np.zeros((m, n, g), np.int32)
    kernels("w4a8_dots")((ceil_div(n * g, 128), m), words, q.q, dots, n, k, group)
    assert np.array_equal(dots, group_sums(codes[None] * q.codes[:, None], group))

    scales, sums, y = per_column(s, group, k), np.zeros((m, g), np.float32), np.zeros((m, n), np.float32)
    kernels("sum_groups")((ceil_div(g, 4), m), x, k, group, sums)
    for name, more, w, w_magnitude in (
        ("centre", (), scales * (codes - 8), np.abs(scales) * (codes + 8)),
        ("points", (points,), scales * (codes - (z := per_column(points, group, k))), np.abs(scales) * (codes + z)),
        ("minima", (minima,), scales * codes + (o := per_column(minima, group, k)), np.abs(scales) * codes + np.abs(o)),
    ):
        for kind, given, inputs in (
            (f"w4a8_{name}", (q.q, q.t, q.sums), q.codes * per_column(q.t, group, k)),
            (f"w4a16_{name}", (x, sums), x.astype(np.float64)),
        ):
            y[:] = np.nan
            kernels(kind)(grid, words, s, *more, *given, y, n, k, group)
            assert_close(y, inputs @ w.T, np.abs(inputs) @ w_magnitude.T, k)


@pytest.mark.parametrize(("kind", "n", "k", "group", "m"), [("bytes", *s) for s in SHAPES] + [("words", *s) for s in OF_32])
def test_bits_of_both_signs_times_such(kernels: Kernels, kind: str, n: int, k: int, group: int, m: int) -> None:
    rng, g = np.random.default_rng(n + k), ceil_div(k, group)
    bits, x, s = rng.integers(0, 2, (n, k)), rng.integers(0, 2, (m, k)), halves(rng, n, g)
    t, y = rng.uniform(0.1, 2, m).astype(np.float32), np.full((m, n), np.nan, np.float32)
    word = np.uint8 if kind == "bytes" else np.uint32
    launch, grid, args = kernels(f"b1a1_{kind}"), (ceil_div(n, 4), m), (packed(bits, 1, word), packed(x, 1, word))

    one, ones = np.ones((n, g), np.float16), np.ones(m, np.float32)
    launch(grid, args[0], one, args[1], ones, y, n, k, group)
    assert np.array_equal(y, (2 * x - 1) @ (2 * bits - 1).T)  # integers, below 2^24

    launch(grid, args[0], s, args[1], t, y, n, k, group)
    scales = per_column(s, group, k)
    wanted = t[:, None].astype(np.float64) * ((2 * x - 1) @ (scales * (2 * bits - 1)).T)
    assert_close(y, wanted, t[:, None] * np.abs(scales).sum(1), k)


@pytest.mark.parametrize(("n", "k", "group", "m"), SHAPES)
def test_bits_with_scale_and_offset(kernels: Kernels, n: int, k: int, group: int, m: int) -> None:
    rng, g = np.random.default_rng(n + k), ceil_div(k, group)
    bits, s, offset, x = rng.integers(0, 2, (n, k)), halves(rng, n, g), halves(rng, n, g), halves(rng, m, k)
    sums, y = np.full((m, g), np.nan, np.float32), np.full((m, n), np.nan, np.float32)
    kernels("sum_groups")((ceil_div(g, 4), m), x, k, group, sums)
    exact = x.astype(np.float64)
    assert_close(sums, group_sums(exact, group), group_sums(np.abs(exact), group), k)

    kernels("b1a16")((ceil_div(n, 4), m), packed(bits, 1, np.uint8), s, offset, x, sums, y, n, k, group)
    scales, offsets = per_column(s, group, k), per_column(offset, group, k)
    magnitude = np.abs(exact) @ (np.abs(scales) * bits + np.abs(offsets)).T
    assert_close(y, exact @ (scales * bits + offsets).T, magnitude, k)


@pytest.mark.parametrize(("n", "k", "group", "m"), SHAPES)
def test_ternary_codes_times_8_bits_and_times_halves(kernels: Kernels, n: int, k: int, group: int, m: int) -> None:
    rng, g = np.random.default_rng(n + k), ceil_div(k, group)
    codes, s, x = rng.integers(0, 3, (n, k)), halves(rng, n, g), halves(rng, m, k)
    padded = np.zeros((n, ceil_div(k, 16) * 16), np.int64)
    padded[:, :k] = codes
    order = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]  # of columns within a word, from its lowest bits up
    words = packed(padded.reshape(n, -1, 16)[:, :, order].reshape(n, -1), 2, np.uint32)
    q = Activations(kernels, x, group, even_odd=False)

    dots = np.zeros((m, n, g), np.int32)
    kernels("w2a8_dots")((ceil_div(n * g, 128), m), words, q.q, q.sums, dots, n, k, group)
    assert np.array_equal(dots, group_sums((codes - 1)[None] * q.codes[:, None], group))

    y, grid = np.full((m, n), np.nan, np.float32), (ceil_div(n, 4), m)
    w, magnitude = per_column(s, group, k) * (codes - 1), np.abs(per_column(s, group, k))
    kernels("w2a8")(grid, words, s, q.q, q.t, q.sums, y, n, k, group)
    inputs = q.codes * per_column(q.t, group, k)
    assert_close(y, inputs @ w.T, np.abs(inputs) @ (2 * magnitude).T, k)

    kernels("w2a16")(grid, words, s, x, y, n, k, group)
    assert_close(y, x.astype(np.float64) @ w.T, np.abs(x.astype(np.float64)) @ magnitude.T, k)


def test_one_hot_x_reads_out_each_column(kernels: Kernels) -> None:
    k = 70
    codes, x = np.random.default_rng(1).integers(0, 16, (3, k)), np.eye(k, dtype=np.float16)
    q = Activations(kernels, x, 72, even_odd=True)
    dots = np.zeros((k, 3, 1), np.int32)
    kernels("w4a8_dots")((1, k), packed(codes, 4, np.uint32), q.q, dots, 3, k, 72)
    assert np.array_equal(dots[:, :, 0].T, 127 * codes)


# ---- machine code


@pytest.fixture(scope="module")
def cubins() -> dict[str, nvrtc.Compiled]:
    try:
        return {arch: nvrtc.compiled("gemv", arch) for arch in ("sm_52", "sm_61", "sm_70")}
    except MissingDependency as e:
        pytest.skip(e.message)


def test_one_source_becomes_machine_code_for_sm_52_61_and_70(cubins: dict[str, nvrtc.Compiled]) -> None:
    for arch, made in cubins.items():
        flags = int.from_bytes(made.cubin[48:52], "little")  # of the ELF header; its low byte is the architecture
        assert (made.cubin[:4], int.from_bytes(made.cubin[18:20], "little")) == (b"\x7fELF", 190)  # EM_CUDA
        assert f"sm_{flags & 0xFF}" == arch
        assert f".target {arch}" in made.ptx


def test_dp4a_is_used_where_the_gpu_has_it(cubins: dict[str, nvrtc.Compiled]) -> None:
    n_dp4a = {arch: made.ptx.count("dp4a.s32.s32") for arch, made in cubins.items()}
    assert n_dp4a["sm_52"] == 0 and n_dp4a["sm_61"] > 0 and n_dp4a["sm_70"] > 0


def test_halves_are_widened_and_never_computed_with(cubins: dict[str, nvrtc.Compiled]) -> None:
    for made in cubins.values():
        assert set(re.findall(r"\S*\.f16\S*", made.ptx)) == {"cvt.f32.f16"}


def test_no_kernel_spills_and_none_needs_more_than_48_registers(cubins: dict[str, nvrtc.Compiled]) -> None:
    names = set(cuda_on_cpu.kernel_names("gemv"))
    for made in cubins.values():
        assert set(made.kernels) == names
        for usage in made.kernels.values():
            assert usage.registers <= 48 and (usage.shared_nbytes, usage.stack_nbytes, usage.spilled_nbytes) == (0, 0, 0)


def test_without_nvrtc_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"need NVRTC 12\nhint: pip install nvidia-cuda-nvrtc-cu12==12\.9\.86"):
        nvrtc.library.__wrapped__()


def test_a_gpu_that_nvrtc_does_not_know_is_refused(cubins: dict[str, nvrtc.Compiled]) -> None:
    with pytest.raises(UnsupportedError, match="does not compile for sm_35.*\n.*sm_50"):
        nvrtc.compiled("gemv", "sm_35")
