"""What ggml's CPU kernels make of activations before they meet a weight: 8-bit blocks beside quantized ones.

With the same rounding the interpreter and llama.cpp agree to f32 noise, so a small difference is a real one.
Source: ggml/src/ggml-cpu (vec_dot_type of each type, quantize_row_q8_0, quantize_row_q8_K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qconvert.scheme import CODEBOOKS


def round_q8_0(x: Tensor) -> Tensor:
    """f32[..., K] -> the same through blocks of 32: codes -127..127, scale peak / 127 kept as f16."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(peak > 0, 127.0 / peak, 0.0))
    return (codes * (peak / 127.0).half().float()).reshape(x.shape)


def round_q8_k(x: Tensor) -> Tensor:
    """f32[..., K] -> the same through blocks of 256: the value of largest magnitude becomes -127, scale f32."""
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest != 0, -127.0 / largest, 0.0)
    codes = torch.round(blocks * inverse).clamp(max=127)
    return torch.where(inverse != 0, codes / inverse, 0.0).reshape(x.shape)


def unrounded(x: Tensor) -> Tensor:
    return x


def as_f16(x: Tensor) -> Tensor:
    return x.half().float()


def as_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


BLOCKS_OF_256 = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0", *CODEBOOKS)
BLOCKS_OF_32 = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "q1_0", "q2_0")


def as_ggml(dtype: str) -> Callable[[Tensor], Tensor]:
    """How activations are rounded beside weights of a type."""
    if dtype in BLOCKS_OF_256:
        return round_q8_k
    if dtype in BLOCKS_OF_32:
        return round_q8_0
    return {"f16": as_f16, "bf16": as_bf16}.get(dtype, unrounded)
