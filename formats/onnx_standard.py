"""Ops in ai.onnx alone: what any runtime of opset 23 can execute, in the forms that onnxruntime fuses as it loads."""

from __future__ import annotations

from typing import cast

import numpy as np

from qconvert.formats import onnx_experts
from qconvert.formats import onnx_lowering as common
from qconvert.formats.onnx_columns import LAYOUTS as COLUMNS
from qconvert.formats.onnx_layouts import LAYOUTS, centre, has_zeros
from qconvert.formats.onnx_lowering import (
    MASK,
    Lower,
    Lowering,
    module,
    n_new,
    n_total,
    part_names,
    product,
    rotated,
    rotation,
    rows_name,
)
from qconvert.formats.onnx_proto import i64
from qconvert.graph import Node

FREE = (0, 0)  # in a new shape: batch and tokens as they are
PARTS = (("apart", "u8"), ("low", "u8"), ("wide", "f32"))
END = np.iinfo(np.int64).max


def _linear(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    product(e, "MatMul", name, [e.edge(x), turned(e, weight)], bias, module(weight))


def turned(e: Lowering, weight: str) -> str:
    """The weight as f32[K,N]. Codes lie so already: onnxruntime makes a MatMulNBits of no other arrangement."""
    kind, path, name = e.graph.nodes[weight].type, module(weight), f"{weight}.turned"
    n, k = kind.dims

    def make() -> None:
        out = [e.model.value(name, "f32", (k, n))]
        if kind.dtype not in COLUMNS:
            e.model.node("Transpose", path, [e.real(weight)], out, perm=[1, 0])
            return
        scheme, (codes, scales, zeros) = COLUMNS[kind.dtype].scheme, part_names(weight)
        inputs = [codes, scales, zeros] if has_zeros(scheme) else [codes, scales]
        e.model.node("DequantizeLinear", path, inputs, out, axis=0, block_size=scheme.block)

    return e.once(name, make)


def embed(e: Lowering, name: str, node: Node) -> None:
    """Rows of codes, of their scales and zero points: dequantizing the table first would make all of it real."""
    ids, weight = node.inputs
    dtype, path, m = e.graph.nodes[weight].type.dtype, module(weight), e.model
    if dtype not in LAYOUTS:
        common.embed(e, name, node)
        return
    scheme, (_, scales, zeros), k = LAYOUTS[dtype].scheme, part_names(weight), e.graph.nodes[weight].type.dims[1]
    groups, (batch, tokens, _) = k // scheme.block, e.shape(name)
    grouped, column = [batch, tokens, groups, scheme.block], [batch, tokens, groups, 1]
    m.node("Gather", path, [scales, e.edge(ids)], [m.value(f"{name}.scales", "f32", column[:3])])
    m.node("Unsqueeze", path, [f"{name}.scales", m.constant(i64(-1))], [m.value(f"{name}.factors", "f32", column)])
    centre_ = m.constant(np.array(centre(scheme), np.float32))
    if has_zeros(scheme):
        whole = gathered(e, path, zeros, e.edge(ids), f"{name}.zeros", scheme.bits)
        cut = m.value(f"{name}.zeros.cut", "f32", column[:3])
        m.node("Slice", path, [whole, m.constant(i64(0)), m.constant(i64(groups)), m.constant(i64(2))], [cut])
        centre_ = m.value(f"{name}.centres", "f32", column)
        m.node("Unsqueeze", path, [cut, m.constant(i64(-1))], [centre_])
    codes = gathered(e, path, rows_name(weight), e.edge(ids), f"{name}.codes", scheme.bits)
    m.node("Reshape", path, [codes, m.constant(i64(*FREE, groups, scheme.block))], [m.value(f"{name}.grouped", "f32", grouped)])
    m.node("Sub", path, [f"{name}.grouped", centre_], [m.value(f"{name}.centred", "f32", grouped)])
    m.node("Mul", path, [f"{name}.centred", f"{name}.factors"], [m.value(f"{name}.values", "f32", grouped)])
    e.say("Reshape", name, [f"{name}.values", m.constant(i64(*FREE, k))], path=path)


def gathered(e: Lowering, path: str, table: str, ids: str, out: str, bits: int) -> str:
    """Rows `ids` of a table u8[N,m] as f32[B,T, m * 8 / bits]: integers of `bits` bits, the first in the low ones."""
    m, per, width = e.model, 8 // bits, row_nbytes(e, table)
    outer: list[int | str] = ["batch_size", "sequence_length", width]
    m.node("Gather", path, [table, ids], [m.value(f"{out}.packed", "u8", outer)])
    m.node("Unsqueeze", path, [f"{out}.packed", m.constant(i64(-1))], [m.value(f"{out}.column", "u8", [*outer, 1])])
    apart, low, wide = (m.value(f"{out}.{part}", dtype, [*outer, per]) for part, dtype in PARTS)
    m.node("BitShift", path, [f"{out}.column", m.constant(np.arange(0, 8, bits, dtype=np.uint8))], [apart], direction="RIGHT")
    m.node("BitwiseAnd", path, [apart, m.constant(np.array((1 << bits) - 1, np.uint8))], [low])
    m.node("Cast", path, [low], [wide], to=1)
    m.node("Reshape", path, [wide, m.constant(i64(*FREE, width * per))], [m.value(out, "f32", [*outer[:2], width * per])])
    return out


def row_nbytes(e: Lowering, table: str) -> int:
    """nbytes of a row of a table."""
    width: int = e.model.initializers[table].dims[1]
    return width


# positions and what they see ----------------------------------------------------------------------


def position_ids(e: Lowering) -> str:
    """i64[B,T]: how many tokens of its own text come before each new one; padding does not count."""
    m, both = e.model, ("batch_size", "total_sequence_length")

    def make() -> None:
        m.node("CumSum", MASK, [MASK, m.constant(np.array(1, np.int64))], [m.value("mask.counted", "i64", both)])
        m.node("Sub", MASK, ["mask.counted", m.constant(np.array(1, np.int64))], [m.value("mask.before", "i64", both)])
        m.node("Max", MASK, ["mask.before", m.constant(np.array(0, np.int64))], [m.value("mask.positions", "i64", both)])
        new = m.value("position_ids", "i64", ("batch_size", "sequence_length"))
        m.node("Slice", MASK, ["mask.positions", first_new(e), m.constant(i64(END)), m.constant(i64(1))], [new])

    return e.once("position_ids", make)


def first_new(e: Lowering) -> str:
    """i64[1]: where the new tokens begin, counted from the end."""
    name = "tokens.first"
    return e.once(name, lambda: e.model.node("Neg", MASK, [n_new(e)], [e.model.value(name, "i64", (1,))]))


def ages(e: Lowering) -> str:
    """i64[T,S]: how far each key lies behind each new token."""
    m = e.model

    def make() -> None:
        zero, one = (m.constant(np.array(v, np.int64)) for v in (0, 1))
        m.node("Squeeze", MASK, [n_total(e)], [m.value("keys.n", "i64", ())])
        m.node("Range", MASK, [zero, "keys.n", one], [m.value("keys", "i64", ("total_sequence_length",))])
        at = m.value("queries", "i64", ("sequence_length",))
        m.node("Slice", MASK, ["keys", first_new(e), m.constant(i64(END))], [at])
        column = m.value("queries.column", "i64", ("sequence_length", 1))
        m.node("Unsqueeze", MASK, [at, m.constant(i64(1))], [column])
        m.node("Sub", MASK, [column, "keys"], [m.value("ages", "i64", ("sequence_length", "total_sequence_length"))])

    return e.once("ages", make)


def visible(e: Lowering, window: int | None) -> str:
    """bool[B,1,T,S]: keys that a token attends to: itself, and those before it that are no padding and not too far back.

    A token that is padding sees itself, so that no row is empty: its NaN would spread by the cache.
    """
    m, pair = e.model, ("sequence_length", "total_sequence_length")
    name = "visible" if window is None else f"visible.{window}"
    shape = ("batch_size", 1, *pair)

    def seen() -> None:
        m.node("Cast", MASK, [MASK], [m.value("mask.bool", "bool", ("batch_size", pair[1]))], to=9)
        rows = m.value("mask.rows", "bool", ("batch_size", 1, 1, pair[1]))
        m.node("Unsqueeze", MASK, ["mask.bool", m.constant(i64(1, 2))], [rows])
        zero = m.constant(np.array(0, np.int64))
        m.node("Equal", MASK, [ages(e), zero], [m.value("mask.self", "bool", pair)])
        m.node("GreaterOrEqual", MASK, [ages(e), zero], [m.value("mask.causal", "bool", pair)])
        m.node("Or", MASK, [rows, "mask.self"], [m.value("mask.seen", "bool", shape)])
        m.node("And", MASK, ["mask.seen", "mask.causal"], [m.value("visible", "bool", shape)])

    def near() -> None:
        bound = m.constant(np.array(window, np.int64))
        m.node("Less", MASK, [ages(e), bound], [m.value(f"{name}.near", "bool", pair)])
        m.node("And", MASK, [e.once("visible", seen), f"{name}.near"], [m.value(name, "bool", shape)])

    return e.once(name, seen if window is None else near)


def _positions(e: Lowering, name: str, node: Node) -> None:
    e.model.node("Identity", name, [position_ids(e)], [e.model.value(name, "i64", e.shape(name))])


def rope(e: Lowering, name: str, node: Node) -> None:
    x, head_dim = node.inputs[0], cast(int, node.attrs["head_dim"])
    inputs = [e.edge(x), *rotation(e, node), position_ids(e)]
    e.say(
        "RotaryEmbedding", name, inputs, num_heads=int(e.shape(x)[-1]) // head_dim,
        rotary_embedding_dim=rotated(node) % head_dim, interleaved=int(bool(node.attrs.get("interleaved"))),
    )  # fmt: skip


def attention(e: Lowering, name: str, node: Node) -> None:
    q = node.inputs[0]
    heads, kv_heads = (cast(int, node.attrs[key]) for key in ("heads", "kv_heads"))
    past, present = e.cache(e.n_layers, kv_heads, int(e.shape(q)[-1]) // heads)
    e.n_layers += 1
    mask = visible(e, cast(int | None, node.attrs.get("window")))
    e.model.node(
        "Attention", name, [*node.inputs, mask, *past], [e.declare(name), *present], q_num_heads=heads,
        kv_num_heads=kv_heads, scale=float(cast(float, node.attrs["scale"])),
        softcap=float(cast(float, node.attrs.get("softcap") or 0)),
    )  # fmt: skip


OPS: dict[str, Lower] = common.OPS | {
    "embed": embed,
    "positions": _positions,
    "linear": _linear,
    "rope": rope,
    "attention": attention,
    "route": onnx_experts.route,
    "spread": onnx_experts.spread,
}
