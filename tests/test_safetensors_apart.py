"""Codes whose rows lie apart (HQQ, BitNet) and torchao's: bytes by hand and by their libraries, folders run and read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError, VerificationError
from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.scheme import QTensor, scheme_of
from qconvert.sources import Store
from qconvert.verification import verify_file
from qconvert.weights import Weights

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
Visible = Callable[[str], ModuleType]
MODULE = "model.layers.1.mlp.down_proj"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def module_of(folder: Path, module: str = MODULE) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{module}."): v for k, v in tensors_of(folder).items() if k.startswith(f"{module}.")}


def folded(codes: Any, scheme: str, tmp_path: Path, high_first: bool) -> tuple[Any, QTensor]:
    """What fold makes of weights that are codes already, and what unfold makes of that."""
    n, k = codes.shape
    bits = scheme_of(scheme).bits  # type: ignore[union-attr]
    levels = {"scale": torch.ones(n * k // 16, 1), "zero": torch.zeros(n * k // 16, 1)}
    if scheme.startswith("ternary"):
        levels = {"scale": torch.ones(1)}
    parts = 8 // bits
    lines = torch.from_numpy(np.zeros((n * k // 16 // parts, 16), np.uint8))
    save_file({"codes": lines, **levels}, tmp_path / "m.safetensors")
    store = Store()
    store.add("m", tmp_path / "m.safetensors")
    nodes = {
        name: Node("load", (), Type("f32", tuple(v.shape)), {"tensor": f"m/m.safetensors#{name}"}) for name, v in levels.items()
    }
    nodes["codes"] = Node("load", (), Type("u8", tuple(lines.shape)), {"tensor": "m/m.safetensors#codes"})
    attrs = {"parts": parts, "high_first": high_first}
    nodes["q"] = Node("unfold", ("codes", *levels), Type(scheme, (n, k)), attrs)
    nodes["folded"] = Node("fold", ("q",), Type("u8", (n // parts, k)), attrs)
    graph = Graph(nodes, ("q", "folded"))
    weights = Weights(graph, store)
    out = np.zeros((n // parts, k), np.uint8)
    for part in range(parts):
        shift = bits * (parts - 1 - part if high_first else part)
        out |= codes[part * (n // parts) : (part + 1) * (n // parts)] << np.uint8(shift)
    save_file({"codes": torch.from_numpy(out.reshape(lines.shape)), **levels}, tmp_path / "m.safetensors")
    store.close()
    store = Store()
    store.add("m", tmp_path / "m.safetensors")
    weights = Weights(graph, store)
    again = np.concatenate([np.asarray(weights.rows("folded", i, i + 1)) for i in range(n // parts)])
    np.testing.assert_array_equal(again, out)
    q = weights.rows("q", 1, n - 1)
    assert isinstance(q, QTensor)
    store.close()
    return out, q


@pytest.mark.parametrize(("scheme", "high_first"), [("uint4f_g16", True), ("uint2f_g16", True), ("ternary_f32", False)])
def test_codes_come_back_from_bytes_that_rows_share(scheme: str, high_first: bool, tmp_path: Path) -> None:
    bits = 4 if scheme.startswith("uint4") else 2
    codes = np.random.default_rng(0).integers(0, 3 if scheme.startswith("ternary") else 1 << bits, (8, 32), dtype=np.uint8)
    _, q = folded(codes, scheme, tmp_path, high_first)
    np.testing.assert_array_equal(q.codes, codes[1:-1])


def test_the_first_half_of_the_rows_lies_in_the_high_bits(tmp_path: Path) -> None:
    codes = np.repeat(np.array([[1], [2], [3], [4]], np.uint8), 16, axis=1)
    out, _ = folded(codes, "uint4f_g16", tmp_path, True)
    assert out[:, 0].tolist() == [0x13, 0x24]


def test_the_first_quarter_of_the_rows_lies_in_the_low_bits(tmp_path: Path) -> None:
    codes = np.repeat(np.array([[0], [1], [2], [1]], np.uint8), 16, axis=1)
    out, _ = folded(codes, "ternary_f32", tmp_path, False)
    assert out[:, 0].tolist() == [0b01_10_01_00]


# BitNet -------------------------------------------------------------------------------------------


def test_bitnet_folder_gives_the_weights_and_logits_of_the_graph(tmp_path: Path) -> None:
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant="bitnet", output=tmp_path / "out", require_verified=True)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    assert [rows[what].verdict for what in ("runtime transformers", "transformers' unpack_weights")] == ["pass"] * 2
    assert {row.verdict for what, row in rows.items() if what.startswith("kernel ")} <= {"pass"}


def test_bitnet_tensors_are_those_of_transformers(tmp_path: Path) -> None:
    """Its quantizer and its packing, of the same weight."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    convert(TINY, to="safetensors", quant="bitnet", output=tmp_path / "out", check=False)
    weight, got = tensors_of(TINY)[f"{MODULE}.weight"].float(), module_of(tmp_path / "out")
    scale = 1 / weight.abs().mean().clamp(min=1e-5)
    codes = (weight * scale).round().clamp(-1, 1)
    assert torch.equal(got["weight"], bitnet.pack_weights(codes))
    assert got["weight_scale"].dtype == torch.bfloat16
    assert got["weight_scale"].float().item() == pytest.approx((1 / scale).item(), rel=2**-8)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_bitnet_folders_are_read_as_their_linears_multiply(linear_class: str, tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="bitnet", output=tmp_path / "first", check=False)
    path = tmp_path / "first" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_class"] = linear_class
    path.write_text(json.dumps(config))
    convert(tmp_path / "first", to="safetensors", quant="fp32", output=tmp_path / "out", check=False)
    scale = module_of(tmp_path / "first")["weight_scale"].float()
    values = module_of(tmp_path / "out")["weight"].unique()
    want = 1 / scale if linear_class == "bitlinear" else scale
    assert torch.equal(values, torch.cat([-want, torch.zeros(1), want]))


