"""What a form of ONNX file can be told of a model, and up to which length the file computes what the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from qconvert.errors import UnsupportedError
from qconvert.graph import Attr, Graph, Node

Users = Mapping[str, list[str]]  # Graph.users


class Form(NamedTuple):
    """A dialect. contrib: nodes of com.microsoft may be used; bodies: their definitions in standard nodes lie in the file."""

    name: str
    opset: int
    ir_version: int
    contrib: bool
    bodies: bool
    runs_in: str


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("ort", 23, 11, True, True, "onnxruntime 1.23, and what executes the bodies of functions"),
        Form("portable", 23, 11, False, False, "whatever has opset 23: onnxruntime 1.23"),
        Form("legacy", 21, 10, True, False, "onnxruntime 1.20"),
    )
}
# op -> the attributes that its nodes say; an op or an attribute that is not here would be lost
UNDERSTOOD: Mapping[str, frozenset[str]] = {
    op: frozenset(attrs.split())
    for op, attrs in {
        "input": "default slot", "positions": "", "embed": "", "linear": "round_input round_output", "lora": "scale", "add": "",
        "mul": "", "times": "by", "take": "", "softcap": "cap", "silu": "", "gelu": "", "gelu_tanh": "", "relu": "",
        "slice": "begin end", "rms_norm": "eps", "layer_norm": "eps", "rope": "head_dim theta scaling dims interleaved",
        "attention": "heads kv_heads scale causal window softcap", "pool": "mode", "unit": "",
        "route": "used normalize", "experts": "act", "spread": "times", "group_sums": "group", "shift_path": "",
    }.items()
}  # fmt: skip


def check_supported(graph: Graph, form: Form) -> None:
    """UnsupportedError for what has no node here."""
    fixed, users = graph.constants(), graph.users()
    for name, node in graph.nodes.items():
        if name in fixed:
            continue
        if node.op not in UNDERSTOOD:
            raise UnsupportedError(f"%{name}: --to onnx has no {node.op}", hint="--to gguf may have it")
        if lost := node.attrs.keys() - UNDERSTOOD[node.op]:
            raise UnsupportedError(f"%{name}: --to onnx has no {node.op} with {', '.join(sorted(lost))}")
        if node.op == "lora" and "slot" not in graph.nodes[node.inputs[1]].attrs:
            raise UnsupportedError(f"%{name}: --to onnx has factors in slots alone", hint="inline-shift{form=pooled}")
        if node.op == "attention":
            check_attention(graph, users, name, node, form)
        if node.op == "rope" and len(node.inputs) > 1:
            raise UnsupportedError(f"%{name}: --to onnx has no rope by factors")
    inputs = [n for n, node in graph.nodes.items() if node.op == "input" and "slot" not in node.attrs]
    if not is_encoder(graph) and len(inputs) > 1:
        raise UnsupportedError(f"--to onnx writes decoders of one input, this model has {', '.join(inputs)}")


def check_attention(graph: Graph, users: Users, name: str, node: Node, form: Form) -> None:
    if not is_encoder(graph):
        if form.opset < 23 and (why := why_not_fused(graph, users, node)):
            raise UnsupportedError(f"%{name}: {why}", hint="--form ort has standard nodes for it")
        if len(node.inputs) > 3:
            raise UnsupportedError(f"%{name}: --to onnx has no decoder's attention with a mask as input")
    elif lost := [what for what in ("window", "softcap") if node.attrs.get(what) is not None]:
        raise UnsupportedError(f"%{name}: --to onnx has no encoder's attention with {' and '.join(lost)}")
    elif len(node.inputs) < 4 or node.attrs.get("causal", True) or node.inputs[3] != "attention_mask":
        raise UnsupportedError(f"%{name}: --to onnx wants all attention of an encoder to see all tokens of attention_mask")
    elif any(graph.nodes[i].op == "rope" for i in node.inputs):
        raise UnsupportedError(f"%{name}: --to onnx has no encoder whose heads rotate")


def is_encoder(graph: Graph) -> bool:
    """Whether tokens see those after them: no cache, and hidden states instead of logits."""
    return any(node.op == "attention" and node.attrs.get("causal") is False for node in graph.nodes.values())


def fused_attention(graph: Graph, form: Form) -> frozenset[str]:
    """Attention that GroupQueryAttention says in this form."""
    if not form.contrib or is_encoder(graph):
        return frozenset()
    users, nodes = graph.users(), graph.nodes
    return frozenset(n for n in nodes if nodes[n].op == "attention" and not why_not_fused(graph, users, nodes[n]))


def why_not_fused(graph: Graph, users: Users, node: Node) -> str | None:
    """What onnxruntime's GroupQueryAttention refuses or cannot be told of an attention; None where it can say it."""
    q, k, v = (graph.nodes[i] for i in node.inputs[:3])
    head_dim = cast(int, q.type.shape[-1]) // cast(int, node.attrs["heads"])
    multiple = 16 if q.op == "rope" else 8
    if head_dim % multiple:
        return f"heads of {head_dim}; onnxruntime's GroupQueryAttention wants multiples of {multiple}"
    alike = q.op == k.op == "rope" and q.attrs == k.attrs and q.attrs["head_dim"] == head_dim and v.op != "rope"
    if not alike and "rope" in (q.op, k.op, v.op):
        return "GroupQueryAttention rotates whole heads of queries and keys, both alike"
    if alike and (dims := cast(int, q.attrs.get("dims", head_dim))) % 16:
        return f"{dims} values of each head rotate; GroupQueryAttention wants multiples of 16"
    for turned in node.inputs[:2] if alike else ():
        if others := [u for u in users[turned] if graph.nodes[u].op != "attention"]:
            return f"%{others[0]} reads the rotated %{turned} too, which GroupQueryAttention keeps to itself"
    return None


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
