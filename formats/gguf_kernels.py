"""llama.cpp's own matrix product on this very file: one row per distinct type and row length."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from typing import Any

import numpy as np

from qconvert.check import LIMITS
from qconvert.formats.gguf_activations import as_ggml
from qconvert.formats.gguf_values import InitParams, declare, dequantized
from qconvert.formats.llama_cpp import library
from qconvert.gguf_reader import GGML_TYPES
from qconvert.report import Row, judged

ROWS, COLUMNS = 64, 4
ARENA_NBYTES = 64 << 20


def kernel_rows(tensors: Mapping[str, Any]) -> list[Row]:
    """Relative error of ggml_mul_mat against f64 over gguf-py's values, for the first tensor of each (type, K).

    tensors: name -> (data [N, row], ggml type), vectors, matrices and stacked matrices.
    """
    firsts: dict[tuple[str, int], str] = {}
    for name, tensor in tensors.items():
        dtype = tensor.type.name.lower()
        if tensor.data.ndim > 1 and dtype in GGML_TYPES:
            _, block, nbytes = GGML_TYPES[dtype]
            firsts.setdefault((dtype, tensor.data.shape[-1] * tensor.data.itemsize // nbytes * block), name)
    rows = []
    for (dtype, k), name in sorted(firsts.items()):
        error = product_error(tensors[name], dtype, k)
        limit, _ = LIMITS["kernel, f16 offset" if dtype in ("q4_1", "q5_1") else "kernel"]
        row = judged(f"kernel {dtype} x {k}", "relative error", error, limit)
        rows.append(row if row.verdict == "pass" else row._replace(reason=f"on {name}"))
    return rows


def product_error(tensor: Any, dtype: str, k: int) -> float:
    """|ggml(W x) - W x'| / |W x'| with W[<=64, K] of the file, x[4, K] normal and x' = x rounded as ggml does."""
    import torch

    data = np.ascontiguousarray(tensor.data.reshape(-1, tensor.data.shape[-1])[:ROWS])
    x = np.random.default_rng(0).standard_normal((COLUMNS, k)).astype(np.float32)
    rounded = as_ggml(dtype)(torch.from_numpy(x)).numpy().astype(np.float64)
    want = rounded @ dequantized(data, tensor.type.name).astype(np.float64).T
    got = ggml_product(data, GGML_TYPES[dtype][0], len(data), x)
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))


def ggml_product(data: np.ndarray[Any, Any], kind: int, n: int, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x[C,K] times the rows that `data` holds in ggml's type `kind`: f32[C,N], by ggml's CPU kernels."""
    lib = library().call
    declare(lib)
    context = lib.ggml_init(InitParams(ARENA_NBYTES, None, False))
    try:
        w = lib.ggml_new_tensor_2d(context, kind, x.shape[1], n)
        v = lib.ggml_new_tensor_2d(context, 0, x.shape[1], x.shape[0])
        c.memmove(lib.ggml_get_data(w), data.ctypes.data, data.nbytes)
        c.memmove(lib.ggml_get_data(v), x.ctypes.data, x.nbytes)
        product = lib.ggml_mul_mat(context, w, v)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, product)
        lib.ggml_graph_compute_with_ctx(context, graph, 1)
        out = np.empty((x.shape[0], n), np.float32)
        c.memmove(out.ctypes.data, lib.ggml_get_data(product), out.nbytes)
        return out
    finally:
        lib.ggml_free(context)
