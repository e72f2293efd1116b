"""A checkpoint becomes a graph: one block builder that reads the switches of a family's table.

No tensor is read (but for a head that is both tied and stored). Every tensor is used, or dropped for a reason that
graph.meta["dropped"] gives, or an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qconvert.dtypes import FLOATS
from qconvert.errors import InputError, UnsupportedError
from qconvert.families import Family, family_of
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import infer
from qconvert.pooling import read_pooling
from qconvert.scheme import Array
from qconvert.settings import Experts, Settings, read_settings
from qconvert.shapes import FUSED_EXPERTS, SHAPES, product
from qconvert.sources import Checkpoint, Store, TensorInfo
from qconvert.stored_forms import SAID_IN, StoredForm, Tensors, gguf_parameter, stored_form, trained_as

BLOCK = 1 << 22  # values compared at a time


def build(checkpoint: Checkpoint) -> Graph:
    """The model as a graph: tokens i64[B,T] -> logits f32[B,T,V]; parameters are called as in a model with a head.

    A family without a head gives its hidden states, f32[B,T,D], and for an embedding model the vector of each text,
    f32[B,D]; it reads token_types and attention_mask too.

    UnsupportedError for an architecture or a setting that no family has; InputError for config keys that are unknown,
    and for tensors that are missing, unread or misshapen.
    """
    where = str(checkpoint.gguf.file if checkpoint.gguf else checkpoint.folder / "config.json")
    family = family_of(checkpoint.config, where)
    family = family.in_gguf() if checkpoint.gguf else family
    form = stored_form(checkpoint.config, where)
    how = [k for k in SAID_IN if form and k in checkpoint.config]
    ours = {k: v for k, v in checkpoint.config.items() if k not in how}
    settings = read_settings(family, ours, where)
    b = _Builder(checkpoint, family, settings, form)
    x = b.embedding()
    for i in range(settings.layers):
        x = b.feed_forward(i, b.attention(i, x))
    outputs = (b.head(b.norm("norm", x, "output_norm")),) if "output" in family.names else b.pooled(x)
    dropped: list[Attr] = [{"tensor": ref, "reason": reason} for ref, reason in b.dropped()]
    used: list[Attr] = [*settings.used, *how]
    keys: dict[str, Attr] = {"used": used, "dropped": dict(settings.dropped)}
    meta: dict[str, Attr] = {"family": family.name, "config": settings.meta(), "dropped": dropped, "config_keys": keys}
    return Graph(b.nodes, outputs, meta)


@dataclass
class _Builder:
    checkpoint: Checkpoint
    family: Family
    settings: Settings
    form: StoredForm | None
    nodes: dict[str, Node] = field(default_factory=lambda: {"tokens": Node("input", (), Type("i64", ("B", "T")))})
    used: set[str] = field(default_factory=set)
    bare: bool = field(init=False)

    def __post_init__(self) -> None:
        self.bare = not any(tensor.startswith(self.family.prefix) for tensor in self.checkpoint.tensors)

    # activations ---------------------------------------------------------------------------------

    def add(self, name: str, op: str, *inputs: str, **attrs: Attr) -> str:
        self.nodes[name] = Node(op, inputs, infer(op, tuple(self.nodes[i].type for i in inputs), **attrs), attrs)
        return name

    def linear(self, name: str, x: str, role: str, layer: int | None = None) -> str:
        return self.add(name, "linear", x, self.weight(role, layer), *self.bias(role, layer))

    def norm(self, name: str, x: str, role: str, layer: int | None = None) -> str:
        weight, bias = self.weight(role, layer), self.bias(role, layer)
        return self.add(name, self.family.norm, x, weight, *bias, eps=self.settings.eps)

    def norm_if(self, name: str, x: str, role: str, layer: int | None = None) -> str:
        """x, normed where the family does that here."""
        return self.norm(name, x, role, layer) if role in self.family.names else x

    def embedding(self) -> str:
        family = self.family
        plain = family.position == "rope" and not family.scaled_embedding
        x = self.add("h" if plain else "token_embd", "embed", "tokens", self.weight("token_embd"))
        if family.scaled_embedding:
            x = self.add("h", "times", x, by=math.sqrt(self.settings.width))
        if "token_types" in family.names:
            kinds = self.add("token_type_embd", "embed", self.input("token_types", 0), self.weight("token_types"))
            x = self.add("typed", "add", x, kinds)
        if family.position == "learned":
            positions = self.add("positions", "positions", "tokens")
            at = self.add("position_embd", "embed", positions, self.weight("position_embd"))
            x = self.add("h", "add", x, at)
        return self.norm_if("h_norm", x, "token_embd_norm")

    def input(self, name: str, default: int) -> str:
        self.nodes.setdefault(name, Node("input", (), Type("i64", ("B", "T")), {"default": default}))
        return name

    def attention(self, i: int, x: str) -> str:
        c = self.settings
        q, k, v = self.qkv(i, self.norm_if(f"l{i}.attn_norm", x, "attn_norm", i))
        attrs: dict[str, Attr] = {"heads": c.heads, "kv_heads": c.kv_heads, "scale": c.attn_scale}
        if c.attn_softcap is not None:
            attrs["softcap"] = c.attn_softcap
        if c.windows[i] is not None:
            attrs["window"] = c.windows[i]
        seen: tuple[str, ...] = ()
        if not self.family.causal:
            attrs["causal"], seen = False, (self.input("attention_mask", 1),)
        attn = self.add(f"l{i}.attn", "attention", self.turned(i, q), self.turned(i, k), v, *seen, **attrs)
        out = self.linear(f"l{i}.attn_out", attn, "attn_output", i)
        sum_ = self.add(f"l{i}.h1", "add", x, self.norm_if(f"{out}_norm", out, "post_attention_norm", i))
        return self.norm_if(f"l{i}.h1_norm", sum_, "attn_output_norm", i)

    def qkv(self, i: int, x: str) -> tuple[str, str, str]:
        if not self.family.fused_qkv:
            q, k, v = (self.linear(f"l{i}.{part}", x, f"attn_{part}", i) for part in "qkv")
            return q, k, v
        c = self.settings
        fused, ends = self.linear(f"l{i}.qkv", x, "attn_qkv", i), [0]
        for heads in (c.heads, c.kv_heads, c.kv_heads):
            ends.append(ends[-1] + heads * c.head_dim)
        q, k, v = (self.add(f"l{i}.{p}", "slice", fused, begin=ends[j], end=ends[j + 1]) for j, p in enumerate("qkv"))
        return q, k, v

    def turned(self, i: int, x: str) -> str:
        """q or k, normed where the family does that, and rotated by position."""
        if self.family.qk_norm:
            x = self.norm(f"{x}_norm", x, f"attn_{x[-1]}_norm", i)
        c = self.settings
        rope = c.rope if c.window_rope is None or c.windows[i] is None else c.window_rope
        if rope is None:
            return x
        return self.add(x.removesuffix("_norm") + "_rope", "rope", x, head_dim=c.head_dim, **rope)

    def feed_forward(self, i: int, x: str) -> str:
        n, experts = self.norm_if(f"l{i}.ffn_norm", x, "ffn_norm", i), self.settings.experts
        out = self.mlp(i, n) if experts is None or i not in experts.layers else self.mixture(i, n, experts)
        sum_ = self.add(f"l{i}.h2", "add", x, self.norm_if(f"{out}_norm", out, "post_ffw_norm", i))
        return self.norm_if(f"l{i}.h2_norm", sum_, "layer_output_norm", i)

    def mlp(self, i: int, n: str) -> str:
        act = self.settings.act
        if self.family.mlp == "gated":
            gate, up = self.gate_and_up(i, n)
            inner = self.add(f"l{i}.gated", "mul", self.add(f"l{i}.act", act, gate), up)
        else:
            inner = self.add(f"l{i}.act", act, self.linear(f"l{i}.up", n, "ffn_up", i))
        return self.linear(f"l{i}.down", inner, "ffn_down", i)

    def mixture(self, i: int, x: str, experts: Experts) -> str:
        router = self.linear(f"l{i}.router", x, "ffn_gate_inp", i)
        route = self.add(f"l{i}.route", "route", router, used=experts.used, normalize=experts.normalize)
        stacked = [self.stacked(role, i) for role in FUSED_EXPERTS]
        return self.add(f"l{i}.experts", "experts", x, route, *stacked, act=self.settings.act)

    def gate_and_up(self, i: int, x: str) -> tuple[str, str]:
        if not self.family.fused_mlp:
            return self.linear(f"l{i}.gate", x, "ffn_gate", i), self.linear(f"l{i}.up", x, "ffn_up", i)
        fused, ffn = self.linear(f"l{i}.gate_up", x, "ffn_gate_up", i), self.settings.ffn
        return (
            self.add(f"l{i}.gate", "slice", fused, begin=0, end=ffn),
            self.add(f"l{i}.up", "slice", fused, begin=ffn, end=2 * ffn),
        )

    def head(self, x: str) -> str:
        role = "token_embd" if self.settings.tied else "output"
        if self.settings.softcap is None:
            return self.linear("logits", x, role)
        return self.add("logits", "softcap", self.linear("head", x, role), cap=self.settings.softcap)

    def pooled(self, x: str) -> tuple[str, ...]:
        """The outputs of an encoder: hidden states, and one vector for each text where the model says how."""
        pooling = read_pooling(self.checkpoint.folder)
        if pooling is None:
            return (x,)
        seen = self.input("attention_mask", 1)
        vector = self.add("pooled" if pooling.unit else "embedding", "pool", x, seen, mode=pooling.mode)
        return x, self.add("embedding", "unit", vector) if pooling.unit else vector

    # parameters ----------------------------------------------------------------------------------

    def weight(self, role: str, layer: int | None = None) -> str:
        return self.parameter(role, layer, "weight", SHAPES[role])

    def bias(self, role: str, layer: int | None = None) -> tuple[str, ...]:
        """The name of the role's bias, or nothing."""
        has = self.family.biases.get(role, False)
        if not (self.settings.flags[has] if isinstance(has, str) else has):
            return ()
        return (self.parameter(role, layer, "bias", SHAPES[role][:1]),)

    def stacked(self, role: str, layer: int) -> str:
        """A weight [E,N,K] of all experts, stored as one tensor or as one for each."""
        module = self.family.module(role, layer)
        name = f"{module.replace('.{e}', '')}.weight"
        attrs: dict[str, Attr] = {"role": role, "layer": layer}
        fused, shape, half = FUSED_EXPERTS[role]
        whole = f"{self.family.fused_experts}.{fused}".format(i=layer)
        if self.stored(whole) not in self.checkpoint.tensors:
            assert self.settings.experts is not None
            parts = [f"{module.format(e=e)}.weight" for e in range(self.settings.experts.n)]
            n, k = (product(dim, self.sizes) for dim in SHAPES[role])
            for part in parts:
                quantized = self.form and self.form.parameter(part, (n, k), attrs, self.tensors)
                self.nodes |= quantized or {part: self.load(part, SHAPES[role], attrs)}
                if (kind := self.nodes[part].type) != (first := self.nodes[parts[0]].type):
                    raise InputError(f"{self.checkpoint.place}: {part} is {kind}, but {parts[0]} is {first}")
            return self.add(name, "stack", *parts)
        if half is None:
            self.nodes[name] = self.load(whole, shape, attrs)
            return name
        self.nodes[f"{name}~stored"] = load = self.load(whole, shape, attrs)
        n = load.type.dims[1] // 2
        return self.add(name, "part", f"{name}~stored", begin=half * n, end=(half + 1) * n)

    def load(self, name: str, shape: tuple[str, ...], attrs: Mapping[str, Attr]) -> Node:
        info = self.find(name)
        self.check(info, shape)
        return Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})

    def parameter(self, role: str, layer: int | None, part: str, shape: tuple[str, ...]) -> str:
        name = f"{self.family.module(role, layer)}.{part}"
        if name in self.nodes:
            return name
        turned = part == "weight" and role in self.family.stored_transposed
        attrs: dict[str, Attr] = {"role": role} | ({} if layer is None else {"layer": layer})
        if self.checkpoint.gguf:
            more = trained_as(self.family.trained_as or self.family, role, part)
            self.nodes |= gguf_parameter(name, self.load(name, shape, attrs | more), self.heads_in_pairs(role))
            return name
        if self.form and part == "weight" and len(shape) == 2:
            n, k = (product(dim, self.sizes) for dim in shape)
            if quantized := self.form.parameter(name, (n, k), attrs, self.tensors):
                self.nodes |= quantized
                return name
        stored = self.load(name, shape[::-1] if turned else shape, attrs)
        if turned:
            self.nodes[f"{name}~stored"] = stored
            self.add(name, "transpose", f"{name}~stored")
        elif self.family.norm_offset and role.endswith("_norm"):
            self.nodes[f"{name}~stored"] = stored
            self.add(name, "shifted", f"{name}~stored", by=self.family.norm_offset)
        else:
            self.nodes[name] = stored
        return name

    def heads_in_pairs(self, role: str) -> int | None:
        """Of a weight whose rows a GGUF keeps as they rotate."""
        if self.checkpoint.gguf is None or not self.checkpoint.gguf.pairs:
            return None
        return {"attn_q": self.settings.heads, "attn_k": self.settings.kv_heads}.get(role)

    def find(self, name: str) -> TensorInfo:
        tensors, stored = self.checkpoint.tensors, self.stored(name)
        if stored not in tensors and self.settings.tied and name == f"{self.family.module('token_embd', None)}.weight":
            stored = self.head_name or stored  # tied both ways: some programs save the head only
        for old, new in self.family.renamed:
            if stored not in tensors and stored.replace(old, new) in tensors:
                stored = stored.replace(old, new)
        if stored not in tensors:
            raise InputError(f"{self.checkpoint.place}: no tensor is called {stored}", hint=self.why_missing(name))
        self.used.add(stored)
        return tensors[stored]

    def has(self, name: str) -> bool:
        stored, tensors = self.stored(name), self.checkpoint.tensors
        return any(n in tensors for n in (stored, *(stored.replace(old, new) for old, new in self.family.renamed)))

    @property
    def tensors(self) -> Tensors:
        return Tensors(self.has, self.find, lambda info: values_of(self.checkpoint, info))

    @property
    def head_name(self) -> str | None:
        return f"{self.family.module('output', None)}.weight" if "output" in self.family.names else None

    def stored(self, name: str) -> str:
        """The name in this checkpoint: without the prefix where it was saved from the model below the head."""
        return name.removeprefix(self.family.prefix) if self.bare else name

    @property
    def sizes(self) -> dict[str, int]:
        """What SHAPES' words stand for."""
        sizes = {k: v for k, v in vars(self.settings).items() if isinstance(v, int)}
        experts = self.settings.experts
        return sizes if experts is None else sizes | {"experts": experts.n, "expert_ffn": experts.ffn}

    def check(self, info: TensorInfo, shape: tuple[str, ...]) -> None:
        if info.dtype not in FLOATS and not (self.checkpoint.gguf and "." in info.dtype):
            raise UnsupportedError(
                f"{info.ref}: {info.dtype} is not a type of weights", hint="convert the checkpoint before quantization"
            )
        sizes = self.sizes
        wanted = tuple(product(dim, sizes) for dim in shape)
        if info.shape != wanted:
            keys = {k: self.family.config[k].spellings[0] for k in sizes if k in self.family.config}
            text = ", ".join(re.sub(r"[a-z_]+", lambda m: keys.get(m[0], m[0]), dim) for dim in shape)
            raise InputError(
                f"{info.ref}: shape {list(info.shape)}, but config.json says {list(wanted)} = [{text}]",
                hint="do config.json and the weights belong together?",
            )

    # what is left over ---------------------------------------------------------------------------

    def dropped(self) -> list[tuple[str, str]]:
        """(ref, reason) of tensors that the graph does not read. InputError for the first without a reason."""
        out = []
        for name, info in self.checkpoint.tensors.items():
            if name in self.used:
                continue
            reason = next((r for pattern, r in self.family.ignorable.items() if re.fullmatch(pattern, name)), None)
            if reason is None and self.form:
                reason = self.form.unread(info, self.tensors)
            if reason is None and name == self.head_name and self.settings.tied:
                reason = self.tied_head(info)
            if reason is None:
                raise InputError(
                    f"{info.ref}: {self.family.name} models have no such tensor, so it would be lost",
                    hint=self.why_unread(name),
                )
            out.append((info.ref, reason))
        return out

    def tied_head(self, head: TensorInfo) -> str:
        """Why a stored head is not read though the embedding is the head. InputError where they are not the same.

        transformers 4 would use the embedding and 5 the stored head, so neither is right without asking.
        """
        embedding = self.checkpoint.tensors[self.stored(f"{self.family.module('token_embd', None)}.weight")]
        if not _equal(self.checkpoint, embedding, head):
            raise InputError(
                f"{head.ref}: differs from {embedding.ref}, but config.json ties them (tie_word_embeddings)",
                hint='set "tie_word_embeddings": false if the head was trained by itself, else delete the tensor',
            )
        return f"equal to {embedding.ref}, to which it is tied"

    def why_missing(self, name: str) -> str:
        layer = re.search(r"\.(\d+)\.", name)
        if name == self.head_name:
            return "config.json says that the head is not tied to the embedding; was the model saved without its head?"
        if name.endswith(".bias") and self.stored(name).removesuffix("bias") + "weight" in self.checkpoint.tensors:
            return "config.json, or the family, says that this map has a bias (attention_bias, mlp_bias)"
        if layer and not any(f".{layer[1]}." in f".{tensor}" for tensor in self.checkpoint.tensors):
            key = self.family.config["layers"].spellings[0]
            return f"nothing of layer {layer[1]} is there, but config.json says {key} = {self.settings.layers}"
        module = self.stored(name).removesuffix("weight")
        nearby = [t for t in self.checkpoint.tensors if t.startswith(module) and not t.endswith(".bias")]
        return f"there is {nearby[0]}; is it quantized?" if nearby else "the checkpoint is not complete; fetch it again"

    def why_unread(self, name: str) -> str:
        layer = re.search(r"\.(\d+)\.", f".{name}")
        if layer and int(layer[1]) >= self.settings.layers:
            key = self.family.config["layers"].spellings[0]
            return f"it is of layer {layer[1]}, but config.json says {key} = {self.settings.layers}"
        if "lora_" in name:
            return "this looks like an adapter: give its base model, and the adapter as MODEL+ADAPTER"
        if name.endswith(".bias"):
            return "config.json says that this linear map has no bias (attention_bias, mlp_bias)"
        return "is config.json of another model, or the model a variant that is not supported?"


def values_of(checkpoint: Checkpoint, info: TensorInfo) -> Array:
    """All of a small tensor."""
    store = Store()
    store.add(info.ref.partition("/")[0], checkpoint.folder)
    try:
        return store.read(info.ref, 0, info.shape[0] if info.shape else 1)
    finally:
        store.close()


def _equal(checkpoint: Checkpoint, a: TensorInfo, b: TensorInfo) -> bool:
    """Are two matrices the same, bit for bit?"""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    store = Store()
    store.add(a.ref.partition("/")[0], checkpoint.folder)
    step = max(1, BLOCK // max(1, a.shape[1]))
    try:
        blocks = [(i, min(a.shape[0], i + step)) for i in range(0, a.shape[0], step)]
        return all(np.array_equal(store.read(a.ref, *rows), store.read(b.ref, *rows)) for rows in blocks)
    finally:
        store.close()
