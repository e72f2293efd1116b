"""A folder of QuIP#'s tensors: products of each linear as quip-sharp computes them, bits and all, against the graph's weights.

Decoded as its CUDA kernel does it (quiptools_e8p_gemv.cu): two coordinates in the halves of a word, by additions in f16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.formats.safetensors_compared import firsts
from qconvert.formats.safetensors_dialects import Written
from qconvert.formats.safetensors_files import Opened, opened_tensors
from qconvert.kernels.hadamard import factors
from qconvert.kernels.lattice import LANES, MAGNITUDES
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.scheme import Array

LIMIT = 1e-5  # sums of f32 in another order; measured 5e-7
N_INPUTS = 4


def decoded_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """One row: the worst product of all weights whose shape is new, relative to the greatest."""
    worst, where = 0.0, ""
    with opened_tensors(folder) as tensors:

        def shape(name: str) -> tuple[int, ...]:
            return tensors.shape(f"{name.removesuffix('.weight')}.Qidxs")

        found = list(firsts(written, shape))
        for name, _ in found:
            want = torch.from_numpy(np.ascontiguousarray(reals.real(name), np.float32))
            x = torch.from_numpy(np.random.default_rng(0).standard_normal((N_INPUTS, want.shape[1]), np.float32))
            got, want = linear(tensors, name.removesuffix(".weight"), x), x @ want.T
            far = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
            if not far <= worst:
                worst, where = far, name
    return [judged(f"quip-sharp's linear, decoded anew: {len(found)} shapes", "product, relative", worst, LIMIT, where)]


def linear(tensors: Opened, module: str, x: Any) -> Any:
    """f32[B,K] -> f32[B,N], as QuantizedE8P12Linear.forward."""
    words, su, sv, unit = (tensors.tensor(f"{module}.{part}") for part in ("Qidxs", "SU", "SV", "Wscale"))
    points = torch.from_numpy(decompressed(words.numpy()).astype(np.float32))
    x = hadamard(x * su.float(), transpose=True) @ points.T
    return hadamard(x, transpose=False) * sv.float() * unit.float()


def hadamard(x: Any, transpose: bool) -> Any:
    width, small = factors(x.shape[1])
    y, step = x.reshape(-1, len(small), width), 1
    while step < width:
        y = y.reshape(-1, width // (2 * step), 2, step)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2)
        step *= 2
    matrix = torch.from_numpy(small.T.copy() if transpose else small).float()
    return (matrix @ y.reshape(-1, len(small), width)).reshape(x.shape) / x.shape[1] ** 0.5


def decompressed(words: Array) -> Array:
    """i64[N,K/32] -> f16[N,K], the lattice's points."""
    n, k = words.shape[0], words.shape[1] * 32
    grid = np.zeros(256, np.uint32)  # magnitudes in halves, and 8, in nibbles
    magnitudes = MAGNITUDES.astype(np.int64)[:, LANES]
    magnitudes[:, 7] *= np.where(magnitudes.sum(1) % 4, -1, 1)
    for lane in range(8):
        grid |= (magnitudes[:, lane] + 8).astype(np.uint32) << np.uint32(4 * lane)
    both = np.ascontiguousarray(words).view(np.uint32).reshape(-1, 2)
    a, b = both[:, 0], both[:, 1]
    parity = b ^ b >> np.uint32(4)
    parity ^= parity >> np.uint32(8)
    parity = (parity ^ parity >> np.uint32(16)) & np.uint32(15)
    signs = b ^ parity
    out = np.empty((len(a), 2, 2, 8), np.float16)  # word, group, row, coordinate
    for i in range(4):
        x = grid[a >> np.uint32(8 * i) & np.uint32(255)] ^ (signs >> np.uint32(i) & np.uint32(0x11111111)) * np.uint32(14)
        shift = (0xD080 | (parity >> np.uint32(i) & np.uint32(1)) << np.uint32(4)).astype(np.uint16).view(np.float16)
        for j in range(8):  # -36 or -36.5, and 32.25 with a nibble that counts halves
            nibble = x >> np.uint32(4 * (j // 2 + j % 2 * 4)) & np.uint32(15)
            out[:, i // 2, i % 2, j] = (0x5008 | nibble << np.uint32(4)).astype(np.uint16).view(np.float16) + shift
    tiles = out.reshape(n // 16, k // 64, 8, 4, 2, 2, 8)  # rows, columns, pair, word, group, row, coordinate
    return tiles.transpose(0, 2, 5, 1, 3, 4, 6).reshape(n, k)
