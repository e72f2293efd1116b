"""The triangular factor by which errors of a column are fed forward to the columns after it, in f64.

H f64[K,K] is symmetric and positive definite. inverse(H) = U^T U with U upper triangular; column j's error, times
U[j,column] / U[j,j], is taken from column l > j. U is the inverse of R, H = R R^T, R upper: the Cholesky factor of H with rows
and columns in reverse, so that one factorization and one triangular inverse do. Blocks of 128, sums in the order of columns:
the same bits on every machine and for any number of threads. In place: 8 K^2 bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.kernels.fused import less_product
from qconvert.kernels.lanes import choose, count, load, spread, store
from qconvert.scheme import F32, Array

F64 = npt.NDArray[np.float64]
BLOCK = 128  # columns at a time
TILE = 256  # columns whose part of a block stays in the cache while rows go by
TOGETHER = 8  # rows that a part of a block is taken from while it is in the nearest cache
PANEL = 8  # columns whose factors lie together
TINY = 1e-30


def feedback_factors(h: Array, added: float) -> tuple[F32, F64] | None:
    """h [K,K] + added * I -> panels f32[...], d f64[K]; None where that is not positive definite.

    panels: for every 8 columns, row by row down to the last that reaches them, U[j,column] / U[j,j], 0 where column <= j.
    d: 1 / U[j,j]^2, what a squared error of column j costs once all later ones have made up for it.
    """
    k = len(h)
    size = -(-k // BLOCK) * BLOCK
    a = np.zeros((size, size))
    for i in range(k):  # no more than the lower triangle is read
        a[i, : i + 1] = h[k - 1 - i, k - 1 - i :][::-1]
    a.reshape(-1)[:: size + 1] += added
    a.reshape(-1)[k * (size + 1) :: size + 1] = 1.0
    lanes, flat = choose(8, 16), a.reshape(-1)
    if not _factor(lanes, flat, size) or not np.isfinite(a.diagonal()).all():
        return None
    _invert(lanes, flat, size)
    n = -(-k // PANEL)
    panels = np.zeros(32 * n * (n + 1), np.float32)
    _panels(a, k, panels)
    return panels, 1.0 / np.square(a.diagonal()[:k][::-1])


@njit(forceinline=True)
def _at(n, p, j):  # type: ignore[no-untyped-def]
    """Where P[128,size] has [p,j]: what n lanes of 128 rows take lies together."""
    return (j // n * BLOCK + p) * n + j % n


@njit(forceinline=True)
def _subtract(lanes, C, size, i, j, A, a, P):  # type: ignore[no-untyped-def]
    """C[i:i+4, j:j+n] -= A[4, 128] @ P[128, j:j+n]; A's rows begin at a."""
    n, at, first = count(lanes), i * size + j, j * BLOCK
    c0, c1 = load(lanes, C, at), load(lanes, C, at + size)
    c2, c3 = load(lanes, C, at + 2 * size), load(lanes, C, at + 3 * size)
    for p in range(BLOCK):
        v = load(lanes, P, first + p * n)
        c0 = less_product(c0, spread(lanes, A, a + p), v)
        c1 = less_product(c1, spread(lanes, A, a + BLOCK + p), v)
        c2 = less_product(c2, spread(lanes, A, a + 2 * BLOCK + p), v)
        c3 = less_product(c3, spread(lanes, A, a + 3 * BLOCK + p), v)
    store(C, at, c0)
    store(C, at + size, c1)
    store(C, at + 2 * size, c2)
    store(C, at + 3 * size, c3)


@njit(forceinline=True)
def _solve(lanes, A, size, k, P, begin, end):  # type: ignore[no-untyped-def]
    """P[128, begin:end] = inverse of A's block at [k,k], lower triangular, @ P, from its first row on."""
    n = count(lanes)
    for j in range(begin, end, n):
        for p in range(BLOCK):
            v = load(lanes, P, j * BLOCK + p * n)
            for q in range(p):
                v = v - spread(lanes, A, (k + p) * size + k + q) * load(lanes, P, j * BLOCK + q * n)
            store(P, j * BLOCK + p * n, v / spread(lanes, A, (k + p) * size + k + p))


@njit(cache=True, nogil=True, error_model="numpy")
def _factor(lanes, A, size):  # type: ignore[no-untyped-def]
    """A[size,size] -> its lower Cholesky factor; what is above the diagonal stays. False where it has none."""
    n = count(lanes)
    P, L = np.empty(BLOCK * size), np.empty(size * BLOCK)
    for k in range(0, size, BLOCK):
        for j in range(k, k + BLOCK):
            for i in range(j, k + BLOCK):
                v = A[i * size + j]
                for p in range(k, j):
                    v -= A[i * size + p] * A[j * size + p]
                if i > j:
                    A[i * size + j] = v / A[j * size + j]
                elif v > TINY:
                    A[j * size + j] = np.sqrt(v)
                else:
                    return False
        first = k + BLOCK
        for i in range(first, size):
            for p in range(BLOCK):
                P[_at(n, p, i)] = A[i * size + k + p]
        _solve(lanes, A, size, k, P, first, size)
        for i in range(first, size):
            for p in range(BLOCK):
                A[i * size + k + p] = L[i * BLOCK + p] = P[_at(n, p, i)]
        for start in range(first, size, TILE):
            for some in range(start, size, TOGETHER):
                for j in range(start, min(start + TILE, some + TOGETHER), n):
                    for i in range(max(some, j // 4 * 4), some + TOGETHER, 4):
                        _subtract(lanes, A, size, i, j, L, i * BLOCK, P)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _invert(lanes, A, size):  # type: ignore[no-untyped-def]
    """The inverse of the lower triangle, in place: rows below a block hold what their own solution is yet to be made of."""
    n = count(lanes)
    P, L = np.empty(BLOCK * size), np.empty(size * BLOCK)
    for k in range(0, size, BLOCK):
        last = k + BLOCK
        for p in range(BLOCK):
            for j in range(k):
                P[_at(n, p, j)] = A[(k + p) * size + j]
            for j in range(k, last):
                P[_at(n, p, j)] = 1.0 if j == k + p else 0.0
        _solve(lanes, A, size, k, P, 0, last)
        for p in range(BLOCK):
            for j in range(last):
                A[(k + p) * size + j] = P[_at(n, p, j)]
        for i in range(last, size):
            for p in range(BLOCK):
                L[i * BLOCK + p] = A[i * size + k + p]
                A[i * size + k + p] = 0.0
        for start in range(0, last, TILE):
            for some in range(last, size, TOGETHER):
                for j in range(start, min(start + TILE, last), n):
                    for i in range(some, some + TOGETHER, 4):
                        _subtract(lanes, A, size, i, j, L, i * BLOCK, P)


@njit(cache=True, nogil=True, error_model="numpy")
def _panels(a, k, panels):  # type: ignore[no-untyped-def]
    """U[j,column] = a[k-1-j, k-1-column]"""
    at = 0
    for first in range(0, k, PANEL):
        for j in range(first + PANEL):
            for c in range(PANEL):
                column = first + c
                if j < column < k:
                    panels[at + c] = np.float32(a[k - 1 - j, k - 1 - column] / a[k - 1 - j, k - 1 - j])
            at += PANEL
