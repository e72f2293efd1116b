"""Solvers as they are asked for: `gptq{damp=0.02 ordered=true}`, and what is known of them before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, cast

from qconvert import registry
from qconvert.errors import UsageError
from qconvert.graph import Attr
from qconvert.own_solvers import Own
from qconvert.pipeline import parsed
from qconvert.scheme import MINIFLOATS, Scheme


class Chosen(NamedTuple):
    """needs: the statistic, with ? where it does without. refuses(scheme): why it does not make that one."""

    name: str
    needs: str
    attrs: dict[str, Attr]  # of the node
    refuses: Callable[[Scheme], str | None]


FOLDS = {"awq": "awq", "smoothquant": "smooth"}  # as passes/fold.py has them


class Solving(NamedTuple):
    """`awq+gptq`: weights are folded, then solved. solver None: the format's own; auto: what is nearest on text held out."""

    fold: str = ""
    solver: str | None = None
    auto: bool = False

    @classmethod
    def of(cls, spec: str | None) -> Solving:
        """UsageError, UnsupportedError for what no solver is called, or has as an option."""
        if spec is None or spec == "auto":
            return cls(auto=spec is not None)
        name, _, rest = spec.partition("+")
        made = cls(FOLDS[name], rest or None) if name in FOLDS else cls("", spec)
        if made.solver is not None:
            chosen(made.solver)
        return made

    def needs(self, usual: str) -> frozenset[str]:
        """Statistics that it cannot do without; with ? those that it can. usual: what the format's own needs."""
        if self.auto:
            return frozenset({"moments", "hessian"})
        kinds = {chosen(self.solver).needs if self.solver is not None else usual}
        kinds |= {"moments"} if self.fold == "awq" else {"peaks"} if self.fold else set()
        return frozenset(kinds - {""})


def chosen(spec: str) -> Chosen:
    """UsageError, UnsupportedError for a name or options that no solver has."""
    m = re.match(r"([\w.-]*)(\+?)", spec)
    assert m is not None
    known, (name, plus) = registry.entries("solvers"), m.groups()
    if name not in known and name not in FOLDS:
        raise registry.unknown("solvers", name, (*known, *FOLDS, "auto"))
    if name in FOLDS or plus:
        raise UsageError(f"--solver {spec}: what a fold goes on with is one solver", hint="awq+gptq, smoothquant+rtn")
    if spec == "rtn":
        return Chosen(spec, "", {"solver": spec}, _refused_by_rtn)
    solver = cast(Any, parsed(spec, "solvers"))
    own = isinstance(solver, Own)
    options = {f.name: v for f in fields(solver) if not own and (v := getattr(solver, f.name)) != f.default}
    return Chosen(name, solver.needs, {"solver": name, **options}, solver.refuses)


def reads_statistics(spec: str | None) -> bool:
    """Of a solver as it is asked for; a format's own does not."""
    return bool(Solving.of(spec).needs(""))


def _refused_by_rtn(scheme: Scheme) -> str | None:
    """Small floats have an rtn of their own, and that loads no kernels."""
    return None if scheme.name in MINIFLOATS else cast(str | None, cast(Any, parsed("rtn", "solvers")).refuses(scheme))
