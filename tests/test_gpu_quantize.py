"""Quantizing kernels of the GPU, interpreted: byte for byte the CPU's; and compiled, free of what would change a byte."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from test_kernels import hard_rows, normal_rows

pytest.importorskip("triton")

import triton

from qconvert import kernels
from qconvert.errors import MissingDependency, UnsupportedError
from qconvert.kernels.affine_quants import Affine
from qconvert.kernels.gpu import quantize, solve
from qconvert.kernels.gpu.compiled import TARGETS, assembly
from qconvert.kernels.gpu.launch import Launch
from qconvert.scheme import F32, FP4_TABLE, NF4_TABLE, ZeroPoint

SCHEMES = pytest.mark.parametrize("scheme", quantize.SEARCHES)


@pytest.fixture(autouse=True)
def device_is_asked_for_again() -> Iterator[None]:
    quantize.device.cache_clear()
    yield
    quantize.device.cache_clear()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)


@SCHEMES
def test_blocks_are_the_cpus(interpreted: None, scheme: str) -> None:
    x = np.concatenate([x.reshape(-1, 256) for _, x in hard_rows() if x.shape[1] % 256 == 0])
    beyond_f16 = [normal_rows(1, 256) * np.float32(size) for size in (1e7, 1e12, 1e16, 1e20, 1e30, 1e38)]
    x = np.concatenate([x, *beyond_f16])
    assert np.isfinite(x).all() and np.array_equal(quantize.search(scheme, x), kernels.search(scheme, x))


@pytest.mark.parametrize("scheme", ["q4_0", "q2_k", "q4_k", "q6_k"])
def test_several_programs_and_a_part_of_one(interpreted: None, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(quantize, "INTERPRETED_LANES", 32)
    x = normal_rows(3, 768)
    assert np.array_equal(quantize.search(scheme, x), kernels.search(scheme, x))
    assert quantize.search(scheme, x[:0]).shape == kernels.search(scheme, x[:0]).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_quantized_as_what_they_stand_for(interpreted: None, dtype: torch.dtype) -> None:
    x = torch.from_numpy(normal_rows(4, 256)).to(dtype)
    out, launch = quantize.searching("q8_0", x, interpreted=True)
    launch.run()
    assert np.array_equal(out.numpy(), kernels.search("q8_0", x.float().numpy()))


def compiled_text(launch: Launch, target: str) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    return assembly(launch, target)


def is_exact(text: str, target: str) -> bool:
    """No product is added unrounded, nothing is divided by an estimate, and small numbers stay."""
    if target.startswith("sm"):
        return not re.search(r"\b(fma|mad)\.\S*f32|\b(div|sqrt|rcp|rsqrt)\.(approx|full)|\.ftz", text)
    # exact divisions and roots are made of fused steps, five and two each; v_fma_mix with -0 is a product of halves
    fused = len(re.findall(r"\bv_(?:fma|fmac|pk_fma|mad|mac)_f32", text))
    mixed = [line for line in re.findall(r"v_(?:fma|mad)_mix\w*.*", text) if "neg(0)" not in line]
    exact = 5 * text.count("v_div_fixup_f32") + 2 * len(re.findall(r"\bv_sqrt_f32", text))
    return fused == exact and not mixed and ".amdhsa_float_denorm_mode_32 3" in text


def launch_of(scheme: str) -> Launch:
    return quantize.searching(scheme, torch.empty((4, 256)), interpreted=False)[1]


SOME = [("q4_0", target) for target in TARGETS] + [("q2_k", "sm_90"), ("q2_k", "gfx942")]


@pytest.mark.parametrize(("scheme", "target"), SOME)
def test_compiled_kernels_contract_nothing(scheme: str, target: str) -> None:
    text = compiled_text(launch_of(scheme), target)
    assert is_exact(text, target)
    assert ("div.rn.f32" if target.startswith("sm") else "v_div_fixup_f32") in text


@pytest.mark.peer
@pytest.mark.parametrize("target", TARGETS)
@SCHEMES
def test_each_compiled_kernel_contracts_nothing(scheme: str, target: str) -> None:
    assert is_exact(compiled_text(launch_of(scheme), target), target)


@pytest.mark.parametrize("target", TARGETS)
def test_contraction_would_be_found(target: str) -> None:
    launch = launch_of("q4_0")
    fused = launch._replace(switches={**launch.switches, "enable_fp_fusion": True})
    assert not is_exact(compiled_text(fused, target), target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UnsupportedError, match=r"--device cuda: .* no GPU \(torch") as e:
        quantize.search("q4_0", normal_rows(1, 32))
    assert "--device cpu" in str(e.value.hint)


def test_without_triton_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependency, match="--device cuda needs triton"):
        quantize.device()


def groups_of(group: int) -> F32:
    """One of each kind of hard row."""
    kinds = [x.reshape(-1, 256)[:2] for _, x in hard_rows() if x.shape[1] % 256 == 0]
    return np.ascontiguousarray(np.concatenate(kinds)[:, : 2 * group])


def alike(a: Affine, b: Affine) -> bool:
    return all(np.array_equal(p.view(np.uint8), q.view(np.uint8)) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
def test_affine_codes_scales_and_zeros_are_the_cpus(interpreted: None, zero_point: ZeroPoint, bits: int) -> None:
    x = groups_of(16)
    assert alike(solve.affine(x, 16, bits, zero_point), kernels.affine(x, 16, bits, zero_point))


def test_large_groups_and_rows_that_are_left_to_the_cpu(interpreted: None) -> None:
    for x, group in ((groups_of(128), 128), (groups_of(16)[:, :20], 20)):
        assert alike(solve.affine(x, group, 4), kernels.affine(x, group, 4))


@pytest.mark.parametrize("table", [NF4_TABLE, FP4_TABLE], ids=["nf4", "fp4"])
def test_codes_into_tables_are_the_cpus(interpreted: None, table: tuple[float, ...]) -> None:
    x = groups_of(16)
    assert alike(solve.table_codes(x, 16, table), kernels.table_codes(x, 16, table))


def test_codes_of_given_scales_are_the_cpus(interpreted: None) -> None:
    x = groups_of(32)
    _, scales, zeros = kernels.affine(x, 32, 8, "int")
    kept = scales.astype(np.float16).astype(np.float32)
    assert np.array_equal(solve.affine_codes(x, 32, 8, kept, zeros), kernels.affine_codes(x, 32, 8, kept, zeros))


SOLVERS = ("none", "int", "float", "table")


def solving(kind: str) -> Launch:
    x = torch.empty((4, 256))
    if kind == "table":
        return solve.solving_table(x, 64, NF4_TABLE, interpreted=False).launch
    return solve.solving_affine(x, 64, 4, cast("ZeroPoint", kind), interpreted=False).launch


@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_solver_contracts_nothing(target: str) -> None:
    assert is_exact(compiled_text(solving("none"), target), target)


@pytest.mark.peer
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", SOLVERS)
def test_each_compiled_solver_contracts_nothing(kind: str, target: str) -> None:
    assert is_exact(compiled_text(solving(kind), target), target)
