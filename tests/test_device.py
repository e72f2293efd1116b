"""--device cuda, interpreted: files are the CPU's byte for byte, and the report says what ran where; without a GPU, why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from qconvert import Node, Type, convert, kernels, on_device
from qconvert.errors import MissingDependency, UnsupportedError, UsageError, VerificationError
from qconvert.graph import Graph
from qconvert.kernels.gpu import quantize
from qconvert.kernels.gpu.columns import GpuColumns
from qconvert.scheme import F32, Bytes, scheme_of
from qconvert.solvers import least_squares
from qconvert.sources import Store
from qconvert.weights import Weights

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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(Path(__file__).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return file


@pytest.mark.parametrize(("solver", "types"), [("rtn", ("q4_0", "q6_k")), ("gptq{ordered=true}", ("q4_0", "q2_k"))])
def test_a_file_of_a_solver_is_the_cpus(solver: str, types: tuple[str, str], text: Path, tmp_path: Path) -> None:
    chosen = tuple(rf"blk\.{i}\.attn_k\.weight={name}" for i, name in enumerate(types))
    for device in ("cpu", "cuda"):
        file, some = tmp_path / f"{device}.gguf", {"calibrate": text, "calibrate_tokens": 256} if "gptq" in solver else {}
        result = convert(
            TINY, quant="f16", tensor_types=chosen, solver=solver, output=file, device=device, check=False, **some
        )  # fmt: skip
    assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
    (note,) = (note for note in result.report.notes if note.startswith("--device cuda: 2 of 2 weights"))
    assert ("gptq's Cholesky factors, in f64 (2, first model.layers.0." in note) == ("gptq" in solver)
    assert ("levels of q2_k, for want of a kernel" in note) == ("gptq" in solver) and "on the CPU" not in note


def test_the_proof_compares_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, inputs = rng.standard_normal((8, 64)), rng.standard_normal((64, 128)) + rng.standard_normal(128)
    nodes = {name: Node("constant", (), Type("f32", v.shape), {"values": v.tolist()})
             for name, v in (("w", x), ("h", inputs @ inputs.T))}  # fmt: skip
    nodes["q"] = Node("quantize", ("w", "h"), Type("int4_g32", x.shape), {"solver": "gptq"})
    weights = Weights(Graph(nodes, ("q",)), Store(), device="cuda")
    assert [(r.what, r.verdict) for r in on_device.rows(weights)] == [("device cuda int4_g32 by gptq", "pass")]
    monkeypatch.setattr(GpuColumns, "feed", lambda *args: None)
    assert [r.verdict for r in on_device.rows(weights)] == ["fail"]


def test_every_weight_of_a_checkpoint_rounds_there(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        report = convert(TINY, to="safetensors", quant="w4a16", solver="rtn", output=out, device=device, check=False).report
    files = [next((tmp_path / device).glob("*.safetensors")).read_bytes() for device in ("cpu", "cuda")]
    assert files[0] == files[1] and "--device cuda: 21 of 21 weights are quantized on the GPU" in report.notes


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
    def node(dtype: str, solver: str, *statistics: str) -> Node:
        return Node("quantize", ("%w", *statistics), Type(dtype, (64, 256)), {"solver": solver})

    def has(dtype: str, solver: str, *statistics: str) -> bool:
        return quantize.has(node(dtype, solver, *statistics))

    assert all(has(scheme, "search") for scheme in quantize.SEARCHES)
    assert has("int4_g32", "mse") and has("uint4f_g64", "mse") and has("nf4_g64", "mse") and has("uint8_g128_bf16", "mse")
    assert not has("q4_k", "search", "%moments")  # no kernel weighs by statistics
    assert not has("q4_k", "gptq") and not has("int4_g32", "hqq") and not has("mxfp4", "mse")
    assert all(on_device.has(node(dtype, "gptq", "%h")) for dtype in ("q4_k", "int4_g32", "nvfp4", "int4_row", "uint1f_g64"))
    assert all(on_device.has(node(dtype, solver)) for dtype in ("q4_k", "uint4_g32") for solver in ("rtn", "lsq"))
    assert not on_device.has(node("nvfp4", "rtn")) and not on_device.has(node("int8_row", "rtn"))  # as other packages round
    assert not on_device.has(node("q2_k", "lsq")) and not on_device.has(node("iq2_s", "gptq", "%h"))
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
