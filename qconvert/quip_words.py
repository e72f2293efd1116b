"""E8P's codes of 16 bits as quip-sharp packs them: in words of 64 bits, in tiles of 16 rows by 64 weights.

A word has the codes of two neighbouring rows and two neighbouring groups of 8: code i is that of row i % 2, group i // 2. Its
low half has their magnitudes, a byte each; in its high half bit 4 * j + i is the sign j of code i. A tile's words lie in
the order of its pairs of rows, then of groups; tiles of the same rows lie side by side.
Source: quip-sharp, lib/codebook/latticee8_padded12.py (maybe_pack_idxs).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qconvert.scheme import U16, Array

SPREAD = np.array([sum((b >> j & 1) << 4 * j for j in range(8)) for b in range(256)], np.uint64)


def words_of(codes: U16) -> npt.NDArray[np.int64]:
    """u16[N,K/8] -> i64[N,K/32], N a multiple of 16 and K of 64."""
    n, groups = codes.shape
    by_word = codes.reshape(n // 16, 8, 2, groups // 8, 4, 2).transpose(0, 3, 1, 4, 5, 2).reshape(-1, 4)
    i = np.arange(4, dtype=np.uint64)
    low = np.bitwise_or.reduce(by_word.astype(np.uint64) >> np.uint64(8) << np.uint64(8) * i, axis=1)
    high = np.bitwise_or.reduce(SPREAD[by_word & 255] << i, axis=1)
    words: npt.NDArray[np.int64] = (high << np.uint64(32) | low).view(np.int64)
    return words.reshape(n, groups // 4)


def codes_of(words: Array) -> U16:
    """i64[N,K/32] -> u16[N,K/8]"""
    n, k = words.shape[0], words.shape[1] * 32
    word = np.ascontiguousarray(words).view(np.uint64).reshape(-1)
    codes = np.empty((word.size, 4), np.uint16)
    for i in range(4):
        signs = sum((word >> np.uint64(32 + 4 * j + i) & np.uint64(1)) << np.uint64(j) for j in range(8))
        codes[:, i] = (word >> np.uint64(8 * i) & np.uint64(255)) << np.uint64(8) | signs
    tiles = codes.reshape(n // 16, k // 64, 8, 4, 2, 2)  # …, pair of rows, pair of groups, group, row
    return tiles.transpose(0, 2, 5, 1, 3, 4).reshape(n, k // 8)
