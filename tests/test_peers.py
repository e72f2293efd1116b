"""Whole files against llama.cpp's own chain: what we write in one pass, llama-quantize writes from our 16-bit file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconvert import convert
from qconvert.formats.gguf_check import read_tensors
from qconvert.formats.gguf_mix_rules import FILE_TYPES

pytestmark = pytest.mark.peer
GOLDEN = Path(__file__).parents[1] / "golden"
ELSEWHERE = ("f32", "f16", "bf16", "q2_0")  # the last is newer than cyllama's llama.cpp; test_kernels.py has its bytes
NEED_IMATRIX = ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")
MIXES = [name for name, file in FILE_TYPES.items() if file.default not in ELSEWHERE and name not in NEED_IMATRIX]


@pytest.mark.parametrize("mix", MIXES)
def test_every_tensor_is_what_llama_quantize_makes_of_the_unquantized_file(tmp_path: Path, mix: str) -> None:
    llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama brings llama-quantize")
    llama.disable_logging()
    model = f"{GOLDEN / 'tiny'}+{GOLDEN / 'tiny-lora'}"
    convert(model, quant="F32", output=tmp_path / "f32.gguf", check=False)
    ours = convert(model, quant=mix, output=tmp_path / "ours.gguf", check=False)
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FILE_TYPES[mix].id, 1
    llama.model_quantize(str(tmp_path / "f32.gguf"), str(tmp_path / "theirs.gguf"), params)
    mine, theirs = read_tensors(ours.outputs), read_tensors([tmp_path / "theirs.gguf"])
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].type == tensor.type, name
        assert np.array_equal(mine[name].data, tensor.data), name
