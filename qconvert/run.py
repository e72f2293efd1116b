"""The reference evaluator: what a graph computes, in torch, f32 or f64. Everything emitted is judged against it.

Activations are kept until their last reader has run; weights are read right before use, large ones in blocks of rows,
so memory is the live activations plus one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qconvert.errors import GraphError
from qconvert.graph import Graph, Node
from qconvert.reals import Reals
from qconvert.rope import Scaling, frequencies

BLOCK = 1 << 23  # values of a weight read at a time: 32 MB of f32
Observe = Callable[[str, Node, tuple[Tensor, ...]], None]
RoundInput = Callable[[Node, Tensor], Tensor]
Made = Callable[[str, Tensor], None]
AtExpert = Callable[[str, int, Tensor], None]


def run(
    graph: Graph,
    weights: Reals,
    tokens: Tensor | npt.NDArray[np.integer[Any]] | list[list[int]],
    *,
    want: Iterable[str] | None = None,
    observe: Observe | None = None,
    round_input: RoundInput | None = None,
    round_output: RoundInput | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    known: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Values by name for token ids i64[B,T]: those in `want`, by default the graph's outputs.

    observe(name, node, inputs): called before each op with its activations (weights left out).
    inputs: i64[B,T] of the graph's other inputs, what is not there is its default everywhere; factors for slots.
    known: values that were computed before; what only they need is not computed again.
    round_input(node, x): what a linear gets in place of its activations x, as a runtime rounds them.
    round_output(node, y): what it gives in place of its product y, before the bias.
    For a full f64 reference give weights of np.float64 too. GraphError where `want` names nothing.
    """
    wanted = tuple(graph.outputs if want is None else want)
    for name in wanted:
        if name not in graph.nodes:
            raise GraphError(f"no value is called %{name}")
    values = Values(graph, weights, torch.as_tensor(tokens, dtype=torch.int64), dtype, round_input, round_output)
    values.given, values.live = inputs or {}, dict(known or {})
    need = graph.needed(wanted, values.live) - values.fixed - values.live.keys()
    evaluate_all(values, [name for name in graph.nodes if name in need], wanted, observe)
    return {name: values[name] for name in wanted}


def evaluate_all(
    values: Values, order: Sequence[str], keep: Iterable[str], observe: Observe | None = None, made: Made | None = None
) -> None:
    """Activations in that order into values.live, where those of `keep` stay and others until their last reader has run.

    made(name, value): called for each, as soon as it is there.
    """
    nodes, kept = values.graph.nodes, set(keep)
    last = {i: name for name in order for i in nodes[name].inputs}
    with torch.no_grad():
        for name in order:
            node = nodes[name]
            if observe is not None:
                observe(name, node, tuple(values[i] for i in node.inputs if i not in values.fixed))
            values.live[name] = evaluate(values, name, node)
            if made is not None:
                made(name, values.live[name])
            for i in {*node.inputs, name}:
                if i not in kept and last.get(i, name) == name:
                    values.live.pop(i, None)


@dataclass
class Values:
    """What an op can read: activations that live, and weights, which are never kept."""

    graph: Graph
    weights: Reals
    tokens: Tensor
    dtype: torch.dtype
    round_input: RoundInput | None = None
    round_output: RoundInput | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    at_expert: AtExpert | None = None  # (weight, e, x[n,K]): tokens that expert e multiplies by a stack of weights
    live: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.fixed = self.graph.constants()

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name) if name in self.fixed else self.live[name]

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        array = self.weights.real(name, begin, end)
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.dtype)

    def blocks(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, rows begin..end) over all rows of a weight."""
        n, *rest = self.graph.nodes[name].type.dims
        step = max(1, BLOCK // math.prod(rest))
        for begin in range(0, n, step):
            end = min(n, begin + step)
            yield begin, end, self.rows(name, begin, end)

    def gather(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` i64[...] of a weight [N,K] -> [...,K]; only those rows are read where they are few."""
        n, k = self.graph.nodes[name].type.dims
        if int(ids.max()) >= n or int(ids.min()) < 0:
            raise GraphError(f"%{name} has {n} rows; row {int(ids.max())} was wanted")
        unique, at = np.unique(ids.numpy(), return_inverse=True)
        if n * k <= BLOCK:
            return self[name][ids]
        if len(unique) <= n // 16:
            return torch.cat([self.rows(name, int(i), int(i) + 1) for i in unique])[torch.from_numpy(at)]
        found = torch.empty(len(unique), k, dtype=self.dtype)
        for begin, end, w in self.blocks(name):
            i, j = np.searchsorted(unique, (begin, end))
            found[i:j] = w[torch.from_numpy(unique[i:j] - begin)]
        return found[torch.from_numpy(at)]


def evaluate(values: Values, name: str, node: Node) -> Tensor:
    if node.op == "input" and "slot" in node.attrs:  # unfilled, its rank is 0
        return values.given.get(name, torch.zeros([0 if isinstance(d, str) else d for d in node.type.shape])).to(values.dtype)
    if node.op == "input" and "default" in node.attrs:
        given = values.given.get(name)
        return torch.full_like(values.tokens, _count(node, "default")) if given is None else given
    if node.op not in OPS:
        raise GraphError(f"%{name}: {node.op} is not an op on activations", hint=f"those are {', '.join(OPS)}")
    return OPS[node.op](values, node)


