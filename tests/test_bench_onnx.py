"""tools/bench_onnx and decode_onnx: they measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qconvert import convert

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench_onnx() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import bench_onnx
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return bench_onnx


def test_decoding_tells_time_and_memory_of_a_folder(tmp_path: Path) -> None:
    convert(ROOT / "golden" / "tiny", to="onnx", bits=4, output=tmp_path / "out", check=False)
    command = [sys.executable, str(ROOT / "tools" / "decode_onnx.py"), str(tmp_path / "out"), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["step_ms"] > 0 and said["used"]["anonymous_mb"] >= said["loaded"]["anonymous_mb"] > 10


def test_kl_is_zero_of_the_same_logits_and_more_of_others(bench_onnx: ModuleType) -> None:
    class Fixed:
        def __init__(self, logits: np.ndarray) -> None:
            self.logits = lambda _: logits

    p = np.array([[0.5, 0.25, 0.25]], np.float32)
    same, other = (bench_onnx.kls(Fixed(np.log(q) + 3), [[0]], [np.log(p)]) for q in (p, p[:, ::-1]))
    assert same == pytest.approx([0], abs=1e-7)
    assert other == pytest.approx([0.25 * np.log(2)], rel=1e-6)


@pytest.mark.parametrize("group", [32, 128])
def test_our_weights_are_nearer_than_those_of_onnxruntimes_quantizers(bench_onnx: ModuleType, group: int) -> None:
    pytest.importorskip("onnx_ir", reason="onnxruntime's quantizers need onnx-ir")
    w = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    mine, zeros = (bench_onnx.error([w], partial(bench_onnx.our_weights, scheme=s, group=group)) for s in ("int4", "uint4"))
    hows = ("default sym", "default asym")
    sym, asym = (bench_onnx.error([w], partial(bench_onnx.ort_weights, how=h, group=group)) for h in hows)
    assert 0.05 < mine < 0.96 * sym and 0.05 < zeros < 0.98 * asym  # measured: 5 % and 4 % less, or more


def test_without_real_inputs_or_the_builder_cases_say_so(bench_onnx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import builder_oracle

    monkeypatch.delenv("GENAI_PYTHON", raising=False)
    monkeypatch.setattr(builder_oracle, "find_spec", lambda name: None if name == "onnx_ir" else name)
    assert builder_oracle.missing() == "the builder needs onnx_ir"
    assert bench_onnx.builders(Path("model"), Path("out")) is None
