"""Ops as onnxruntime's own nodes (com.microsoft): quantized products, and attention with its rotations and cache in one.

A sum and the norm that reads it are said together, as SkipSimplifiedLayerNormalization. Attention that
GroupQueryAttention cannot say is said in standard nodes.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from qconvert.formats import onnx_experts, onnx_standard
from qconvert.formats import onnx_lowering as common
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_lowering import (
    MASK,
    Lower,
    Lowering,
    module,
    n_new,
    n_total,
    part_names,
    product,
    rotation,
    rows_name,
)
from qconvert.formats.onnx_proto import CONTRIB, i64
from qconvert.graph import Node


def _linear(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    if e.graph.nodes[weight].type.dtype in LAYOUTS:
        _quantized(e, name, node)
        return
    product(e, "FusedMatMul", name, [e.edge(x), e.real(weight)], bias, module(weight), CONTRIB, transB=1)


def _quantized(e: Lowering, name: str, node: Node) -> None:
    """MatMulNBits takes a bias, MatMulBnb4 does not."""
    x, weight, *bias = node.inputs
    n, k = e.graph.nodes[weight].type.dims
    layout = LAYOUTS[e.graph.nodes[weight].type.dtype]
    attributes, path = layout.attributes(n, k, e.accuracy_level), module(weight)
    codes, scales, zeros = part_names(weight)
    if layout.node == "MatMulBnb4":
        product(e, layout.node, name, [e.edge(x), codes, scales], bias, path, CONTRIB, **attributes)
        return
    inputs = [e.edge(x), codes, scales, zeros if layout.scheme.zero_point != "none" else "", "", *bias]
    while not inputs[-1]:
        inputs.pop()
    e.say(layout.node, name, inputs, CONTRIB, path, **attributes)


def _embed(e: Lowering, name: str, node: Node) -> None:
    ids, weight = node.inputs
    dtype = e.graph.nodes[weight].type.dtype
    if dtype not in LAYOUTS or not e.form.bodies:  # onnxruntime 1.20 gathers no codes in bytes
        onnx_standard.embed(e, name, node)
        return
    scheme, (_, scales, zeros) = LAYOUTS[dtype].scheme, part_names(weight)
    inputs = [rows_name(weight), e.edge(ids), scales, *([zeros] if len(scheme.levels) > 1 else [])]
    e.say("GatherBlockQuantized", name, inputs, CONTRIB, module(weight), gather_axis=0, quantize_axis=1,
          block_size=scheme.block, bits=scheme.bits)  # fmt: skip


def _add(e: Lowering, name: str, node: Node) -> None:
    if skip_norm(e, name) is None:
        common.add(e, name, node)


def skip_norm(e: Lowering, name: str) -> str | None:
    """The norm over the whole width that reads the sum `name` before anything else does; it then makes the sum too."""
    first = e.users[name][0] if e.users[name] else None
    if first is None or e.graph.nodes[first].op != "rms_norm" or name in e.graph.outputs:
        return None
    return first if e.graph.nodes[e.graph.nodes[first].inputs[1]].type.dims[0] == e.shape(name)[-1] else None


def _rms_norm(e: Lowering, name: str, node: Node) -> None:
    x, weight = node.inputs
    before = e.graph.nodes[x]
    if before.op != "add" or skip_norm(e, x) != name:
        common.rms_norm(e, name, node)
        return
    inputs = [*(e.edge(i) for i in before.inputs), weight]
    outputs = [e.declare(name), "", "", e.declare(x)]
    eps = float(cast(float, node.attrs["eps"]))
    e.model.node("SkipSimplifiedLayerNormalization", module(weight), inputs, outputs, CONTRIB, epsilon=eps)


def _positions(e: Lowering, name: str, node: Node) -> None:
    """Those of the new tokens, behind what the cache holds: as GroupQueryAttention counts them."""
    m, scalars = e.model, []
    for part, length in (("new", n_new(e)), ("total", n_total(e))):
        scalars.append(m.value(f"{name}.{part}", "i64", ()))
        m.node("Squeeze", name, [length], [scalars[-1]])
    m.node("Sub", name, scalars[::-1], [m.value(f"{name}.past", "i64", ())])
    one = m.constant(np.array(1, np.int64))
    m.node("Range", name, [f"{name}.past", scalars[1], one], [m.value(f"{name}.range", "i64", ("sequence_length",))])
    m.node("Shape", name, [e.edge(node.inputs[0])], [m.value(f"{name}.shape", "i64", (2,))])
    m.node("Expand", name, [f"{name}.range", f"{name}.shape"], [m.value(name, "i64", e.shape(name))])


def _rope(e: Lowering, name: str, node: Node) -> None:
    """Nothing by itself where all that read it are fused: they rotate what they read."""
    if not e.fused.issuperset(e.users[name]):
        onnx_standard.rope(e, name, node)


def _attention(e: Lowering, name: str, node: Node) -> None:
    if name not in e.fused:
        onnx_standard.attention(e, name, node)
        return
    q, k, v = node.inputs
    heads, kv_heads = (cast(int, node.attrs[key]) for key in ("heads", "kv_heads"))
    past, present = e.cache(e.n_layers, kv_heads, int(e.shape(q)[-1]) // heads)
    e.n_layers += 1
    turns = [e.graph.nodes[i] for i in (q, k) if e.graph.nodes[i].op == "rope"]
    read = [e.graph.nodes[i].inputs[0] if turns and i != v else i for i in (q, k, v)]
    inputs = [*read, *past, *lengths(e), *(rotation(e, turns[0]) if turns else ())]
    pairs = int(bool(turns and turns[0].attrs.get("interleaved")))
    e.model.node(
        "GroupQueryAttention", name, inputs, [e.declare(name), *present], CONTRIB, num_heads=heads, kv_num_heads=kv_heads,
        scale=float(cast(float, node.attrs["scale"])), do_rotary=int(bool(turns)), rotary_interleaved=pairs,
        local_window_size=cast(int, node.attrs.get("window") or -1), softcap=float(cast(float, node.attrs.get("softcap") or 0)),
    )  # fmt: skip


def lengths(e: Lowering) -> list[str]:
    """What GroupQueryAttention wants of the mask: each text's length less one, i32[B], and the longest, i32."""
    m = e.model

    def last() -> None:
        m.node("ReduceSum", MASK, [MASK, m.constant(i64(1))], [m.value("mask.lengths", "i64", ("batch_size",))], keepdims=0)
        one = m.constant(np.array(1, np.int64))
        m.node("Sub", MASK, ["mask.lengths", one], [m.value("mask.last", "i64", ("batch_size",))])
        m.node("Cast", MASK, ["mask.last"], [m.value("seqlens_k", "i32", ("batch_size",))], to=6)

    def longest() -> None:
        m.node("Squeeze", MASK, [n_total(e)], [m.value("mask.total", "i64", ())])
        m.node("Cast", MASK, ["mask.total"], [m.value("total_sequence_length", "i32", ())], to=6)

    return [e.once("seqlens_k", last), e.once("total_sequence_length", longest)]


OPS: dict[str, Lower] = common.OPS | {
    "embed": _embed,
    "positions": _positions,
    "linear": _linear,
    "add": _add,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "attention": _attention,
    "route": onnx_experts.fused_route,
    "experts": onnx_experts.experts,
    "spread": onnx_experts.spread,
}
