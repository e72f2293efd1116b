"""Weights f32[N,K] whose codes solvers choose on grids, column by column: where kernels take them, on the CPU in tiles.

A grid is scale * level + offset for each group of columns of a row (feedback.py). kernels/gpu/columns.py has the same on a
GPU, bit for bit. With feedback: reach, choose levels, sweep; chunk by chunk, then codes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from qconvert.kernels import feedback
from qconvert.kernels.feedback import PANEL, Grid, tiled, untiled
from qconvert.kernels.fit_quants import extremes, fit_lines, fit_scales, fit_zero_points
from qconvert.scheme import F32, Bytes

Places = npt.NDArray[np.int64]


class Columns(Protocol):
    """Columns count as they are taken. importance f32[K]; levels f32[N,G], of G groups from group `first` on."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, begin: int, end: int) -> F32:
        """Columns begin..end as they are now, f32[N,end-begin]."""
        ...

    def extremes(self, group: int) -> tuple[F32, F32]:
        """The least and the greatest of each group; a zero is +0."""
        ...

    def fit_scales(self, group: int, grid: Grid, importance: F32, first: int, n_groups: int) -> F32: ...

    def fit_lines(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]: ...

    def fit_zero_points(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]: ...

    def nearest(self, scales: F32, offsets: F32, groups: Places, grid: Grid) -> Bytes:
        """Codes u8[N,K]. groups [K]: of each column."""
        ...

    def reach(self, begin: int, end: int) -> None:
        """Columns begin..end take the errors of all before them, which are swept already."""
        ...

    def sweep(self, scales: F32, offsets: F32, groups: Places, grid: Grid, begin: int, end: int) -> None:
        """Choose codes of columns begin..end, each column's error fed to those after it. groups [end-begin]."""
        ...

    def codes(self) -> Bytes:
        """What sweeps chose, u8[N,K], columns as they lie in the weight."""
        ...


class CpuColumns:
    """Columns on the CPU. panels: factors of feedback (cholesky.py); order [K]: in which columns are taken."""

    def __init__(self, x: F32, panels: F32 | None = None, order: Places | None = None) -> None:
        self.shape, self.order = (len(x), x.shape[1]), order
        self.w = tiled(x if order is None else x[:, order])
        if panels is not None:
            self.panels, self.errors, self.chosen = panels, np.zeros_like(self.w), np.zeros(self.w.shape, np.uint8)

    def _entries(self, tiles: F32) -> F32:
        entries: F32 = untiled(tiles, self.shape[0], tiles.shape[1])
        return entries

    def rows(self, begin: int, end: int) -> F32:
        return self._entries(self.w[:, begin:end])

    def extremes(self, group: int) -> tuple[F32, F32]:
        low, high = extremes(self.w, group, self.shape[1] // group)
        return self._entries(low), self._entries(high)

    def fit_scales(self, group: int, grid: Grid, importance: F32, first: int, n_groups: int) -> F32:
        return self._entries(fit_scales(self.w, group, grid, importance, first, n_groups))

    def fit_lines(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
        scales, offsets = fit_lines(self.w, group, bits, importance, first, n_groups)
        return self._entries(scales), self._entries(offsets)

    def fit_zero_points(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
        scales, zeros = fit_zero_points(self.w, group, bits, importance, first, n_groups)
        return self._entries(scales), self._entries(zeros)

    def nearest(self, scales: F32, offsets: F32, groups: Places, grid: Grid) -> Bytes:
        codes: Bytes = untiled(feedback.nearest(self.w, tiled(scales, 1), tiled(offsets, 1), groups, grid), *self.shape)
        return codes

    def reach(self, begin: int, end: int) -> None:
        feedback.feed(self.w, self.errors, self.panels, (0, begin), begin, -(-end // PANEL) * PANEL)

    def sweep(self, scales: F32, offsets: F32, groups: Places, grid: Grid, begin: int, end: int) -> None:
        every = np.zeros(self.shape[1], np.int64)
        every[begin:end] = groups
        last, levels = -(-end // PANEL) * PANEL, (tiled(scales, 1), tiled(offsets, 1))
        feedback.with_feedback(self.w, self.errors, self.panels, *levels, every, grid, begin, last, self.chosen)

    def codes(self) -> Bytes:
        taken: Bytes = untiled(self.chosen, *self.shape)
        if self.order is not None:
            taken[:, self.order] = taken.copy()
        return taken
