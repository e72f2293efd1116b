"""The same kernels compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from packed_operands import CASES, packed

pytest.importorskip("triton")

from qconvert.kernels.gpu.compiled import TARGETS, Binary, compiled, compiled_dequantize, compiled_product
from qconvert.kernels.gpu.launch import Tiles, product, rounding

TINY = Tiles(16, 32, 16, stages=1)  # compiled in half a second
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)


def whole(binary: Binary, kernel: str, target: str) -> bool:
    return (binary.kernel, binary.target) == (kernel, target) and binary.nbytes > 1000 and binary.registers > 0


@EACH_TARGET
def test_kernels_compile(target: str) -> None:
    w = packed("ct uint4 32").operand
    assert whole(compiled_dequantize(w, target), "dequantize", target)
    for m, dtype, kernel in ((1, torch.float16, "gemv"), (16, torch.bfloat16, "gemm"), (16, torch.int8, "gemm")):
        (binary,) = compiled_product(w, target, m, dtype, tiles=TINY)
        assert whole(binary, kernel, target)


@EACH_TARGET
@pytest.mark.parametrize("float8", [False, True])
def test_rounding_of_x_compiles(target: str, float8: bool) -> None:
    *_, launch = rounding(torch.empty((2, 96)), 32, None, 127.5, float8, interpreted=False)
    assert whole(compiled(launch, target), "quantize_rows", target)


@pytest.mark.parametrize("name", ["bnb double adapter", "hqq 2 8 second level", "awq", "fp8 blocks"])
def test_each_kind_of_layout_compiles(name: str) -> None:
    for binary in compiled_product(packed(name).operand, "sm_90", 1, tiles=TINY):
        assert whole(binary, "gemv", "sm_90")


def test_the_interpreter_still_runs_after_the_compiler() -> None:
    w = packed("ct uint4 32").operand
    compiled_dequantize(w, "sm_80")
    x = torch.eye(96).numpy()
    assert (packed("ct uint4 32").theirs == product(x, w).T).all()


@pytest.mark.peer
@EACH_TARGET
@pytest.mark.parametrize("name", CASES)
def test_every_layout_compiles(name: str, target: str) -> None:
    w = packed(name).operand
    assert all(whole(binary, "gemv", target) for binary in compiled_product(w, target, 1, tiles=TINY))
    assert all(whole(binary, "gemm", target) for binary in compiled_product(w, target, 16, tiles=TINY))


@EACH_TARGET
def test_products_of_four_bits_spill_no_registers(target: str) -> None:
    """With the tiles that a GPU gets before it is tuned."""
    (binary,) = compiled_product(packed("ct uint4 32").operand, target, 1, torch.bfloat16)
    assert binary.spilled == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    monkeypatch.setattr("sys.argv", ["bench_gpu.py"])
    assert importlib.import_module("bench_gpu").main() == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "needs a GPU" in shown.err