def _number(node: Node, attr: str) -> float:
    value = node.attrs[attr]
    assert isinstance(value, int | float)
    return value


def _count(node: Node, attr: str) -> int:
    value = node.attrs[attr]
    assert isinstance(value, int)
    return value


# linear maps --------------------------------------------------------------------------------------


def _linear(v: Values, node: Node) -> Tensor:
    x = v[node.inputs[0]]
    if v.round_input is not None:
        x = v.round_input(node, x)
    parts = [F.linear(x, w) for _, _, w in v.blocks(node.inputs[1])]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if v.round_output is not None:
        y = v.round_output(node, y)
    return y + v[node.inputs[2]] if len(node.inputs) > 2 else y


def _take(v: Values, node: Node) -> Tensor:
    x, indices = (v[i] for i in node.inputs)
    return x[..., indices.long()]


def _group_sums(v: Values, node: Node) -> Tensor:
    return _split(v[node.inputs[0]], _count(node, "group")).sum(-1)


def _lora(v: Values, node: Node) -> Tensor:
    x, a, b, *bias = (v[i] for i in node.inputs)
    y = F.linear(F.linear(x, a), b)
    return _number(node, "scale") * (y + bias[0] if bias else y)


def _dora_path(v: Values, node: Node) -> Tensor:
    """Blockwise over rows of w: weight * ((g-1) * x @ w.T + g * scale * x @ A.T @ B.T), g = m / |w + scale * B @ A|."""
    x_name, w_name, *factors = node.inputs
    x, (a, b, m) = v[x_name], (v[i] for i in factors)
    scale, parts = _number(node, "scale"), []
    low = F.linear(x, a)
    for begin, end, w in v.blocks(w_name):
        g = m[begin:end] / (w + scale * (b[begin:end] @ a)).norm(dim=1)
        parts.append((g - 1) * F.linear(x, w) + g * scale * F.linear(low, b[begin:end]))
    return _number(node, "weight") * torch.cat(parts, -1)


# embeddings ---------------------------------------------------------------------------------------


def _embed(v: Values, node: Node) -> Tensor:
    ids, w = node.inputs
    return v.gather(w, v[ids])


def _lora_embed(v: Values, node: Node) -> Tensor:
    ids, a, b = (v[i] for i in node.inputs)
    return _number(node, "scale") * F.linear(a.T[ids], b)


def _dora_embed(v: Values, node: Node) -> Tensor:
    ids_name, w_name, *factors = node.inputs
    ids, (a, b, m) = v[ids_name], (v[i] for i in factors)
    scale = _number(node, "scale")
    square = torch.zeros_like(m)
    for begin, end, w in v.blocks(w_name):
        square += (w + scale * (b @ a[:, begin:end]).T).square().sum(0)
    g = m / square.sqrt()
    return _number(node, "weight") * ((g - 1) * v.gather(w_name, ids) + g * scale * F.linear(a.T[ids], b))


# experts ------------------------------------------------------------------------------------------


def _route(v: Values, node: Node) -> Tensor:
    probabilities = v[node.inputs[0]].softmax(-1)
    top, at = probabilities.topk(_count(node, "used"), -1)
    if node.attrs["normalize"]:
        top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, at, top)


def _experts(v: Values, node: Node) -> Tensor:
    x_name, route, *first, down = node.inputs
    x, share = v[x_name].flatten(0, -2), v[route].flatten(0, -2)
    act, y = ACTIVATIONS[str(node.attrs["act"])], torch.zeros_like(x)

    def product(x: Tensor, weight: str, e: int) -> Tensor:
        if v.at_expert is not None:
            v.at_expert(weight, e, x)
        if v.round_input is not None:
            x = v.round_input(Node("linear", (x_name, weight), node.type), x)
        n = v.graph.nodes[weight].type.dims[1]
        return F.linear(x, v.rows(weight, e * n, (e + 1) * n))

    for e in range(share.shape[-1]):
        at = share[:, e].nonzero()[:, 0]  # the tokens that chose this expert
        if len(at):
            parts = [product(x[at], weight, e) for weight in first]
            gate, up = parts if len(parts) == 2 else (parts[0][:, ::2], parts[0][:, 1::2])
            y[at] += share[at, e, None] * product(act(gate) * up, down, e)
    return y.reshape(v[x_name].shape)


# norms, positions, attention ----------------------------------------------------------------------


def _split(x: Tensor, k: int) -> Tensor:
    """[..., n*k] -> [..., n, k]"""
    return x.reshape(*x.shape[:-1], -1, k)


def _rms_norm(v: Values, node: Node) -> Tensor:
    x, w = (v[i] for i in node.inputs)
    chunks = _split(x, len(w))
    return (w * (chunks * torch.rsqrt(chunks.square().mean(-1, keepdim=True) + _number(node, "eps")))).flatten(-2)


