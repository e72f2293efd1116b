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
from qconvert.verification import verify_file
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
    modules = {"ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "attn_v": "self_attn.v_proj"}
    modules["attn_output"] = "self_attn.o_proj"
    tensors = {t.name: t for t in gguf.GGUFReader(foreign).tensors}
    for role, module in modules.items():
        t = tensors[f"blk.0.{role}.weight"]
        got = np.asarray(weights.real(f"model.layers.0.{module}.weight"), np.float32)
        assert t.tensor_type.name.startswith("IQ")
        assert np.array_equal(got.view(np.uint32), gguf.quants.dequantize(t.data, t.tensor_type).view(np.uint32)), role
    store.close()


@needs_llama
def test_it_becomes_a_proven_file_of_another_type(foreign: Path, tmp_path: Path) -> None:
    assert convert(foreign, quant="Q8_0", output=tmp_path / "a.gguf", require_verified=True).verified


@needs_llama
def test_it_is_verified_against_the_model_it_was_made_from(foreign: Path) -> None:
    report = verify_file(foreign, str(TINY), threads=1)
    assert report.runtime and [row for row in report.checks if row.verdict == "fail"] == []
    assert {f"kernel {name} x 256" for name in ("iq2_xxs", "iq3_xxs", "iq3_s", "iq2_s")} <= {row.what for row in report.checks}
