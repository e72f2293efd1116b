"""The Triton kernels, interpreted: every layout against the library that owns it, and products against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from packed_operands import CASES, Packed, packed, weights

pytest.importorskip("triton")

from qconvert.errors import InputError, UnsupportedError
from qconvert.kernels.gpu import reference
from qconvert.kernels.gpu.check import bound, integer_error, product_error, relative
from qconvert.kernels.gpu.launch import Tiles, dequantize, integer_product, integer_sums, multiply, product, unpack
from qconvert.kernels.gpu.operand import Codes, Metadata, Operand, Part, Second, contract
from qconvert.kernels.gpu.records import place

ALL = pytest.mark.parametrize("name", CASES)


def plain(p: Packed) -> Operand:
    return dataclasses.replace(p.operand, low_rank=None)


@ALL
def test_dequantized_weights_are_the_librarys(name: str) -> None:
    p = packed(name)
    wanted = np.abs(p.theirs).max() * 2.0**-24 * p.ulps
    assert np.abs(dequantize(p.operand) - p.theirs).max() <= wanted
    assert relative(reference.dense(p.operand), p.theirs) < 2**-22


@ALL
def test_codes_are_unpacked(name: str) -> None:
    w = packed(name).operand
    if isinstance(w.codes, Codes):
        assert np.array_equal(unpack(w), reference.codes(w))


@ALL
def test_each_column_is_read_where_it_lies(name: str) -> None:
    p = packed(name)
    n, k = p.operand.shape
    eye = np.eye(k, dtype=np.float32)
    tolerance = np.abs(p.theirs).max() * 2.0**-22
    assert np.abs(product(eye, plain(p)).T - p.theirs).max() <= tolerance
    for column in (0, 1, k - 1):
        assert np.abs(product(eye[column : column + 1], plain(p))[0] - p.theirs[:, column]).max() <= tolerance


@ALL
def test_products_are_within_4_sqrt_k_roundings(name: str) -> None:
    p = packed(name)
    k = p.operand.shape[1]
    for m in (1, 4, 32, 128):
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        wanted = x.astype(np.float64) @ p.theirs.astype(np.float64).T
        if p.operand.low_rank:
            wanted += reference.product(x, p.operand) - reference.product(x, plain(p))
        assert relative(product(x, p.operand), wanted) <= bound(k) + 2.0**-24 * p.ulps