def test_a_bitnet_folder_written_again_is_the_same(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="bitnet", output=tmp_path / "first", check=False)
    convert(tmp_path / "first", to="safetensors", quant="bitnet", output=tmp_path / "second", check=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_bitnet_models_that_normalize_on_the_way_are_refused(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="bitnet", output=tmp_path / "first", check=False)
    path = tmp_path / "first" / "config.json"
    config = json.loads(path.read_text())
    cases = (("use_rms_norm", True, "use_rms_norm"), ("quantization_mode", "online", "quantization_mode online"))
    for key, value, message in cases:
        changed = {**config, "quantization_config": config["quantization_config"] | {key: value}}
        path.write_text(json.dumps(changed))
        with pytest.raises(UnsupportedError, match=message):
            convert(tmp_path / "first", to="safetensors", quant="bf16", output=tmp_path / "out", check=False)


# HQQ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["hqq", "hqq-2bit"])
def test_hqq_folder_gives_the_weights_and_logits_of_the_graph(quant: str, tmp_path: Path, visible: Visible) -> None:
    visible("hqq")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", require_verified=True)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    assert [rows[what].verdict for what in ("runtime hqq", "hqq's dequantization")] == ["pass"] * 2
    assert {row.verdict for what, row in rows.items() if what.startswith("kernel ")} <= {"pass"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_linears_have_the_state_that_hqq_gives_them(bits: int, tmp_path: Path, visible: Visible) -> None:
    """Names, dtypes and shapes of all tensors, and what they say of the module."""
    visible("hqq")
    core = import_module("hqq.core.quantize")
    convert(TINY, to="safetensors", quant="hqq" if bits == 4 else f"hqq-{bits}bit", output=tmp_path / "out", check=False)
    own = torch.nn.Linear(512, 256, bias=False).to(torch.bfloat16)
    settings = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    settings["weight_quant_params"]["round_zero"] = False
    want = core.HQQLinear(own, settings, compute_dtype=torch.bfloat16, device="cpu").state_dict()
    got = module_of(tmp_path / "out")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert name in ("W_q", "scale", "zero") or torch.equal(got[name], value), name


def test_hqq_weights_lose_less_than_by_hqq_itself(tmp_path: Path, visible: Visible) -> None:
    visible("hqq")
    core = import_module("hqq.core.quantize")
    from qconvert.formats.safetensors_files import opened_tensors
    from qconvert.formats.safetensors_hqq_check import linear

    convert(TINY, to="safetensors", quant="hqq", output=tmp_path / "out", check=False)
    weight = tensors_of(TINY)[f"{MODULE}.weight"].float()
    codes, meta = core.Quantizer.quantize(weight, 4, group_size=64, axis=1, device="cpu")
    theirs = core.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    with opened_tensors(tmp_path / "out") as opened:
        ours = linear(opened, MODULE).dequantize()
    assert (ours - weight).norm() < 0.97 * (theirs - weight).norm()  # measured 0.95, with scales in bf16


def test_hqq_folders_keep_their_codes_and_take_an_adapter(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="hqq", output=tmp_path / "first", check=False)
    convert(tmp_path / "first", to="safetensors", quant="hqq", output=tmp_path / "second", check=False)
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    both = f"{tmp_path / 'first'}+{LORA}"
    result = convert(both, to="safetensors", quant="bf16", output=tmp_path / "out", require_verified=True)
    assert all(row.verdict != "fail" for row in result.report.checks)


def test_hqq_modules_of_other_axes_are_refused(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="hqq", output=tmp_path / "first", check=False)
    tensors = tensors_of(tmp_path / "first")
    for axis, error, said in ((2, UnsupportedError, "down_proj of .* axis 2"), (0, InputError, r"down_proj\.W_q")):
        tensors[f"{MODULE}.axis"] = torch.tensor(axis, dtype=torch.int32)
        save_file(tensors, tmp_path / "first" / "model.safetensors")
        with pytest.raises(error, match=said):
            convert(tmp_path / "first", to="safetensors", quant="bf16", output=tmp_path / "out", check=False)


@pytest.mark.parametrize(("bits", "shape", "group"), [(4, (128, 96), 64), (2, (40, 96), 64), (8, (40, 30), 24), (4, (6, 4), 8)])
def test_values_along_axis_0_are_those_of_hqq(
    bits: int, shape: tuple[int, int], group: int, tmp_path: Path, visible: Visible
) -> None:
    """Whatever rows are asked for; where a group does not divide the rows, too."""
    visible("hqq")
    quantizer = import_module("hqq.core.quantize").Quantizer
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, meta = quantizer.quantize(x, nbits=bits, group_size=group, axis=0, device="cpu")
    want = quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}).numpy()
    save_file({"W_q": codes, "scale": meta["scale"], "zero": meta["zero"]}, tmp_path / "m.safetensors")
    store = Store()
    store.add("m", tmp_path / "m.safetensors")
    loads = {
        name: Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref})
        for name in ("W_q", "scale", "zero") for info in (store.tensors("m")[name],)
    }  # fmt: skip
    attrs = {"scheme": f"uint{bits}f_g{group}", "parts": 8 // bits}
    node = Node("across", tuple(loads), Type("f32", shape), attrs)
    weights = Weights(Graph({**loads, "w": node}, ("w",)), store)
    assert np.array_equal(weights.real("w"), want)
    for begin, end in ((0, 1), (1, 4), (shape[0] - 3, shape[0]), (3, 3 + shape[0] // 2)):
        assert np.array_equal(weights.real("w", begin, end), want[begin:end])


def along_axis_0(folder: Path, group: int = 64) -> dict[str, torch.Tensor]:
    """A folder of golden/tiny with hqq's own linears, quantized with axis 0; their weights in f32."""
    core = import_module("hqq.core.quantize")
    convert(TINY, to="safetensors", quant="hqq", output=folder, check=False)
    tensors, found = tensors_of(folder), dict[str, torch.Tensor]()
    plain = tensors_of(TINY)
    for module in [key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")]:
        own = torch.nn.Linear(*plain[f"{module}.weight"].shape[::-1], bias=False)
        own.weight.data = plain[f"{module}.weight"].clone()
        settings = core.BaseQuantizeConfig(nbits=4, group_size=group, axis=0)
        made = core.HQQLinear(own, settings, compute_dtype=torch.bfloat16, device="cpu").state_dict()
        tensors |= {f"{module}.{name}": value.clone() for name, value in made.items()}
        again = core.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        again.load_state_dict(made)
        found[module] = again.dequantize().float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return found


def test_hqq_folders_of_axis_0_are_read_take_an_adapter_and_are_verified(tmp_path: Path, visible: Visible) -> None:
    visible("hqq")
    found = along_axis_0(tmp_path / "first")
    convert(tmp_path / "first", to="safetensors", quant="fp32", output=tmp_path / "out", require_verified=True)
    written = tensors_of(tmp_path / "out")
    assert len(found) == 21 and all(torch.equal(written[f"{module}.weight"], value) for module, value in found.items())
    result = convert(f"{tmp_path / 'first'}+{LORA}", to="safetensors", quant="hqq", output=tmp_path / "two", eval_tokens=0)
    rows = {row.what: row for row in result.report.checks}
    assert not result.report.failed and rows["rounded again: uint4f_g64_bf16 -> uint4f_g64_bf16"].verdict == "info"
    report = verify_file(tmp_path / "first", str(TINY))
    assert not report.failed and {r.what: r.verdict for r in report.checks}["runtime hqq"] == "pass"


def test_a_wrong_zero_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: Visible) -> None:
    visible("hqq")
    from qconvert.formats import safetensors_hqq_check

    real = safetensors_hqq_check.linear

    def wrong(tensors: Any, module: str) -> Any:
        own = real(tensors, module)
        own.meta["zero"] = own.meta["zero"] + 1
        return own

    monkeypatch.setattr(safetensors_hqq_check, "linear", wrong)
    with pytest.raises(VerificationError, match="hqq's dequantization"):
        convert(TINY, to="safetensors", quant="hqq", output=tmp_path / "out")


# torchao ------------------------------------------------------------------------------------------


def test_codes_of_torchao_are_in_twos_complement_the_first_in_the_low_half() -> None:
    scheme = scheme_of("int4o_g32_bf16")
    assert scheme is not None
    codes = np.resize(np.array([-8, 7, -1, 0, 1, 2, 3, 4], np.int8), (1, 32))
    q = QTensor(scheme, codes, (np.array([[0.5]], np.float32), np.array([[-2]], np.float32)))
    layout = layout_of("torchao.int4o_g32_bf16")
    packed = layout.pack(q)
    assert packed.tobytes().hex() == "780f2143" * 4 + "003f" + "00c0"
    np.testing.assert_array_equal(layout.unpack(packed).codes, codes)
    np.testing.assert_array_equal(q.dequantize()[0, :3], [-6, 1.5, -2.5])


def test_torchao_folder_gives_the_weights_of_the_graph(tmp_path: Path, visible: Visible) -> None:
    visible("torchao")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant="torchao-int4", output=tmp_path / "out")
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    assert rows["torchao's unflatten_tensor_state_dict"].verdict == "pass"
    assert {row.verdict for what, row in rows.items() if what.startswith("kernel ")} <= {"pass"}
    assert rows["runtime transformers"].verdict == "skip" and "mslk" in str(rows["runtime transformers"])


LOADED = """
import json, sys
import torch
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int4Tensor, Int4WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

folder, module = sys.argv[1:]
with safe_open(f"{folder}/model.safetensors", "pt") as file:
    metadata = file.metadata()
    parts = [file.get_tensor(f"{module}._weight_{part}") for part in ("qdata", "scale", "zero_point")]
_, said = flatten_tensor_state_dict({f"{module}.weight": Int4Tensor(*parts, [1, 128], torch.Size([256, 512]))})
assert json.loads(metadata[f"{module}.weight"]) == json.loads(said[f"{module}.weight"]), metadata
kind = Int4WeightOnlyConfig(group_size=128, int4_packing_format="plain")
want = json.loads(json.dumps(TorchAoConfig(kind, modules_to_not_convert=["lm_head"]).to_dict()))
assert json.load(open(f"{folder}/config.json"))["quantization_config"] == want, want
model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
assert not any(told.values()), told
assert type(model.get_submodule(module).weight) is Int4Tensor
"""


def test_torchao_and_transformers_write_and_read_the_same(tmp_path: Path) -> None:
    """What the metadata say of a tensor, the settings, and every key as it is loaded; transformers looks for torchao once."""
    if PathFinder.find_spec("torchao") is None:  # it is hidden here
        pytest.skip("torchao is not installed")
    convert(TINY, to="safetensors", quant="torchao-int4", output=tmp_path / "out", check=False)
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "out"), MODULE], check=True)


