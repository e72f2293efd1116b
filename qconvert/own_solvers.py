"""Solvers of one library's own types: what each reads and which schemes it makes. weights.py has their kernels.

Those of any grid are classes in solving.py; the registry has the names of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qconvert.scheme import FP4_TABLE, GGML_SCHEMES, LATTICES, MINIFLOATS, NF4_TABLE, SCB, TERNARY, Scheme


@dataclass(frozen=True)
class Own:
    """It has no options. needs: the statistic, with ? where it does without. packed: it makes packed rows, not codes."""

    name: str
    refuses: Callable[[Scheme], str | None]
    needs: str = ""
    packed: bool = True


PEAKED = (NF4_TABLE, FP4_TABLE)
OF_LATTICES = "points of a lattice have nearest and ldlq"


def _search(scheme: Scheme) -> str | None:
    return None if scheme.name in GGML_SCHEMES else "it is ggml's own, of GGUF's types (mse is the one of others)"


def _mse(scheme: Scheme) -> str | None:
    if scheme.name in GGML_SCHEMES:
        return "GGUF's types have search and lsq"
    if scheme.name in LATTICES:
        return OF_LATTICES
    if scheme.name in TERNARY or scheme.name in SCB:
        return "its scale is another library's, absmean or absmax"
    known = scheme.name in MINIFLOATS or len(scheme.table) == 16 or any(v.role == "offset" for v in scheme.levels)
    if known or (not scheme.table and scheme.bits in (2, 4, 8)):
        return None
    return "it has kernels for 2, 4 and 8 bits and tables of 16 (lsq is for all)"


def _only(what: str, legal: Callable[[Scheme], bool], scheme: Scheme) -> str | None:
    return None if legal(scheme) else f"it makes {what}"


_points = partial(_only, "points of a lattice (--quant quip)", lambda s: s.name in LATTICES)

SEARCH = Own("search", _search, "moments?")
MSE = Own("mse", _mse)
ABSMAX = Own("absmax", partial(_only, "NF4, FP4 and bitsandbytes' int8", lambda s: s.name in SCB or s.table in PEAKED))
MLX = Own("mlx", partial(_only, "codes with offsets", lambda s: any(v.role == "offset" for v in s.levels)))
ABSMEAN = Own("absmean", partial(_only, "ternary codes with one scale", lambda s: s.name in TERNARY))
NEAREST = Own("nearest", _points, packed=False)
LDLQ = Own("ldlq", _points, "hessian", packed=False)
