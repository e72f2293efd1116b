"""Packed weights made by the libraries that own their layouts, as operands, and what those libraries make of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from qconvert.kernels.gpu.operand import Codes, LowRank, Metadata, Operand, Second
from qconvert.scheme import FP4_TABLE, NF4_TABLE

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Packed(NamedTuple):
    operand: Operand
    theirs: np.ndarray  # f32[N,K]: the library's own dequantization
    ulps: float = 0.0  # how far ours may be, in parts of 2^-24 of the greatest weight: 0 where the order of operations agrees


@cache
def library(name: str) -> Any:
    """The module, or a skip that names it. What conftest.py hides is hidden again afterwards."""
    top = name.partition(".")[0]
    hidden = sys.modules.get(top, sys) is None
    if hidden:
        del sys.modules[top]
    try:
        pytest.importorskip(top)
        return importlib.import_module(name)
    finally:
        if hidden:
            sys.modules[top] = None  # type: ignore[assignment]


def weights(n: int, k: int) -> torch.Tensor:
    return torch.randn((n, k), generator=torch.Generator().manual_seed(n * k))


def bnb(kind: str, double: bool, shape: tuple[int, int] = (96, 200)) -> Packed:
    """bitsandbytes: blocks of 64 of the flattened weight, which here run across rows."""
    functional = library("bitsandbytes.functional")
    n, k = shape
    q, state = functional.quantize_4bit(weights(n, k), blocksize=64, quant_type=kind, compress_statistics=double)
    absmax, second = state.absmax.numpy().reshape(1, -1), None
    if double:
        nested = state.state2
        second = Second(nested.absmax.numpy(), nested.blocksize, offset=float(state.offset), table=nested.code.numpy())
    scale = Metadata(absmax, "int" if double else "f32", second)
    table = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}[kind]
    codes = Codes(q.numpy().reshape(1, -1), 4, "columns-high")
    operand = Operand(f"bnb.{kind}", shape, codes, "table", scale=scale, block=(1, 64), width=n * k, table=table)
    return Packed(operand, functional.dequantize_4bit(q, state).numpy())


def bnb_int8() -> Packed:
    functional = library("bitsandbytes.functional")
    q, peak, _ = functional.int8_vectorwise_quant(weights(37, 100).half())
    scale = Metadata(peak.numpy()[:, None], divisor=127)
    theirs = functional.int8_vectorwise_dequant(q, peak).numpy()
    return Packed(Operand("bnb.int8", (37, 100), Codes(q.numpy(), 8), scale=scale), theirs, 2)


def ct_packed(bits: int, group: int | None, symmetric: bool, shape: tuple[int, int]) -> Packed:
    """compressed-tensors pack-quantized: zero points packed along N."""
    base = library("compressed_tensors.compressors.pack_quantized.base")
    quantization = library("compressed_tensors.quantization")
    (n, k), half = shape, 1 << (bits - 1)
    args = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weights(n, k).reshape(n, -1, group or k)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (grouped.abs().amax(-1) / half if symmetric else (high - low) / (2 * half - 1)).half().float()
    zero = torch.zeros_like(scale) if symmetric else (-half - low / scale).round().clamp(-half, half - 1)
    state = {"weight": weights(n, k), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    packed = base.PackedQuantizationCompressor.compress(state, scheme)
    theirs = base.PackedQuantizationCompressor.decompress(packed, scheme)["weight"].float().numpy()
    point: Metadata | float = float(half)
    if not symmetric:
        point = Metadata(Codes(packed["weight_zero_point"].numpy(), bits, "rows"), "int")
    words, scales = packed["weight_packed"].numpy(), scale.half().numpy()
    operand = Operand("ct.packed", shape, Codes(words, bits), scale=Metadata(scales, "f16"), zero=point, block=(1, group))
    return Packed(operand, theirs)


def ct_nvfp4() -> Packed:
    helpers = library("compressed_tensors.compressors.nvfp4.helpers")
    quantization = library("compressed_tensors.quantization")
    n, k, divisor = 21, 80, 1234.5
    g = torch.Generator().manual_seed(0)
    scale = (torch.rand((n, k // 16), generator=g) * 400).to(torch.float8_e4m3fn)
    words = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g)
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    forward = library("compressed_tensors.quantization.lifecycle.forward")
    values = helpers.unpack_fp4_from_uint8(words, n, k, torch.float32)
    theirs = forward.dequantize(values, scale.float(), args=args, dtype=torch.float32, global_scale=torch.tensor([divisor]))
    metadata = Metadata(scale.view(torch.uint8).numpy(), "e4m3", divisor=divisor)
    operand = Operand("ct.nvfp4", (n, k), Codes(words.numpy(), 4), "table", scale=metadata, block=(1, 16), table=E2M1)
    return Packed(operand, theirs.numpy())


def ct_mxfp4() -> Packed:
    base = library("compressed_tensors.compressors.mxfp4.base")
    quantization = library("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    n, k, g = 21, 96, torch.Generator().manual_seed(0)
    words = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g)
    scale = torch.randint(100, 140, (n, k // 32), dtype=torch.uint8, generator=g)
    state = {"weight_packed": words, "weight_scale": scale}
    theirs = base.MXFP4PackedCompressor.decompress(state, scheme)["weight"].float().numpy()
    metadata = Metadata(scale.numpy(), "e8m0")
    operand = Operand("ct.mxfp4", (n, k), Codes(words.numpy(), 4), "table", scale=metadata, block=(1, 32), table=E2M1)
    return Packed(operand, theirs)


def float8(block: tuple[int, int | None], scales: tuple[int, int]) -> Packed:
    """FP8 with a scale a tensor, a row or a block; torch's own casts."""
    n, k = 150, 200
    q = weights(n, k).to(torch.float8_e4m3fn)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows, columns = block[0] if scales[0] > 1 else n, block[1] if scales[1] > 1 else k
    spread = scale.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns or k, 1)[:, :k]
    metadata = Metadata(scale.view(torch.uint16).numpy(), "bf16")
    operand = Operand("fp8", (n, k), q.view(torch.uint8).numpy(), "float", "e4m3", scale=metadata, block=block)
    return Packed(operand, (q.float() * spread).numpy())


