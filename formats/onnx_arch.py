"""What onnxruntime's nodes cannot be told of a model, and up to which length the folder computes what the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from qconvert.errors import UnsupportedError
from qconvert.graph import Attr, Graph, Node

# op -> the attributes that its nodes say; an op or an attribute that is not here would be lost
UNDERSTOOD: Mapping[str, frozenset[str]] = {
    op: frozenset(attrs.split())
    for op, attrs in {
        "input": "", "positions": "", "embed": "", "linear": "", "add": "", "mul": "", "times": "by", "softcap": "cap",
        "silu": "", "gelu": "", "gelu_tanh": "", "relu": "", "slice": "begin end", "rms_norm": "eps", "layer_norm": "eps",
        "rope": "head_dim theta scaling", "attention": "heads kv_heads scale window softcap",
    }.items()
}  # fmt: skip


def check_supported(graph: Graph) -> None:
    """UnsupportedError for what has no node here, and for attention that GroupQueryAttention refuses or cannot say."""
    fixed = graph.constants()
    for name, node in graph.nodes.items():
        if name in fixed:
            continue
        if node.op not in UNDERSTOOD:
            raise UnsupportedError(f"%{name}: --to onnx has no {node.op}", hint="--to gguf may have it")
        if lost := node.attrs.keys() - UNDERSTOOD[node.op]:
            raise UnsupportedError(f"%{name}: --to onnx has no {node.op} with {', '.join(sorted(lost))}")
        if node.op == "attention":
            check_attention(graph, name, node)
        if node.op == "rope" and len(node.inputs) > 1:
            raise UnsupportedError(f"%{name}: --to onnx has no rope by factors")
    inputs = [n for n, node in graph.nodes.items() if node.op == "input"]
    if len(inputs) > 1:
        raise UnsupportedError(f"--to onnx writes decoders of one input, this model has {', '.join(inputs)}")


def check_attention(graph: Graph, name: str, node: Node) -> None:
    if len(node.inputs) > 3:
        raise UnsupportedError(f"%{name}: --to onnx has no attention with a mask as input")
    q, k, v = (graph.nodes[i] for i in node.inputs)
    head_dim = cast(int, q.type.shape[-1]) // cast(int, node.attrs["heads"])
    multiple = 16 if q.op == "rope" else 8
    if head_dim % multiple:
        raise UnsupportedError(
            f"%{name}: heads of {head_dim}; onnxruntime's GroupQueryAttention wants multiples of {multiple}",
            hint="--to gguf has no such limit",
        )
    alike = q.op == k.op == "rope" and q.attrs == k.attrs and q.attrs["head_dim"] == head_dim and v.op != "rope"
    if not alike and "rope" in (q.op, k.op, v.op):
        raise UnsupportedError(f"%{name}: GroupQueryAttention rotates whole heads of queries and keys, both alike")
    for turned in node.inputs[:2] if alike else ():
        if others := [u for u in graph.users()[turned] if graph.nodes[u].op != "attention"]:
            raise UnsupportedError(f"%{others[0]} reads the rotated %{turned}, which only attention has here")


def context_length(graph: Graph) -> tuple[int, tuple[str, ...]]:
    """The longest text on which the file computes what the model does, and a note where that is shorter than the model's."""
    config = cast(Mapping[str, Attr], graph.meta["config"])
    context = cast(int, config["context"])
    for node in graph.nodes.values():
        scaling = node.attrs.get("scaling") if node.op == "rope" else None
        if isinstance(scaling, dict) and (kind := scaling.get("type")) in ("dynamic", "longrope"):
            original = min(context, cast(int, scaling.get("original_context") or context))
            note = f"{kind} rope scaling: its tables do not change with the text, so context_length is {original}"
            return original, (note,)
    return context, ()
