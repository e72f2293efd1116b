"""Columns on a GPU, or interpreted: what kernels.columns.CpuColumns does, bit for bit.

Errors are fed in two steps, lazily: to the columns at hand at once, to all the others when LAZY of them are there. Each is a
sum in the order of columns, as on the CPU, where no BLAS is asked either: so where columns are parted changes no bit. What the
CPU is left with: factors of Hessians, in f64; what a scheme keeps of levels, a few numbers a group; and the levels that have
no kernel here (solving.levels_apart).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qconvert.errors import require
from qconvert.kernels.columns import CpuColumns, Places
from qconvert.kernels.feedback import TABLE, Grid
from qconvert.kernels.fit_quants import SHIFTS, SPANS, TURNS, starts_of
from qconvert.kernels.gpu.quantize import STAGE, device
from qconvert.scheme import F32, Array, Bytes

if TYPE_CHECKING:
    import torch

    from qconvert.kernels.gpu.launch import Launch

F = np.float32
SWEPT, LAZY = 32, 128  # columns of a sweep, and whose errors go to all later ones together
TILE = (32, 64)  # columns and rows of a program
INTERPRETED_TILE = (128, 1 << 12)  # the interpreter pays by the numpy call
LEVELS = 16  # of a table


def launch_of(kernel: str, args: Sequence[object], lanes: int, parts: int, interpreted: bool, **switches: object) -> Launch:
    """One of column_kernels. lanes: rows, or rows of groups; parts: programs beside each other."""
    from qconvert.kernels.gpu.launch import Launch, up
    from qconvert.kernels.gpu.loading import loaded

    function = getattr(loaded(interpreted, "lane_kernels", "column_kernels")[1], kernel)
    each = min(INTERPRETED_TILE[1], max(16, up(lanes))) if interpreted else TILE[1]
    return Launch(function, (-(-lanes // each), parts), tuple(args), {**switches, "LANES": each, "enable_fp_fusion": False})


class GpuColumns:
    """x f32[N,K]; panels, order: as CpuColumns has them. Of one thread, on its own stream."""

    def __init__(self, x: F32, panels: F32 | None = None, order: Places | None = None) -> None:
        self.interpreted = device() == "cpu"
        self.shape, self.order, self.fed = (len(x), x.shape[1]), order, 0
        self.columns = INTERPRETED_TILE[0] if self.interpreted else TILE[0]
        self.constants: dict[bytes, torch.Tensor] = {}
        with STAGE.stream():
            turned = STAGE.up(np.asarray(x, F)).T
            if order is not None:
                turned = turned.index_select(0, STAGE.up(order))
            self.w = turned.clone(memory_format=require("torch", "--device cuda").contiguous_format)  # never x's own memory
            if panels is not None:
                self.panels = PANELS.on_device(panels)
                self.errors, self.chosen = self.found(1, self.shape[1])[0], self.no_codes()

    def run(self, kernel: str, args: Sequence[object], lanes: int, parts: int = 1, **switches: object) -> None:
        if lanes:
            launch_of(kernel, args, lanes, parts, self.interpreted, **switches).run()

    def constant(self, values: Array) -> torch.Tensor:
        key = values.tobytes()
        if key not in self.constants:
            self.constants[key] = STAGE.up(values)
        return self.constants[key]

    def places(self, groups: Places) -> torch.Tensor:
        return self.constant(groups.astype(np.int32))

    def table(self, grid: Grid) -> torch.Tensor:
        """f32[3,16]: middles, levels and codes of a table."""
        table = np.full((3, LEVELS), np.inf, F)
        if grid.kind == TABLE:
            rows = (grid.levels[1:] + grid.levels[:-1]) * F(0.5), grid.levels, grid.codes
            for row, values in zip(table, rows, strict=True):
                row[: len(values)] = values
        return self.constant(table)

    def levels(self, scales: F32, offsets: F32) -> torch.Tensor:
        """f32[N,G] each -> [2,G,N]"""
        return STAGE.up(np.stack([scales, offsets]).astype(F, copy=False)).transpose(1, 2).contiguous()

    def found(self, n_levels: int, n_groups: int) -> torch.Tensor:
        return self.w.new_empty((n_levels, n_groups, self.shape[0]))

    def no_codes(self) -> torch.Tensor:
        return self.w.new_empty(self.w.shape, dtype=require("torch", "--device cuda").uint8)

    def down(self, there: torch.Tensor) -> Array:
        """[...,G,N] -> [...,N,G]"""
        return STAGE.down(there.transpose(-1, -2).contiguous())

    def rows(self, begin: int, end: int) -> F32:
        with STAGE.stream():
            return self.down(self.w[begin:end])

    def extremes(self, group: int) -> tuple[F32, F32]:
        n, k = self.shape
        with STAGE.stream():
            both = self.found(2, k // group)
            self.run("extremes", (self.w, *both, n, k // group, group), both[0].numel())
            low, high = self.down(both)
        return low, high

    def fit_scales(self, group: int, grid: Grid, importance: F32, first: int, n_groups: int) -> F32:
        with STAGE.stream():
            rest = self.table(grid), (levels := self.found(1, n_groups)), self.shape[0], n_groups, group, first
            limits = float(grid.low), float(grid.high)
            self._fit("fit_scales", importance, (starts_of(grid),), (*rest, *limits), levels, KIND=grid.kind)
            scales: F32 = self.down(levels)[0]
        return scales

    def fit_lines(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
        if bits == 1:
            begin, end = first * group, (first + n_groups) * group
            return CpuColumns(self.rows(begin, end)).fit_lines(group, bits, importance[begin:end], 0, n_groups)
        last = F((1 << bits) - 1)
        tries = np.array(SPANS[bits], F) / last, last * F(0.5) + np.array(SHIFTS, F)
        return self._fit_both("fit_lines", importance, tries, n_groups, (group, first, float(last)))

    def fit_zero_points(self, group: int, bits: int, importance: F32, first: int, n_groups: int) -> tuple[F32, F32]:
        last = F((1 << bits) - 1)
        tries = np.array((1.0, *SPANS[bits]), F) / last, np.arange(-1, 2).astype(F)
        return self._fit_both("fit_zero_points", importance, tries, n_groups, (group, first, float(last)))

    def _fit_both(
        self, kernel: str, importance: F32, tries: tuple[F32, F32], n_groups: int, rest: tuple[float, ...]
    ) -> tuple[F32, F32]:
        """Two levels, from each of the first tries with each of the second."""
        steps, shifts = tries
        with STAGE.stream():
            levels = self.found(2, n_groups)
            pairs = np.repeat(steps, len(shifts)), np.tile(shifts, len(steps))
            self._fit(kernel, importance, pairs, (*levels, self.shape[0], n_groups, *rest), levels)
            first, second = self.down(levels)
        return first, second

    def _fit(
        self, kernel: str, importance: F32, tries: Sequence[F32], rest: Sequence[object], levels: torch.Tensor, **switches: int
    ) -> None:
        from qconvert.kernels.gpu.launch import up

        many = up(n := len(tries[0]))
        filled = (self.constant(np.pad(v, (0, many - n), constant_values=1)) for v in tries)
        args = self.w, self.constant(importance), *filled, *rest
        self.run(kernel, args, levels[0].numel(), N=n, TRIES=many, TURNS=TURNS, **switches)

    def nearest(self, scales: F32, offsets: F32, groups: Places, grid: Grid) -> Bytes:
        n, k = self.shape
        with STAGE.stream():
            codes = self.no_codes()
            given = *self.levels(scales, offsets), self.places(groups), self.table(grid)
            args = self.w, *given, codes, n, k, float(grid.low), float(grid.high)
            self.run("nearest_codes", args, n, -(-k // self.columns), COLUMNS=self.columns, KIND=grid.kind)
            return self.down(codes)

    def feed(self, first: int, last: int, begin: int, end: int) -> None:
        """Take the errors of columns first..last from columns begin..end."""
        if first < last and begin < end:
            args = self.w, self.errors, self.panels, self.shape[0], first, last, begin, end
            self.run("feed", args, self.shape[0], -(-(end - begin) // self.columns), COLUMNS=self.columns)

    def lazily(self, fed: int, begin: int, end: int, limit: int) -> int:
        """Columns begin..end take the errors of fed..begin; where those are LAZY or more, so do all up to `limit`.
        The first column whose errors these have still to take."""
        many = begin - fed >= LAZY
        self.feed(fed, begin, begin, limit if many else end)
        return begin if many else fed

    def reach(self, begin: int, end: int) -> None:
        with STAGE.stream():
            self.fed = self.lazily(self.fed, begin, end, self.shape[1])

    def sweep(self, scales: F32, offsets: F32, groups: Places, grid: Grid, begin: int, end: int) -> None:
        with STAGE.stream():
            levels, places, table, fed = self.levels(scales, offsets), self.places(groups), self.table(grid), begin
            for first in range(begin, end, SWEPT):
                last = min(end, first + SWEPT)
                fed = self.lazily(fed, first, last, end)
                given = self.panels, *levels, places[first - begin :], table
                limits = first, last, float(grid.low), float(grid.high)
                args = self.w, self.errors, *given, self.chosen, self.shape[0], *limits
                self.run("sweep", args, self.shape[0], COLUMNS=SWEPT, KIND=grid.kind)

    def codes(self) -> Bytes:
        with STAGE.stream():
            taken = self.chosen
            if self.order is not None:
                taken = self.no_codes()
                taken[STAGE.up(self.order)] = self.chosen
            return self.down(taken)


class Panels:
    """Factors that lie on the GPU as long as their arrays do here: those of a Hessian serve all rows of several weights."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[F32], torch.Tensor]] = {}
        self.lock = threading.Lock()

    def on_device(self, panels: F32) -> torch.Tensor:
        from qconvert.kernels.gpu.records import tensor

        if device() == "cpu":
            return tensor(panels, "cpu")
        with self.lock:
            key = id(panels)
            if key not in self.known or self.known[key][0]() is not panels:
                there = tensor(panels, "cuda")  # whole before any stream reads it
                self.known[key] = weakref.ref(panels, lambda _: self.known.pop(key, None)), there
            return self.known[key][1]


PANELS = Panels()
