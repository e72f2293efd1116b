"""ONNX files that exist: what is in them, and whether they are the model that they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qconvert import convert
from qconvert.cli import cli
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.inspection import inspect_file
from qconvert.report import Report
from qconvert.verification import verify_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
BOTH = f"{TINY}+{LORA}"


def made(out: Path, **options: Any) -> Path:
    convert(BOTH, to="onnx", output=out, check=False, **options)
    return out


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("int4") / "out", quant="int4")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("fp32") / "out", quant="fp32", form="portable")


def edited(folder: Path, out: Path, edit: Callable[[Any], None]) -> Path:
    """The folder with its protobuf changed, and nothing that says who made it."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    edit(model)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    return out


def unchanged(model: Any) -> None:
    pass


def verdicts(report: Report) -> dict[str, str]:
    return {r.what: r.verdict for r in report.checks if r.verdict != "info"}


# inspect ------------------------------------------------------------------------------------------


def test_inspect_tells_the_scheme_of_each_weight_and_true_bits_without_reading_weights(tmp_path: Path, int4: Path) -> None:
    copy = edited(int4, tmp_path / "out", unchanged)
    (copy / "model.onnx.data").unlink()
    found = inspect_file(str(copy))
    assert (found["format"], found["bpw"]["codes"], found["bpw"]["linear"]) == ("onnx", 4, 5)
    tensors = {t["name"]: t for t in found["tensors"]}
    codes = tensors["model.layers.0.mlp.up_proj.qweight"]
    assert (codes["dtype"], codes["shape"], codes["nbytes"]) == ("int4_g32", (512, 256), 512 * 128)
    assert tensors["model.layers.0.mlp.up_proj.scales"]["of"] == codes["name"]
    rows = tensors["model.embed_tokens.qweight.rows"]
    assert (rows["of"], rows["nbytes"]) == ("model.embed_tokens.qweight", 0)  # the tied head's bytes, counted once
    n_weights = sum(t["nbytes"] for t in tensors.values())
    assert n_weights == pytest.approx((int4 / "model.onnx.data").stat().st_size, abs=64 * len(tensors))


def test_inspect_tells_opset_inputs_outputs_and_where_it_comes_from(int4: Path) -> None:
    said = inspect_file(str(int4 / "model.onnx"))["metadata"]
    assert said["opset"] == "ai.onnx 23, com.microsoft 1" and said["ir_version"] == 11
    assert said["input past_key_values.%d.key"] == "f32[batch_size,2,past_sequence_length,64] x 3"
    assert said["output logits"] == "f32[batch_size,sequence_length,1024]"
    assert (said["qconvert.base_model"], said["qconvert.adapter.0"]) == ("tiny", "tiny-lora")


@pytest.mark.parametrize(("form", "bits"), [("ort", 5.125), ("portable", 5.125), ("legacy", 5.125)])
def test_inspect_counts_the_same_bits_in_every_form(tmp_path: Path, form: str, bits: float) -> None:
    found = inspect_file(str(made(tmp_path / "out", quant="uint4", form=form)))
    assert found["bpw"]["linear"] == bits
    assert found["types"].keys() == {"uint4_g32", "f32"}


def test_inspect_reads_what_others_made(tmp_path: Path) -> None:
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    codes = helper.make_tensor("w", onnx.TensorProto.UINT4, [64, 6], bytes(192), raw=True)
    scales, bias = (numpy_helper.from_array(np.ones(s, np.float16), n) for s, n in (((2, 6), "s"), ((6,), "b")))
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32)]
    nodes += [helper.make_node("Gemm", ["x", "d", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, 10, ["N", k]) for n, k in (("x", 64), ("y", 6)))
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [codes, scales, bias, axes]))
    onnx.save(model, tmp_path / "a.onnx")
    found = inspect_file(str(tmp_path / "a.onnx"))
    listed = {t["name"]: (t["dtype"], t["shape"], t["nbytes"], t["of"]) for t in found["tensors"]}
    assert listed == {
        "w": ("int4_g32", (64, 6), 192, ""), "s": ("f16", (2, 6), 24, "w"), "b": ("f16", (6,), 12, ""),
    }  # fmt: skip
    assert found["metadata"]["input x"] == "f16[N,64]"


def test_inspect_shows_a_foreign_model_on_the_command_line(shared_data: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(shared_data / "silero-vad" / "silero_vad_half.onnx")])
    assert done.exit_code == 0 and "pytorch 2.3.1" in done.output and "encoder.0.reparam_conv.weight" in done.output


def test_a_checkpoint_with_onnx_files_beside_it_is_still_a_checkpoint(tmp_path: Path, int4: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes((int4 / "model.onnx").read_bytes())
    assert inspect_file(str(tmp_path))["format"] == "safetensors"
    assert inspect_file(str(tmp_path / "onnx" / "model.onnx"))["format"] == "onnx"


def test_of_several_onnx_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"2 ONNX files: a\.onnx, b\.onnx"):
        inspect_file(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"\x08\x0b", b"not a protobuf", b"\xff" * 40])
