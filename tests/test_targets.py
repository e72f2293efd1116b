"""What --target and --list targets say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qconvert import registry
from qconvert.errors import MissingDependency, UnsupportedError, UsageError
from qconvert.formats.onnx import QUANTS
from qconvert.kernels import nvrtc
from qconvert.targets import BITS, LETTERS, OLD_CUDA, RULES, TARGETS, answer, find_target, target_notes

ROOT = Path(__file__).parents[1]
TINY = ROOT / "golden" / "tiny"


def refusal(target: str, format: str, quant: str) -> tuple[str, str]:
    with pytest.raises(UnsupportedError) as caught:
        target_notes(target, format, quant, None)
    return caught.value.message, caught.value.hint or ""


def test_awq_on_pascal_is_refused_with_what_vllm_needs_and_the_nearest_that_runs() -> None:
    assert refusal("sm_61", "safetensors", "awq") == (
        "no runtime is known to run awq (safetensors) on sm_61 (Pascal: GTX 10x0, P40): "
        "vLLM 0.15.1 needs compute capability 7.5",
        "nearest that runs there: --to gguf --bits 4 (llama.cpp 0.5.0-dev, built with CUDA 12.x), or "
        "--to safetensors --quant nf4 (transformers 5.23 with bitsandbytes 0.50, torch 2.14 or older for CUDA 12.6)",
    )


def test_gguf_on_pascal_runs_in_llama_cpp_built_with_cuda_12() -> None:
    assert target_notes("sm_61", "gguf", "Q4_K_M", None) == [
        "sm_61 runs Q4_K_M: llama.cpp 0.5.0-dev, built with CUDA 12.x (known from: ggml/src/ggml-cuda)"
    ]


def test_types_that_run_but_slowly_come_with_advice() -> None:
    assert "IQ types look each weight up in a table" in target_notes("sm_61", "gguf", "IQ4_XS", None)[1]
    assert "emulates products of bytes" in target_notes("sm_52", "gguf", None, 4)[1]
    assert "1/64" in target_notes("sm_61", "safetensors", "fp16", None)[1]
    assert len(target_notes("sm_80", "gguf", "IQ4_XS", None)) == 2  # llama.cpp and vLLM, no advice


def test_what_runs_only_with_expanded_weights_says_so_and_what_stays_packed() -> None:
    runs, packed = target_notes("sm_61", "safetensors", None, 4)
    assert runs.startswith("sm_61 runs w4a16: transformers 5.23 with compressed-tensors 0.20, torch 2.14 or older for ")
    assert "expanding the weights to 16 bits" in runs
    assert packed == (
        "sm_61: vLLM after 0.15.1 needs compute capability 7.5. Nearest that stays packed: --to gguf --bits 4 "
        "(llama.cpp 0.5.0-dev, built with CUDA 12.x), or --to safetensors --quant nf4 "
        "(transformers 5.23 with bitsandbytes 0.50, torch 2.14 or older for CUDA 12.6)"
    )


def test_what_no_rule_speaks_of_is_not_known_and_not_refused() -> None:
    assert target_notes("gfx1100", "onnx", "int4", None) == ["gfx1100: whether anything runs onnx int4 there is not known"]
    assert target_notes("sm_90", "my-format", "q7", None) == ["sm_90: whether anything runs my-format q7 there is not known"]
    assert target_notes(None, "safetensors", "awq", None) == []


@pytest.mark.parametrize(("name", "found"), [("sm_61", "sm_61"), ("SM61", "sm_61"), ("6.1", "sm_61"), ("10.0", "sm_100"),
                                             ("GFX942", "gfx942"), ("cpu", "cpu")])  # fmt: skip
def test_a_target_has_several_spellings(name: str, found: str) -> None:
    assert find_target(name).name == found


def test_an_unknown_target_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"--target gfx1010: not in the table\nhint: there are sm_52, .* gfx1100, "):
        find_target("gfx1010")


def test_rules_name_types_and_targets_that_exist() -> None:
    known = {"safetensors": set(BITS), "onnx": set(QUANTS), "gguf": set()}
    for rule in RULES:
        assert rule.quants == "*" or set(rule.quants.split()) <= known[rule.format], rule
        assert set(f"{rule.others} {rule.never}".split()) <= set(TARGETS) and bool(rule.never) == bool(rule.why), rule
        assert rule.version and rule.source, rule
        assert not set(rule.others.split()) & set(rule.never.split()), rule


def test_every_dialect_of_safetensors_has_a_row() -> None:
    assert set(registry.BUILTIN["dialects"]) <= set(BITS)


def test_every_claim_of_running_has_a_runtime_a_version_and_a_source() -> None:
    for target in TARGETS.values():
        for format, quant in (("gguf", "any"), *(("onnx", q) for q in QUANTS), *(("safetensors", q) for q in BITS)):
            for rule in answer(target, format, quant).runs:
                assert rule.runtime in LETTERS and rule.version[0].isdigit() | rule.version.startswith(("b", "after ")), rule


def test_gpus_that_cuda_13_dropped_are_those_that_nvrtc_12_compiles_for() -> None:
    try:
        compiles_for = set(nvrtc.architectures())
    except MissingDependency as e:
        pytest.skip(e.message)
    old = [t.name for t in TARGETS.values() if t.cuda == OLD_CUDA]
    assert old == ["sm_52", "sm_61", "sm_70"] and set(old) < compiles_for
    assert {t.name for t in TARGETS.values() if t.cc} <= compiles_for


def qconvert(*args: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "qconvert", *map(str, args)], capture_output=True, text=True, env=env)


def test_a_conversion_that_nothing_runs_stops_before_the_model_is_read(tmp_path: Path) -> None:
    args = ("no/such/model", "--to", "safetensors", "--quant", "awq", "--target", "sm_61")
    done = qconvert(*args, "--json", tmp_path / "r.json")
    assert done.returncode == 5 and "vLLM 0.15.1 needs compute capability 7.5" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["exit"] == 5


def test_a_conversion_says_what_runs_it(tmp_path: Path) -> None:
    done = qconvert(TINY, "--bits", 4, "--target", "sm_61", "--dry-run", "--json", tmp_path / "r.json")
    note = "sm_61 runs 4 bits: llama.cpp 0.5.0-dev, built with CUDA 12.x (known from: ggml/src/ggml-cuda)"
    assert done.returncode == 0 and f"note: {note}\n" in done.stdout
    assert note in json.loads((tmp_path / "r.json").read_text())["notes"]


def test_the_list_has_facts_a_matrix_and_sources() -> None:
    lines = qconvert("--list", "targets").stdout.splitlines()
    assert "sm_61    Pascal: GTX 10x0, P40  yes                           1/64       48          12.9" in lines
    (awq,) = (line.split() for line in lines if line.split()[1:2] == ["awq"])
    assert awq[2:] == ["-", "-", "-", *["V"] * 6, "-", "-", "?", "VT"]
    at = lines.index("vLLM 0.15.1: safetensors, awq")
    assert lines[at + 1] == ("    sm_75 and newer, cpu; not on gfx942 gfx1100: it has no kernel for AMD GPUs. Known from: "
                             "its documentation, supported hardware")  # fmt: skip
