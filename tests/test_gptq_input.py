"""GPTQ checkpoints as the source, packed by hand: their codes in ONNX give the logits of the dequantized model.

Two of the cases are exported wrongly, without a word, by the usual builder: checkpoint_format gptq_v2, and desc_act with
zero points (knowledge of onnxruntime-genai 0.18).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, save_random, some_tokens, their_logits

from qconvert import convert
from qconvert.build import build
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.inspection import inspect_file
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

onnx = pytest.importorskip("onnx")
MODEL = SMALL | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "pad_token_id": 0}  # heads of 16
TOKENS = some_tokens(96, 24)[:1]


class Kind(NamedTuple):
    bits: int = 4
    group: int = 32
    sym: bool = True
    v2: bool = False
    desc_act: bool = False


class Made(NamedTuple):
    """folder is the GPTQ checkpoint, dense the same model with its dequantized weights."""

    folder: Path
    dense: Path


def rounded(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [N,K], scales [N,G], zero points [N,G] by rounding to nearest."""
    n, k = weight.shape
    group = k if kind.group == -1 else kind.group
    x, last = weight.reshape(n, k // group, group), 2**kind.bits - 1
    if kind.sym:
        scales = (x.abs().amax(-1) * 2 / last).half().float().clamp(min=1e-6)
        zeros = torch.full_like(scales, 2 ** (kind.bits - 1))
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scales = ((high - low) / last).half().float().clamp(min=1e-6)
        zeros = (-low / scales).round().clamp(0, last)
    codes = (torch.round(x / scales[..., None]) + zeros[..., None]).clamp(0, last)
    return codes.reshape(n, k).long(), scales, zeros.long()


def as_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A little-endian bit stream along the first axis, in int32."""
    a = values.numpy().astype(np.uint8)
    single = (a[:, None, :] >> np.arange(bits, dtype=np.uint8)[:, None] & 1).reshape(-1, a.shape[1])
    words = np.ascontiguousarray(np.packbits(single.T, axis=1, bitorder="little")).view("<i4")
    return torch.from_numpy(words.T.copy())


def packed(name: str, weight: torch.Tensor, kind: Kind) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a linear, and its dequantized weight."""
    k = weight.shape[1]
    group = k if kind.group == -1 else kind.group
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k)) if kind.desc_act else torch.arange(k)
    codes, scales, zeros = rounded(weight[:, order], kind)
    back, groups = torch.argsort(order), torch.arange(k) // group
    codes, g_idx = codes[:, back], groups[back]
    dense = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    stored = (zeros - (0 if kind.v2 else 1)) & (2**kind.bits - 1)
    stem = name.removesuffix(".weight")
    tensors = {"qweight": as_words(codes.T, kind.bits), "qzeros": as_words(stored, kind.bits).T.contiguous(),
               "scales": scales.T.contiguous().half(), "g_idx": g_idx.int()}  # fmt: skip
    return {f"{stem}.{part}": t for part, t in tensors.items()}, dense


def made(folder: Path, kind: Kind, vocab: int = 96, **changes: object) -> Made:
    """`changes` are made to quantization_config."""
    base = save_random(folder / "base", "Llama", MODEL | {"vocab_size": vocab})
    config, tensors = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    dense, stored = dict(tensors), dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        more, dense[name] = packed(name, tensors[name], kind)
        del stored[name]
        stored |= more
    quantization = {"quant_method": "gptq", "bits": kind.bits, "group_size": kind.group, "sym": kind.sym, "lm_head": False,
                    "desc_act": kind.desc_act, "checkpoint_format": "gptq_v2" if kind.v2 else "gptq"}  # fmt: skip
    for place, weights, more in (
        ("dense", dense, {}), ("gptq", stored, {"quantization_config": quantization | changes})
    ):  # fmt: skip
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(config | more))
        save_file({n: t.contiguous() for n, t in weights.items()}, folder / place / "model.safetensors", {"format": "pt"})
    return Made(folder / "gptq", folder / "dense")


def evaluated(folder: Path) -> torch.Tensor:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    out = run(graph, Weights(graph, store), TOKENS)["logits"]
    store.close()
    return out


