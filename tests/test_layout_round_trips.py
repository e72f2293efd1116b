"""Every layout of the registry: what random bytes mean, written again and read again, means the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import cast

import numpy as np
import pytest

from qconvert import registry
from qconvert.errors import InputError
from qconvert.layouts import layout_of
from qconvert.scheme import Layout, QTensor

N, K = 5, 512
TABLES = sorted(registry.entries("layouts"))
ALL = sorted(name for table in TABLES for name in cast(Mapping[str, Layout], registry.find("layouts", table)))
APART = ("bitnet.", "hqq.", "quip.")  # their codes are tensors of their own, beside rows of nothing or of zero points
NAMES = [name for name in ALL if not name.startswith(APART)]


def random_values(layout: Layout, rng: np.random.Generator) -> QTensor:
    """What random bytes mean; where those mean nothing (a zero point that is no choice), any codes and any scales."""
    nbytes = layout.row_nbytes(K)
    try:
        return within(layout.unpack(rng.integers(0, 256, (N, nbytes), np.uint8)))
    except InputError:
        q = layout.unpack(layout.pack(zeros(layout)))
        codes = rng.permuted(np.resize(np.arange(1 << layout.scheme.bits, dtype=np.uint8), (N, K)), axis=1)
        return q._replace(codes=(codes - np.uint8(layout.scheme.centre)).view(q.codes.dtype))


def within(q: QTensor) -> QTensor:
    """Codes of the scheme's bits, where a byte each has room for more; scales that are numbers."""
    low, high = -1 << (q.scheme.bits - 1), (1 << q.scheme.bits) - 1
    codes = q.codes.astype(np.int16)
    if codes.min() < low or codes.max() > high:
        codes &= high
        codes = codes - ((codes > high >> 1) << q.scheme.bits if q.codes.dtype == np.int8 else 0)
    both = zip(q.scheme.levels, q.levels, strict=True)
    levels = tuple(v % (1 << each.bits) if each.dtype[0] == "u" else np.where(np.isnan(v), 1, v) for each, v in both)
    return q._replace(codes=codes.astype(q.codes.dtype), levels=levels)


def zeros(layout: Layout) -> QTensor:
    levels = tuple(np.zeros((N, level.entries(K)), np.float32) for level in layout.scheme.levels)
    return QTensor(layout.scheme, np.zeros((N, K), np.int8), levels)


@pytest.mark.parametrize("name", NAMES)
def test_values_survive_being_written_and_read(name: str) -> None:
    layout, rng = layout_of(name), np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(8):
        q = random_values(layout, rng)
        packed = layout.pack(q)
        assert packed.shape == (N, layout.row_nbytes(K))
        again = layout.unpack(packed)
        np.testing.assert_array_equal(again.codes, q.codes)
        for a, b in zip(again.levels, q.levels, strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_format_has_layouts_here() -> None:
    assert {name.partition(".")[0] for name in ALL} == set(TABLES)
    assert all(not layout_of(name).whole for name in set(ALL) - set(NAMES))
