"""Codes and zero points of hqq's own quantizer, by its package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import cast

import numpy as np
import pytest

from qconvert.scheme import F32, Scheme, scheme_of
from qconvert.solving import Given, Hqq


def weights(size: float, n: int = 48, k: int = 256) -> F32:
    return (np.random.default_rng(0).standard_t(5, size=(n, k)) * size).astype(np.float32)


@pytest.fixture(autouse=True)
def hqq(visible: Callable[[str], ModuleType]) -> None:
    visible("hqq")


def theirs(x: F32, bits: int, group: int) -> tuple[F32, F32, F32]:
    torch = pytest.importorskip("torch")
    quantizer = import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(torch.from_numpy(x), nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu")
    return tuple(v.numpy().reshape(len(x), -1) for v in (codes, meta["scale"], meta["zero"]))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [0.02, 1.0])  # of weights: errors of large ones are not shrunk to nothing
@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_scales_and_zero_points_are_those_of_hqq(bits: int, group: int, size: float) -> None:
    x, scheme = weights(size), cast(Scheme, scheme_of(f"uint{bits}f_g{group}"))
    q = Hqq().solve(scheme, x, Given(over_all=lambda f: f([x[:20], x[20:]])))
    codes, scales, zeros = theirs(x, bits, group)
    assert (q.codes == codes).mean() > 0.9998  # a group's mean is summed in another order; measured 1.0 but for 8 bits
    np.testing.assert_array_equal(q.levels[0], scales)
    np.testing.assert_allclose(q.levels[1], zeros, rtol=1e-5, atol=1 / group + 1e-6)  # one code's flip moves it by 1 / group
    assert np.median(np.abs(q.levels[1] - zeros)) < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("bits", [2, 4])
def test_the_same_of_axis_0_whose_groups_are_values_apart(bits: int) -> None:
    """hqq makes [group, N K / group] of a weight and searches down its columns: here they are rows."""
    torch = pytest.importorskip("torch")
    x, group, scheme = weights(0.02), 64, cast(Scheme, scheme_of(f"uint{bits}f_g64"))
    rows = np.ascontiguousarray(x.reshape(group, -1).T)
    q = Hqq().solve(scheme, rows, Given(over_all=lambda f: f([rows])))
    quantizer = import_module("hqq.core.quantize").Quantizer
    how = {"nbits": bits, "group_size": group, "axis": 0, "bitpack": False, "device": "cpu"}
    codes, meta = quantizer.quantize(torch.from_numpy(x), **how)
    assert (q.codes == codes.numpy().reshape(group, -1).T).mean() > 0.9998
    np.testing.assert_array_equal(q.levels[0], meta["scale"].numpy().T)
    np.testing.assert_allclose(q.levels[1], meta["zero"].numpy().T, rtol=1e-5, atol=1 / group + 1e-6)


def test_it_stops_where_the_error_of_the_whole_weight_does() -> None:
    """Stopping each block of rows by itself would give other codes."""
    x, scheme = weights(0.02), cast(Scheme, scheme_of("uint4f_g16"))
    x[24:] *= 30
    together = Hqq().solve(scheme, x[:24], Given(over_all=lambda f: f([x])))
    np.testing.assert_array_equal(together.codes, theirs(x, 4, 16)[0][:24])


def test_it_makes_nothing_without_a_free_zero_point() -> None:
    for name in ("int4_g64", "uint4_g64", "q4_0", "nf4_g64", "q4_k"):
        assert Hqq().refuses(cast(Scheme, scheme_of(name)))
    assert Hqq().refuses(cast(Scheme, scheme_of("uint3o_g64_bf16"))) is None
