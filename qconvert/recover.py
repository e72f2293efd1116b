"""Checkpoints trained on a grid (QAT): codes and scales found again from weights that were stored as bf16 or f16.

Weights code * scale, rounded to the checkpoint's dtype, are what fake quantization leaves. A quantizer that chooses scales
anew lands on another grid; here each group's own is found, proved by giving every weight of the group back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qconvert import kernels
from qconvert.scheme import F32, QTensor, Scheme

if TYPE_CHECKING:
    from qconvert.kernels.grid_recovery import Grid

SOLVER = "recover"


def recoverable(scheme: Scheme) -> bool:
    """Whether its groups are code * scale and no more: Q4_0, Q5_0, Q8_0, int4_g32 …"""
    plain = [level for level in scheme.levels if level.role == "scale" and level.dtype in ("f32", "f16", "bf16")]
    return len(plain) == len(scheme.levels) == 1 and not scheme.table and not scheme.unsigned and scheme.levels[0].rows == 1


def recovered(scheme: Scheme, x: F32) -> Grid:
    """The grid of f32[N,K] in the scheme's codes and scales; `recoverable` must have said that it has such."""
    half = 1 << (scheme.bits - 1)
    return kernels.recover(x, scheme.levels[0].group or x.shape[1], -half, half - 1, scheme.levels[0].dtype)


def with_recovered(q: QTensor, x: F32) -> QTensor:
    """q, which another solver made of x, with the codes and scales of all groups whose grid is found."""
    found = recovered(q.scheme, x)
    group = x.shape[1] // found.scales.shape[1]
    codes = np.where(np.repeat(found.found, group, axis=1), found.codes, q.codes)
    return QTensor(q.scheme, codes, (np.where(found.found, found.scales, q.levels[0]),))


class Share:
    """How many groups of weights lie on a grid; groups of zeros are on any, and not counted."""

    def __init__(self) -> None:
        self.found = self.n = 0

    def add(self, grid: Grid) -> None:
        real = ~grid.found | (grid.scales != 0)
        self.n += int(real.sum())
        self.found += int((grid.found & real).sum())


def sampled(blocks: Iterator[F32], scheme: Scheme) -> Share:
    share = Share()
    for x in blocks:
        share.add(recovered(scheme, x))
    return share
