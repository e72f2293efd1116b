"""How codes and metadata are chosen, by solvers that are found by name.

    rows x f32[n,K] -> levels, as the scheme keeps them, for a block of columns -> codes: the nearest, or with feedback

rtn: the extremes of a group are those of its grid. lsq: least squared error, weighted by the moments of inputs where they are
known. gptq: each column's error is fed forward to columns that can make up for it, by the Hessian of inputs; levels are
fitted to weights that are so changed. hqq: zero points of hqq.
Sources: Frantar et al. 2022 (GPTQ); Nagel et al. 2020 (why squared error of weights is weighted by inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

import numpy as np

from qconvert import float_weights, kernels, recover
from qconvert.grids import finest, grid_of, kept, lowest, steps_of
from qconvert.hessians import Factor
from qconvert.kernels.codebook_feedback import SUPER, book, metrics, with_entries
from qconvert.kernels.columns import Columns, CpuColumns, Places
from qconvert.kernels.feedback import INTEGERS, Grid, tiled, untiled
from qconvert.kernels.hqq_quants import hqq_codes, hqq_zero_points
from qconvert.layouts import layout_of
from qconvert.own_solvers import OF_LATTICES
from qconvert.scheme import CODEBOOKS, F32, LATTICES, MINIFLOATS, SCHEMES, TERNARY, Array, QTensor, Scheme
from qconvert.solvers import rounded_to

F = np.float32
Needs = Literal["", "moments?", "hessian"]  # ?: used where it is there
AT_ONCE = 32  # columns whose levels are chosen at the same time, where groups are smaller


class Given(NamedTuple):
    """What a solver may ask for beside the rows.

    whole: of all rows of the weight, the greatest or the mean magnitude, as the scheme has it. moments f32[K]. factor(damp,
    ordered): of the Hessian. over_all(f): f of all rows of the weight, a block at a time; once for all that ask. columns(rows,
    panels, order): where kernels take them.
    """

    whole: float | None = None
    moments: F32 | None = None
    factor: Callable[[float, bool], Factor] | None = None
    over_all: Callable[[Callable[[Iterable[F32]], int]], int] | None = None
    columns: Callable[[F32, F32 | None, Places | None], Columns] = CpuColumns


class Solver(Protocol):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    needs: ClassVar[Needs]

    def refuses(self, scheme: Scheme) -> str | None:
        """Why it does not choose codes of that scheme."""
        ...

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        """x f32[n,K]: all rows that share entries. Rows are independent but for what `given` says of them all."""
        ...


def refused(scheme: Scheme) -> str | None:
    if scheme.name in LATTICES:
        return OF_LATTICES
    if scheme.name in CODEBOOKS:
        return "its codes are entries of a codebook, several weights to one (--solver search, gptq)"
    if grid_of(scheme) is None:
        return "its levels are another library's, of the greatest magnitude of a row (--solver absmax)"
    if any(level.adds for level in scheme.levels) and scheme.name not in SCHEMES:
        return "its second level is made from the first"
    return None


@dataclass(frozen=True)
class Rtn:
    name: ClassVar[str] = "rtn"
    needs: ClassVar[Needs] = ""

    def refuses(self, scheme: Scheme) -> str | None:
        return refused(scheme)

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        grid, w = cast(Grid, grid_of(scheme)), given.columns(x, None, None)
        if scheme.name in MINIFLOATS:
            return nearest_codes(scheme, w, float_weights.codes_of(scheme, x, given.whole, False)[1])
        low, high = w.extremes(finest(scheme, x.shape[1]))
        roles = {level.role for level in scheme.levels}
        if roles <= {"scale", "divisor"}:
            reach = (grid.high - grid.low) / 2 if grid.kind == INTEGERS else float(np.abs(grid.levels).max())
            peaks: F32 = np.maximum(-low, high)
            return nearest_codes(scheme, w, kept(scheme, peaks / F(reach), np.zeros_like(low)))
        if "min" in roles or scheme.zero_point == "int":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        return nearest_codes(scheme, w, kept(scheme, (high - low) / F((1 << scheme.bits) - 1), low))


@dataclass(frozen=True)
class Lsq:
    name: ClassVar[str] = "lsq"
    needs: ClassVar[Needs] = "moments?"

    def refuses(self, scheme: Scheme) -> str | None:
        return refused(scheme)

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        w, k = given.columns(x, None, None), x.shape[1]
        importance = np.ones(k, F) if given.moments is None else importance_of(given.moments)
        return nearest_codes(scheme, w, fitted(scheme, w, importance, (0, k), given))


@dataclass(frozen=True)
class Hqq:
    """norm, beta, turns: hqq's lp_norm, beta and iters."""

    name: ClassVar[str] = "hqq"
    needs: ClassVar[Needs] = ""
    norm: float = 0.7
    beta: float = 10.0
    turns: int = 20

    def refuses(self, scheme: Scheme) -> str | None:
        single = len(scheme.levels) == 2 and scheme.levels[0].group is not None and lowest(scheme) == 0
        line = scheme.zero_point == "float" or any(level.role == "offset" for level in scheme.levels)
        return None if single and line else "it chooses zero points that are any number, of groups (uint4f_g64)"

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        (n, k), group = x.shape, finest(scheme, x.shape[1])
        assert given.over_all is not None
        turns = given.over_all(lambda blocks: self.until_stop(scheme, blocks))
        w = tiled(x, 1)
        per, zeros, _ = hqq_zero_points(w, n, group, scheme.bits, turns, self.norm, self.beta, False)
        codes = untiled(hqq_codes(w, group, scheme.bits, per, zeros), n, k)
        scales, points = F(1) / untiled(per, n, k // group), untiled(zeros, n, k // group)
        second = points if scheme.zero_point == "float" else -points * scales
        both = zip(scheme.levels, (scales, second), strict=True)
        return QTensor(scheme, codes, tuple(rounded_to(level.dtype, v.astype(F)) for level, v in both))

    def until_stop(self, scheme: Scheme, blocks: Iterable[F32]) -> int:
        """Turns until the mean error of all rows, as f32 has it, does not fall any more."""
        errors, n_weights = np.zeros(self.turns), 0
        for x in blocks:
            w = tiled(x, 1)
            errors += hqq_zero_points(w, len(x), finest(scheme, x.shape[1]), scheme.bits, self.turns, self.norm, self.beta)[2]
            n_weights += x.size
        mean, best = (errors / n_weights).astype(F), F(np.inf)
        for turn in range(self.turns):
            if not mean[turn] < best:
                return turn + 1
            best = mean[turn]
        return self.turns


@dataclass(frozen=True)
class Gptq:
    """damp: in parts of the mean of the Hessian's diagonal. ordered: strong inputs first, which fixes all levels beforehand
    (so do static ones); no file needs to know of it."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[Needs] = "hessian"
    damp: float = 0.01
    ordered: bool = False
    static: bool = False

    def refuses(self, scheme: Scheme) -> str | None:
        if scheme.name in CODEBOOKS:
            return "the weights of an entry stand together (without ordered)" if self.ordered else None
        if (why := refused(scheme)) is not None:
            return why
        return "its groups are not of a multiple of 8 columns" if any((v.group or 8) % 8 for v in scheme.levels) else None

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        assert given.factor is not None
        factor, k = given.factor(self.damp, self.ordered), x.shape[1]
        if scheme.name in CODEBOOKS:
            return entries_fed(scheme, x, factor)
        grid = cast(Grid, grid_of(scheme))
        order = np.arange(k) if factor.order is None else factor.order
        group = finest(scheme, k)
        at_once = -(-AT_ONCE // scheme.block) * scheme.block
        if self.ordered or self.static or any(level.group is None and level.rows == 1 for level in scheme.levels):
            at_once = k
        cost = np.empty(k, F)
        cost[order] = factor.cost
        w, found = given.columns(x, factor.panels, factor.order), []
        changed = given.columns(x, None, None) if self.ordered else w
        for begin in range(0, k, at_once):
            end = min(k, begin + at_once)
            w.reach(begin, end)
            found.append(fitted(scheme, changed, cost, (begin, end), given))
            steps = steps_of(scheme, found[-1], end - begin)
            groups = (order[begin:end] if self.ordered else np.arange(end - begin)) // group
            w.sweep(steps.scales, steps.offsets, groups, grid, begin, end)
        both = zip(scheme.levels, zip(*found, strict=True), strict=True)
        levels = tuple(np.concatenate(parts, axis=1) if level.group else parts[0] for level, parts in both)
        return QTensor(scheme, as_codes(scheme, w.codes()), levels)


@dataclass(frozen=True)
class Recover:
    """Groups that lie on a grid keep it; the others, and types of another kind, are searched."""

    name: ClassVar[str] = recover.SOLVER
    needs: ClassVar[Needs] = ""

    def refuses(self, scheme: Scheme) -> str | None:
        return refused(scheme)

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        if scheme.name in SCHEMES:
            q = searched(scheme, x)
        else:
            q = Lsq().solve(scheme, x, given)
        return recover.with_recovered(q, x) if recover.recoverable(scheme) else q


def entries_fed(scheme: Scheme, x: F32, factor: Factor) -> QTensor:
    """Scales are ggml's search's of each super-block, once the errors of those before it were fed; entries are chosen anew."""
    w, found = CpuColumns(x, factor.panels), []
    factors = factor.panels, factor.cost, metrics(factor.panels, factor.cost, book(scheme.name).width)
    for begin in range(0, x.shape[1], SUPER):
        end = begin + SUPER
        w.reach(begin, end)
        q = searched(scheme, w.rows(begin, end), factor.cost[begin:end])
        d, fine = (tiled(level, 1) for level in q.levels)
        with_entries(scheme.name, w.w, w.errors, factors, d, fine, begin, w.chosen)
        found.append((q.levels[0], untiled(fine, len(x), fine.shape[1])))
    levels = tuple(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return QTensor(scheme, w.codes().view(np.int8), levels)


def searched(scheme: Scheme, x: F32, importance: F32 | None = None) -> QTensor:
    """What ggml's search makes of rows in one of its types; importance f32[K]."""
    some = None if importance is None else np.ascontiguousarray(importance)
    return layout_of(f"gguf.{scheme.name}").unpack(kernels.search(scheme.name, x, importance=some))


def nearest_codes(scheme: Scheme, w: Columns, levels: tuple[F32, ...]) -> QTensor:
    k, grid = w.shape[1], cast(Grid, grid_of(scheme))
    steps = steps_of(scheme, levels, k)
    return QTensor(scheme, as_codes(scheme, w.nearest(steps.scales, steps.offsets, np.arange(k) // steps.group, grid)), levels)


def as_codes(scheme: Scheme, codes: Array) -> Array:
    return codes if scheme.table or lowest(scheme) >= 0 else codes.view(np.int8)


def importance_of(moments: F32) -> F32:
    """Positive, around 1: a channel without input still keeps a little of its weight."""
    mean = float(moments.mean(dtype=np.float64))
    return np.maximum(moments / F(mean), F(1e-4)).astype(F) if mean > 0 else np.ones_like(moments)


def fitted(scheme: Scheme, w: Columns, importance: F32, columns: tuple[int, int], given: Given) -> tuple[F32, ...]:
    """Levels, as kept, of least error weighted by importance f32[K], of columns begin..end of w."""
    (begin, end), group = columns, finest(scheme, columns[1] - columns[0])
    if scheme.name in TERNARY:
        return (np.full((w.shape[0], 1), given.whole, F),)
    if scheme.name in MINIFLOATS:
        return float_weights.codes_of(scheme, w.rows(begin, end), given.whole, True)[1]
    if scheme.name == "q2_k":  # scales of 4 bits: rounding them afterwards costs more (KL 0.0043, by ggml's search 0.0026)
        return searched(scheme, w.rows(begin, end), importance[begin:end]).levels
    where = importance, begin // group, (end - begin) // group
    roles = {level.role for level in scheme.levels}
    if roles == {"scale"}:
        scales = w.fit_scales(group, cast(Grid, grid_of(scheme)), *where)
        offsets = np.zeros_like(scales)
    elif scheme.zero_point == "int":
        scales, zeros = w.fit_zero_points(group, scheme.bits, *where)
        offsets = -scales * zeros
    else:
        scales, offsets = w.fit_lines(group, scheme.bits, *where)
    if "min" in roles and (offsets > 0).any():  # such an offset is not kept, so the scale must do without
        alone = w.fit_scales(group, cast(Grid, grid_of(scheme)), *where)
        scales, offsets = np.where(offsets > 0, np.maximum(alone, 0), scales), np.minimum(offsets, 0)
    return kept(scheme, scales, offsets)


def levels_apart(scheme: Scheme) -> str | None:
    """Why the levels of least error come from the CPU wherever its codes are chosen; None where kernels.columns has them."""
    if scheme.name in MINIFLOATS:
        return "they are small floats"
    if scheme.name == "q2_k":
        return "a search with importance chooses them"
    line = scheme.bits == 1 and scheme.zero_point != "int" and {level.role for level in scheme.levels} != {"scale"}
    return "weights are sorted for them" if line and not scheme.table else None
