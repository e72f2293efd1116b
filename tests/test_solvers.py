"""Solvers on every grid: distortion of normal weights against the published optimum, importance, whole rows, refusals."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from qconvert.errors import UnsupportedError, UsageError
from qconvert.passes.quantize import Quantize
from qconvert.scheme import F32, SCHEMES, QTensor, Scheme, scheme_of
from qconvert.solver_spec import Solving, chosen, reads_statistics
from qconvert.solving import Given, Hqq, Lsq, Rtn, Solver
from qconvert.text import parse

X: F32 = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
ALL = (
    *SCHEMES, "uint1f_g8", "uint1_g8", "uint2f_row", "uint3_g40", "int3_g64", "uint3o_g64_bf16", "int4_row", "uint4_g32_f16",
    "uint5f_g8", "int6_g16", "uint7_g128", "int8_g64", "nf4_g64", "fp4_row", "ternary_g128", "binary_g128", "binary_row",
    "nvfp4", "mxfp4", "mxfp8", "e4m3_row", "e4m3_b128", "e4m3_tensor",
)  # fmt: skip


def of(name: str) -> Scheme:
    return cast(Scheme, scheme_of(name))


def solved(solver: Solver, name: str, x: F32, given: Given | None = None) -> QTensor:
    return solver.solve(of(name), x, given or Given(float(np.abs(x).max()), over_all=lambda f: f([x])))


def nmse(q: QTensor, x: F32) -> float:
    return float(np.square(q.dequantize() - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


# What least squares leaves of iid normal weights, and rounding between the extremes: bits, group, NMSE
LEAST = {(1, 8): 0.212, (1, 16): 0.290, (1, 64): 0.344, (2, 16): 0.067, (2, 32): 0.089, (2, 64): 0.103, (3, 128): 0.032,
         (4, 64): 0.0067, (4, 128): 0.0083}  # fmt: skip
EXTREMES = {(1, 8): 0.686, (1, 16): 1.27, (1, 64): 2.73, (2, 16): 0.107, (2, 32): 0.155, (2, 64): 0.203, (3, 128): 0.046,
            (4, 64): 0.0080, (4, 128): 0.0100}  # fmt: skip
PROXIMAL = {(1, 8): 0.589, (1, 16): 1.06, (1, 64): 2.27, (2, 16): 0.091, (2, 32): 0.138, (2, 64): 0.188, (3, 128): 0.043,
            (4, 64): 0.0074, (4, 128): 0.0093}  # fmt: skip


@pytest.mark.parametrize(("bits", "group"), LEAST)
def test_distortion_is_that_of_least_squares(bits: int, group: int) -> None:
    assert nmse(solved(Lsq(), f"uint{bits}f_g{group}", X), X) == pytest.approx(LEAST[bits, group], rel=0.03)


@pytest.mark.parametrize(("bits", "group"), EXTREMES)
def test_distortion_is_that_of_rounding_between_the_extremes(bits: int, group: int) -> None:
    assert nmse(solved(Rtn(), f"uint{bits}f_g{group}", X), X) == pytest.approx(EXTREMES[bits, group], rel=0.03)


@pytest.mark.parametrize(("bits", "group"), PROXIMAL)
def test_distortion_is_that_of_hqq(bits: int, group: int) -> None:
    assert nmse(solved(Hqq(), f"uint{bits}f_g{group}", X), X) == pytest.approx(PROXIMAL[bits, group], rel=0.05)


def test_binary_and_ternary_codes_are_best_too() -> None:
    assert nmse(solved(Lsq(), "binary_g128", X), X) == pytest.approx(0.361, rel=0.02)
    assert nmse(solved(Lsq(), "ternary_g128", X), X) == pytest.approx(0.187, rel=0.02)


def test_two_levels_are_the_best_of_all_ways_to_part_a_group() -> None:
    x = X[:40, :8]
    q = solved(Lsq(), "uint1f_g8", x)
    for row, error in zip(x, np.square(q.dequantize() - x).sum(1), strict=True):
        ways = [np.array([i >> j & 1 for j in range(8)], bool) for i in range(1, 255)]
        best = min(row[way].var() * way.sum() + row[~way].var() * (~way).sum() for way in ways)
        assert error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_least_squares_are_no_worse_than_rounding(name: str) -> None:
    k = 640 if "g40" in name else 512
    x = np.random.default_rng(1).standard_t(4, size=(16, k)).astype(np.float32)
    coarse, fine = solved(Rtn(), name, x), solved(Lsq(), name, x)
    assert nmse(fine, x) <= nmse(coarse, x) * 1.0001
    assert nmse(fine, x) < 0.9


@pytest.mark.parametrize("name", ["uint2f_g32", "int3_g64", "uint4_g64", "nf4_g64", "ternary_g64", "uint1f_g16"])
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    x = X[:64]
    moments = np.exp(np.random.default_rng(2).normal(size=x.shape[1]) * 2).astype(np.float32)
    plain, weighed = (solved(Lsq(), name, x, Given(moments=m)) for m in (None, moments))
    errors = [float((np.square(q.dequantize() - x) * moments).sum()) for q in (plain, weighed)]
    assert errors[1] < 0.93 * errors[0]


@pytest.mark.parametrize("name", ["uint3_g64", "uint4f_g16", "int5_g32", "nf4_g32", "binary_g64"])
def test_rows_do_not_depend_on_those_beside_them(name: str) -> None:
    x = X[:70, :256]
    whole, parts = solved(Lsq(), name, x), [solved(Lsq(), name, x[i:j]) for i, j in ((0, 3), (3, 35), (35, 70))]
    np.testing.assert_array_equal(whole.codes, np.concatenate([p.codes for p in parts]))
    for i, v in enumerate(whole.levels):
        np.testing.assert_array_equal(v, np.concatenate([p.levels[i] for p in parts]))


@pytest.mark.parametrize("value", [0.0, 1.5, -1e-30])
@pytest.mark.parametrize("solver", [Rtn(), Lsq()])
@pytest.mark.parametrize("name", ["uint4f_g32", "uint4_g32", "int4_g32", "uint3o_g32", "nf4_g32", "q4_k", "uint1f_g8"])
def test_constant_groups_stay_what_they_are(name: str, solver: Solver, value: float) -> None:
    x = np.full((3, 256), value, np.float32)
    np.testing.assert_allclose(solved(solver, name, x).dequantize(), x, rtol=0.08, atol=1e-20)


def test_solvers_are_named_with_options_and_refuse_what_is_not_theirs() -> None:
    assert chosen("gptq{damp=0.05 ordered=true}").attrs == {"solver": "gptq", "damp": 0.05, "ordered": True}
    assert chosen("gptq").attrs == {"solver": "gptq"}
    with pytest.raises(UsageError, match="damp is float, not 'x'"):
        chosen("gptq{damp=x}")
    with pytest.raises(UnsupportedError, match="no solver is called 'gtpq'; there are absmax, .*awq, .*search") as caught:
        Solving.of("gtpq")
    assert caught.value.hint == "did you mean 'gptq'?"
    with pytest.raises(UnsupportedError, match="no solver is called 'awk'") as caught:
        Solving.of("awk+gptq")
    assert caught.value.hint == "did you mean 'awq'?"
    with pytest.raises(UsageError, match="search: no option 'a=1'; it has none"):
        chosen("search{a=1}")
    with pytest.raises(UsageError, match=r"--solver gptq\+awq: what a fold goes on with is one solver"):
        Solving.of("gptq+awq")
    assert all(Solving.of(s) for s in ("awq", "smoothquant", "awq+gptq{damp=1e+3}", "auto", "gptq{damp=1e+3}"))
    graph = parse('%w : f32[4,64] = load() {"tensor": "base/m.safetensors#w"}\nreturn %w')
    with pytest.raises(UnsupportedError, match=r"w: solver search makes no int4_g32: it is ggml's own"):
        Quantize("", "search", {"w": "int4_g32"})(graph)
    with pytest.raises(UsageError, match=r"w: solver gptq needs %w~hessian"):
        Quantize("", "gptq", {"w": "int4_g32"})(graph)
    for kind, solver, said in (("e8p", "gptq", "points of a lattice"), ("nvfp4", "absmax", "it makes NF4, FP4")):
        assert said in str(chosen(solver).refuses(of(kind)))
    mixed = Quantize("", "mse", {"w": "int4_g32"}, solvers={"w": "lsq"})(graph)
    assert mixed.nodes["w"].attrs == {"solver": "lsq"}


def test_a_fold_and_the_choice_of_solvers_read_a_text_too() -> None:
    assert [s for s in (None, "mse", "rtn", "lsq", "gptq", "awq", "smoothquant+rtn", "auto") if reads_statistics(s)] == [
        "lsq", "gptq", "awq", "smoothquant+rtn", "auto"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["uint4o_g32", "q4_1", "q4_k", "uint4_g32"])
def test_the_sign_of_a_zero_changes_no_byte_of_rounding(name: str) -> None:
    x = np.zeros((3, 256), np.float32)
    x[1, ::2], x[2] = 1, np.random.default_rng(0).random(256) * (np.arange(256) % 3 > 0)
    plain, other = (Rtn().solve(of(name), v, Given()) for v in (x, np.where(x == 0, np.float32(-0.0), x)))
    assert [v.tobytes() for v in (plain.codes, *plain.levels)] == [v.tobytes() for v in (other.codes, *other.levels)]
