"""Ops of the graph as ONNX nodes: what all forms of a file share. onnx_contrib and onnx_standard say the rest, each its way.

A form's table is op -> how it is said; see onnx_forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from qconvert.formats.onnx_arch import Form, fused_attention, is_encoder
from qconvert.formats.onnx_proto import Model, i64, info
from qconvert.graph import Graph, Node
from qconvert.rope import frequencies

DIMS = {"B": "batch_size", "T": "sequence_length"}
TOKENS, MASK = "input_ids", "attention_mask"
INPUTS: Mapping[str, str] = {"tokens": TOKENS, "attention_mask": MASK, "token_types": "token_type_ids"}
PAST, PRESENT = "past_key_values.{i}.{part}", "present.{i}.{part}"  # as onnxruntime-genai and transformers.js name them


@dataclass
class Lowering:
    """`model` has the weights already; positions up to `context` can be rotated."""

    graph: Graph
    model: Model
    form: Form
    context: int
    accuracy_level: int
    users: Mapping[str, list[str]] = field(init=False)
    fused: frozenset[str] = field(init=False)  # attention that one contrib node says, rotations included
    n_layers: int = 0
    made: set[str] = field(default_factory=set)
    tables: dict[str, tuple[str, str]] = field(default_factory=dict)  # rope's attributes -> cos, sin

    def __post_init__(self) -> None:
        self.users = self.graph.users()
        self.fused = fused_attention(self.graph, self.form)

    def run(self, ops: Mapping[str, Lower]) -> None:
        shape, given = ("batch_size", "sequence_length"), [n for n, node in self.graph.nodes.items() if node.op == "input"]
        self.model.inputs += [info(name, "i64", shape) for key, name in INPUTS.items() if key in given]
        if not is_encoder(self.graph):
            self.model.inputs += [info(MASK, "i64", ("batch_size", "total_sequence_length"))]
        for name, node in self.graph.nodes.items():
            if "slot" in node.attrs:
                slot(self, name, node)
        fixed = self.graph.constants()
        for name, node in self.graph.nodes.items():
            if name not in fixed and node.op != "input":
                ops[node.op](self, name, node)
        self.model.outputs[:0] = [info(name, "f32", self.shape(name)) for name in self.graph.outputs]

    # names and shapes ----------------------------------------------------------------------------

    def edge(self, name: str) -> str:
        return INPUTS.get(name, name) if self.graph.nodes[name].op == "input" else name

    def shape(self, name: str) -> list[int | str]:
        return [DIMS.get(d, d) if isinstance(d, str) else d for d in self.graph.nodes[name].type.shape]

    def declare(self, name: str) -> str:
        """An edge of the graph's own name, type and shape."""
        return name if name in self.graph.outputs else self.model.value(name, "f32", self.shape(name))

    def say(self, op: str, name: str, inputs: list[str], domain: str = "", path: str = "", **attrs: Any) -> None:
        """One node that makes the value `name`."""
        self.model.node(op, path or name, inputs, [self.declare(name)], domain, **attrs)

    def once(self, name: str, make: Callable[[], None]) -> str:
        """An edge that many read: its nodes are made when it is first asked for."""
        if name not in self.made:
            self.made.add(name)
            make()
        return name

    def real(self, weight: str) -> str:
        """A plain weight as f32."""
        kind, wide = self.graph.nodes[weight].type, f"{weight}.f32"
        if kind.dtype == "f32":
            return weight

        def widen() -> None:
            self.model.node("Cast", module(weight), [weight], [self.model.value(wide, "f32", kind.dims)], to=1)

        return self.once(wide, widen)

    def cache(self, layer: int, kv_heads: int, head_dim: int) -> tuple[list[str], list[str]]:
        """Names of past and present keys and values of a layer, as inputs and outputs of the model."""
        made = []
        for names, inside, side in ((PAST, "past", self.model.inputs), (PRESENT, "total", self.model.outputs)):
            made.append([names.format(i=layer, part=part) for part in ("key", "value")])
            side += [info(n, "f32", ("batch_size", kv_heads, f"{inside}_sequence_length", head_dim)) for n in made[-1]]
        return made[0], made[1]


