"""Solvers as they are asked for: `gptq{damp=0.02 ordered=true}`, and what is known of them before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, cast

from qconvert.graph import Attr
from qconvert.pipeline import parsed
from qconvert.scheme import GGML_SCHEMES, LATTICES, MINIFLOATS, SCB, TERNARY, Scheme


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
    if spec in OWN or spec == "rtn":
        attrs: dict[str, Attr] = {"solver": spec}
        return Chosen(spec, NEEDS.get(spec, ""), attrs, OWN.get(spec) or _registered("rtn"))
    solver = cast(Any, parsed(spec, "solvers"))
    options = {f.name: getattr(solver, f.name) for f in fields(solver) if getattr(solver, f.name) != f.default}
    return Chosen(solver.name, solver.needs, {"solver": solver.name, **options}, solver.refuses)


def statistic_of(spec: str | None) -> str:
    """What a solver reads, with ? where it does without; nothing for a format's own."""
    return chosen(spec).needs if spec else ""


def _registered(name: str) -> Callable[[Scheme], str | None]:
    """Asked when there is a scheme: small floats have an rtn of their own, and that loads nothing."""

    def refuses(scheme: Scheme) -> str | None:
        return None if scheme.name in MINIFLOATS else cast(str | None, cast(Any, parsed(name, "solvers")).refuses(scheme))

    return refuses


def _search(scheme: Scheme) -> str | None:
    return None if scheme.name in GGML_SCHEMES else "it is ggml's own, of GGUF's types (mse is the one of others)"


def _mse(scheme: Scheme) -> str | None:
    if scheme.name in GGML_SCHEMES:
        return "GGUF's types have search and lsq"
    if scheme.name in TERNARY or scheme.name in SCB:
        return "its scale is another library's, absmean or absmax"
    known = scheme.name in MINIFLOATS or len(scheme.table) == 16 or any(v.role == "offset" for v in scheme.levels)
    if known or (not scheme.table and scheme.bits in (2, 4, 8)):
        return None
    return "it has kernels for 2, 4 and 8 bits and tables of 16 (lsq is for all)"


def _only(what: str, legal: Callable[[Scheme], bool], scheme: Scheme) -> str | None:
    return None if legal(scheme) else f"it makes {what}"


OWN: Mapping[str, Callable[[Scheme], str | None]] = {
    "search": _search,
    "mse": _mse,
    "absmax": partial(_only, "NF4, FP4 and bitsandbytes' int8", lambda s: s.name in SCB or len(s.table) == 16),
    "mlx": partial(_only, "codes with offsets", lambda s: any(v.role == "offset" for v in s.levels)),
    "absmean": partial(_only, "ternary codes with one scale", lambda s: s.name in TERNARY),
    **dict.fromkeys(("nearest", "ldlq"), partial(_only, "points of a lattice (--quant quip)", lambda s: s.name in LATTICES)),
}
NEEDS = {"search": "moments?", "ldlq": "hessian"}