def test_a_damaged_onnx_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.onnx"):
        inspect_file(str(tmp_path / "a.onnx"))


# verify -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "int4"},
        {"quant": "uint4", "form": "portable", "weights_in": "safetensors", "split_max_size": "400K"},
        {"quant": "int8", "group": 64, "form": "legacy"},
        {"quant": "fp16", "layout": "transformersjs"},
    ],
)
def test_files_of_ours_are_verified_weight_by_weight(tmp_path: Path, options: dict[str, Any]) -> None:
    report = verify_file(made(tmp_path / "out", **options), BOTH, threads=1)
    rows = verdicts(report)
    assert report.verified and set(rows.values()) == {"pass"}
    assert {"weights", "runtime onnxruntime, the file's weights, 8 cached steps"} <= rows.keys()


def test_integer_products_are_held_to_the_price_of_four_bits_as_their_weights_are_not_compared(tmp_path: Path) -> None:
    report = verify_file(made(tmp_path / "out", quant="int8-dynamic"), BOTH, threads=1)
    rows = verdicts(report)
    assert rows.pop("weights") == "skip" and set(rows.values()) == {"pass"}
    assert "runtime onnxruntime, price over that of our own int4_g32" in rows


def test_the_model_without_its_adapter_is_another_and_the_worst_weight_is_named(int4: Path) -> None:
    report = verify_file(int4, str(TINY), threads=1)
    assert report.exit == 6 and report.failed[0].what == "weights" and "mlp.up_proj" in report.failed[0].reason


def test_quantized_files_of_others_are_held_to_what_their_bits_cost(tmp_path: Path, int4: Path) -> None:
    copy = edited(int4, tmp_path / "out", unchanged)
    what = "runtime onnxruntime, price over that of our own int4_g32"
    right, wrong = verify_file(copy, BOTH, threads=1), verify_file(copy, str(TINY), threads=1)
    assert right.verified and verdicts(right)[what] == "pass" and "weights" not in verdicts(right)
    assert next(r.value for r in right.checks if r.what == what) == pytest.approx(1, abs=0.2)  # it is our own
    assert wrong.exit == 6 and verdicts(wrong)[what] == "fail"


def test_f32_files_of_others_are_held_to_arithmetic(tmp_path: Path, fp32: Path) -> None:
    copy = edited(fp32, tmp_path / "out", unchanged)
    assert verdicts(verify_file(copy, BOTH, threads=1)) == {
        "runtime onnxruntime, prompts": "pass", "runtime onnxruntime, 8 cached steps": "pass",
    }  # fmt: skip
    assert verify_file(copy, str(TINY), threads=1).failed[0].what == "runtime onnxruntime, prompts"


def test_positions_are_fed_where_a_file_asks_for_them(tmp_path: Path, fp32: Path) -> None:
    def ask(model: Any) -> None:
        graph = model.graph
        graph.node.remove(next(n for n in graph.node if "position_ids" in n.output))
        value = next(v for v in graph.value_info if v.name == "position_ids")
        graph.input.append(value)
        graph.value_info.remove(value)

    assert verify_file(edited(fp32, tmp_path / "out", ask), BOTH, threads=1).verified


def test_a_cache_that_is_mixed_up_fails_in_the_cached_steps_alone(tmp_path: Path, fp32: Path) -> None:
    def swap(model: Any) -> None:
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name in ("past_key_values.0.key", "past_key_values.1.key"):
                    node.input[i] = name.translate(str.maketrans("01", "10"))

    assert verdicts(verify_file(edited(fp32, tmp_path / "out", swap), BOTH, threads=1)) == {
        "runtime onnxruntime, prompts": "pass", "runtime onnxruntime, 8 cached steps": "fail",
    }  # fmt: skip


def test_a_file_without_a_weight_is_named(tmp_path: Path, int4: Path) -> None:
    def rename(model: Any) -> None:
        model.metadata_props.add(key="qconvert.version", value="0")
        next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.up_proj.qweight").name = "other"

    with pytest.raises(InputError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        verify_file(edited(int4, tmp_path / "out", rename), BOTH, threads=1)


def test_what_is_no_decoder_is_refused(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no input input_ids|an input"):
        verify_file(shared_data / "silero-vad" / "silero_vad_half.onnx", BOTH, threads=1)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UnsupportedError, match="no file of a known format"):
        verify_file(tmp_path / "notes.txt", BOTH)


def test_verify_on_the_command_line_reports_as_json(tmp_path: Path, int4: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(int4), "--against", BOTH, "--json", "-", "-q", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runtime"]["name"] == "onnxruntime"


@pytest.mark.peer
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_what_genais_own_builder_made_is_verified(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("onnx_ir", reason="onnxruntime-genai's builder needs onnx-ir")
    pytest.importorskip("onnxruntime_genai")
    build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", TINY, "-o", tmp_path / "out"]
    build += ["-p", precision, "-e", "cpu", "-c", tmp_path / "cache"]
    subprocess.run(build, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert verify_file(tmp_path / "out", str(TINY), threads=1).verified
    assert verify_file(tmp_path / "out", BOTH, threads=1).exit == 6
