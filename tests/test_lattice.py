"""QuIP#'s lattice, its nearest points and its Hadamard matrices, against quip-sharp's own functions."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import quip_oracle
import torch

from qconvert import kernels, lattice_weights
from qconvert.kernels.hadamard import ORDERS, factors
from qconvert.kernels.lattice import MAGNITUDES, POINTS
from qconvert.scheme import F32

# sha256 of quip-sharp's _E8P_GRID * 4 as i8, and of its get_had12 … get_had172 as i8, one behind another
GRID = "ea3883a85a627590ca74626320a2a691943386a8c89ac72cdb6388bfe7da5cc0"
TABLES = "d8e20babc7110790cb95aad569093b6d78b6020cadffc1f28029966868e85881"


def digest(*arrays: npt.NDArray[Any]) -> str:
    return sha256(b"".join(np.ascontiguousarray(a).astype(np.int8).tobytes() for a in arrays)).hexdigest()


# points -------------------------------------------------------------------------------------------


def test_points_are_those_of_quip_sharp_by_their_digest() -> None:
    assert digest(POINTS) == GRID and len(np.unique(POINTS, axis=0)) == 1 << 16


@pytest.mark.peer
def test_the_digest_is_that_of_quip_sharps_grid() -> None:
    theirs = quip_oracle.grid().numpy() * 4
    assert np.array_equal(theirs, POINTS) and digest(theirs) == GRID


def test_some_points_by_hand() -> None:
    """Magnitudes 0 are eight halves, 1 has 3/2 last: an odd sum makes that negative. Bit 0 of the signs shifts by -1/4."""
    codes = np.array([[0x0000, 0x0001, 0x0003, 0x0100, 0x0180]], np.uint16)
    want = [[3] * 8, [1] * 8, [-1, 3, -1] + [3] * 5, [3] * 7 + [-5], [-3] + [1] * 6 + [5]]
    assert kernels.e8p_points(codes).reshape(-1, 8).tolist() == want


def test_magnitudes_are_what_the_definition_says() -> None:
    squares = (MAGNITUDES.astype(int) ** 2).sum(1)
    assert (squares[:227] <= 40).all() and (squares[227:] == 48).all()
    assert sorted(MAGNITUDES[:227].tolist()) == MAGNITUDES[:227].tolist()


def test_every_code_is_found_again() -> None:
    assert np.array_equal(kernels.e8p_codes(POINTS).reshape(-1), np.arange(1 << 16))


def hard_groups() -> F32:
    rng = np.random.default_rng(0)
    wide = [rng.standard_normal((150, 8)) * s for s in (0.1, 0.5, 1, 1.03, 2, 5)]
    near = POINTS[rng.integers(0, 1 << 16, 100)] / 4 + rng.standard_normal((100, 8)) * 0.3
    halfway = rng.integers(-12, 13, (100, 8)) / 4
    corners = np.array([[0] * 8, [1e3] * 8, [-1e4] + [0] * 7, [1.5] * 5 + [0.5] * 3, [2.5, 1.5] + [0.5] * 6])
    return np.concatenate([*wide, near, halfway, corners]).astype(np.float32)


def test_the_nearest_point_is_none_nearer() -> None:
    x = hard_groups()
    found = kernels.e8p_nearest(x, 1.0)
    assert np.array_equal(POINTS[kernels.e8p_codes(found)].reshape(found.shape), found)
    exact = x.astype(np.float64)
    points = POINTS.astype(np.float64) / 4
    least = (np.square(points).sum(1) - 2 * exact @ points.T).min(1)
    got = np.square(found / 4.0).sum(1) - 2 * (exact * found / 4).sum(1)
    np.testing.assert_allclose(got, least, rtol=1e-6, atol=1e-5)  # ties, as f32 sees them


@pytest.mark.peer
def test_the_nearest_point_is_as_near_as_quip_sharps() -> None:
    x = torch.from_numpy(hard_groups())
    theirs = quip_oracle.codebook().quantize(x, return_idx=False)
    mine = torch.from_numpy(kernels.e8p_nearest(x.numpy(), 1.0) / 4)
    assert ((x - mine).norm(dim=1) <= (x - theirs).norm(dim=1) * (1 + 1e-6) + 1e-6).all()
    assert ((x - mine).norm(dim=1) < (x - theirs).norm(dim=1) - 1e-3).sum() == 0


def test_gaussian_weights_lose_what_is_published() -> None:
    """0.0917 of their square; here 0.0914, from the scale of least error."""
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32) * np.float32(0.02)
    points, unit = lattice_weights.nearest(x)
    error = np.square(x - points * (unit / 4), dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum()
    assert error == pytest.approx(0.0917, rel=0.01)


def test_zeros_stay_zeros() -> None:
    points, unit = lattice_weights.nearest(np.zeros((16, 64), np.float32))
    assert unit == 0 and not (points * unit).any()


# Hadamard matrices --------------------------------------------------------------------------------


def test_matrices_are_those_of_quip_sharp_by_their_digest() -> None:
    assert digest(*(factors(q).small for q in sorted(ORDERS))) == TABLES


def test_the_digest_is_that_of_quip_sharps_tables() -> None:
    theirs = quip_oracle.hadamard()
    assert digest(*(theirs[f"get_had{q}"]().numpy() for q in sorted(ORDERS))) == TABLES


@pytest.mark.parametrize("n", [64, 192, 1280, 1792, 1376])
def test_rows_are_turned_as_quip_sharp_turns_them(n: int) -> None:
    theirs, x = quip_oracle.hadamard(), np.random.default_rng(0).standard_normal((16, n))
    one = np.ones(1)
    for transpose, name in ((True, "matmul_hadUt"), (False, "matmul_hadU")):
        turn = kernels.incoherent if transpose else kernels.coherent
        for row in x[:3]:
            got = turn(row[None].copy(), np.ones(n), one)[0]
            want = theirs[name](torch.from_numpy(row)[None].clone())[0].numpy()
            np.testing.assert_allclose(got, want, atol=1e-6)  # their root is one of f32


@pytest.mark.parametrize("n", [1, 8, 12, 28, 36, 44, 52, 99, 116, 124, 704])
def test_turned_and_back_is_the_same_and_lengths_are_kept(n: int) -> None:
    rng = np.random.default_rng(0)
    x, su, sv = rng.standard_normal((24, n)), rng.choice([-1.0, 1.0], n), rng.choice([-1.0, 1.0], 24)
    turned = kernels.incoherent(x.copy(), su, sv)
    assert np.square(turned).sum() == pytest.approx(np.square(x).sum(), rel=1e-12)
    np.testing.assert_allclose(kernels.coherent(turned.copy(), su, sv), x, atol=1e-12)


def test_an_outlier_is_spread_over_the_whole_weight() -> None:
    x = np.zeros((64, 128), np.float32)
    x[5, 7] = 1
    turned = kernels.incoherent(x, np.ones(128, np.float32), np.ones(64, np.float32))
    np.testing.assert_allclose(np.abs(turned), 1 / np.sqrt(64 * 128), rtol=1e-6)


def test_which_widths_quip_sharp_has() -> None:
    assert all(map(kernels.known_width, (1, 64, 4096, 11008, 14336, 5120, 13824, 28672)))
    assert not any(map(kernels.known_width, (44, 5632, 99, 7)))


# ldlq ---------------------------------------------------------------------------------------------


def correlated(k: int) -> npt.NDArray[np.float64]:
    x = np.random.default_rng(1).standard_normal((4 * k, k)) @ np.diag(np.geomspace(3, 0.03, k))
    turned = x @ np.linalg.qr(np.random.default_rng(2).standard_normal((k, k)))[0]
    return turned.T @ turned / len(turned)


def proxy(x: F32, points: npt.NDArray[np.int8], unit: np.float32, hessian: npt.NDArray[np.float64]) -> float:
    error = x.astype(np.float64) - points * (unit / 4)
    return float(np.sum(error @ hessian * error))


def test_errors_fed_back_make_outputs_better() -> None:
    x, hessian = np.random.default_rng(0).standard_normal((64, 256), np.float32), correlated(256)
    fed = proxy(x, *lattice_weights.ldlq(x, hessian.copy()), hessian)
    assert fed < 0.35 * proxy(x, *lattice_weights.nearest(x), hessian)  # measured 0.2


def test_without_correlation_ldlq_is_nearest() -> None:
    x = np.random.default_rng(0).standard_normal((32, 192), np.float32)
    points, unit = lattice_weights.ldlq(x, np.eye(192))
    assert np.array_equal(points, kernels.e8p_nearest(x, float(unit)))


@pytest.mark.peer
def test_points_are_those_of_quip_sharps_ldlq() -> None:
    """With its unit and its Hessian; sums of f32 in another order may let single points fall to another side."""
    x, hessian = np.random.default_rng(0).standard_normal((64, 256), np.float32), correlated(256)
    feedback, unit = lattice_weights.block_ldl(hessian), np.float32(1)
    mine = lattice_weights.fed_back(x, feedback, unit)
    space = quip_oracle.run(quip_oracle.text("lib/utils/math_utils.py", "def block_LDL", "def approx_int_sqrt"))
    lower, _ = space["block_LDL"](torch.from_numpy(hessian).float(), 8)
    ldlq = quip_oracle.run(quip_oracle.text(quip_oracle.QUIP, "def LDLQ(", "def LDLQ_buffered("))["LDLQ"]
    options = type("Options", (), {"resid_scale_override": -1, "quip_tune_iters": 0})
    theirs, _ = ldlq(torch.from_numpy(x), torch.from_numpy(hessian).float(), lower, None, quip_oracle.codebook(), options)
    assert np.mean((theirs.numpy() * 4 == mine).reshape(64, -1, 8).all(-1)) > 0.99