KINDS = {
    "symmetric": Kind(), "zero points": Kind(sym=False), "v2": Kind(v2=True), "v2 zero points": Kind(sym=False, v2=True),
    "one group a row": Kind(group=-1, sym=False), "groups of 16": Kind(group=16), "desc_act": Kind(desc_act=True),
    "desc_act zero points": Kind(sym=False, desc_act=True), "desc_act v2 zero points": Kind(sym=False, v2=True, desc_act=True),
    "3 bits": Kind(bits=3, sym=False), "2 bits": Kind(bits=2), "3 bits desc_act": Kind(bits=3, desc_act=True),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_codes_in_onnx_give_the_logits_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    files = made(tmp_path, KINDS[name])
    want = their_logits(files.dense, TOKENS)
    torch.testing.assert_close(evaluated(files.folder), want, rtol=0, atol=1e-4)
    # the embedding and the head are not quantized, so at int4 they would be rounded: leave them out of the comparison
    result = convert(files.folder, to="onnx", bits=4, output=tmp_path / "out", check=False, threads=1)
    assert sum(int(note.split()[0]) for note in result.report.notes if "keep their codes" in note) == 14
    model = OnnxRuntime().open(tmp_path / "out" / "model.onnx", 64, 1, exact=True)
    reference = files.dense.with_name("rounded")
    with_rounded_ends(files.dense, tmp_path / "out", reference)
    want = their_logits(reference, TOKENS)[0]
    np.testing.assert_allclose(model.logits(TOKENS[0].tolist()), want.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(model.decoded(TOKENS[0].tolist(), 8), want.numpy(), rtol=0, atol=1e-4)


def with_rounded_ends(dense: Path, out: Path, reference: Path) -> None:
    """The dense model with embedding and head as the ONNX file has them, so that its other weights alone are compared."""
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out / "model.onnx").graph.initializer}
    tensors = load_file(dense / "model.safetensors")
    for weight, codes in (("model.embed_tokens", "model.embed_tokens.qweight.rows"), ("lm_head", "lm_head.qweight")):
        packed_ = found[codes].reshape(96, -1)
        values = np.stack([packed_ & 15, packed_ >> 4], -1).reshape(96, -1, 32).astype(np.float32) - 8
        tensors[f"{weight}.weight"] = torch.from_numpy((values * found[f"{weight}.scales"][..., None]).reshape(96, -1))
    reference.mkdir()
    (reference / "config.json").write_text((dense / "config.json").read_text())
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", [Kind(sym=False), Kind(sym=False, desc_act=True)], ids=["plain", "desc_act"])
def test_the_proof_says_that_every_code_is_where_it_was(kind: Kind, tmp_path: Path) -> None:
    result = convert(made(tmp_path, kind).folder, to="onnx", bits=4, output=tmp_path / "out", threads=1)
    assert result.verified
    assert [r.verdict for r in result.report.checks if r.what == "codes moved: 14 tensors, exact"] == ["pass"]
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    assert sum(n.op_type == "Gather" for n in nodes) == (14 if kind.desc_act else 0)
    assert all(len(n.input) < 5 or not n.input[4] for n in nodes if n.op_type == "MatMulNBits")  # g_idx is wrong there


@pytest.mark.parametrize("form", ["portable", "legacy"])
def test_scattered_groups_in_every_form(form: str, tmp_path: Path) -> None:
    files = made(tmp_path, Kind(desc_act=True))
    result = convert(files.folder, to="onnx", bits=4, form=form, output=tmp_path / "out", threads=1)
    assert result.verified


def test_groups_stay_as_large_as_they_are_unless_others_are_asked_for(tmp_path: Path) -> None:
    folder = made(tmp_path, Kind(group=-1)).folder
    types = {}
    for group in (None, 16):
        plan = convert(folder, to="onnx", bits=4, group=group, output=tmp_path / "out", dry_run=True).plan
        types[group] = {e.name.rpartition(".layers.0.")[2]: e.dtype for e in plan.entries}
    assert types[None]["self_attn.q_proj.weight"] == "onnx.int4_g64" and types[None]["mlp.down_proj.weight"] == "onnx.int4_g32"
    assert types[16]["self_attn.q_proj.weight"] == "onnx.int4_g16"


@pytest.mark.parametrize("kind", [Kind(), Kind(sym=False, desc_act=True)], ids=["plain", "desc_act"])
def test_eight_bits_hold_codes_of_four(kind: Kind, tmp_path: Path) -> None:
    result = convert(made(tmp_path, kind).folder, to="onnx", quant="int8", output=tmp_path / "out", threads=1)
    assert result.verified
    assert [r.verdict for r in result.report.checks if r.what == "codes moved: 14 tensors, exact"] == ["pass"]


