"""Every type that is written is proven in llama.cpp: its bytes, its values, its kernel, and the logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert import convert
from qconvert.formats.gguf_values import read_tensors
from qconvert.formats.llama_cpp import LlamaCpp

TINY = Path(__file__).parents[1] / "golden" / "tiny"
needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")


def converted(folder: Path, quant: str, types: dict[str, str]) -> dict[str, str]:
    """The types of the tensors of a file that ends verified."""
    result = convert(
        TINY, quant=quant, tensor_types=[f"{k}={v}" for k, v in types.items()], output=folder / "a.gguf", require_verified=True
    )
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
