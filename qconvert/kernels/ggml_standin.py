"""Stand-in until the compiled kernels are in: calls ggml in the xllamacpp wheel."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qconvert.errors import require
from qconvert.scheme import F32, Bytes

IDS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23,
}  # fmt: skip


@cache
def _ggml() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        require("xllamacpp", "search", "xllamacpp")
        raise AssertionError
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    lib.ggml_quantize_chunk.restype = lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    for i in IDS.values():
        lib.ggml_quantize_init(i)
    return lib


def search(scheme: str, x: F32) -> Bytes:
    """x f32[N,K] -> u8[N, row nbytes], ggml's reference quantizer."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((x.shape[0], _ggml().ggml_row_size(IDS[scheme], x.shape[1])), np.uint8)
    _ggml().ggml_quantize_chunk(IDS[scheme], x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    return out
