"""Nodes of a mixture of experts: onnxruntime's MoE and QMoE, and the choice of experts in standard nodes."""

from __future__ import annotations

from typing import cast

from qconvert.formats.onnx_layouts import LAYOUTS, has_zeros
from qconvert.formats.onnx_lowering import Lowering, module, part_names
from qconvert.formats.onnx_mixtures import experts_level
from qconvert.formats.onnx_proto import CONTRIB, i64
from qconvert.graph import Node

SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


def experts(e: Lowering, name: str, node: Node) -> None:
    """MoE or QMoE chooses by the router's logits itself; its shares always add up to 1."""
    x, route, both, down = node.inputs
    choice, m, shape = e.graph.nodes[route], e.model, e.shape(name)
    path, router = module(both).rpartition(".")[0], choice.inputs[0]
    n = int(e.shape(router)[-1])
    m.node("Reshape", path, [router, m.constant(i64(-1, n))], [m.value(f"{router}.rows", "f32", ("tokens", n))])
    whole = bool(choice.attrs["normalize"])
    out = e.declare(name) if whole else m.value(f"{name}.whole", "f32", shape)
    op, inputs, attrs = product(e, both, down)
    m.node(op, path, [e.edge(x), f"{router}.rows", *inputs], [out], CONTRIB, k=cast(int, choice.attrs["used"]),
           normalize_routing_weights=1, **SWIGLU, **attrs)  # fmt: skip
    if whole:
        return
    shares, _ = chosen(e, route, choice)
    total = m.value(f"{route}.total", "f32", [*shape[:-1], 1])
    m.node("ReduceSum", path, [shares, m.constant(i64(-1))], [total], keepdims=1)
    e.say("Mul", name, [out, total], path=path)


def product(e: Lowering, both: str, down: str) -> tuple[str, list[str], dict[str, int]]:
    """Op, inputs and attributes that say by which weights."""
    kind = e.graph.nodes[both].type
    if kind.dtype not in LAYOUTS:
        return "MoE", [e.real(both), "", e.real(down)], {}
    scheme = LAYOUTS[kind.dtype].scheme
    (first, first_scales, first_zeros), (second, second_scales, second_zeros) = part_names(both), part_names(down)
    inputs = [first, first_scales, "", second, second_scales]
    if has_zeros(scheme):
        inputs += ["", "", "", "", first_zeros, second_zeros]
    level = experts_level(e.form, scheme.bits, e.accuracy_level)
    attrs = {"expert_weight_bits": scheme.bits, "block_size": scheme.block}
    return "QMoE", inputs, attrs if level is None else attrs | {"accuracy_level": level}


def chosen(e: Lowering, name: str, node: Node) -> tuple[str, str]:
    """The largest of the softmax over experts, f32[B,T,used], and which they are."""
    router, used, m = node.inputs[0], cast(int, node.attrs["used"]), e.model
    shares = m.value(f"{name}.softmax", "f32", e.shape(name))
    top = [m.value(f"{name}.{part}", dtype, [*e.shape(name)[:-1], used]) for part, dtype in (("top", "f32"), ("at", "i64"))]
    m.node("Softmax", name, [router], [shares], axis=-1)
    m.node("TopK", name, [shares, m.constant(i64(used))], top, axis=-1)
    return top[0], top[1]


def fused_route(e: Lowering, name: str, node: Node) -> None:
    """Nothing by itself where MoE or QMoE reads it: they choose."""
    if any(e.graph.nodes[user].op != "experts" for user in e.users[name]):
        route(e, name, node)


def route(e: Lowering, name: str, node: Node) -> None:
    shares, at = chosen(e, name, node)
    m, outer = e.model, e.shape(name)[:-1]
    if node.attrs["normalize"]:
        total = m.value(f"{name}.total", "f32", [*outer, 1])
        scaled = m.value(f"{name}.scaled", "f32", [*outer, cast(int, node.attrs["used"])])
        m.node("ReduceSum", name, [shares, m.constant(i64(-1))], [total], keepdims=1)
        m.node("Div", name, [shares, total], [scaled])
        shares = scaled
    m.node("Shape", name, [f"{name}.softmax"], [m.value(f"{name}.shape", "i64", (3,))])
    m.node("ConstantOfShape", name, [f"{name}.shape"], [m.value(f"{name}.zeros", "f32", e.shape(name))])
    e.say("ScatterElements", name, [f"{name}.zeros", at, shares], axis=-1)


def spread(e: Lowering, name: str, node: Node) -> None:
    x, times, m = node.inputs[0], cast(int, node.attrs["times"]), e.model
    outer, n = e.shape(name)[:-1], int(e.shape(x)[-1])
    column, wide = m.value(f"{name}.column", "f32", [*outer, n, 1]), m.value(f"{name}.wide", "f32", [*outer, n, times])
    m.node("Unsqueeze", name, [x, m.constant(i64(-1))], [column])
    m.node("Expand", name, [column, m.constant(i64(1, 1, n, times))], [wide])
    e.say("Reshape", name, [wide, m.constant(i64(0, 0, n * times))])