def dense(kind: str) -> Packed:
    w = weights(37, 100).to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind])
    bits = w.view(torch.uint16).numpy() if kind == "bf16" else w.numpy()
    return Packed(Operand(kind, (37, 100), bits, "float", kind), w.float().numpy())  # type: ignore[arg-type]


def mlx(bits: int, group: int) -> Packed:
    mx = library("mlx.core")
    n, k = 37, 192
    words, scale, offset = mx.quantize(mx.array(weights(n, k).numpy()), group, bits)
    theirs = np.array(mx.dequantize(words, scale, offset, group, bits))
    scales, offsets = (Metadata(np.array(a).astype(np.float32)) for a in (scale, offset))
    operand = Operand("mlx", (n, k), Codes(np.array(words), bits), scale=scales, offset=offsets, block=(1, group))
    return Packed(operand, theirs, 2)  # its kernel multiplies and adds at once


def hqq(bits: int, group: int, axis: int, second: bool = False, shape: tuple[int, int] = (40, 96)) -> Packed:
    """HQQ: rows of the reshape in parts, groups along it or across it; scales maybe quantized once more."""
    quantizer = library("hqq.core.quantize").Quantizer
    (n, k), r = shape, shape[0] * shape[1] // group if axis else group
    q, meta = quantizer.quantize(weights(n, k), nbits=bits, group_size=group, axis=axis, optimize=False, device="cpu")
    meta["compute_dtype"] = torch.float32
    scale = Metadata(meta["scale"].numpy())
    if second:
        inner, two = quantizer.quantize(meta["scale"], nbits=8, group_size=20, optimize=False, device="cpu")
        two["compute_dtype"] = torch.float32
        levels = Second(two["scale"].numpy(), 1, two["zero"].numpy())  # axis 0: entry i belongs to i modulo their number
        scale = Metadata(inner.numpy().reshape(meta["scale"].shape), "int", levels)
        meta["scale"] = quantizer.dequantize(inner, two)
    width = n * k // r
    block = (1, None) if axis else (r, 1)
    codes = Codes(q.numpy(), 8 if bits > 4 else bits, "parts-high")
    grid = "binary" if bits == 1 else "affine"
    zero = Metadata(meta["zero"].numpy())
    operand = Operand("hqq", shape, codes, grid, scale=scale, zero=zero, block=block, width=width)  # type: ignore[arg-type]
    return Packed(operand, quantizer.dequantize(q, meta).numpy())


