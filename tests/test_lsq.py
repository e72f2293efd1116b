"""Scales of least squared error for formats whose own quantizers round: less error, the best where that is known."""

from __future__ import annotations

import numpy as np
import pytest
from test_kernels import normal_rows

from qconvert import kernels
from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.scheme import F32, SCHEMES, QTensor

# the error that lsq leaves of that of ggml's own on normal rows, at most; measured 0.30, 0.30, 0.26, 0.95, 0.92
SHARES = {"tq1_0": 0.35, "tq2_0": 0.35, "q2_0": 0.3, "q4_0": 0.97, "q8_0": 0.95}


def real(scheme: str, x: F32, importance: F32 | None, lanes: int | None = None) -> F32:
    found = kernels.lsq(scheme, x, importance, lanes)
    return QTensor(SCHEMES[scheme], found.codes, (found.scales,)).dequantize()


@pytest.mark.parametrize("scheme", SHARES)
def test_less_is_left_than_by_the_formats_own_quantizer(scheme: str) -> None:
    x, importance = normal_rows(16, 1024), np.exp(np.random.default_rng(0).standard_normal(1024)).astype(np.float32)
    for weights in (None, importance):
        own = LAYOUTS[f"gguf.{scheme}"].unpack(kernels.search(scheme, x, importance=weights)).dequantize()
        factor = 1 if weights is None else weights
        mine, theirs = (float((np.square(v - x) * factor).sum()) for v in (real(scheme, x, weights), own))
        assert mine < SHARES[scheme] * theirs


@pytest.mark.parametrize("scheme", ["q1_0", *SHARES])
def test_what_it_finds_packs_and_is_the_same_without_vectors(scheme: str) -> None:
    x = normal_rows(3, 512)
    found, layout = kernels.lsq(scheme, x), LAYOUTS[f"gguf.{scheme}"]
    q = QTensor(SCHEMES[scheme], found.codes, (found.scales,))
    assert np.array_equal(layout.unpack(layout.pack(q)).dequantize(), q.dequantize())
    assert np.array_equal(real(scheme, x, None, lanes=1), q.dequantize())


def test_two_levels_are_the_weighted_mean_magnitude() -> None:
    x, importance = normal_rows(2, 128), np.arange(128, dtype=np.float32)
    wanted = (np.abs(x) * importance).sum(1) / importance.sum()
    assert np.allclose(kernels.lsq("q1_0", x, importance).scales[:, 0], wanted, rtol=1e-3)  # f16


def test_three_levels_come_near_the_best_of_all_thresholds() -> None:
    """For -1, 0 and 1 the best codes are the largest magnitudes, however many: all 257 counts are tried here."""
    x = normal_rows(4, 256)
    sums = np.cumsum(-np.sort(-np.abs(x), axis=1).astype(np.float64), axis=1)
    least = np.square(x.astype(np.float64)).sum(1) - (sums**2 / np.arange(1, 257)).max(1)
    assert (np.square(real("tq2_0", x, None) - x).sum(1) < 1.001 * least).all()


@pytest.mark.parametrize("value", [0, 3, -1])
@pytest.mark.parametrize("scheme", SHARES)
def test_constants_are_met(scheme: str, value: float) -> None:
    x = np.full((1, 256), value, np.float32)
    assert np.allclose(real(scheme, x, None), x, rtol=2e-3)  # f16, and the codes of q8_0


def test_channels_of_no_importance_do_not_count() -> None:
    x = normal_rows(2, 256)
    importance = np.ones(256, np.float32)
    importance[::2] = 0
    moved = x.copy()
    moved[:, ::2] *= np.float32(0.5)
    assert np.array_equal(real("tq2_0", x, importance)[:, 1::2], real("tq2_0", moved, importance)[:, 1::2])


def test_other_schemes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="tq2_0"):
        kernels.lsq("q4_k", np.zeros((1, 256), np.float32))
