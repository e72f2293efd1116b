"""Every type that is written is proven in llama.cpp: its bytes, its values, its kernel, and the logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert import convert
from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_values import read_tensors
from qconvert.formats.llama_cpp import LlamaCpp

TINY = Path(__file__).parents[1] / "golden" / "tiny"
needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")


def converted(folder: Path, quant: str, types: dict[str, str], **options: Path | int | str) -> dict[str, str]:
    """The types of the tensors of a file that ends verified."""
    chosen = [f"{k}={v}" for k, v in types.items()]
    result = convert(TINY, quant=quant, tensor_types=chosen, output=folder / "a.gguf", require_verified=True, **options)
    assert [r for r in result.report.data()["checks"] if r["verdict"] == "fail"] == [] and result.verified
    return {name: tensor.type.name.lower() for name, tensor in read_tensors(result.outputs).items()}


@needs_llama
def test_a_file_with_types_that_gguf_py_knows_is_proven(tmp_path: Path) -> None:
    types = converted(tmp_path, "TQ2_0", {"attn_q": "tq1_0", "ffn_down": "mxfp4"})
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_k", "ffn_down")} == {"tq1_0", "tq2_0", "mxfp4"}


@needs_llama
def test_a_file_with_types_that_gguf_py_lacks_is_proven_by_ggml(tmp_path: Path) -> None:
    types = converted(tmp_path, "Q2_0", {"attn_q": "q1_0"})
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_k.weight"]) == ("q1_0", "q2_0")


@needs_llama
@pytest.mark.parametrize("solver", ["search", "gptq"])
def test_a_file_with_codebooks_is_proven(solver: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    chosen = {"attn_q": "iq1_s", "attn_k": "iq1_m", "attn_v": "iq2_xs", "attn_output": "iq3_xxs", "ffn_gate": "iq2_s"}
    chosen["ffn_up"] = "iq3_s"
    types = converted(tmp_path, "IQ2_XXS", chosen, calibrate=text, calibrate_tokens=256, solver=solver)
    assert {k: types[f"blk.0.{k}.weight"] for k in chosen} == chosen and types["blk.1.ffn_down.weight"] == "iq2_xxs"


def test_types_that_need_an_imatrix_are_refused_without_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="iq2_xxs needs an imatrix, and none was given") as e:
        convert(TINY, quant="iq2_xxs", output=tmp_path / "a.gguf")
    assert e.value.exit_code == 5 and "--calibrate" in str(e.value.hint) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("solver", "why"), [("lsq", "entries of a codebook"), ("gptq{ordered=true}", "stand together")])
def test_solvers_that_take_weights_one_by_one_refuse_codebooks(solver: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"makes no iq3_s: .*{why}"):
        convert(TINY, quant="IQ3_S", solver=solver, calibrate=Path(__file__), dry_run=True)