def gptq(bits: int, group: int, scattered: bool = False) -> Packed:
    """GPTQ's words are compressed-tensors' dense streams, along K and along N; zero points less 1."""
    helpers = library("compressed_tensors.compressors.pack_quantized.helpers")
    n, k, half, g = 64, 96, 1 << (bits - 1), torch.Generator().manual_seed(bits)
    q = torch.randint(-half, half, (k, n), dtype=torch.int8, generator=g)
    zero = torch.randint(-half, half, (k // group, n), dtype=torch.int8, generator=g)
    scale = torch.rand((k // group, n), generator=g).half()
    index = torch.randperm(k, generator=g) // group if scattered else torch.arange(k) // group
    theirs = (scale.float()[index] * (q.float() - zero.float()[index])).T.contiguous().numpy()
    less = ((zero.int() + half - 1) % (2 * half) - half).to(torch.int8)
    words = helpers.pack_to_int32(q, bits, packed_dim=0).numpy().T
    zeros = Codes(helpers.pack_to_int32(less, bits, packed_dim=1).numpy().T, bits, "rows", add=1)
    operand = Operand(
        "gptq",
        (n, k),
        Codes(words, bits),
        scale=Metadata(scale.numpy().T, "f16"),
        zero=Metadata(zeros, "int"),
        block=(1, group),
        g_idx=index.int().numpy() if scattered else None,
    )
    return Packed(operand, theirs)


def awq() -> Packed:
    """Words along N; the shift of row 8 j + order[i] is 4 i."""
    n, k, group, rng = 48, 96, 32, np.random.default_rng(0)

    def words(q: np.ndarray) -> np.ndarray:
        out = np.zeros((q.shape[0], n // 8), np.uint32)
        for i, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= q[:, row::8].astype(np.uint32) << np.uint32(4 * i)
        return out.view(np.int32)

    q, zero = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    scale = rng.random((k // group, n)).astype(np.float16)
    theirs = ((q - zero.repeat(group, 0)) * scale.astype(np.float32).repeat(group, 0)).T.astype(np.float32)
    zeros = Metadata(Codes(words(zero).T, 4, "rows-awq"), "int")
    codes = Codes(words(q).T, 4, "rows-awq")
    operand = Operand("awq", (n, k), codes, scale=Metadata(scale.T, "f16"), zero=zeros, block=(1, group))
    return Packed(operand, theirs)


def torchao(group: int = 32) -> Packed:
    """tinygemm's int4: w = (q - 8) * scale + zero, metadata [G,N]."""
    primitives = library("torchao.quantization.quant_primitives")
    n, k, g = 37, 96, torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=g)
    scale, zero = (torch.rand((n, k // group), generator=g).bfloat16() for _ in range(2))
    theirs = primitives._dequantize_affine_tinygemm(q, (1, group), scale.float(), zero.float(), torch.int32, 0, 15)
    words = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8).numpy()
    scales, offsets = (Metadata(np.ascontiguousarray(a.view(torch.uint16).numpy().T).T, "bf16") for a in (scale, zero))
    operand = Operand("torchao", (n, k), Codes(words, 4), scale=scales, zero=8.0, offset=offsets, block=(1, group))
    return Packed(operand, theirs.float().numpy())


def bitnet(n: int = 37, divided: bool = True) -> Packed:
    """Quarters of rows in bits 0 2 4 6; a scale for all, multiplied or divided by."""
    integration = library("transformers.integrations.bitnet")
    q = torch.randint(-1, 2, (n, 100), generator=torch.Generator().manual_seed(0)).float()
    words, scale = integration.pack_weights(q.clone()).numpy(), np.float32(3.7)
    metadata = Metadata(np.ones((1, 1), np.float32), divisor=float(scale)) if divided else Metadata(np.full((1, 1), scale))
    theirs = q.numpy() * (np.float32(1) / scale) if divided else q.numpy() * scale
    return Packed(Operand("bitnet", (n, 100), Codes(words, 2, "parts"), "ternary", scale=metadata), theirs)


def with_adapter(packed: Packed, rank: int = 5) -> Packed:
    """The same with a low-rank pair in bf16 beside it."""
    n, k = packed.operand.shape
    a, b = (weights(*s).bfloat16().view(torch.uint16).numpy() for s in ((rank, k), (n, rank)))
    fields = vars(packed.operand) | {"low_rank": LowRank(a, b, 0.25, "bf16")}
    return packed._replace(operand=Operand(**fields))


MLX = ((2, 64), (3, 64), (4, 32), (6, 32), (8, 64))
HQQ = ((1, 8, 1), (2, 16, 0), (3, 8, 1), (4, 64, 1), (8, 8, 1))
CASES: dict[str, Callable[[], Packed]] = {
    **{f"bnb {kind}{' double' * d}": lambda kind=kind, d=d: bnb(kind, bool(d)) for kind in ("nf4", "fp4") for d in (0, 1)},
    "bnb nf4 odd rows": lambda: bnb("nf4", False, (6, 75)),
    "bnb int8": bnb_int8,
    **{f"ct int{b} {g}": lambda b=b, g=g: ct_packed(b, g, True, (37, 96)) for b, g in ((2, 8), (3, 32), (4, None), (5, 48))},
    **{f"ct uint{b} {g}": lambda b=b, g=g: ct_packed(b, g, False, (37, 96)) for b, g in ((4, 32), (6, 16), (7, 96), (8, 24))},
    "ct nvfp4": ct_nvfp4,
    "ct mxfp4": ct_mxfp4,
    "fp8 tensor": lambda: float8((1, None), (1, 1)),
    "fp8 rows": lambda: float8((1, None), (150, 1)),
    "fp8 blocks": lambda: float8((128, 128), (2, 2)),
    **{kind: lambda kind=kind: dense(kind) for kind in ("bf16", "f16", "f32")},
    **{f"mlx {b} {g}": lambda b=b, g=g: mlx(b, g) for b, g in MLX},
    **{f"hqq {b} {g} axis {a}": lambda b=b, g=g, a=a: hqq(b, g, a) for b, g, a in HQQ},
    "hqq 4 64 axis 0": lambda: hqq(4, 64, 0),
    "hqq 3 30 axis 0": lambda: hqq(3, 30, 0, shape=(40, 90)),
    "hqq 2 8 second level": lambda: hqq(2, 8, 1, second=True),
    "hqq 1 8 second level": lambda: hqq(1, 8, 1, second=True),
    **{f"gptq {bits} {group}": lambda b=bits, g=group: gptq(b, g) for bits, group in ((2, 8), (3, 32), (4, 32), (8, 96))},
    "gptq scattered": lambda: gptq(4, 32, scattered=True),
    "awq": awq,
    "torchao": torchao,
    "bitnet": bitnet,
    "bitnet multiplied": lambda: bitnet(40, divided=False),
    "ct adapter": lambda: with_adapter(ct_packed(4, 32, True, (37, 96))),
    "bnb double adapter": lambda: with_adapter(bnb("nf4", True)),
}  # fmt: skip


@cache
def packed(name: str) -> Packed:
    return CASES[name]()
