"""The codebooks of ggml's iq types, and beside which of their entries a point lies that is none of them.

A code word packs the levels of an entry, the first lowest: 8 of 2 bits, or 4 of 3. A cell is the number of a point in base
3 or 8, its first level the lowest digit. The candidates of a cell are the entries of the nearest two distances or so, nearest
first, then by index: the order in which ggml compares them, and keeps the first of equals.
Source: ggml/src/ggml-quants.c, iq2xs_init_impl and iq3xs_init_impl; the codebooks are gguf-py's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from qconvert.codebooks import entries

LENGTH = 9  # bits of a span that count candidates
PADDED = 16  # a multiple of so many words has each list: those after its end repeat its first
DISTANCES = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq1_s": 3, "iq1_m": 3, "iq3_xxs": 2, "iq3_s": 3}


class Cells(NamedTuple):
    """spans i32[cells]: where a cell's words begin << LENGTH | how many candidates; 0 of them: the one word is the point's own.

    words u16[...]; entry u16[words there can be]: the index in the codebook of an entry's word.
    """

    spans: npt.NDArray[np.int32]
    words: npt.NDArray[np.uint16]
    entry: npt.NDArray[np.uint16]


@cache
def cells(name: str) -> Cells:
    grid = entries(name)
    levels = np.searchsorted(np.unique(grid), grid).astype(np.int16)
    width, (radix, bits) = grid.shape[1], (3, 2) if grid.shape[1] == 8 else (8, 3)
    points = (np.arange(radix**width)[:, None] // radix ** np.arange(width) % radix).astype(np.int16)
    of_entry = (levels << bits * np.arange(width)).sum(1).astype(np.uint16)
    entry = np.zeros(1 << bits * width, np.uint16)
    entry[of_entry] = np.arange(len(grid))
    spans, words = np.zeros(len(points), np.int32), np.zeros(len(points) * (len(grid) + PADDED), np.uint16)
    used = _fill(np.ascontiguousarray(levels.T), points, of_entry, DISTANCES[name], spans, words)
    return Cells(spans, words[:used].copy(), entry)


@njit(cache=True, nogil=True)
def _fill(levels, points, of_entry, wanted, spans, words):  # type: ignore[no-untyped-def]
    """Spans and words of all points; how many words there are. levels i16[width, entries]."""
    width, n = levels.shape
    distance, counts, end = np.zeros(n, np.int16), np.zeros(256, np.int64), 0
    for cell in range(len(points)):
        distance[:] = 0
        for i in range(width):
            for j in range(n):
                apart = levels[i, j] - points[cell, i]
                distance[j] += np.int16(apart * apart)
        counts[:] = 0
        for j in range(n):
            counts[distance[j]] += 1
        shells, reach, begin = 0, 0, end
        while shells < wanted:
            if counts[reach]:
                shells += 1
                for j in range(n):
                    if distance[j] == reach:
                        words[end] = of_entry[j]
                        end += 1
                if reach == 0:
                    break
            reach += 1
        spans[cell] = begin << LENGTH | (0 if reach == 0 else end - begin)
        while (end - begin) % PADDED:
            words[end] = words[begin]
            end += 1
    return end
