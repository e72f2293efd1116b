"""Ops of the graph as ONNX nodes: a table, op -> how it is said in ai.onnx 23 and com.microsoft 1.

Rotations are said inside GroupQueryAttention, and a sum with the norm that reads it as SkipSimplifiedLayerNormalization.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_proto import Model, i64, info
from qconvert.graph import Graph, Node
from qconvert.rope import frequencies

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4  # activations in 8 bits, group by group: the fast kernels
DIMS = {"B": "batch_size", "T": "sequence_length"}
TOKENS, MASK = "input_ids", "attention_mask"
PAST, PRESENT = "past_key_values.{i}.{part}", "present.{i}.{part}"  # as onnxruntime-genai and transformers.js name them


@dataclass
class Lowering:
    """`model` has the weights already; positions up to `context` can be rotated."""

    graph: Graph
    model: Model
    context: int
    users: Mapping[str, list[str]] = field(init=False)
    n_layers: int = 0
    widened: set[str] = field(default_factory=set)
    tables: dict[str, tuple[str, str]] = field(default_factory=dict)  # rope's attributes -> cos, sin

    def __post_init__(self) -> None:
        self.users = self.graph.users()

    def run(self) -> None:
        self.add_inputs()
        fixed = self.graph.constants()
        for name, node in self.graph.nodes.items():
            if name in fixed or node.op == "input":
                continue
            OPS[node.op](self, name, node)
        logits = self.graph.outputs[0]
        self.model.outputs.insert(0, info(logits, "f32", self.shape(logits)))

    def add_inputs(self) -> None:
        """Token ids and their mask, and what GroupQueryAttention wants of it: lengths less one, and the longest."""
        m = self.model
        m.inputs += [info(TOKENS, "i64", ("batch_size", "sequence_length"))]
        m.inputs += [info(MASK, "i64", ("batch_size", "total_sequence_length"))]
        m.node("ReduceSum", MASK, [MASK, m.constant(i64(1))], [m.value("mask.lengths", "i64", ("batch_size",))], keepdims=0)
        one = m.constant(np.array(1, np.int64))
        m.node("Sub", MASK, ["mask.lengths", one], [m.value("mask.last", "i64", ("batch_size",))])
        m.node("Cast", MASK, ["mask.last"], [m.value("seqlens_k", "i32", ("batch_size",))], to=6)
        m.node("Shape", MASK, [MASK], [m.value("mask.shape", "i64", (1,))], start=1, end=2)
        m.node("Squeeze", MASK, ["mask.shape"], [m.value("mask.total", "i64", ())])
        m.node("Cast", MASK, ["mask.total"], [m.value("total_sequence_length", "i32", ())], to=6)

    # names and shapes ----------------------------------------------------------------------------

    def edge(self, name: str) -> str:
        return TOKENS if self.graph.nodes[name].op == "input" else name

    def shape(self, name: str) -> list[int | str]:
        return [DIMS.get(d, d) if isinstance(d, str) else d for d in self.graph.nodes[name].type.shape]

    def declare(self, name: str) -> str:
        """An edge of the graph's own name, type and shape."""
        return name if name in self.graph.outputs else self.model.value(name, "f32", self.shape(name))

    def say(self, op: str, name: str, inputs: list[str], domain: str = "", path: str = "", **attrs: Any) -> None:
        """One node that makes the value `name`."""
        self.model.node(op, path or name, inputs, [self.declare(name)], domain, **attrs)

    def real(self, weight: str) -> str:
        """A plain weight as f32."""
        if self.graph.nodes[weight].type.dtype == "f32":
            return weight
        wide = f"{weight}.f32"
        if wide not in self.widened:
            self.widened.add(wide)
            self.model.value(wide, "f32", self.graph.nodes[weight].type.dims)
            self.model.node("Cast", module(weight), [weight], [wide], to=1)
        return wide


def module(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".bias")


def part_names(weight: str) -> tuple[str, str, str]:
    """Initializers of a quantized weight: codes, scales, zero points."""
    stem = module(weight)
    return f"{stem}.qweight", f"{stem}.scales", f"{stem}.zero_points"


def rows_name(weight: str) -> str:
    """The codes once more as rows u8[N, K * bits / 8], which is how they are gathered."""
    return f"{module(weight)}.qweight.rows"


# the ops ------------------------------------------------------------------------------------------


