"""What GGUF calls a weight, and the order in which llama-quantize writes them."""

from __future__ import annotations

import re

from qconvert.errors import GraphError
from qconvert.graph import Graph

STEMS = {"ffn_gate_up": "ffn_up"}  # role -> its name where it is another: llama.cpp's for both in one


def gguf_name(graph: Graph, parameter: str) -> str:
    """blk.3.attn_q.weight: the stem is the role, the suffix the parameter's own."""
    attrs = graph.root(parameter).attrs
    role, layer = attrs.get("role"), attrs.get("layer")
    if not isinstance(role, str):
        raise GraphError(f"{parameter} has no role; GGUF cannot name it")
    role = STEMS.get(role, role)
    suffix = "bias" if parameter.endswith(".bias") else "weight"
    return f"{role}.{suffix}" if layer is None else f"blk.{layer}.{role}.{suffix}"


def sort_key(name: str) -> tuple[int, str]:
    """llama-quantize's order: the tensors of no layer by name, then layer by layer."""
    m = re.match(r"blk\.(\d+)\.", name)
    return (int(m[1]) if m else -1, name)