def test_fewer_bits_are_rounded_again_whatever_the_order_of_columns(tmp_path: Path) -> None:
    folder = made(tmp_path, Kind(sym=False, desc_act=True)).folder
    result = convert(folder, to="onnx", quant="int4", output=tmp_path / "out", threads=1)
    (row,) = (r for r in result.report.checks if r.what == "rounded again: uint4_g32_f16 -> int4_g32")
    assert result.verified and row.value is not None and 0.05 < row.value < 0.15


@pytest.mark.parametrize("kind", [Kind(), Kind(sym=False, desc_act=True)], ids=["plain", "desc_act"])
def test_gguf_rounds_the_codes_again(kind: Kind, tmp_path: Path) -> None:
    files = made(tmp_path, kind, vocab=1024)
    convert(files.folder, to="gguf", quant="F32", output=tmp_path / "a.gguf", check=False, tokenizer=TINY_TOKENIZER)
    from qconvert.formats.gguf_source import read_gguf

    store = Store()
    graph = build(read_gguf(tmp_path / "a.gguf", store))
    got = run(graph, Weights(graph, store), TOKENS)["logits"]
    torch.testing.assert_close(got, their_logits(files.dense, TOKENS), rtol=0, atol=1e-4)


def test_zero_points_that_were_not_asked_for_are_not_taken(tmp_path: Path) -> None:
    folder = made(tmp_path, Kind(sym=False)).folder
    plan = convert(folder, to="onnx", bits=4, zero_point="none", output=tmp_path / "out", dry_run=True).plan
    assert {e.dtype for e in plan.entries} == {"f32", "onnx.int4_g32"}


def test_settings_in_the_older_file_are_read(tmp_path: Path) -> None:
    files = made(tmp_path, Kind(sym=False))
    config = json.loads((files.folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (files.folder / "config.json").write_text(json.dumps(config))
    (files.folder / "quantize_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    torch.testing.assert_close(evaluated(files.folder), their_logits(files.dense, TOKENS), rtol=0, atol=1e-4)


def test_inspect_lists_the_words(tmp_path: Path) -> None:
    found = inspect_file(str(made(tmp_path, Kind()).folder))
    assert found["types"]["int4_g32_f16"] == 14
    assert sum(t["dtype"] == "i32" for t in found["tensors"]) == 28  # zero points and orders; words of codes are the weights


def test_biases_of_zeros_that_gptqs_tools_add_are_dropped_and_others_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, Kind()).folder
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(64).half()}, folder / "model.safetensors")
    graph = build(read_checkpoint(folder, Store()))
    (dropped,) = graph.meta["dropped"]  # type: ignore[misc,union-attr]
    assert dropped == {"tensor": f"base/model.safetensors#{name}", "reason": "all zeros, which GPTQ's tools add"}
    save_file(tensors | {name: torch.ones(64).half()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.bias: llama models have no such tensor"):
        build(read_checkpoint(folder, Store()))


@pytest.mark.parametrize(("kind", "changes"), [(Kind(), {"checkpoint_format": "gptq_v2"}),
                                               (Kind(v2=True), {"checkpoint_format": "gptq"}),
                                               (Kind(sym=False), {"sym": True})])  # fmt: skip
def test_zero_points_that_contradict_the_settings_are_an_error(kind: Kind, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"qzeros: a zero point is \d+, but config.json says sym, where each is 8"):
        evaluated(made(tmp_path, kind, **changes).folder)


def test_scattered_groups_that_config_json_denies_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="g_idx: columns are not in groups of 32"):
        evaluated(made(tmp_path, Kind(desc_act=True), desc_act=False).folder)


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"bits": 5}, UnsupportedError, "GPTQ of 5 bits"),
    ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
    ({"dynamic": {"+:.*k_proj": {"bits": 8}}}, UnsupportedError, "dynamic"),
    ({"group_size": 0}, InputError, "group_size"),
    ({"sym": 1}, InputError, "sym"),
    ({"group_size": 16}, InputError, r"qzeros: i32\[2,64\]|qzeros: i32\[2, 8\], but config.json says i32\[4, 8\]"),
    ({"quant_method": "eetq"}, UnsupportedError, r"already quantized \(eetq\)"),
])  # fmt: skip
def test_what_would_be_read_wrongly_is_refused(
    changes: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    folder = made(tmp_path, Kind(), **changes).folder
    with pytest.raises(error, match=match):
        build(read_checkpoint(folder, Store()))


TINY_TOKENIZER = Path(__file__).parents[1] / "golden" / "tiny"
