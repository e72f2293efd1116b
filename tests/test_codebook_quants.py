"""Quantizers of IQ1_S to IQ3_S against ggml's own, byte for byte, with vectors and without; what they are refused for."""

from __future__ import annotations

import ggml_oracle
import numpy as np
import pytest
from test_kernels import hard_rows, importances, normal_rows

from qconvert import kernels
from qconvert.codebooks import entries
from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.formats.gguf_values import dequantized
from qconvert.kernels.codebook_cells import LENGTH, cells
from qconvert.scheme import CODEBOOKS

NAMES = sorted(CODEBOOKS)
WITHOUT = ("iq1_m", "iq2_s", "iq3_s", "iq3_xxs")  # ggml makes these with no importance too
needs_ggml = pytest.mark.skipif(ggml_oracle.library() is None, reason="xllamacpp is not installed")
ROWS = 3  # of each hard case: ggml is slow


@needs_ggml
@pytest.mark.parametrize("lanes", [pytest.param(None, id="vectors"), pytest.param(1, id="scalars", marks=pytest.mark.peer)])
@pytest.mark.parametrize("name", NAMES)
def test_search_writes_the_bytes_of_ggml_with_importance(name: str, lanes: int | None) -> None:
    (normal, x), *others = hard_rows()
    cases = [(normal, x, kind) for kind in range(7)] + [(what, y, i % 7) for i, (what, y) in enumerate(others)]
    for what, x, i in cases:
        x = np.ascontiguousarray(x[:ROWS])
        kind, importance = list(importances(x.shape[1]))[i]
        wanted = ggml_oracle.quantize(name, x, importance=importance)
        wrong = np.flatnonzero((kernels.search(name, x, lanes, importance=importance) != wanted).any(1))
        assert not wrong.size, f"{what}, importance {kind}: rows {wrong.tolist()}"


@needs_ggml
@pytest.mark.parametrize("name", WITHOUT)
def test_search_writes_the_bytes_of_ggml_without(name: str) -> None:
    for what, x in hard_rows():
        x = np.ascontiguousarray(x[:ROWS])
        wrong = np.flatnonzero((kernels.search(name, x) != ggml_oracle.quantize(name, x)).any(1))
        assert not wrong.size, f"{what}: rows {wrong.tolist()}"


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITHOUT)))
def test_what_needs_importance_is_refused_without(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} needs an importance matrix") as e:
        kernels.search(name, np.zeros((1, 256), np.float32))
    assert e.value.hint == "--calibrate FILE or --imatrix FILE"


@pytest.mark.parametrize("name", NAMES)
def test_what_search_wrote_dequantizes_like_gguf_py_and_is_packed_again(name: str) -> None:
    packed = kernels.search(name, normal_rows(2, 512), importance=np.ones(512, np.float32))
    layout = LAYOUTS[f"gguf.{name}"]
    q = layout.unpack(packed)
    assert np.array_equal(q.dequantize(), dequantized(packed, name.upper()))
    assert np.array_equal(layout.pack(q), packed)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_of_a_cell_are_the_nearest_entries(name: str) -> None:
    grid, found = entries(name), cells(name)
    levels, rng = np.searchsorted(np.unique(grid), grid), np.random.default_rng(0)
    width, radix, bits = grid.shape[1], 3 if grid.shape[1] == 8 else 8, 2 if grid.shape[1] == 8 else 3
    for cell in rng.integers(0, radix**width, 20):
        point = cell // radix ** np.arange(width) % radix
        distance = ((levels - point) ** 2).sum(1)
        begin, n = found.spans[cell] >> LENGTH, found.spans[cell] & (1 << LENGTH) - 1
        words = found.words[begin : begin + max(n, 1)].astype(int)
        got = distance[found.entry[words]]
        assert (np.diff(got) >= 0).all() and got[0] == distance.min() and (n == 0) == (got[0] == 0)
        assert n == 0 or n == (distance <= got[-1]).sum()  # whole shells
        assert np.array_equal(words >> bits * np.arange(width)[:, None] & (1 << bits) - 1, levels[found.entry[words]].T)
