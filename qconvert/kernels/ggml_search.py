"""ggml's reference quantizers, byte for byte: the same float32 operations in the same order, many blocks at a time."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.kernels.codebook_cells import cells
from qconvert.kernels.lanes import Lanes, choose
from qconvert.scheme import F32, GGML_SCHEMES, SCHEMES, Bytes


class Kernel(NamedTuple):
    """Where a scheme's kernel stands, the bytes of its block, the lanes that measured best, and another for importance."""

    module: str
    nbytes: int
    on_avx2: int
    on_avx512: int
    weighted: str | None = None
    needs: bool = False  # importance


KERNELS: dict[str, Kernel] = {
    "q8_0": Kernel("block_quants", 34, 16, 16),
    "q4_0": Kernel("block_quants", 18, 16, 16, "weighted_blocks"),
    "q4_1": Kernel("block_quants", 20, 16, 16, "weighted_blocks"),
    "q5_0": Kernel("block_quants", 22, 16, 16, "weighted_blocks"),
    "q5_1": Kernel("block_quants", 24, 16, 16, "weighted_blocks"),
    "q2_k": Kernel("min_quants", 84, 16, 32),
    "q4_k": Kernel("min_quants", 144, 16, 32),
    "q5_k": Kernel("min_quants", 176, 16, 32),
    "q3_k": Kernel("scale_quants", 110, 16, 32),
    "q6_k": Kernel("scale_quants", 210, 16, 32),
    "tq1_0": Kernel("nearest_blocks", 54, 16, 16),
    "tq2_0": Kernel("nearest_blocks", 66, 16, 16),
    "q1_0": Kernel("nearest_blocks", 18, 16, 16),
    "q2_0": Kernel("nearest_blocks", 18, 16, 16),
    "mxfp4": Kernel("nearest_blocks", 17, 16, 16),
    "iq4_nl": Kernel("iq4_quants", 18, 16, 32),
    "iq4_xs": Kernel("iq4_quants", 136, 16, 32),
    "iq3_s": Kernel("codebook_quants", 110, 8, 16),
    "iq3_xxs": Kernel("codebook_quants", 98, 8, 16),
    "iq2_s": Kernel("codebook_quants", 82, 8, 16),
    "iq2_xs": Kernel("codebook_quants", 74, 8, 16, needs=True),
    "iq2_xxs": Kernel("codebook_quants", 66, 8, 16, needs=True),
    "iq1_m": Kernel("codebook_ternary", 56, 8, 16),
    "iq1_s": Kernel("codebook_ternary", 50, 8, 16, needs=True),
}


def search(
    scheme: str, x: F32, lanes: int | None = None, out: Bytes | None = None, importance: F32 | None = None
) -> Bytes:
    """x f32[N,K] -> u8[N, row nbytes]: what ggml_quantize_chunk writes with that importance f32[K], or without one.

    K is a multiple of the scheme's block; importance is not negative, and what only rounds has no use for it. `lanes` (or
    QCONVERT_LANES) overrides the SIMD width, 1 means scalar code; the bytes are the same. `out` is a contiguous array to
    write to. Releases the GIL. The first call of a scheme compiles its kernel, or loads it from numba's cache. The bytes are
    those of a stock ggml, built without contraction of a*b+c; one built with -march=native writes others.
    """
    if scheme not in KERNELS:
        raise UnsupportedError(f"no search quantizer for {scheme!r}", hint=f"there are {', '.join(KERNELS)}")
    where, (n, k), block = KERNELS[scheme], x.shape, GGML_SCHEMES[scheme].block
    if k % block:
        raise UnsupportedError(f"{scheme}: rows of {k} weights do not divide into blocks of {block}")
    if where.needs and importance is None:
        raise UnsupportedError(f"{scheme} needs an importance matrix", hint="--calibrate FILE or --imatrix FILE")
    module = where.module if importance is None else where.weighted or where.module
    kernel: Callable[..., None] = getattr(import_module(f"qconvert.kernels.{module}"), scheme)
    x = np.ascontiguousarray(x, np.float32)
    if out is None:
        out = np.empty((n, k // block * where.nbytes), np.uint8)
    if x.size:
        wide = choose(where.on_avx2, where.on_avx512, lanes)
        row = Lanes(min(wide.n, 16), wide.wide)
        weights = None if importance is None else cyclic(importance, k)
        kernel(wide, row, x.reshape(-1), k, weights, out.reshape(-1), *(() if scheme in SCHEMES else (cells(scheme),)))
    return out


def cyclic(importance: F32, k: int) -> F32:
    """It, and then its beginning again: as far as the widest vector of blocks reaches that begins in a row."""
    if importance.shape != (k,) or not (importance >= 0).all():
        raise InputError(f"importance {list(importance.shape)} is not {k} numbers of 0 or more")
    return np.resize(importance.astype(np.float32, copy=False), k + 32 * 256)
