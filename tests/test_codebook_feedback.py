"""GPTQ on ggml's codebooks: each entry is the best of all in f64, given those before it, and errors of outputs fall."""

from __future__ import annotations

import numpy as np
import pytest
from test_gptq import F64, K, N, given, of, output_error, problem

from qconvert import kernels
from qconvert.codebooks import entries
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.scheme import CODEBOOKS, F32, QTensor
from qconvert.solving import Gptq

NAMES = tuple(CODEBOOKS)


def solved(name: str, x: F32, h: F64) -> QTensor:
    return Gptq().solve(of(name), x, given(x, h))


def cost_of_group(rest: F64, u: F64, d: F64, begin: int, values: F64) -> F64:
    """What it costs to round columns from `begin` on to values [..., width], one after another; rest: those weights now."""
    width, total, errors = values.shape[-1], np.zeros(values.shape[:-1]), list[F64]()
    for i in range(width):
        e = rest[..., i] - sum((errors[j] * u[begin + j, begin + i] for j in range(i)), np.zeros(())) - values[..., i]
        errors.append(e)
        total += d[begin + i] * e**2
    return total


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_the_best_of_all_with_its_signs(name: str) -> None:
    x, h = problem()
    x = x[:3]
    q = solved(name, x, h)
    grid, shifted = entries(name).astype(np.float64), name.startswith("iq1")
    width, fine = grid.shape[1], of(name).levels[1].group or 0
    scales = (q.levels[0].astype(np.float64).repeat(256 // fine, 1) * q.levels[1]).repeat(fine, 1)
    u = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.trace(h) / K * np.eye(K))).T
    d, u = u.diagonal() ** -2.0, u / u.diagonal()[:, None]
    w = x.astype(np.float64)
    codes = q.codes.view(np.int8).astype(np.float64)
    for begin in range(0, K, width):
        here = slice(begin, begin + width)
        if shifted:
            shift = np.where((q.codes[:, begin].view(np.int8) & 7) == 7, -1.0, 1.0)
            any_of = 8 * grid[None] + shift[:, None, None]
        else:
            any_of = grid[None] * np.sign(codes[:, None, here])
        costs = cost_of_group(w[:, None, here], u, d, begin, scales[:, None, here] * any_of)
        taken = cost_of_group(w[:, here], u, d, begin, scales[:, here] * codes[:, here])
        assert (taken <= costs.min(1) * (1 + 1e-3) + 1e-12).all()
        for j in range(begin, begin + width):
            w[:, j + 1 :] -= np.outer(w[:, j] - scales[:, j] * codes[:, j], u[j, j + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_output_error_is_far_below_that_of_ggmls_search(name: str) -> None:
    x, h = problem()
    searched = kernels.search(name, x, importance=h.diagonal().astype(np.float32))
    peer = output_error(LAYOUTS[f"gguf.{name}"].unpack(searched), x, h)
    assert output_error(solved(name, x, h), x, h) < 0.7 * peer  # measured 0.44 to 0.60


@pytest.mark.parametrize("name", NAMES)
def test_blocks_hold_what_was_chosen_whatever_rows_are_beside(name: str) -> None:
    x, h = problem()
    layout, q = LAYOUTS[f"gguf.{name}"], solved(name, x, h)
    packed = layout.pack(q)
    np.testing.assert_array_equal(layout.unpack(packed).dequantize(), q.dequantize())
    parts = [layout.pack(solved(name, x[i:j], h)) for i, j in ((0, 5), (5, 64), (64, N))]
    np.testing.assert_array_equal(np.concatenate(parts), packed)


def test_weights_of_nothing_stay_nothing() -> None:
    x, h = problem()
    x[3], x[4, :256] = 0, 0
    for name in NAMES:
        values = solved(name, x, h).dequantize()
        assert not values[3].any() and not values[4, :256].any() and np.isfinite(values).all()
