"""Scales and zero points that are quantized themselves: sizes in print, bounds on their error, the same values everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qconvert import kernels
from qconvert.bits import from_bits
from qconvert.errors import UsageError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.passes.second_level import SecondLevel
from qconvert.scheme import Level, QTensor, Scheme, scheme_of
from qconvert.second_level import Kind, entries, error, second_level_name, with_second_level
from qconvert.sources import Store
from qconvert.text import format, parse
from qconvert.weights import Weights

N, K = 48, 4096


def quantized(name: str, seed: int = 0) -> QTensor:
    scheme = scheme_of(name)
    assert scheme is not None
    x = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32) * np.float32(0.02)
    found = kernels.affine(x, scheme.block, scheme.bits, scheme.zero_point)
    codes = from_bits(found.packed, scheme.bits, K)
    signed = (codes - np.uint8(scheme.centre)).view(np.int8) if scheme.centre else codes
    return QTensor(scheme, signed, (found.scales, found.zeros)[: len(scheme.levels)])


def second(q: QTensor, kind: Kind) -> QTensor:
    scheme = scheme_of(second_level_name(q.scheme, K, kind))
    assert scheme is not None
    return with_second_level(q, scheme)


@pytest.mark.parametrize(
    ("bits", "group", "bpw"),
    [(1, 8, 3.0625), (2, 8, 4.0625), (4, 64, 4.258), (4, 16, 5.031), (8, 128, 8.129)],
)  # fmt: skip
def test_bits_per_weight_are_those_in_print(bits: int, group: int, bpw: float) -> None:
    """HQQ with quantized scales and zeros: u8 both, an f16 pair for 128 of each."""
    above = [[Level(role, "f16", 128 * group), Level(role, "u8", group), Level(role, "f16", 128 * group, adds=True)]
             for role in ("scale", "zero")]  # fmt: skip
    assert Scheme("hqq", bits, (*above[0], *above[1])).bits_per_weight == pytest.approx(bpw, abs=6e-4)
    if bits == 4 and group in (16, 64):
        ours = scheme_of(f"uint4f_g{group}_u8x128")
        assert ours is not None and ours.levels == (*above[0], *above[1])


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "uint4f_g64", "uint2f_g16", "int8_g128"])
def test_an_entry_is_at_most_half_a_step_away(name: str) -> None:
    q = quantized(name)
    new = second(q, "u8")
    for level, v in zip(q.scheme.levels, q.levels, strict=True):
        if level.dtype == "f32":
            parts = [x for other, x in zip(new.scheme.levels, new.levels, strict=True) if other.role == level.role]
            step, codes, low = parts
            half = np.repeat(step, v.shape[1] // step.shape[1], axis=1).astype(np.float64) / 2
            assert np.all(np.abs(entries(new, level.role) - v.astype(np.float64)) <= half * (1 + 1e-3))
            assert codes.min() >= 0 and codes.max() <= 255 and np.array_equal(codes, np.rint(codes))
            assert all(np.array_equal(x, x.astype(np.float16).astype(np.float32)) for x in (step, low))
    assert np.array_equal(new.codes, q.codes)


@pytest.mark.parametrize(
    ("name", "kind", "levels", "weights"),
    # measured on normal weights: scales of a few percent spread about their mean, so 8 bits are spread over little
    [
        ("uint4_g32", "u8", 1.5e-3, 1.5e-3), ("uint4_g32", "u6", 0.01, 0.01),
        ("int4_g32", "u8", 5e-3, 5e-3), ("int4_g32", "u6", 0.02, 0.02),
    ],
)  # fmt: skip
def test_the_error_is_small_and_told_by_role(name: str, kind: Kind, levels: float, weights: float) -> None:
    q = quantized(name)
    found = error(q, second(q, kind))
    assert found.levels.keys() == {"scale"}
    assert 0 < found.levels["scale"] < levels and 0 < found.weights < weights


def test_the_weights_are_those_of_the_entries_in_double_precision() -> None:
    q = second(quantized("uint4f_g32"), "u8")
    scale, zero = (np.repeat(entries(q, role).astype(np.float64), 32, axis=1) for role in ("scale", "zero"))
    want = scale * (q.codes.astype(np.float64) - zero)
    assert np.allclose(q.dequantize(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "role"), [("uint4_g32", "scale"), ("uint2f_g16", "zero"), ("int4_g32", "scale")])
def test_hqqs_own_quantizer_of_metadata_does_no_better(visible: Callable[[str], ModuleType], name: str, role: str) -> None:
    """HQQ quantizes scales and zeros to 8 bits in groups of 128, by the same grid with f32 step and zero."""
    visible("hqq")
    from hqq.core.quantize import Quantizer as quantizer

    q = quantized(name)
    (v,) = [v for level, v in zip(q.scheme.levels, q.levels, strict=True) if level.role == role]
    codes, meta = quantizer.quantize(torch.from_numpy(v) * 50, 8, group_size=128, axis=1, optimize=False, device="cpu")
    theirs = quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}).numpy().reshape(v.shape) / 50
    ours = entries(second(q, "u8"), role)
    errors = [np.linalg.norm(x.astype(np.float64) - v) for x in (ours, theirs)]
    # measured: 1.003 times theirs, as steps are rounded up to what f16 has; times 50, as theirs are never below 1/20000
    assert errors[0] <= 1.01 * errors[1] and np.abs(ours - theirs).max() < 0.01 * np.abs(v).max()


def test_six_bits_for_eight_groups_are_q4_ks_superblocks() -> None:
    """ggml's own block of such a tensor: Q4_K with scales of 6 bits, 8 a superblock, as gguf-py reads it."""
    flat = quantized("uint4_g32")
    scales, mins = flat.levels[0], flat.levels[0] * flat.levels[1]  # w = scale * code - min
    one = Scheme("one", 4, (Level("min", "f32", 32),))
    six = Scheme("six", 4, (Level("min", "f16", 256), Level("min", "u6", 32)))
    above = [with_second_level(QTensor(one, flat.codes, (v,)), six).levels for v in (scales, mins)]
    layout = LAYOUTS["gguf.q4_k"]
    q = QTensor(layout.scheme, flat.codes, (*above[0], *above[1]))
    read = gguf.quants.dequantize(layout.pack(q), gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(read, q.dequantize())
    base = Scheme("flat", 4, (Level("scale", "f32", 32), Level("min", "f32", 32)))
    old = QTensor(base, flat.codes, (scales, mins)).dequantize()
    assert np.linalg.norm(read - old) / np.linalg.norm(old) < 0.02


def test_rows_of_few_groups_share_what_divides_them() -> None:
    scheme = scheme_of("uint4_g32")
    assert scheme is not None
    assert second_level_name(scheme, 4096, "u8") == "uint4_g32_u8x128"
    assert second_level_name(scheme, 11008, "u8") == "uint4_g32_u8x86"  # of 344 groups
    assert second_level_name(scheme, 256, "u6") == "uint4_g32_u6x8"


@pytest.mark.parametrize("name", ["uint4_g32_u7x8", "nope_u8x8", "int8_row_u8x8", "q4_k_u8x8"])
def test_names_without_a_scheme_have_none(name: str) -> None:
    assert scheme_of(name) is None


def test_equal_and_zero_entries_stay_exact() -> None:
    one = Scheme("int4_g32", 4, (Level("scale", "f32", 32),))
    q = QTensor(one, np.ones((2, 256), np.int8), (np.array([[0.5] * 8, [0.0] * 8], np.float32),))
    scheme = scheme_of("int4_g32_u8x8")
    assert scheme is not None and error(q, with_second_level(q, scheme)).weights == 0


def test_the_pass_and_the_evaluator_give_the_same_weights(tmp_path: Path) -> None:
    save_file({"w": torch.randn(N, 512, generator=torch.Generator().manual_seed(0))}, tmp_path / "model.safetensors")
    graph = parse(
        '%x : f32[B,T,512] = input()\n%w~real : f32[48,512] = load() {"tensor": "base/model.safetensors#w"}\n'
        '%w : uint4_g32[48,512] = quantize(%w~real) {"solver": "mse"}\n%y : f32[B,T,48] = linear(%x, %w)\nreturn %y'
    )
    new = SecondLevel()(graph)
    assert str(new.nodes["w"].type) == "uint4_g32_u8x16[48,512]" and parse(format(new)) == new
    store = Store()
    store.add("base", tmp_path)
    got, want = Weights(new, store).rows("w", 8, 40), Weights(graph, store).rows("w", 8, 40)
    store.close()
    assert isinstance(got, QTensor) and isinstance(want, QTensor)
    assert 0 < error(want, got).weights < 5e-3
    with pytest.raises(UsageError, match="kind=u5: there are u8, u6"):
        SecondLevel("u5")(graph)
