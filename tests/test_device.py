"""--device cuda, interpreted: files are the CPU's byte for byte, and the report says what ran where; without a GPU, why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from qconvert import Node, Type, convert, kernels
from qconvert.errors import MissingDependency, UnsupportedError, UsageError, VerificationError
from qconvert.kernels.gpu import quantize
from qconvert.scheme import F32, Bytes, scheme_of
from qconvert.solvers import least_squares

TINY = Path(__file__).parents[1] / "golden" / "tiny"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    quantize.device.cache_clear()
    yield
    quantize.device.cache_clear()


def test_a_file_is_the_cpus(tmp_path: Path) -> None:
    types = (r"blk\.0\.attn_k\.weight=q2_k", r"blk\.1\.attn_k\.weight=q6_k")
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.gguf"
        result = convert(TINY, quant="f16", tensor_types=types, output=file, device=device, check=False)
    assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
    assert "--device cuda: 2 of 2 weights are quantized on the GPU" in result.report.notes


def test_the_proof_compares_both(tmp_path: Path) -> None:
    types = (r"blk\.0\.attn_k\.weight=q4_0",)
    result = convert(TINY, quant="f16", tensor_types=types, output=tmp_path / "a.gguf", device="cuda")
    assert [r.verdict for r in result.report.checks if r.what == "device cuda q4_0"] == ["pass"]


def test_what_has_no_kernel_there_is_named(tmp_path: Path) -> None:
    report = convert(TINY, to="safetensors", quant="nf4", output=tmp_path / "a", device="cuda", dry_run=True).report
    (note,) = (note for note in report.notes if note.startswith("--device cuda: 0 of 21 weights"))
    assert "on the CPU, for want of a kernel: nf4_g64 by absmax (21, first model.layers.0." in note


@pytest.mark.parametrize("name", ["int4_g16_bf16", "uint8_g16_f16"])
def test_levels_that_a_file_keeps_are_the_cpus(name: str) -> None:
    scheme, x = scheme_of(name), np.random.default_rng(0).standard_normal((4, 32), np.float32)
    assert scheme is not None
    here, there = (least_squares(scheme, x, on_gpu) for on_gpu in (False, True))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


def test_only_what_has_a_kernel_runs_there() -> None:
    def has(dtype: str, solver: str, *statistics: str) -> bool:
        return quantize.has(Node("quantize", ("%w", *statistics), Type(dtype, (64, 256)), {"solver": solver}))

    assert all(has(scheme, "search") for scheme in quantize.SEARCHES)
    assert has("int4_g32", "mse") and has("uint4f_g64", "mse") and has("nf4_g64", "mse") and has("uint8_g128_bf16", "mse")
    assert not has("q4_k", "search", "%moments")  # no kernel weighs by statistics
    assert not has("q4_k", "gptq") and not has("int4_g32", "hqq") and not has("mxfp4", "mse")
    assert not has("int4_row", "mse") and not has("int4_g40", "mse") and not has("uint4o_g64", "mse")


def test_a_byte_that_the_gpu_makes_otherwise_fails_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(scheme: str, x: F32) -> Bytes:
        return np.ascontiguousarray(kernels.search(scheme, x) ^ np.uint8(1))

    monkeypatch.setattr(quantize, "search", other)
    with pytest.raises(VerificationError, match="device cuda q8_0"):
        convert(TINY, quant="q8_0", output=tmp_path / "a.gguf", device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device tpu"):
        convert(TINY, output=tmp_path / "a.gguf", device="tpu")


@pytest.mark.parametrize("missing", ["gpu", "triton"])
def test_a_dry_run_needs_no_gpu_and_a_real_one_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if missing == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    convert(TINY, output=tmp_path / "a.gguf", device="cuda", dry_run=True)
    found = "no GPU" if missing == "gpu" else "needs triton"
    with pytest.raises(UnsupportedError if missing == "gpu" else MissingDependency, match=found) as e:
        convert(TINY, output=tmp_path / "a.gguf", device="cuda")
    assert e.value.exit_code == 5 and e.value.hint
    assert list(tmp_path.iterdir()) == []
