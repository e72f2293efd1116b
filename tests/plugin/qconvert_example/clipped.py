"""A solver: rounding to the nearest code, after the largest `share` of the weights of each row was clipped."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qconvert.scheme import F32, QTensor, Scheme
from qconvert.solving import Given, Rtn


@dataclass(frozen=True)
class Clipped:
    name: ClassVar[str] = "clipped"
    needs: ClassVar[str] = ""  # or "moments?", "hessian": what --calibrate gathers
    share: float = 0.001

    def refuses(self, scheme: Scheme) -> str | None:
        return Rtn().refuses(scheme)

    def solve(self, scheme: Scheme, x: F32, given: Given) -> QTensor:
        limit = np.quantile(np.abs(x), 1 - self.share, axis=1, keepdims=True).astype(np.float32)
        return Rtn().solve(scheme, np.clip(x, -limit, limit), given)