Lower = Callable[[Lowering, str, Node], None]


def module(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".bias")


def part_names(weight: str) -> tuple[str, str, str]:
    """Initializers of a quantized weight: codes, scales, zero points."""
    stem = module(weight)
    return f"{stem}.qweight", f"{stem}.scales", f"{stem}.zero_points"


def rows_name(weight: str) -> str:
    """The codes once more as rows u8[N, K * bits / 8], which is how they are gathered."""
    return f"{module(weight)}.qweight.rows"


# lengths ------------------------------------------------------------------------------------------


def n_new(e: Lowering) -> str:
    """i64[1]: tokens of this call."""
    return _n_columns(e, TOKENS, "tokens.new")


def n_total(e: Lowering) -> str:
    """i64[1]: tokens of this call and those before it."""
    return _n_columns(e, MASK, "tokens.total")


def _n_columns(e: Lowering, of: str, name: str) -> str:
    return e.once(name, lambda: e.model.node("Shape", of, [of], [e.model.value(name, "i64", (1,))], start=1))


# the ops ------------------------------------------------------------------------------------------


def embed(e: Lowering, name: str, node: Node) -> None:
    """Of a plain table."""
    ids, weight = node.inputs
    dtype, path = e.graph.nodes[weight].type.dtype, module(weight)
    if dtype == "f32":
        e.say("Gather", name, [weight, e.edge(ids)], path=path)
    else:
        rows = e.model.value(f"{name}.rows", dtype, e.shape(name))
        e.model.node("Gather", path, [weight, e.edge(ids)], [rows])
        e.say("Cast", name, [rows], path=path, to=1)


def slot(e: Lowering, name: str, node: Node) -> None:
    """A factor of an adapter, transposed as MatMul reads it: an input that has a value of rank 0, so it may be left out."""
    shape = node.type.shape[::-1]
    e.model.inputs.append(info(name, "f32", [rank_of(name) if isinstance(d, str) else d for d in shape]))
    e.model.empty(name, "f32", [0 if isinstance(d, str) else d for d in shape])


def rank_of(factor: str) -> str:
    """Of each slot its own: onnxruntime takes dimensions of one name to be equal, and reuses buffers by that."""
    return re.sub(r"\.lora_[AB]\.weight$", ".lora_r", factor)


def _group_sums(e: Lowering, name: str, node: Node) -> None:
    group, (*lead, n) = cast(int, node.attrs["group"]), e.shape(name)
    parts = e.model.value(f"{name}.groups", "f32", [*lead, n, group])
    e.model.node("Reshape", name, [e.edge(node.inputs[0]), e.model.constant(i64(0, 0, -1, group))], [parts])
    e.say("ReduceSum", name, [parts, e.model.constant(i64(-1))], keepdims=0)


def _shift_path(e: Lowering, name: str, node: Node) -> None:
    sums, table = node.inputs
    turned = e.model.value(f"{table}.turned", "f32", e.graph.nodes[table].type.dims[::-1])
    e.model.node("Transpose", table, [e.real(table)], [turned], perm=[1, 0])
    e.say("MatMul", name, [sums, turned], path=table)


def lora(e: Lowering, name: str, node: Node) -> None:
    """Through a slot, whose scale is in the factor itself."""
    x, a, b = node.inputs
    low = e.model.value(f"{name}.low", "f32", [*e.shape(name)[:2], rank_of(a)])
    e.model.node("MatMul", a.removesuffix(".weight"), [e.edge(x), a], [low])
    e.say("MatMul", name, [low, b], path=b.removesuffix(".weight"))


def add(e: Lowering, name: str, node: Node) -> None:
    e.say("Add", name, [e.edge(i) for i in node.inputs])


def product(
    e: Lowering, op: str, name: str, inputs: list[str], bias: list[str], path: str, domain: str = "", **attrs: Any
) -> None:
    """One node that makes the value `name`, but for its bias, which is added where there is one."""
    if not bias:
        e.say(op, name, inputs, domain, path, **attrs)
        return
    plain = e.model.value(f"{name}.product", "f32", e.shape(name))
    e.model.node(op, path, inputs, [plain], domain, **attrs)
    e.say("Add", name, [plain, *bias], path=path)


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


