"""Ops of encoders: attention to all tokens of a text, and one vector of it. Neither cache nor genai has a part in them.

Inputs and outputs are called as transformers.js and optimum call them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from qconvert.formats.onnx_lowering import MASK, Lower, Lowering, n_new
from qconvert.formats.onnx_proto import CONTRIB, i64
from qconvert.graph import Graph, Node

OUTPUTS = ("last_hidden_state", "sentence_embedding")
TINY = 1e-12  # the least length that a vector is divided by


def named(graph: Graph) -> Graph:
    """The graph with its outputs' usual names."""
    names: Mapping[str, str] = dict(zip(graph.outputs, OUTPUTS, strict=False))

    def name(old: str) -> str:
        return names.get(old, old)

    nodes = {name(n): replace(node, inputs=tuple(map(name, node.inputs))) for n, node in graph.nodes.items()}
    return replace(graph, nodes=nodes, outputs=tuple(map(name, graph.outputs)))


def _positions(e: Lowering, name: str, node: Node) -> None:
    """0, 1, 2 …, padding or not."""
    m, (zero, one) = e.model, (e.model.constant(np.array(v, np.int64)) for v in (0, 1))
    m.node("Squeeze", name, [n_new(e)], [m.value(f"{name}.n", "i64", ())])
    m.node("Range", name, [zero, f"{name}.n", one], [m.value(f"{name}.range", "i64", ("sequence_length",))])
    m.node("Shape", name, [e.edge(node.inputs[0])], [m.value(f"{name}.shape", "i64", (2,))])
    m.node("Expand", name, [f"{name}.range", f"{name}.shape"], [m.value(name, "i64", e.shape(name))])


def _attention(e: Lowering, name: str, node: Node) -> None:
    q, k, v, _ = node.inputs
    heads, scale = cast(int, node.attrs["heads"]), float(cast(float, node.attrs["scale"]))
    if e.form.opset < 23:
        inputs = [q, k, v, "", cast_mask(e, "i32")]
        e.say("MultiHeadAttention", name, inputs, CONTRIB, num_heads=heads, scale=scale)
    else:
        kv_heads = cast(int, node.attrs["kv_heads"])
        e.say("Attention", name, [q, k, v, square_mask(e)], q_num_heads=heads, kv_num_heads=kv_heads, scale=scale)


def cast_mask(e: Lowering, dtype: str) -> str:
    """The mask [B,T] of another type: 0 or 1 for each token."""
    name, to = f"mask.{dtype}", {"bool": 9, "i32": 6, "f32": 1}[dtype]
    shape = ("batch_size", "sequence_length")
    source = MASK if dtype == "bool" else cast_mask(e, "bool")
    return e.once(name, lambda: e.model.node("Cast", MASK, [source], [e.model.value(name, dtype, shape)], to=to))


def square_mask(e: Lowering) -> str:
    """bool[B,1,T,T]: onnxruntime's Attention wants a row for every token."""
    m, name, n = e.model, "visible", "sequence_length"

    def make() -> None:
        rows = m.value("mask.rows", "bool", ("batch_size", 1, 1, n))
        m.node("Unsqueeze", MASK, [cast_mask(e, "bool"), m.constant(i64(1, 2))], [rows])
        one = m.constant(i64(1))
        m.node("Concat", MASK, [one, one, n_new(e), one], [m.value("mask.square", "i64", (4,))], axis=0)
        m.node("Expand", MASK, [rows, "mask.square"], [m.value(name, "bool", ("batch_size", 1, n, n))])

    return e.once(name, make)


def _pool(e: Lowering, name: str, node: Node) -> None:
    """The mean over tokens that the mask shows, or the first of them."""
    x, m, (batch, width) = node.inputs[0], e.model, e.shape(name)
    if node.attrs["mode"] == "cls":
        m.node("ArgMax", name, [cast_mask(e, "i32")], [m.value(f"{name}.first", "i64", (batch, 1))], axis=1, keepdims=1)
        e.say("GatherND", name, [x, f"{name}.first"], batch_dims=1)
        return
    shape = e.shape(x)
    column, total, n = (m.value(f"{name}.{part}", "f32", dims) for part, dims in (
        ("column", (*shape[:2], 1)), ("total", (batch, width)), ("n", (batch, 1))))  # fmt: skip
    m.node("Unsqueeze", name, [cast_mask(e, "f32"), m.constant(i64(-1))], [column])
    m.node("Mul", name, [x, column], [m.value(f"{name}.kept", "f32", shape)])
    m.node("ReduceSum", name, [f"{name}.kept", m.constant(i64(1))], [total], keepdims=0)
    m.node("ReduceSum", name, [column, m.constant(i64(1))], [n], keepdims=0)
    m.node("Max", name, [n, m.constant(np.array(1, np.float32))], [m.value(f"{name}.some", "f32", (batch, 1))])
    e.say("Div", name, [total, f"{name}.some"])


def _unit(e: Lowering, name: str, node: Node) -> None:
    x, m, shape = node.inputs[0], e.model, [*e.shape(name)[:-1], 1]
    length, safe = (m.value(f"{name}.{part}", "f32", shape) for part in ("length", "safe"))
    m.node("ReduceL2", name, [x, m.constant(i64(-1))], [length], keepdims=1)
    m.node("Max", name, [length, m.constant(np.array(TINY, np.float32))], [safe])
    e.say("Div", name, [x, safe])


OPS: dict[str, Lower] = {"positions": _positions, "attention": _attention, "pool": _pool, "unit": _unit}
