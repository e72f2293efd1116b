"""The tensors of GGUF files, read and dequantized by what nobody here wrote: gguf-py, and ggml itself for types it lacks."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.llama_cpp import library
from qconvert.gguf_reader import GGML_TYPES, read_header
from qconvert.scheme import F32, Array

BY_GGML = ("q1_0", "q2_0")  # gguf-py has no dequantizer of the one and does not read files with the other


class InitParams(c.Structure):
    """ggml_init_params, ggml/include/ggml.h."""

    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))


class Tensor(NamedTuple):
    """data u8[N, row nbytes] (or f32, f16 [N,K]); type: its `name` is ggml's, in capitals."""

    data: Any
    type: Any


class Type(NamedTuple):
    name: str


def read_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of a (split) file through gguf-py. InputError where gguf-py refuses it."""
    from gguf import GGUFReader

    out: dict[str, Tensor] = {}
    for path in paths:
        if any(t.dtype in BY_GGML for t in read_header(path).tensors):
            out |= _mapped(path)
            continue
        try:
            out |= {str(t.name): Tensor(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
        except (ValueError, KeyError, IndexError, OverflowError) as e:
            raise InputError(f"{path}: gguf-py cannot read it: {e}") from e
    return out


def _mapped(path: Path) -> dict[str, Tensor]:
    data, out = np.memmap(path, np.uint8, "r"), {}
    for t in read_header(path).tensors:
        raw = data[t.offset : t.offset + t.nbytes].reshape(*t.shape[:-1], -1)
        dtype = {"f32": np.float32, "f16": np.float16}.get(t.dtype, np.uint8)
        out[t.name] = Tensor(raw.view(dtype), Type(t.dtype.upper()))
    return out


def quantized_by_ggml(name: str, x: F32) -> Array:
    """x f32[N,K] -> u8[N, row nbytes] of ggml's type `name`, with all inputs of one importance."""
    kind, block, nbytes = GGML_TYPES[name.lower()]
    lib, (n, k) = _ready(name), x.shape
    values, importance = np.ascontiguousarray(x, np.float32), np.ones(k, np.float32)
    out = np.empty((n, k // block * nbytes), np.uint8)
    function = lib.ggml_quantize_chunk
    function.argtypes = (c.c_int, *[c.c_void_p] * 2, *[c.c_int64] * 3, c.c_void_p)
    lib.ggml_quantize_init(kind)
    function(kind, values.ctypes.data, out.ctypes.data, 0, n, k, importance.ctypes.data)
    return out


def _ready(name: str) -> Any:
    """ggml, its tables filled. UnsupportedError where there is none."""
    lib = library().call
    if lib is None:
        raise UnsupportedError(f"{name} is left to llama.cpp, which is not installed", hint="pip install xllamacpp")
    declare(lib)
    lib.ggml_free(lib.ggml_init(InitParams(1 << 16, None, True)))
    return lib


def by_rows(data: Any) -> Any:
    """Stacked experts [E,N,...] as [E*N,...]: how weights count rows."""
    return data.reshape(-1, data.shape[-1]) if data.ndim > 2 else data


def dequantized(data: Array, name: str) -> F32:
    """u8[N, row nbytes] (or plain numbers) of ggml's type `name` -> f32[N,K]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if name.lower() not in BY_GGML:
        return cast(F32, dequantize(data, GGMLQuantizationType[name]))
    lib = _ready(name)
    _, block, nbytes = GGML_TYPES[name.lower()]
    rows = np.ascontiguousarray(data)
    out = np.empty((len(rows), rows.shape[-1] // nbytes * block), np.float32)
    function = getattr(lib, f"dequantize_row_{name.lower()}")
    function.restype, function.argtypes = None, (c.c_void_p, c.c_void_p, c.c_int64)
    function(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def declare(lib: Any) -> None:
    """The types of the functions of ggml that are called."""
    p, i64, i32 = c.c_void_p, c.c_int64, c.c_int32
    for name, result, arguments in (
        ("ggml_init", p, (InitParams,)), ("ggml_free", None, (p,)), ("ggml_new_tensor_2d", p, (p, i32, i64, i64)),
        ("ggml_get_data", p, (p,)), ("ggml_mul_mat", p, (p, p, p)), ("ggml_new_graph", p, (p,)),
        ("ggml_build_forward_expand", None, (p, p)), ("ggml_graph_compute_with_ctx", i32, (p, p, i32)),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