def _take(e: Lowering, name: str, node: Node) -> None:
    e.say("Gather", name, [e.edge(i) for i in node.inputs], axis=2)


def _slice(e: Lowering, name: str, node: Node) -> None:
    begin, end = (e.model.constant(i64(cast(int, node.attrs[k]))) for k in ("begin", "end"))
    e.say("Slice", name, [node.inputs[0], begin, end, e.model.constant(i64(2))])


def rms_norm(e: Lowering, name: str, node: Node) -> None:
    """Over the whole width, or head by head."""
    x, weight = node.inputs
    width, chunk, path = int(e.shape(name)[-1]), e.graph.nodes[weight].type.dims[0], module(weight)
    if chunk == width:
        normalized(e, path, e.edge(x), weight, e.declare(name), e.shape(name), node)
        return
    shape = [*e.shape(name)[:2], width // chunk, chunk]
    heads, normed = (e.model.value(f"{name}.{part}", "f32", shape) for part in ("heads", "normed"))
    e.model.node("Reshape", path, [e.edge(x), e.model.constant(i64(0, 0, -1, chunk))], [heads])
    normalized(e, path, heads, weight, normed, shape, node)
    e.say("Reshape", name, [normed, e.model.constant(i64(0, 0, width))], path=path)


def normalized(
    e: Lowering, path: str, x: str, weight: str, out: str, shape: list[int | str], node: Node
) -> None:
    """x over its root mean square, times the weight; before opset 23 as the steps that onnxruntime fuses."""
    eps = float(cast(float, node.attrs["eps"]))
    if e.form.opset >= 23:
        e.model.node("RMSNormalization", path, [x, weight], [out], axis=-1, epsilon=eps)
        return
    m, per_row = e.model, [*shape[:-1], 1]
    steps = {part: m.value(f"{out}.{part}", "f32", shape if part in ("square", "unit") else per_row)
             for part in ("square", "mean", "safe", "root", "unit")}  # fmt: skip
    m.node("Pow", path, [x, m.constant(np.array(2, np.float32))], [steps["square"]])
    m.node("ReduceMean", path, [steps["square"], m.constant(i64(-1))], [steps["mean"]])
    m.node("Add", path, [steps["mean"], m.constant(np.array(eps, np.float32))], [steps["safe"]])
    m.node("Sqrt", path, [steps["safe"]], [steps["root"]])
    m.node("Div", path, [x, steps["root"]], [steps["unit"]])
    m.node("Mul", path, [steps["unit"], weight], [out])


def rotation(e: Lowering, node: Node) -> tuple[str, str]:
    """cos and sin f32[context, rotated/2], computed by constant nodes that the runtime folds as it loads: no bytes."""
    key = json.dumps(dict(node.attrs), sort_keys=True)
    if key in e.tables:
        return e.tables[key]
    m, dims = e.model, rotated(node)
    stem, shape = f"rope{len(e.tables) or ''}", (e.context, dims // 2)
    scaling = cast(Any, node.attrs.get("scaling"))
    turns, factor = frequencies(dims, float(cast(float, node.attrs["theta"])), scaling, e.context)
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


def rotated(node: Node) -> int:
    """How many values of each head a rope turns."""
    return cast(int, node.attrs.get("dims", node.attrs["head_dim"]))


def _plain(op: str, **attrs: Any) -> Lower:
    """An op of one ONNX node on the same inputs."""
    return lambda e, name, node: e.say(op, name, [e.edge(i) for i in node.inputs], **attrs)


OPS: dict[str, Lower] = {
    "embed": embed,
    "add": add,
    "lora": lora,
    "group_sums": _group_sums,
    "shift_path": _shift_path,
    "rms_norm": rms_norm,
    "mul": _plain("Mul"),
    "times": _times,
    "softcap": _softcap,
    "silu": _silu,
    "gelu": _plain("Gelu", approximate="none"),
    "gelu_tanh": _plain("Gelu", approximate="tanh"),
    "relu": _plain("Relu"),
    "take": _take,
    "slice": _slice,
    "layer_norm": _layer_norm,
}