def _linear(e: Lowering, name: str, node: Node) -> None:
    x, weight, *bias = node.inputs
    kind, path = e.graph.nodes[weight].type, module(weight)
    if kind.dtype in LAYOUTS:
        layout, (codes, scales, zeros) = LAYOUTS[kind.dtype], part_names(weight)
        n, k = kind.dims
        inputs = [e.edge(x), codes, scales, zeros if len(layout.planes(k)) > 2 else "", "", *bias]
        e.say(
            "MatMulNBits", name, inputs if bias else inputs[:4] if inputs[3] else inputs[:3], CONTRIB, path, K=k, N=n,
            bits=layout.scheme.bits, block_size=layout.scheme.block, accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip
        return
    if not bias:
        e.say("FusedMatMul", name, [e.edge(x), e.real(weight)], CONTRIB, path, transB=1)
        return
    product = e.model.value(f"{name}.product", "f32", e.shape(name))
    e.model.node("FusedMatMul", path, [e.edge(x), e.real(weight)], [product], CONTRIB, transB=1)
    e.say("Add", name, [product, *bias], path=path)


def _embed(e: Lowering, name: str, node: Node) -> None:
    ids, weight = node.inputs
    dtype, path = e.graph.nodes[weight].type.dtype, module(weight)
    if dtype in LAYOUTS:
        scheme, (_, scales, zeros) = LAYOUTS[dtype].scheme, part_names(weight)
        inputs = [rows_name(weight), e.edge(ids), scales, *([zeros] if len(scheme.levels) > 1 else [])]
        e.say("GatherBlockQuantized", name, inputs, CONTRIB, path, gather_axis=0, quantize_axis=1,
              block_size=scheme.block, bits=scheme.bits)  # fmt: skip
    elif dtype == "f32":
        e.say("Gather", name, [weight, e.edge(ids)], path=path)
    else:
        rows = e.model.value(f"{name}.rows", dtype, e.shape(name))
        e.model.node("Gather", path, [weight, e.edge(ids)], [rows])
        e.say("Cast", name, [rows], path=path, to=1)


def _positions(e: Lowering, name: str, node: Node) -> None:
    """Those of the new tokens, behind what the cache holds."""
    m = e.model
    m.node("Shape", name, [TOKENS], [m.value(f"{name}.shape", "i64", (2,))])
    m.node("Gather", name, [f"{name}.shape", m.constant(np.array(1, np.int64))], [m.value(f"{name}.new", "i64", ())])
    m.node("Sub", name, ["mask.total", f"{name}.new"], [m.value(f"{name}.past", "i64", ())])
    one = m.constant(np.array(1, np.int64))
    m.node("Range", name, [f"{name}.past", "mask.total", one], [m.value(f"{name}.range", "i64", ("sequence_length",))])
    m.node("Expand", name, [f"{name}.range", f"{name}.shape"], [m.value(name, "i64", e.shape(name))])


def _add(e: Lowering, name: str, node: Node) -> None:
    if skip_norm(e, name) is None:
        e.say("Add", name, [e.edge(i) for i in node.inputs])


def skip_norm(e: Lowering, name: str) -> str | None:
    """The norm over the whole width that reads the sum `name` before anything else does; it then makes the sum too."""
    first = e.users[name][0] if e.users[name] else None
    if first is None or e.graph.nodes[first].op != "rms_norm" or name in e.graph.outputs:
        return None
    return first if e.graph.nodes[e.graph.nodes[first].inputs[1]].type.dims[0] == e.shape(name)[-1] else None


def _rms_norm(e: Lowering, name: str, node: Node) -> None:
    x, weight = node.inputs
    eps, path, head_dim = float(cast(float, node.attrs["eps"])), module(weight), e.graph.nodes[weight].type.dims[0]
    before = e.graph.nodes[x]
    if before.op == "add" and skip_norm(e, x) == name:
        inputs = [*(e.edge(i) for i in before.inputs), weight]
        outputs = [e.declare(name), "", "", e.declare(x)]
        e.model.node("SkipSimplifiedLayerNormalization", path, inputs, outputs, CONTRIB, epsilon=eps)
    elif head_dim == e.shape(name)[-1]:
        e.say("RMSNormalization", name, [e.edge(x), weight], path=path, axis=-1, epsilon=eps)
    else:
        shape = [*e.shape(name)[:2], int(e.shape(name)[-1]) // head_dim, head_dim]
        heads, normed = (e.model.value(f"{name}.{part}", "f32", shape) for part in ("heads", "normed"))
        e.model.node("Reshape", path, [e.edge(x), e.model.constant(i64(0, 0, -1, head_dim))], [heads])
        e.model.node("RMSNormalization", path, [heads, weight], [normed], axis=-1, epsilon=eps)
        e.say("Reshape", name, [normed, e.model.constant(i64(0, 0, int(e.shape(name)[-1])))], path=path)


def _layer_norm(e: Lowering, name: str, node: Node) -> None:
    path = module(node.inputs[1])
    e.say("LayerNormalization", name, [e.edge(i) for i in node.inputs], path=path, axis=-1, epsilon=node.attrs["eps"])


def _silu(e: Lowering, name: str, node: Node) -> None:
    gate = e.model.value(f"{name}.sigmoid", "f32", e.shape(name))
    e.model.node("Sigmoid", name, [node.inputs[0]], [gate])
    e.say("Mul", name, [node.inputs[0], gate])


def _times(e: Lowering, name: str, node: Node) -> None:
    e.say("Mul", name, [e.edge(node.inputs[0]), e.model.constant(np.array(node.attrs["by"], np.float32))])


def _softcap(e: Lowering, name: str, node: Node) -> None:
    cap, shape = e.model.constant(np.array(node.attrs["cap"], np.float32)), e.shape(name)
    parts, bounded = (e.model.value(f"{name}.{part}", "f32", shape) for part in ("parts", "bounded"))
    e.model.node("Div", name, [node.inputs[0], cap], [parts])
    e.model.node("Tanh", name, [parts], [bounded])
    e.say("Mul", name, [bounded, cap])


def _slice(e: Lowering, name: str, node: Node) -> None:
    begin, end = (e.model.constant(i64(cast(int, node.attrs[k]))) for k in ("begin", "end"))
    e.say("Slice", name, [node.inputs[0], begin, end, e.model.constant(i64(2))])


def _rope(e: Lowering, name: str, node: Node) -> None:
    """Nothing by itself: attention rotates what it reads. See onnx_arch for what it cannot."""


def _attention(e: Lowering, name: str, node: Node) -> None:
    layer, m = e.n_layers, e.model
    e.n_layers += 1
    q, k, v = node.inputs
    heads, kv_heads = (cast(int, node.attrs[key]) for key in ("heads", "kv_heads"))
    head_dim = int(e.shape(q)[-1]) // heads
    turns = [e.graph.nodes[i] for i in (q, k) if e.graph.nodes[i].op == "rope"]
    caches = []
    for names, inside in ((PAST, "past"), (PRESENT, "total")):
        caches += [names.format(i=layer, part=part) for part in ("key", "value")]
        shape = ("batch_size", kv_heads, f"{inside}_sequence_length", head_dim)
        (m.inputs if inside == "past" else m.outputs).extend(info(c, "f32", shape) for c in caches[-2:])
    read = [e.graph.nodes[i].inputs[0] if turns and i != v else i for i in (q, k, v)]
    inputs = [*read, *caches[:2], "seqlens_k", "total_sequence_length", *(rotation(e, turns[0]) if turns else ())]
    m.node(
        "GroupQueryAttention", name, inputs, [e.declare(name), *caches[2:]], CONTRIB, num_heads=heads,
        kv_num_heads=kv_heads, scale=float(cast(float, node.attrs["scale"])), do_rotary=int(bool(turns)),
        local_window_size=cast(int, node.attrs.get("window") or -1), softcap=float(cast(float, node.attrs.get("softcap") or 0)),
    )  # fmt: skip


def rotation(e: Lowering, node: Node) -> tuple[str, str]:
    """cos and sin f32[context, head_dim/2], computed by constant nodes that the runtime folds as it loads: no bytes."""
    key = json.dumps(dict(node.attrs), sort_keys=True)
    if key in e.tables:
        return e.tables[key]
    m, head_dim = e.model, cast(int, node.attrs["head_dim"])
    stem, shape = f"rope{len(e.tables) or ''}", (e.context, head_dim // 2)
    scaling = cast(Any, node.attrs.get("scaling"))
    turns, factor = frequencies(head_dim, float(cast(float, node.attrs["theta"])), scaling, e.context)
    scalars = [m.constant(np.array(v, np.float32)) for v in (0, e.context, 1)]
    m.node("Range", stem, scalars, [m.value(f"{stem}.positions", "f32", (e.context,))])
    m.node("Reshape", stem, [f"{stem}.positions", m.constant(i64(-1, 1))], [m.value(f"{stem}.column", "f32", (e.context, 1))])
    row = m.constant(turns[None])
    m.node("Mul", stem, [f"{stem}.column", row], [m.value(f"{stem}.angles", "f32", shape)])
    for op in ("Cos", "Sin"):
        name = f"{stem}.{op.lower()}"
        plain = name if factor == 1 else f"{name}.plain"
        m.node(op, stem, [f"{stem}.angles"], [m.value(plain, "f32", shape)])
        if factor != 1:
            m.node("Mul", stem, [plain, m.constant(np.array(factor, np.float32))], [m.value(name, "f32", shape)])
    e.tables[key] = f"{stem}.cos", f"{stem}.sin"
    return e.tables[key]


def _plain(op: str, **attrs: Any) -> Callable[[Lowering, str, Node], None]:
    """An op of one ONNX node on the same inputs."""
    return lambda e, name, node: e.say(op, name, [e.edge(i) for i in node.inputs], **attrs)


OPS: dict[str, Callable[[Lowering, str, Node], None]] = {
    "embed": _embed,
    "positions": _positions,
    "linear": _linear,
    "add": _add,
    "mul": _plain("Mul"),
    "times": _times,
    "softcap": _softcap,
    "silu": _silu,
    "gelu": _plain("Gelu", approximate="none"),
    "gelu_tanh": _plain("Gelu", approximate="tanh"),
    "relu": _plain("Relu"),
    "slice": _slice,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "attention": _attention,
}
