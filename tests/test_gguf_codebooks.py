"""Files that others made with codebook types (IQ1_S to IQ3_S): read as input bit for bit, and verified against their model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconvert import convert
from qconvert.build import build
from qconvert.formats.gguf_source import read_gguf
from qconvert.formats.gguf_values import quantized_by_ggml
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.sources import Store
from qconvert.weights import Weights

gguf = pytest.importorskip("gguf")
TINY = Path(__file__).parents[1] / "golden" / "tiny"
needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")


def retyped(source: Path, target: Path, types: dict[str, str]) -> None:
    """The file again by gguf-py, tensors whose names contain a key of `types` by ggml's own quantizer."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for t in reader.tensors:
        name = next((v for k, v in types.items() if k in t.name), None)
        value = np.array(t.data)
        if name is None:
            writer.add_tensor(t.name, value)
        else:
            kind = gguf.GGMLQuantizationType[name.upper()]
            writer.add_tensor(t.name, quantized_by_ggml(name, value.astype(np.float32)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("iq")
    convert(TINY, to="gguf", quant="F32", output=folder / "f32.gguf", check=False)
    types = {"attn_v.": "iq2_xxs", "ffn_up.": "iq3_xxs", "attn_output.": "iq3_s", "ffn_gate.": "iq2_s"}
    retyped(folder / "f32.gguf", folder / "iq.gguf", types)
    return folder / "iq.gguf"


@needs_llama
def test_its_weights_are_those_of_gguf_py(foreign: Path) -> None:
    store = Store()
    graph = build(read_gguf(foreign, store))
    weights = Weights(graph, store)
    for t in gguf.GGUFReader(foreign).tensors:
        if ".0.ffn_" in t.name or ".0.attn_v" in t.name or ".0.attn_output" in t.name:
            part = t.name.split(".")[2]
            ours = {"ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
                    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}[part]  # fmt: skip
            got = weights.real(f"model.layers.0.{ours}.weight")
            wanted = gguf.quants.dequantize(t.data, t.tensor_type)
            assert np.array_equal(np.asarray(got, np.float32).view(np.uint32), np.asarray(wanted, np.float32).view(np.uint32)), t.name
    store.close()


@needs_llama
def test_it_becomes_a_proven_file_of_another_type(foreign: Path, tmp_path: Path) -> None:
    assert convert(foreign, quant="Q8_0", output=tmp_path / "a.gguf", require_verified=True).verified
