"""What error feedback needs of a weight's inputs: H f[K,K], the mean of x x^T, once factored for all rows that use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.errors import InputError
from qconvert.scheme import F32, Array

F64 = npt.NDArray[np.float64]
KEPT = 3  # factors: those of one block's inputs
TRIES = 6  # ten times the damping each


class Factor(NamedTuple):
    """panels, cost: see kernels/cholesky.py, cost f32[K]; order i64[K] where columns are not taken as they lie."""

    panels: F32
    cost: F32
    order: npt.NDArray[np.int64] | None


def factored(h: Array, damp: float, ordered: bool, where: str) -> Factor:
    """With damp * mean of the diagonal on it, more where that does not do; ordered: the strongest inputs first.

    A channel without input has zeros alone: it is rounded as it is and passes no error on.
    """
    from qconvert.kernels.cholesky import feedback_factors

    if not np.isfinite(h).all():
        raise InputError(f"{where}: a Hessian with NaN or infinity", hint="calibrate again; the file is damaged")
    mean = float(h.diagonal().mean(dtype=np.float64))
    if not mean > 0:
        h, mean = np.eye(len(h)), 1.0
    order = np.argsort(-h.diagonal().astype(np.float64), kind="stable") if ordered else None
    h = h if order is None else h[np.ix_(order, order)]
    for i in range(TRIES):
        found = feedback_factors(h, max(damp, 1e-12) * 10**i * mean)
        if found is not None:
            panels, cost = found
            return Factor(panels, (cost / cost.mean()).astype(np.float32), order)
    raise InputError(f"{where}: not a positive Hessian even with {damp * 10 ** (TRIES - 1):g} of its diagonal on it",
                     hint="calibrate again, on more text")  # fmt: skip


class Factors:
    """The last few, each made once while others wait for it; and numbers of whole weights, made in the same way."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Factor] = {}
        self.numbers: dict[Hashable, int] = {}
        self.making: dict[Hashable, threading.Lock] = {}
        self.lock = threading.Lock()

    def number(self, key: Hashable, make: Callable[[], int]) -> int:
        with self.lock:
            mine = self.making.setdefault(("number", key), threading.Lock())
        with mine:
            if key not in self.numbers:
                self.numbers[key] = make()
            return self.numbers[key]

    def of(self, key: Hashable, make: Callable[[], Factor]) -> Factor:
        with self.lock:
            mine = self.making.setdefault(key, threading.Lock())
        with mine:
            with self.lock:
                if key in self.known:
                    return self.known[key]
            made = make()
            with self.lock:
                while len(self.known) >= KEPT:
                    del self.known[next(iter(self.known))]
                self.known[key] = made
            return made
