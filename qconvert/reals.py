"""What the evaluator reads weights from; apart from it, since it loads torch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt


class Reals(Protocol):
    """Where weights come from: weights.Weights, or anything that gives rows begin..end as real numbers."""

    def real(self, name: str, begin: int = 0, end: int | None = None) -> npt.NDArray[Any]: ...
