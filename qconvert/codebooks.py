"""The codebooks of ggml's iq types, as gguf-py has them."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt


@cache
def entries(name: str) -> npt.NDArray[np.int8]:
    """The codebook, i8[entries, 4 or 8]: the magnitudes of as many weights; of iq1_s and iq1_m -1, 0 and 1."""
    from gguf import quants

    kind = getattr(quants, name.upper())
    kind.init_grid()
    grid: npt.NDArray[np.int8] = kind.grid.reshape(-1, kind.grid.shape[-1]).astype(np.int8)
    return grid
