"""A kernel against the float64 reference, on so little of a weight that the interpreter needs a second at most."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from qconvert.kernels.gpu import reference
from qconvert.kernels.gpu.launch import expanded, multiply, rounded
from qconvert.kernels.gpu.operand import Operand, Part, contract
from qconvert.kernels.gpu.records import place, tensor
from qconvert.scheme import F32, Array

ROWS = 16  # at each end of a weight: where tails and parts of rows begin and end
SHAPES = ((1, 1 << 15), (4, 512))  # rows of x, and columns at most


class ProductError(NamedTuple):
    contract: str  # the formula that ran
    n_wrong: int  # codes, and integer sums, that are not the reference's
    weights: float  # greatest error of a dequantized weight, in parts of the greatest weight
    product: float  # greatest error of a product: |y - y64| / |y64| as norms
    bound: float  # of the product's: 4 sqrt(K) 2^-24

    @property
    def passed(self) -> bool:
        return self.n_wrong == 0 and self.weights <= 2**-22 and self.product <= self.bound


def relative(y: Array, wanted: Array) -> float:
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(y - wanted)) / (norm or 1.0)


def inputs(m: int, k: int) -> F32:
    """f32[m,k], normal, the same each time."""
    return np.random.default_rng(0).standard_normal((m, k), np.float32)


def parts_of(w: Operand, columns: int) -> list[Part]:
    """Its first rows and its last."""
    n, k = w.shape
    firsts = sorted({0, max(0, n - ROWS)})
    return [Part(first, min(n, first + ROWS), min(k, columns)) for first in firsts]


def product_error(w: Operand, x: F32 | None = None) -> ProductError:
    """Of the float kernels on the first and last rows of w; x f32[M,K], of which SHAPES are taken, normal where it is None."""
    placed, k = place(w), w.shape[1]
    wrong, of_weights, of_product = 0, 0.0, 0.0
    x = inputs(max(m for m, _ in SHAPES), k) if x is None else x
    for part in parts_of(w, SHAPES[-1][1]):
        q, v = (expanded(placed, dtype, part) for dtype in (torch.int32, torch.float32))
        exact = reference.dense(w, part)
        wrong += int((q != reference.codes(w, part).astype(np.int32)).sum())
        of_weights = max(of_weights, float(np.abs(v - exact).max() / (np.abs(exact).max() or 1.0)))
    for m, columns in SHAPES:
        for part in parts_of(w, columns):
            given = np.ascontiguousarray(x[:m, : part.columns])
            y = multiply(tensor(given, placed.device), placed, part=part).cpu().numpy()
            of_product = max(of_product, relative(y, reference.product(given, w, part)))
    return ProductError(contract(w), wrong, of_weights, of_product, bound(k))


def integer_error(w: Operand, x: F32 | None = None, static: float | None = None, steps: float = 127.5) -> ProductError:
    """Of the product of a weight of one scale a row by x rounded to i8, by a scale a row of x or by the static one."""
    placed, k = place(w), w.shape[1]
    x = inputs(max(m for m, _ in SHAPES), k) if x is None else x
    wrong, error = 0, 0.0
    for m, columns in SHAPES:
        for part in parts_of(w, columns):
            given = np.ascontiguousarray(x[:m, : part.columns])
            q, t = rounded(tensor(given, placed.device), static=static, steps=steps)
            sums = multiply(q, placed, part=part, raw=True).cpu().numpy()
            y = multiply(q, placed, t, tensor(given, placed.device), part).cpu().numpy()
            scale = np.float32(static) if static is not None else np.abs(given).max(axis=1, keepdims=True) / np.float32(steps)
            exact_q = np.clip(np.rint(given / np.where(scale == 0, np.float32(1), scale)), -128, 127).astype(np.int64)
            exact = exact_q @ (reference.codes(w, part) - int(w.centre)).T
            wrong += int((q.cpu().numpy() != exact_q).sum()) + int((sums != exact).sum())
            error = max(error, relative(y, reference.product(exact_q * scale.astype(np.float64), w, part)))
    return ProductError(contract(w, integers=True), wrong, 0.0, error, bound(k))


def bound(k: int) -> float:
    return 4 * math.sqrt(k) * 2**-24
