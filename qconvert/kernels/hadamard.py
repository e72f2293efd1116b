"""Orthonormal transforms of any width in O(n log n): a Hadamard matrix H of Sylvester's, times a small matrix where it must be.

H of n = q * 2^m values is small[q,q] (x) Sylvester[2^m], over sqrt(n). Where n is a power of two, or q is one of the orders in
ORDERS, H is the one that quip-sharp's tables give, so QuIP#'s files can be read and written. Else q is the odd part of n
and the small matrix a discrete cosine transform, which no other program knows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

F64 = npt.NDArray[np.float64]
Floats = TypeVar("Floats", npt.NDArray[np.float32], F64, npt.NDArray[np.floating])
COLUMNS = 64  # that are turned together
# Orders in which the tables are searched, and how each is made: Paley's two constructions, or Williamson's, of four symmetric
# circulants, with the bits of -1 in their first rows, the first bit high.
# Source of the choices: quip-sharp, lib/utils/matmul_had.py, after N. Sloane's library of Hadamard matrices.
WILLIAMSON = {
    172: (0x39851322867, 0x103D649AF02, 0x0A6A17A1594, 0x1C2D9FE6D0E),
    156: (0xD7D9E6FAC, 0x767AD79B8, 0xCBADED74C, 0x395F123EA7),
    124: (0x316F3DA3, 0x316F3DA3, 0x3E2B351F, 0x01D4CAE0),
    116: (0x06D108B6, 0x012E0748, 0x0B9A059D, 0x039AF59C),
    52: (0x0B0D, 0x0E07, 0x059A, 0x0F6F),
}
ORDERS = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)


class Factors(NamedTuple):
    """n = width * len(small), width a power of two; small: orthogonal, its rows of length sqrt(its order)."""

    width: int
    small: F64


@cache
def factors(n: int) -> Factors:
    q = next((q for q in ORDERS if n % q == 0 and (n // q).bit_count() == 1), n // (n & -n))
    if q in WILLIAMSON:
        return Factors(n // q, _williamson(q))
    if q in (28, 36):
        return Factors(n // q, _paley_2(q))
    return Factors(n // q, _paley(q) if q in ORDERS else _cosine(q))


def known_width(n: int) -> bool:
    """Whether quip-sharp has a matrix of that order, which is this one."""
    return len(factors(n).small) in (1, *ORDERS)


def _residues(p: int) -> F64:
    """[i,j]: 1 where j - i is a square modulo the prime p, -1 where it is not, 0 where i = j."""
    row = np.where(np.isin(np.arange(p), np.arange(1, p) ** 2 % p), 1.0, -1.0)
    row[0] = 0
    out: F64 = row[(np.arange(p) - np.arange(p)[:, None]) % p]
    return out


def _paley(q: int) -> F64:
    """q - 1 prime, 3 modulo 4."""
    out = np.ones((q, q))
    out[0, 1:], out[1:, 1:] = -1, np.eye(q - 1) - _residues(q - 1)
    return out


def _paley_2(q: int) -> F64:
    """q / 2 - 1 prime, 1 modulo 4."""
    half = q // 2
    core, one = np.ones((half, half)), np.eye(half)
    core[0, 0], core[1:, 1:] = 0, _residues(half - 1)
    return np.block([[core + one, core - one], [core - one, -core - one]])


def _williamson(q: int) -> F64:
    m = q // 4
    turned = (np.arange(m) - np.arange(m)[:, None]) % m
    rows = (np.array([1.0 - 2 * (bits >> (m - 1 - i) & 1) for i in range(m)]) for bits in WILLIAMSON[q])
    a, b, c, d = (row[turned] for row in rows)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _cosine(q: int) -> F64:
    angle = np.pi / q * np.arange(q)[:, None] * (np.arange(q) + 0.5)
    return np.cos(angle) * np.where(np.arange(q) == 0, 1, np.sqrt(2))[:, None]


def incoherent(x: Floats, su: Floats, sv: Floats) -> Floats:
    """x[N,K] -> H.T diag(sv) x diag(su) H, in place. su [K], sv [N]: +-1."""
    x *= su
    x *= sv[:, None]
    _rows(x, transpose=True)
    _columns(x, transpose=True)
    return x


def coherent(x: Floats, su: Floats, sv: Floats) -> Floats:
    """x[N,K] -> diag(sv) H x H.T diag(su), in place: the inverse, where su and sv are +-1."""
    _rows(x, transpose=False)
    _columns(x, transpose=False)
    x *= su
    x *= sv[:, None]
    return x


def _rows(x: Floats, transpose: bool) -> None:
    """Each row r of x becomes H r, or H.T r."""
    n = x.shape[1]
    width, small = factors(n)
    scale = x.dtype.type(1 / np.sqrt(n))
    _butterflies(x, width, scale)
    if len(small) > 1:
        _mix(x, np.ascontiguousarray(small.T if transpose else small).astype(x.dtype))


def _columns(x: Floats, transpose: bool) -> None:
    for i in range(0, x.shape[1], COLUMNS):
        some = np.ascontiguousarray(x[:, i : i + COLUMNS].T)
        _rows(some, transpose)
        x[:, i : i + COLUMNS] = some.T


@njit(cache=True, nogil=True)
def _butterflies(x, width, scale):  # type: ignore[no-untyped-def]
    for n in range(x.shape[0]):
        row = x[n]
        step = 1
        while step < width:
            for i in range(0, row.size, 2 * step):
                for j in range(i, i + step):
                    a, b = row[j], row[j + step]
                    row[j], row[j + step] = a + b, a - b
            step *= 2
        for i in range(row.size):
            row[i] *= scale


@njit(cache=True, nogil=True)
def _mix(x, small):  # type: ignore[no-untyped-def]
    q = small.shape[0]
    width = x.shape[1] // q
    line = np.empty(x.shape[1], x.dtype)
    for n in range(x.shape[0]):
        row = x[n]
        line[:] = 0
        for i in range(q):
            for j in range(q):
                factor = small[i, j]
                for k in range(width):
                    line[i * width + k] += factor * row[j * width + k]
        row[:] = line