def _layer_norm(v: Values, node: Node) -> Tensor:
    x, w, b = (v[i] for i in node.inputs)
    return F.layer_norm(x, w.shape, w, b, _number(node, "eps"))


def _rope(v: Values, node: Node) -> Tensor:
    x, head_dim = v[node.inputs[0]], _count(node, "head_dim")
    scaling = cast(Scaling | None, node.attrs.get("scaling"))
    dims = _count(node, "dims") if "dims" in node.attrs else head_dim
    turns, factor = rope_frequencies(dims, _number(node, "theta"), scaling, x.shape[1], v.dtype)
    if len(node.inputs) > 1:
        turns = turns / v[node.inputs[1]]  # GGUF's rope_freqs
    angles = torch.arange(x.shape[1], dtype=v.dtype)[:, None] * turns
    cos, sin = (factor * angles.cos())[:, None], (factor * angles.sin())[:, None]  # [T,1,head_dim/2]
    whole = _split(x, head_dim)
    heads, rest = whole[..., :dims], whole[..., dims:]
    pairs = bool(node.attrs.get("interleaved"))  # neighbours rotate together, not the halves of a head
    first, second = (heads[..., ::2], heads[..., 1::2]) if pairs else heads.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1), rest], -1).flatten(-2)


def _attention(v: Values, node: Node) -> Tensor:
    heads, kv_heads, scale = _count(node, "heads"), _count(node, "kv_heads"), _number(node, "scale")
    head_dim = v[node.inputs[0]].shape[-1] // heads
    q, k, value = (_split(v[i], head_dim).transpose(1, 2) for i in node.inputs[:3])
    mask = _attention_mask(v, node, q.shape[2])
    if "softcap" in node.attrs:
        y = _capped_attention(q, k, value, mask, scale, _number(node, "softcap"))
    else:
        plain = torch.equal(mask, torch.ones_like(mask).tril())  # torch has a faster kernel for it
        y = F.scaled_dot_product_attention(
            q, k, value, attn_mask=None if plain else mask, is_causal=plain, scale=scale, enable_gqa=heads != kv_heads
        )
    return y.transpose(1, 2).flatten(-2)


def _attention_mask(v: Values, node: Node, n: int) -> Tensor:
    """Which positions (last axis) each position sees: bool[T,T], or [B,1,T,T] where a mask of tokens is an input."""
    i = torch.arange(n)
    age = i[:, None] - i
    mask = torch.ones(n, n, dtype=torch.bool)
    if node.attrs.get("causal", True):
        mask = age >= 0
    if "window" in node.attrs:
        mask &= age < _count(node, "window")
    return mask if len(node.inputs) < 4 else mask & (v[node.inputs[3]] != 0)[:, None, None, :]


def _capped_attention(q: Tensor, k: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """q [B,H,T,D], k and value [B,H/g,T,D] -> [B,H,T,D], scores bounded by cap."""
    k, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, value))
    scores = cap * torch.tanh(scale * (q @ k.transpose(-1, -2)) / cap)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value


def rope_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None, n_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """rope.frequencies as a tensor f[head_dim/2], and the factor on cos and sin."""
    wide = np.float64 if dtype == torch.float64 else np.float32
    values, factor = frequencies(head_dim, theta, scaling, n_tokens, wide)
    return torch.from_numpy(values).to(dtype), factor


def _pool(v: Values, node: Node) -> Tensor:
    x, seen = v[node.inputs[0]], v[node.inputs[1]] != 0
    if node.attrs["mode"] == "cls":
        return x[torch.arange(len(x)), seen.int().argmax(1)]
    return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)


# the table ----------------------------------------------------------------------------------------

Run = Callable[[Values, Node], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _plain(fn: Callable[..., Tensor]) -> Run:
    """An op of activations only, without attributes."""
    return lambda v, node: fn(*(v[i] for i in node.inputs))


OPS: dict[str, Run] = {
    "input": lambda v, _: v.tokens,
    "positions": lambda v, node: torch.arange(v[node.inputs[0]].shape[1]).expand_as(v[node.inputs[0]]),
    "embed": _embed,
    "take": _take,
    "linear": _linear,
    "group_sums": _group_sums,
    "shift_path": _plain(F.linear),
    "lora": _lora,
    "lora_embed": _lora_embed,
    "dora_path": _dora_path,
    "dora_embed": _dora_embed,
    "add": _plain(torch.add),
    "mul": _plain(torch.mul),
    "times": lambda v, node: v[node.inputs[0]] * _number(node, "by"),
    "softcap": lambda v, node: _number(node, "cap") * torch.tanh(v[node.inputs[0]] / _number(node, "cap")),
    **{name: _plain(act) for name, act in ACTIVATIONS.items()},
    "route": _route,
    "experts": _experts,
    "spread": lambda v, node: v[node.inputs[0]].repeat_interleave(_count(node, "times"), -1),
    "slice": lambda v, node: v[node.inputs[0]][..., _count(node, "begin") : _count(node, "end")],
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "pool": _pool,
    "unit": _plain(lambda x: F.normalize(x, dim=-1)),
    "rope": _rope,
    "attention": _attention,
}
