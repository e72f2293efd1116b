"""Weights that were trained on a grid: the grid is found again from bf16 or f16, and written without error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert, kernels
from qconvert.errors import UsageError
from qconvert.recover import recoverable, recovered, with_recovered
from qconvert.scheme import F32, Array, QTensor, scheme_of
from qconvert.solvers import rounded_to

TINY, LORA = (Path(__file__).parents[1] / "golden" / name for name in ("tiny", "tiny-lora"))


def grouped(n: int = 64, k: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k // 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.03


def own_rule(x: torch.Tensor) -> torch.Tensor:
    """Q4_0's: the greatest magnitude is code -8."""
    at = x.abs().argmax(-1, keepdim=True)
    return x.gather(-1, at) / -8


# What learned the scales, bf16: the rule of the format, symmetric codes to 7, least squares (LSQ's step), clipped at 85 %
LEARNED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "own rule": own_rule,
    "to 7": lambda x: x.abs().amax(-1, keepdim=True) / 7,
    "learned step": lambda x: 2 * x.abs().mean(-1, keepdim=True) / 7**0.5,
    "clipped": lambda x: -0.85 * x.abs().amax(-1, keepdim=True) / 8,
}


def fake_quantized(x: torch.Tensor, rule: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> tuple[F32, F32, F32]:
    """codes, scales, and code * scale as a checkpoint of `dtype` stores it."""
    scale = rule(x).to(dtype).float()
    codes = torch.round(x / scale).clamp(-8, 7)
    stored = (codes * scale).to(dtype).float()
    n = len(x)
    return codes.reshape(n, -1).numpy(), scale.reshape(n, -1).numpy(), stored.reshape(n, -1).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_grid_is_found(name: str, dtype: torch.dtype) -> None:
    codes, scales, stored = fake_quantized(grouped(), LEARNED[name], dtype)
    scheme = scheme_of("q4_0")
    assert scheme is not None
    found = recovered(scheme, stored)
    assert found.found.all()
    value = QTensor(scheme, found.codes, (found.scales,)).dequantize()
    exact = codes.reshape(len(codes), -1, 32) * scales[:, :, None]
    same = (value.reshape(exact.shape) == exact).all(-1)
    assert same.mean() >= 0.999  # a group of few codes may lie on two grids; both round to what is stored
    rounded = rounded_to("bf16" if dtype is torch.bfloat16 else "f16", value)
    np.testing.assert_array_equal(rounded, stored)
    stock = kernels.search("q4_0", stored)
    theirs = gguf.quants.dequantize(stock, gguf.GGMLQuantizationType.Q4_0)
    intact = (theirs.reshape(exact.shape) == exact).all(-1).mean()
    print(f"{name}: stock rule leaves {intact:.1%} of blocks as they are")
    assert intact == 1.0 if name == "own rule" else intact < 0.8


def test_weights_on_no_grid_are_not_found_and_keep_what_a_search_chose() -> None:
    x = grouped().reshape(64, -1).bfloat16().float().numpy()
    scheme = scheme_of("int4_g32_f16")
    assert scheme is not None
    _, _, stored = fake_quantized(grouped(seed=1), LEARNED["learned step"], torch.bfloat16)
    x[:, 32:64] = stored[:, 32:64]
    x[:, 64:96] = 0
    assert recovered(scheme, x).found.sum(0).tolist() == [0, 64, 64, *[0] * 13]
    before = QTensor(scheme, np.full(x.shape, 3, np.int8), (np.full((64, 16), 0.5, np.float32),))
    after = with_recovered(before, x)
    np.testing.assert_array_equal(after.dequantize()[:, :32], before.dequantize()[:, :32])
    np.testing.assert_array_equal(rounded_to("bf16", after.dequantize()[:, 32:96]), x[:, 32:96])


def test_codes_by_hand() -> None:
    """-8 has no mirror, so its sign is that of the scale; a scale that f16 cannot hold is refused."""
    scheme = scheme_of("q4_0")
    assert scheme is not None and recoverable(scheme)
    x = np.zeros((3, 32), np.float32)
    x[0, :3] = 8 * 0.5, 3 * 0.5, -7 * 0.5
    x[1, :2] = -8 * 0.25, 7 * 0.25
    x[2, :3] = 2.0**-26, 3 * 2.0**-26, 5 * 2.0**-26
    found = recovered(scheme, x)
    assert found.found[:, 0].tolist() == [True, True, False]
    assert found.scales[:2, 0].tolist() == [-0.5, 0.25]
    assert found.codes[0, :3].tolist() == [-8, -3, 7] and found.codes[1, :2].tolist() == [-8, 7]
    others = {name: scheme_of(name) for name in ("q4_1", "q4_k", "nf4_g64", "uint4_g32", "int8_g128_bf16")}
    assert [name for name, s in others.items() if s is not None and recoverable(s)] == ["int8_g128_bf16"]


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 64), (4, 128), (2, 32)])
def test_other_grids(bits: int, group: int) -> None:
    half = 1 << (bits - 1)
    rng = np.random.default_rng(0)
    codes = rng.integers(-half, half, (16, 256)).astype(np.float32)
    scales = rounded_to("bf16", rng.uniform(1e-3, 2e-3, (16, 256 // group)).astype(np.float32))
    exact = (codes.reshape(16, -1, group) * scales[:, :, None]).reshape(16, -1)
    scheme = scheme_of(f"int{bits}_g{group}_bf16")
    assert scheme is not None
    found = recovered(scheme, rounded_to("bf16", exact))
    assert found.found.mean() >= (0.99 if bits == 8 else 1.0)  # where bf16 hides the last bit of large codes, k is not told
    value, on = QTensor(scheme, found.codes, (found.scales,)).dequantize(), np.repeat(found.found, group, axis=1)
    np.testing.assert_array_equal(value[on], exact[on])


# whole conversions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    """golden/tiny as it would be after QAT to Q4_0, all but its vocabulary; and code * scale of each matrix."""
    folder = tmp_path_factory.mktemp("qat") / "model"
    shutil.copytree(TINY, folder)
    tensors, exact = load_file(folder / "model.safetensors"), dict[str, Array]()
    for i, name in enumerate(sorted(n for n in tensors if n.endswith("_proj.weight"))):
        n, k = tensors[name].shape
        rule = list(LEARNED.values())[i % len(LEARNED)]
        codes, scales, stored = fake_quantized(tensors[name].float().reshape(n, -1, 32), rule, torch.bfloat16)
        exact[name] = (codes.reshape(n, -1, 32) * scales[:, :, None]).reshape(n, k)
        tensors[name] = torch.from_numpy(stored).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, exact


ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
NAMES = {**ATTENTION, "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


def test_a_gguf_reads_back_as_codes_times_learned_scales(qat: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    folder, exact = qat
    result = convert(
        folder, quant="Q4_0", solver="recover", token_embedding_type="q8_0", output=tmp_path / "out.gguf", threads=1
    )
    (row,) = [r for r in result.report.checks if r.what == "grids recovered"]
    assert row.value is not None and row.value > 0.8 and "weights have others" in row.reason  # the embedding has no grid
    (other,) = [r for r in result.report.checks if r.what.startswith("on no grid")]
    assert "embed_tokens" in other.what
    read = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for name, want in exact.items():
        part, layer = name.split(".")[4].removesuffix("_proj"), name.split(".")[2]
        got = read[f"blk.{layer}.{NAMES[part]}.weight"]
        if part in "qk":  # rows of each head lie in pairs
            heads = {"q": 4, "k": 2}[part]
            got = got.reshape(heads, -1, 2, got.shape[1]).swapaxes(1, 2).reshape(got.shape)
        np.testing.assert_array_equal(got, want)
    assert result.verified


@pytest.mark.parametrize(("to", "options"), [("onnx", {"quant": "int4"}), ("safetensors", {"quant": "w4a16", "group": 32})])
def test_other_formats_recover_too(
    to: str, options: dict[str, Any], qat: tuple[Path, dict[str, Array]], tmp_path: Path
) -> None:
    pytest.importorskip("onnx" if to == "onnx" else "compressed_tensors")
    result = convert(qat[0], to=to, solver="recover", output=tmp_path / "out", threads=1, **options)
    (row,) = [r for r in result.report.checks if r.what == "grids recovered"]
    assert row.value is not None and row.value > 0.8
    assert not result.report.failed


def test_a_checkpoint_that_was_trained_on_a_grid_is_noticed(qat: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    result = convert(qat[0], quant="Q4_0", output=tmp_path / "a.gguf", check=False, threads=1)
    (note,) = [n for n in result.report.notes if "QAT" in n]
    assert "groups of 32 weights lie on grids of 4 bits" in note and "--solver recover" in note
    result = convert(f"{qat[0]}+{LORA}", quant="Q4_0", output=tmp_path / "b.gguf", check=False, threads=1)
    assert any("leaves the grid" in n for n in result.report.notes)
    result = convert(TINY, quant="Q4_0", output=tmp_path / "c.gguf", check=False, threads=1)
    assert not any("grid" in n for n in result.report.notes)


def test_a_type_without_plain_scales_recovers_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weight gets a type of one scale") as e:
        convert(TINY, quant="Q4_K_M", solver="recover", output=tmp_path / "out.gguf", dry_run=True)
    assert e.value.hint is not None and "Q4_0" in e.value.hint


