"""The mixes that need an importance matrix: llama-quantize itself is asked, where LLAMA_CPP_BIN names its folder."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_gguf_mix import LARGE, SHAPES, Shape, got, write_gguf

from qconvert.errors import UnsupportedError
from qconvert.formats import gguf_imatrix
from qconvert.formats.gguf_imatrix import Entry, IMatrix
from qconvert.formats.gguf_mix import Options, choose, layer_of
from qconvert.formats.gguf_mix_rules import FILE_TYPES

gguf = pytest.importorskip("gguf")
FOLDER = os.environ.get("LLAMA_CPP_BIN")
needs_llama_quantize = pytest.mark.skipif(FOLDER is None, reason="LLAMA_CPP_BIN names no folder of llama.cpp's programs")
LOWEST = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"]


def llama_quantize(source: Path, name: str, imatrix: Path | None) -> dict[str, str] | None:
    """Types as --dry-run prints them; None where an importance matrix is missed."""
    words = [f"{FOLDER}/llama-quantize", "--dry-run", *(["--imatrix", str(imatrix)] if imatrix else [])]
    words += [str(source), str(source.with_name("theirs.gguf")), name, "1"]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = (said.stdout + said.stderr).splitlines()
    if any("will require an imatrix" in line for line in lines):
        return None
    found = [re.search(r"^\[.*\] (\S+) .* type = +(\w+), size = [^(]*(?:\((\w+)\))?$", line) for line in lines]
    return {m[1]: (m[3] or m[2]).lower() for m in found if m}


def write_imatrix(path: Path, shape: Shape) -> frozenset[str]:
    """Of every matrix in a layer; their names."""
    matrices = [t for t in shape.tensors if layer_of(t.name) >= 0 and len(t.shape) > 1]
    n_experts = {t.name: t.shape[0] if len(t.shape) > 2 else 1 for t in matrices}
    entries = {
        t.name: Entry(np.ones((n_experts[t.name], t.shape[-1]), np.float32), np.full(n_experts[t.name], 512)) for t in matrices
    }
    gguf_imatrix.write(path, IMatrix(entries, ("some text",), 1, 512))
    return frozenset(entries)


@needs_llama_quantize
@pytest.mark.parametrize("with_imatrix", [True, False], ids=["imatrix", "none"])
@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=SHAPES | LARGE)
def test_low_mixes_choose_and_refuse_what_llama_quantize_does(shape: Shape, with_imatrix: bool, tmp_path: Path) -> None:
    source, imatrix = tmp_path / "source.gguf", tmp_path / "imatrix.gguf"
    write_gguf(source, shape)
    options = Options(imatrix=write_imatrix(imatrix, shape) if with_imatrix else None)
    for name in LOWEST:
        theirs = llama_quantize(source, name, imatrix if with_imatrix else None)
        if theirs is None:
            with pytest.raises(UnsupportedError, match="needs an imatrix"):
                choose(shape.tensors, FILE_TYPES[name], shape.hyper, options)
        else:
            assert got(choose(shape.tensors, FILE_TYPES[name], shape.hyper, options)) == theirs, (name, shape)


ROLES = ("token_embd", "output", "blk.4.attn_q", "blk.4.attn_v", "blk.4.attn_output", "blk.0.ffn_down", "blk.4.ffn_down",
         "blk.4.ffn_up", "blk.8.ffn_gate")  # fmt: skip
OF_NINE_LAYERS = {  # as llama-quantize of llama.cpp 0.5.0-dev chooses
    "IQ1_S": "q2_k q5_k iq1_s q2_k iq2_xxs q2_k iq1_s iq1_s iq1_s",
    "IQ1_M": "q2_k q5_k iq1_m q2_k iq2_xxs q2_k iq1_m iq1_m iq1_m",
    "IQ2_XXS": "q2_k q5_k iq2_xxs q2_k iq2_xxs q2_k iq2_xxs iq2_xxs iq2_xxs",
    "IQ2_XS": "q2_k q5_k iq2_xs q2_k iq2_xs q2_k iq2_xs iq2_xs iq2_xs",
    "IQ2_S": "iq3_s q5_k iq2_xs iq3_s iq3_s iq3_s iq2_xs iq2_xs iq2_xs",
    "IQ2_M": "iq3_s q5_k iq2_s iq3_s iq3_s iq3_s iq2_s iq2_s iq2_s",
    "IQ3_XXS": "iq3_s q5_k iq2_s iq3_xxs iq3_s iq3_xxs iq3_xxs iq3_xxs iq3_xxs",
    "IQ3_XS": "iq3_s q6_k iq3_xxs iq3_s iq3_s iq3_s iq3_s iq3_xxs iq3_s",
    "IQ3_S": "iq3_s q6_k iq3_s iq3_s iq3_s iq3_s iq3_s iq3_s iq3_s",
    "IQ3_M": "iq3_s q6_k iq3_s q4_k q4_k q4_k iq3_s iq3_s iq3_s",
}


@pytest.mark.parametrize("name", LOWEST)
def test_types_of_nine_layers(name: str) -> None:
    shape = Shape(layers=9)
    options = Options(imatrix=frozenset(t.name for t in shape.tensors))
    types = got(choose(shape.tensors, FILE_TYPES[name], shape.hyper, options))
    assert [types[f"{role}.weight"] for role in ROLES] == OF_NINE_LAYERS[name].split()


def test_a_tensor_of_which_the_imatrix_says_nothing_is_named() -> None:
    shape = Shape()
    options = Options(imatrix=frozenset(t.name for t in shape.tensors) - {"blk.1.attn_q.weight"})
    with pytest.raises(UnsupportedError, match="blk.1.attn_q.weight: iq2_xxs needs an imatrix, and it has no entry") as e:
        choose(shape.tensors, FILE_TYPES["IQ2_XXS"], shape.hyper, options)
    assert e.value.exit_code == 5 and "--calibrate FILE or --imatrix FILE" in str(e.value.hint)


def test_embeddings_that_ggml_cannot_make_without_importance_are_refused() -> None:
    options = Options(pure=True, imatrix=frozenset(t.name for t in Shape().tensors if layer_of(t.name) >= 0))
    with pytest.raises(UnsupportedError, match="output.weight: iq2_xs needs an imatrix"):
        choose(Shape().tensors, FILE_TYPES["IQ2_XS"], Shape().hyper, options)
    types = got(choose(Shape().tensors, FILE_TYPES["IQ2_M"], Shape().hyper, options))
    assert types["token_embd.weight"] == "iq2_s"  # llama-quantize does without there
