"""Activations as compressed-tensors rounds them where it simulates a runtime that multiplies small numbers, in f32.

Source: compressed_tensors/quantization/lifecycle/forward.py and utils/helpers.py of version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from qconvert.float_weights import E4M3_STEPS, E8M0, INT8_STEPS
from qconvert.graph import Graph, Node
from qconvert.kernels import mx_exponents
from qconvert.run import RoundInput

E2M1_GREATEST, EMPTY = 6.0, 0.125  # the e4m3 scale of a group of zeros


def rounding(graph: Graph, inputs: Mapping[str, object]) -> RoundInput:
    """inputs: QuantizationArgs of what linears with quantized weights read; fixed ranges are attributes of these linears."""

    def rounded(node: Node, x: Tensor) -> Tensor:
        if "." not in graph.nodes[node.inputs[1]].type.dtype:
            return x
        at = node.attrs.get("round_input")
        value = cast(float, at["value"]) if isinstance(at, dict) else None
        group = cast(int | None, inputs["group_size"])
        groups = x.reshape(*x.shape[:-1], -1, group) if group else x
        scale = scales_of(groups, inputs, value)
        return (nearest(groups / scale, inputs) * scale).reshape(x.shape)

    return rounded


def scales_of(groups: Tensor, inputs: Mapping[str, object], value: float | None) -> Tensor:
    """What each group (or token) is divided by; value: the fixed scale, or the divisor of scales."""
    strategy, bits = inputs["strategy"], inputs["num_bits"]
    if strategy == "tensor":
        return torch.tensor(value)
    peaks = groups.abs().amax(-1, keepdim=True)
    if strategy == "tensor_group":
        small = e4m3(peaks / E2M1_GREATEST * cast(float, value))
        return torch.where(small == 0, EMPTY, small) / cast(float, value)
    if inputs.get("scale_dtype"):
        return torch.from_numpy(E8M0[mx_exponents(peaks.contiguous().numpy(), 2 if bits == 4 else 8)])
    scale = peaks / (INT8_STEPS if inputs["type"] == "int" else E4M3_STEPS)
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def nearest(v: Tensor, inputs: Mapping[str, object]) -> Tensor:
    if inputs["type"] == "int":
        return v.clamp(-128, 127).round()
    return e4m3(v) if inputs["num_bits"] == 8 else e2m1(v)


def e4m3(v: Tensor) -> Tensor:
    return v.clamp(-E4M3_STEPS, E4M3_STEPS).to(torch.float8_e4m3fn).float()


def e2m1(v: Tensor) -> Tensor:
    """0, 0.5 … 2 in steps of 0.5, then 3, 4 and 6; ties to the even code."""
    v = v.clamp(-E2M1_GREATEST, E2M1_GREATEST)
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    return (v / step).round() * step
