"""ggml itself, by ctypes: the C API that the xllamacpp wheel exports. What the byte tests are held against."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qconvert.scheme import F32, Bytes

IDS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "q1_0": 41, "q2_0": 42,
    "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq3_s": 21, "iq2_s": 22, "iq1_m": 29,
}  # fmt: skip


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def library() -> Path | None:
    """The shared library of xllamacpp, found without importing it; None where it is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("xllamacpp*.so"), None)


@cache
def _ggml() -> ctypes.CDLL:
    path = library()
    if path is None:
        raise ImportError("xllamacpp is not installed")
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_init.restype = ctypes.c_void_p
    lib.ggml_init.argtypes = [_InitParams]
    lib.ggml_init(_InitParams(1 << 16, None, True))  # fills the tables that f16 conversion reads
    return lib


def row_nbytes(scheme: str, k: int) -> int:
    """Bytes of one row of k weights, as ggml counts them."""
    return int(_ggml().ggml_row_size(IDS[scheme], k))


def quantize(scheme: str, x: F32, out: Bytes | None = None, importance: F32 | None = None) -> Bytes:
    """x f32[N,K] -> u8[N, row nbytes] by ggml_quantize_chunk, with importance f32[K] or without."""
    lib, (n, k) = _ggml(), x.shape
    x = np.ascontiguousarray(x, np.float32)
    if out is None:
        out = np.empty((n, row_nbytes(scheme, k)), np.uint8)
    lib.ggml_quantize_init(IDS[scheme])
    weights = None if importance is None else importance.ctypes.data
    lib.ggml_quantize_chunk(IDS[scheme], x.ctypes.data, out.ctypes.data, 0, n, k, weights)
    return out
