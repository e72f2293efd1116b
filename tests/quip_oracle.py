"""quip-sharp's own functions, as text out of a clone of github.com/Cornell-RelaxML/quip-sharp that QUIP_SHARP names.

Its modules import CUDA extensions, so parts of them are run alone. Any clone does, a bare one too.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import textwrap
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CODEBOOK, HADAMARD, QUIP = "lib/codebook/latticee8_padded12.py", "lib/utils/matmul_had.py", "lib/algo/quip.py"


def text(path: str, begin: str, end: str | None = None) -> str:
    """From the line that begins with `begin` to that with `end`; skips where there is no clone."""
    clone = os.environ.get("QUIP_SHARP")
    if not clone:
        pytest.skip("QUIP_SHARP names no clone of quip-sharp")
    done = subprocess.run(["git", "-C", clone, "show", f"HEAD:{path}"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(begin))
    last = next((i for i, line in enumerate(lines) if i > first and end and line.startswith(end)), len(lines))
    return textwrap.dedent("\n".join(lines[first:last]))


def run(source: str, **names: Any) -> dict[str, Any]:
    space: dict[str, Any] = {"torch": torch, "math": math, "itertools": itertools, **names}
    exec(source, space)
    return space


@cache
def lattice() -> dict[str, Any]:
    """Its module of the codebook, which takes a minute to make its grid."""
    return run(text(CODEBOOK, "_E8P_CODESZ", "class QuantizedE8P12Linear"), nn=torch.nn, quiptools_cuda=None)


def grid() -> Any:
    """f32[65536,8]"""
    return lattice()["_E8P_GRID"]


def codebook() -> Any:
    return lattice()["E8P12_codebook"]()


def hadamard() -> dict[str, Any]:
    """matmul_hadU, matmul_hadUt, get_hadK and tables."""
    first, tables = text(HADAMARD, "def get_hadK", "torch.library.define"), text(HADAMARD, "def is_pow2")
    return run(f"{first}\n{tables}", utils=SimpleNamespace(clean=lambda: None))


def packed(codes: Any) -> Any:
    """i64[N,K/8] -> i64[N,K/32]"""
    return run(text(CODEBOOK, "    def maybe_pack_idxs", "    def by_idxs"))["maybe_pack_idxs"](None, codes)


def linear(x: Any, words: Any, su: Any, sv: Any, decompress: Any) -> Any:
    """QuantizedE8P12Linear.forward of x f32[B,K]."""
    source = text(CODEBOOK, "    def forward(", "    def never")
    theirs = hadamard()

    def turned(x: Any, small: Any, q: int) -> Any:
        """Of what their CUDA function does with the small matrix that it is given."""
        y, width = x.reshape(-1, q, x.shape[-1] // q), x.shape[-1] // q
        one = theirs["matmul_hadU"](y) * width**0.5
        return ((small if q > 1 else torch.eye(1)) @ one).reshape(x.shape) / x.shape[-1] ** 0.5

    ops = SimpleNamespace(ops=SimpleNamespace(quip_lib=SimpleNamespace(decompress_packed_e8p=decompress)),
                          float32=torch.float32, float16=torch.float32)  # fmt: skip
    forward = run(source, matmul_hadU_cuda=turned)
    forward["torch"] = ops
    (left, k_left), (right, k_right) = (theirs["get_hadK"](len(s)) for s in (su, sv))
    layer = SimpleNamespace(scale=32, codebook=SimpleNamespace(grid_packed_abs=None))
    left = None if left is None else left.T.contiguous()
    return forward["forward"](layer, x, [words], su, sv, left, right, k_left, k_right)
