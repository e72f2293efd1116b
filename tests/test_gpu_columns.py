"""Columns on a GPU, interpreted: codes and levels of rtn, lsq and gptq are the CPU's; compiled, nothing is contracted."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gptq import given, of, problem
from test_gpu_quantize import is_exact
from test_kernels import hard_rows

pytest.importorskip("triton")

import triton

from qconvert.kernels.feedback import E4M3, INTEGERS, TABLE
from qconvert.kernels.gpu import columns, quantize
from qconvert.kernels.gpu.columns import GpuColumns, launch_of
from qconvert.kernels.gpu.compiled import TARGETS, assembly, compiling_for
from qconvert.kernels.gpu.launch import Launch
from qconvert.kernels.gpu.loading import TRITON
from qconvert.scheme import F32
from qconvert.solving import Gptq, Lsq, Rtn, Solver

ORDERED, STATIC = Gptq(ordered=True), Gptq(static=True)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    quantize.device.cache_clear()
    yield
    quantize.device.cache_clear()


def unlike(solver: Solver, name: str, x: F32) -> list[int]:
    """How many codes, and bytes of each level, the two make otherwise."""
    h = problem()[1][: x.shape[1], : x.shape[1]]
    some, before = given(x, h), x.copy()
    with np.errstate(all="ignore"):
        here, there = (solver.solve(of(name), x, g) for g in (some, some._replace(columns=GpuColumns)))
    assert np.array_equal(x, before, equal_nan=True)
    pairs = zip((here.codes, *here.levels), (there.codes, *there.levels), strict=True)
    return [int((a.view(np.uint8) != b.view(np.uint8)).sum()) for a, b in pairs]


def some_rows(n: int, k: int) -> F32:
    return problem()[0][:n, :k]


@pytest.mark.parametrize(
    "name", ["int4_g32", "uint4_g16", "uint3o_g40_bf16", "nf4_g16", "int4_row", "ternary_g32", "q4_k", "q6_k"]
)
def test_rtn_is_the_cpus(interpreted: None, name: str) -> None:
    x = some_rows(37, 256 if name.endswith("_k") else 160)
    assert not any(unlike(Rtn(), name, x))


@pytest.mark.parametrize("name", ["int4_g32", "uint8_g40", "uint4f_g16", "fp4_g16"])
def test_lsq_is_the_cpus(interpreted: None, name: str) -> None:
    assert not any(unlike(Lsq(), name, some_rows(5, 80 if name != "int4_g32" else 96)))


CASES: list[tuple[Solver, str, int, int]] = [
    (Gptq(), "int4_g32", 37, 96), (Gptq(), "uint4_g16", 1, 48), (Gptq(), "uint3o_g40_bf16", 33, 80),
    (Gptq(), "uint1f_g8", 5, 40),
    (Gptq(), "int4_row", 5, 72), (Gptq(), "nf4_g16", 3, 32), (Gptq(), "nvfp4", 3, 32), (Gptq(), "e4m3_row", 5, 40),
    (STATIC, "uint4f_g16", 3, 160), (STATIC, "q4_0", 37, 160),
    (ORDERED, "int4_g32", 37, 160), (ORDERED, "uint3o_g40_bf16", 3, 160), (ORDERED, "uint4_g16", 3, 144),
    (ORDERED, "mxfp4", 3, 96),
    (Gptq(), "q4_k", 3, 256), (Gptq(), "q2_k", 3, 256), (ORDERED, "q6_k", 2, 256),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "name", "n", "k"), CASES)
def test_gptq_is_the_cpus(interpreted: None, solver: Solver, name: str, n: int, k: int) -> None:
    assert not any(unlike(solver, name, some_rows(n, k)))


@pytest.mark.parametrize(("solver", "name"), [(Gptq(), "uint4_g16"), (STATIC, "q4_0"), (ORDERED, "e4m3_row")])
def test_however_columns_and_rows_are_parted(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, solver: Solver, name: str
) -> None:
    monkeypatch.setattr(columns, "INTERPRETED_TILE", (8, 16))
    monkeypatch.setattr(columns, "SWEPT", 16)
    monkeypatch.setattr(columns, "LAZY", 32)
    assert not any(unlike(solver, name, some_rows(21, 80 if name != "q4_0" else 96)))


@pytest.mark.parametrize(("solver", "name"), [(Rtn(), "uint4o_g32"), (STATIC, "int4_g32"), (STATIC, "e4m3_row")])
def test_zeros_and_what_overflows_are_the_cpus(interpreted: None, solver: Solver, name: str) -> None:
    hard = np.concatenate([x.reshape(-1, 256)[:2, :64] for _, x in hard_rows() if x.shape[1] % 256 == 0])
    zeros = np.zeros((3, 64), np.float32)
    zeros[1], zeros[2, ::2] = -0.0, -0.0
    sizes = [some_rows(1, 64) * np.float32(size) for size in (1e7, 1e16, 1e38, 1e-36, 1e-42)]
    assert not any(unlike(solver, name, np.concatenate([hard, zeros, *sizes])))


def test_no_rows_have_no_codes(interpreted: None) -> None:
    x = some_rows(0, 64)
    w = GpuColumns(x)
    assert w.extremes(32)[0].shape == (0, 2) and w.rows(0, 64).shape == (0, 64)


def test_an_error_that_goes_astray_would_be_found(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuColumns, "feed", lambda *args: None)
    assert unlike(STATIC, "int4_g32", some_rows(5, 96))[0] > 10


def launches() -> dict[str, Launch]:
    f, u, i = torch.empty(4096), torch.empty(4096, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    limits, kinds = (-8.0, 7.0), {"integers": INTEGERS, "table": TABLE, "e4m3": E4M3}
    tries: dict[str, int] = {"N": 20, "TRIES": 32, "TURNS": 6}
    groups = 64, 2, 32, 0
    made = {
        "feed": launch_of("feed", (f, f, f, 64, 0, 32, 32, 64), 64, 1, False, COLUMNS=32),
        "extremes": launch_of("extremes", (f, f, f, 64, 2, 32), 128, 1, False),
        "fit_lines": launch_of("fit_lines", (f, f, f, f, f, f, *groups, 15.0), 128, 1, False, **tries),
        "fit_zero_points": launch_of("fit_zero_points", (f, f, f, f, f, f, *groups, 15.0), 128, 1, False, **tries),
    }
    for name, kind in kinds.items():
        swept = f, f, f, f, f, i, f, u, 64, 0, 32, *limits
        made[f"sweep {name}"] = launch_of("sweep", swept, 64, 1, False, COLUMNS=32, KIND=kind)
        chosen = f, f, f, i, f, u, 64, 64, *limits
        made[f"nearest_codes {name}"] = launch_of("nearest_codes", chosen, 64, 2, False, COLUMNS=32, KIND=kind)
        made[f"fit_scales {name}"] = launch_of(
            "fit_scales", (f, f, f, f, f, *groups, *limits), 128, 1, False, **tries, KIND=kind
        )
    return made


EACH_TARGET = pytest.mark.parametrize("target", TARGETS)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")


@compiles
@EACH_TARGET
@pytest.mark.parametrize("name", ["feed", "sweep integers"])
def test_compiled_columns_contract_nothing(name: str, target: str) -> None:
    assert is_exact(assembly(launches()[name], target), target)


@pytest.mark.peer
@compiles
@EACH_TARGET
def test_each_compiled_column_kernel_contracts_nothing(target: str) -> None:
    assert [name for name, launch in launches().items() if not is_exact(assembly(launch, target), target)] == []


@compiles
@pytest.mark.parametrize("fused", [False, True])
def test_machine_code_of_feedback_has_products_and_sums_apart(tmp_path: Path, fused: bool) -> None:
    """ptxas may contract what PTX has apart; of what it was told to fuse nothing else is left."""
    launch = launches()["feed"]
    with TRITON, compiling_for("sm_80"):
        kernel = launch._replace(switches={**launch.switches, "enable_fp_fusion": fused}).compile()
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, "-sass", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=True)
    fma, products, sums = (len(re.findall(rf"\b{op}\b", done.stdout)) for op in ("FFMA", "FMUL", "FADD"))
    assert (fma == 0 and products == sums > 0) if not fused else (fma > 0 and products == sums == 0)


def test_the_benchmark_finds_equal_codes(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    bench = importlib.import_module("bench_gpu")
    monkeypatch.setattr(bench, "ROUNDS", 1)
    rtn, gptq = (bench.measure_solver(*case, 8, 64) for case in ((Rtn(), "uint4_g32"), (STATIC, "q4_0")))
    assert rtn["case"] == "solve rtn uint4_g32 8 x 64" and gptq["case"] == "solve gptq static q4_0 8 x 64"
    assert rtn["wrong_codes_and_levels"] == gptq["wrong_codes_and_levels"] == 0
    assert rtn["factor_s"] is None and gptq["factor_s"] is not None


def test_factors_leave_the_gpu_with_their_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = columns.Panels()
    monkeypatch.setattr(columns, "device", lambda: "cuda")
    monkeypatch.setattr("qconvert.kernels.gpu.records.tensor", lambda a, _: torch.from_numpy(a).clone())
    arrays = [np.full(8, i, np.float32) for i in range(2)]
    first, again = ([kept.on_device(a) for a in arrays] for _ in range(2))
    assert [float(v[0]) for v in first] == [0, 1] and all(a is b for a, b in zip(first, again, strict=True))
    assert len(kept.known) == 2
    arrays.clear()
    assert kept.known == {}
