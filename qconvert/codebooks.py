"""The codebooks of ggml's iq types, as gguf-py has them, and what else differs among these types."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

EVEN = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # of eight signs the last makes their number even, and is not kept
# the fine level of a sub-block is an odd number of times that
LEAST = {"iq1_s": 0.125, "iq1_m": 0.125, "iq2_xxs": 0.125, "iq2_xs": 0.125, "iq2_s": 0.125, "iq3_xxs": 0.25, "iq3_s": 1.0}


@cache
def entries(name: str) -> npt.NDArray[np.int8]:
    """The codebook, i8[entries, 4 or 8]: the magnitudes of as many weights; of iq1_s and iq1_m -1, 0 and 1."""
    from gguf import quants

    kind = getattr(quants, name.upper())
    kind.init_grid()
    grid: npt.NDArray[np.int8] = kind.grid.reshape(-1, kind.grid.shape[-1]).astype(np.int8)
    return grid