def test_torchao_folders_keep_their_codes_and_are_read(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="torchao-int4", group=64, output=tmp_path / "first", check=False)
    convert(tmp_path / "first", to="safetensors", quant="torchao-int4", output=tmp_path / "second", check=False)
    first, second = module_of(tmp_path / "first"), module_of(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    convert(tmp_path / "first", to="safetensors", quant="fp32", output=tmp_path / "plain", check=False)
    codes = torch.stack([first["_weight_qdata"] << 4 >> 4, first["_weight_qdata"] >> 4], -1).reshape(256, 512)
    scales, zeros = (first[f"_weight_{part}"].float().t().repeat_interleave(64, 1) for part in ("scale", "zero_point"))
    assert torch.equal(module_of(tmp_path / "plain")["weight"], codes * scales + zeros)


def test_other_packings_of_torchao_are_refused(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="torchao-int4", output=tmp_path / "first", check=False)
    path = tmp_path / "first" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_type"]["default"]["_data"]["int4_packing_format"] = "preshuffled"
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="packed preshuffled"):
        convert(tmp_path / "first", to="safetensors", quant="bf16", output=tmp_path / "out", check=False)


def test_groups_that_a_format_has_not_are_refused() -> None:
    cases = (("torchao-int4", 48, "multiples of 32"), ("hqq", 12, "multiples of 8"), ("bitnet", 64, "one scale"))
    for quant, group, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(TINY, to="safetensors", quant=quant, group=group, dry_run=True)


def test_shapes_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", quant="bitnet", output=tmp_path / "first", check=False)
    tensors = tensors_of(tmp_path / "first")
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"][:-1].clone()
    save_file(tensors, tmp_path / "first" / "model.safetensors")
    with pytest.raises(InputError, match=r"u8\[63, 512\], but config.json says u8\[64, 512\]"):
        convert(tmp_path / "first", to="safetensors", quant="bf16", output=tmp_path / "out", check=False)


@pytest.mark.parametrize("quant", ["bitnet", "int8-bnb", "mlx-4bit"])
def test_folders_are_verified_against_what_they_were_made_from(quant: str, tmp_path: Path) -> None:
    for library in {"int8-bnb": ["bitsandbytes"], "mlx-4bit": ["mlx_lm"]}.get(quant, []):
        pytest.importorskip(library)
    convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", check=False)
    good = verify_file(tmp_path / "out", f"{TINY}+{LORA}")
    assert good.verified and not good.failed
    if quant != "bitnet":  # three codes lose more than the adapter adds
        assert [row.what for row in verify_file(tmp_path / "out", str(TINY)).failed] == ["weights"]
