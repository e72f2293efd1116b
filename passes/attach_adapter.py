"""attach-adapter: put an adapter beside the linears it was trained on, on activations, exactly as it was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from qconvert.adapter_config import CONFIG
from qconvert.adapter_pooling import FACTORS
from qconvert.adapters import Adapter, Factors, Replacement, TokenRows, is_head
from qconvert.errors import AdapterError, GraphError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import OPS, QUANTIZED, infer
from qconvert.passes.adapter_fit import check_missing, check_unused, check_vocabulary, key_of, other_base
from qconvert.passes.untie_head import HEAD, Site, UntieHead, embedding_of, is_tied, sites, vocabulary_weights
from qconvert.sources import TensorInfo

AS_STORED = ("transpose", "shifted")  # what makes a parameter of a tensor that a checkpoint stores otherwise
# or stores quantized: an adapter brings it as it was trained
AS_CODES = (*QUANTIZED, "unpermute_rope", "unsort", "across")


@dataclass(frozen=True)
class AttachAdapter:
    """Add low-rank paths beside their linears; put trained weights, biases and rows in place of the base's.

    Weights are altered as W + weight * (W_adapter - W), so several adapters add up. AdapterError where a tensor of
    the adapter matches nothing (unless allow_unused), does not fit, or one that should be there is missing.
    """

    name: ClassVar[str] = "attach-adapter"
    adapter: Adapter
    allow_unused: bool = False

    def __call__(self, graph: Graph) -> Graph:
        work = _Attaching(graph, self.adapter)
        for kind in ("base", "saved"):
            work.replace([r for r in self.adapter.replacements if r.kind == kind], kind)
        work.set_rows(self.adapter.rows)
        work.add_paths()
        unused = [*self.adapter.unknown, *(t.ref for t in self.adapter.tensors() if t.ref not in work.used)]
        check_unused(graph, self.adapter, unused, bool(work.used), self.allow_unused)
        check_missing(work.graph, self.adapter, work.changed(), self.allow_unused)
        check_vocabulary(work.graph, self.adapter)
        return _recorded(work, unused)


@dataclass
class _Attaching:
    """A graph on its way; `used` has the refs of the tensors that found their place."""

    graph: Graph
    adapter: Adapter
    used: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    bases: dict[str, str] = field(default_factory=dict)  # weight -> what this adapter was trained on, where it says

    # whole parameters and rows ----------------------------------------------------------------------

    def replace(self, items: Sequence[Replacement], kind: str) -> None:
        skip = self._settle_tie([(r.parameter, r.tensor) for r in items], kind)
        changes: dict[str, dict[str, Node]] = {}
        for r in items:
            name = self.parameter(r.parameter)
            if r.tensor.ref in skip:
                self.used.add(r.tensor.ref)
            elif name is not None:
                self._claim(r.parameter, name, changes, r.tensor)
                changes[name] = self._replaced(name, r)
        self._apply(changes)

    def _replaced(self, name: str, r: Replacement) -> dict[str, Node]:
        """The nodes that take the place of parameter `name`."""
        old = self.graph.nodes[name]
        new = f"{name}~{self.adapter.alias}.{r.kind}"
        nodes = _loads(self.graph, name, new, r.tensor)
        if nodes[new].type.shape == old.type.shape:
            altered = self._altered(name, "blend", new, {"weight": self.adapter.weight})
            if r.kind == "base":
                self.bases[name] = new
            return {**nodes, **altered}
        self._check_resize(name, r.tensor)
        root = self.graph.root(name)
        return {name: Node("load", (), nodes[new].type, {**root.attrs, "tensor": r.tensor.ref})}

    def _altered(self, name: str, op: str, new: str, attrs: Mapping[str, Attr]) -> dict[str, Node]:
        """Move the weight down to ~base (or ~a0, ~a1 … where it was altered before) and put `op` over it."""
        old = self.graph.nodes[name]
        original = f"{name}~base"
        below = free_name(self.graph, name)
        inputs = (below, self.bases.get(name, original), new)
        return {below: old, name: Node(op, inputs, Type("f32", old.type.shape), attrs)}

    def _check_resize(self, name: str, tensor: TensorInfo) -> None:
        """A vocabulary of another length can only be taken whole: the base has no rows to blend with."""
        shape = self.graph.nodes[name].type.shape
        in_vocabulary = name in vocabulary_weights(self.graph)
        if not in_vocabulary or len(tensor.shape) != 2 or tensor.shape[1] != shape[1]:
            raise self._misfit(tensor, name)
        if self.adapter.weight != 1 or free_name(self.graph, name) != f"{name}~base":
            raise AdapterError(
                f"{tensor.ref}: an adapter that resized the vocabulary ({tensor.shape[0]}) comes first, with weight 1",
                hint=f"the base has {shape[0]} rows: there is nothing to blend the others with",
                place=self.adapter.place(tensor.ref),
            )

    def set_rows(self, items: Sequence[TokenRows]) -> None:
        skip = self._settle_tie([(f"{t.module}.weight", t.tensor) for t in items], "rows")
        changes: dict[str, dict[str, Node]] = {}
        for t in items:
            name = self.parameter(f"{t.module}.weight")
            if t.tensor.ref in skip:
                self.used.add(t.tensor.ref)
            elif name is not None:
                self._claim(f"{t.module}.weight", name, changes, t.tensor)
                n, k = self.graph.nodes[name].type.dims
                if t.tensor.shape[1] != k or max(t.indices, default=0) >= n:
                    raise self._misfit(t.tensor, name)
                new = f"{name}~{self.adapter.alias}.rows"
                attrs: dict[str, Attr] = {"indices": list(t.indices), "weight": self.adapter.weight}
                changes[name] = {new: _load(t.tensor), **self._altered(name, "set_rows", new, attrs)}
        self._apply(changes)

    def _settle_tie(self, items: Sequence[tuple[str, TensorInfo]], kind: str) -> set[str]:
        """Untie the head where only one side is changed; refs of the head's tensors that the embedding's stand for.

        As in PEFT: tied layers share a base weight and trained rows; modules_to_save are trained beside it.
        """
        if not items or not is_tied(self.graph):
            return set()
        embedding = embedding_of(self.graph) or ""
        heads = [t.ref for name, t in items if is_head(name)]
        embeds = [t.ref for name, t in items if not is_head(name) and self.parameter(name) == embedding]
        if embeds and heads and all(ref in self.adapter.twins for ref in heads):
            return set(heads)
        alone = kind != "saved" or self.adapter.ensure_weight_tying
        if (embeds and heads) or (heads and kind != "base") or (embeds and not alone):
            self.graph = UntieHead()(self.graph)
            if embedding in self.bases:
                self.bases[HEAD] = HEAD + self.bases[embedding].removeprefix(embedding)
        return set()

    # paths --------------------------------------------------------------------------------------------

    def add_paths(self) -> None:
        where = sites(self.graph)
        changes: dict[str, dict[str, Node]] = {}
        for f in self.adapter.factors:
            name = self.parameter(f"{f.module}.weight")
            op = "embed" if f.embedding else "linear"
            found = where.get((op, name), []) if name is not None else []
            if name is None or not found:
                continue
            if len(found) > 1:
                raise GraphError(f"{name} is read by {len(found)} {op}s; which of them {f.module} is cannot be told")
            tensors = (*f[1:], *(f.pooled.elastic if f.pooled else ()))
            self._claim(f.module, found[0].result, changes, *(t for t in tensors if isinstance(t, TensorInfo)))
            self._check_factors(f, name)
            changes[found[0].result] = self._path(f, name, found[0])
        self._apply(changes)

    def _path(self, f: Factors, weight: str, site: Site) -> dict[str, Node]:
        """base, what the adapter adds, and their sum, in the place of what consumers read."""
        base, alias, old = self.graph.nodes[site.base], self.adapter.alias, self.graph.nodes[site.result]
        loads, (a, b) = self._factor_nodes(f)
        extra = []
        for part, info in (("lora_magnitude_vector", f.magnitude), ("lora_B.bias", f.bias)):
            if info is not None:
                extra.append(f"{f.module}.{part}~{alias}")
                loads[extra[-1]] = _load(info)
        x, scale = base.inputs[0], f.scale
        if f.pooled is not None and (group := self._pooled_group(f, weight)) > 1:
            x, k = f"{x}~sums{group}", self.graph.nodes[weight].type.dims[1]
            loads[x] = Node("group_sums", (base.inputs[0],), Type("f32", (*base.type.shape[:-1], k // group)), {"group": group})
            scale *= FACTORS[f.pooled.convention](group, k)
            more, (a, b) = self._elastic(f, (a, b), group)
            loads |= more
        if f.magnitude is None:
            op, inputs = ("lora_embed" if f.embedding else "lora"), (x, a, b, *extra)
            attrs: dict[str, Attr] = {"scale": self.adapter.weight * scale}
        else:
            original = f"{weight}~base" if f"{weight}~base" in self.graph.nodes else weight
            op = "dora_embed" if f.embedding else "dora_path"
            inputs = (x, self.bases.get(weight, original), a, b, *extra)
            attrs = {"scale": scale, "weight": self.adapter.weight}
        below, path = self._moved(site), f"{site.base.removesuffix('~base')}~{alias}"
        return {
            **loads,
            below: old,
            path: Node(op, inputs, base.type, attrs),
            site.result: Node("add", (below, path), base.type),
        }

    def _moved(self, site: Site) -> str:
        """Where the value that consumers read goes: ~base, or ~sum0, ~sum1 … above earlier adapters."""
        if site.base == site.result:
            return f"{site.base}~base"
        n = 0
        while f"{site.result}~sum{n}" in self.graph.nodes:
            n += 1
        return f"{site.result}~sum{n}"

    def _factor_nodes(self, f: Factors) -> tuple[dict[str, Node], tuple[str, str]]:
        """Loads of A and B. A tied head has the embedding's, transposed: the same nodes, so that both merge alike."""
        alias = self.adapter.alias
        if f.a.ref in self.adapter.twins and is_tied(self.graph):
            embedding = embedding_of(self.graph)
            tied = (e for e in self.adapter.factors if e.embedding and self.parameter(f"{e.module}.weight") == embedding)
            loads, (a, b) = self._factor_nodes(next(tied))
            for name in (a, b):
                t = loads[name].type
                loads[f"{name}~transposed"] = Node("transpose", (name,), Type(t.dtype, t.shape[::-1]))
            return loads, (f"{b}~transposed", f"{a}~transposed")
        kind = "lora_embedding_" if f.embedding else "lora_"
        names = f"{f.module}.{kind}A~{alias}", f"{f.module}.{kind}B~{alias}"
        return {names[0]: _load(f.a), names[1]: _load(f.b)}, names

    def _pooled_group(self, f: Factors, weight: str) -> int:
        """How many inputs are one of A's. AdapterError where the shapes do not say so."""
        assert f.pooled is not None
        k, columns = self.graph.nodes[weight].type.dims[1], f.a.shape[1]
        group = k // columns if columns and k % columns == 0 else 0
        if group != 1 and (group == 0 or f.pooled.group not in (None, group)):  # PEFT pools inputs of GPTQ's layers alone
            raise self._misfit(f.a, weight)
        return group

    def _elastic(self, f: Factors, factors: tuple[str, str], group: int) -> tuple[dict[str, Node], tuple[str, str]]:
        """IR-QLoRA: A also has the means of K/r inputs for each rank, B each rank again for N/r outputs, times a number."""
        assert f.pooled is not None
        out, names = dict[str, Node](), list(factors)
        for i, (info, tensor) in enumerate(zip(f.pooled.elastic, (f.a, f.b), strict=False)):
            (p, q), r = tensor.shape, f.a.shape[0]
            if p % r or q % r:
                raise AdapterError(
                    f"{info.ref}: {tensor.shape} has no {r} blocks",
                    hint="r must divide the outputs and the groups of inputs",
                    place=self.adapter.place(info.ref),
                )
            scale, value = f"{names[i]}.elastic", r / (q * group) if i == 0 else 1.0
            out[scale] = _load(info)
            out[f"{names[i]}~elastic"] = Node("add_blocks", (names[i], scale), Type("f32", (p, q)), {"value": value})
            names[i] = f"{names[i]}~elastic"
        return out, (names[0], names[1])

    def _check_factors(self, f: Factors, name: str) -> None:
        n, k = self.graph.nodes[name].type.dims
        if f.embedding:
            n, k = k, n
        columns = f.a.shape[1]
        if f.pooled is None and not f.embedding and 1 < columns < k and k % columns == 0 and f.b.shape[0] == n:
            raise AdapterError(
                f"{f.a.ref}: {columns} columns for {k} inputs, {k // columns} each: this is QA-LoRA, and {CONFIG} does not say "
                "how inputs were pooled",
                hint=f"--pooling {' or '.join(FACTORS)}: whose program trained it?",
                place=self.adapter.place(f.a.ref),
            )
        if f.pooled is not None and f.a.shape[0] == f.b.shape[1] and f.b.shape[0] == n:
            k = k // self._pooled_group(f, name)
        if columns != k or f.b.shape[0] != n:
            raise self._misfit(f.a if columns != k else f.b, name)
        for info in (f.magnitude, f.bias):
            if info is not None and info.shape != (n,):
                raise self._misfit(info, name)

    # common -------------------------------------------------------------------------------------------

    def parameter(self, name: str) -> str | None:
        """The graph's name of a parameter that the adapter names; tied, the head's weight is the embedding's."""
        found = find_parameter(self.graph, name)
        if found is None and name.endswith("lm_head.weight") and is_tied(self.graph):
            return embedding_of(self.graph)
        return found

    def changed(self) -> set[str | None]:
        """Weights that the adapter has something for, by the graph's names."""
        saved = [r.parameter for r in self.adapter.replacements if r.kind == "saved"]
        modules = [*(f.module for f in self.adapter.factors), *(t.module for t in self.adapter.rows)]
        return {self.parameter(name) for name in (*saved, *(f"{m}.weight" for m in modules))}

    def _claim(self, module: str, place: str, taken: Mapping[str, object], *tensors: TensorInfo) -> None:
        if place in taken:
            what = f"{tensors[0].ref}: {module} is the adapter's second name for one weight of the model"
            raise AdapterError(what, place=self.adapter.place(tensors[0].ref))
        self.used |= {t.ref for t in tensors}
        self.modules.add(module.removesuffix(".weight").removesuffix(".bias"))

    def _apply(self, changes: Mapping[str, dict[str, Node]]) -> None:
        """Put the new nodes in place; DoRA paths of earlier adapters keep reading the base they were trained on."""
        moved = {name: f"{name}~base" for name, nodes in changes.items() if f"{name}~base" in nodes}

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if node.op in ("dora_path", "dora_embed") and node.inputs[1] in moved:
                inputs = (node.inputs[0], moved[node.inputs[1]], *node.inputs[2:])
                return {name: replace(node, inputs=inputs)}
            return changes.get(name)

        if changes:
            self.graph = retyped(self.graph.rewrite(rule))

    def _misfit(self, tensor: TensorInfo, name: str) -> AdapterError:
        shape = list(self.graph.nodes[name].type.shape)
        return AdapterError(
            f"{tensor.ref}: {list(tensor.shape)} does not fit {name}, which is {shape}",
            hint=other_base(self.graph, self.adapter),
            place=self.adapter.place(tensor.ref),
        )


def _loads(graph: Graph, name: str, new: str, tensor: TensorInfo) -> dict[str, Node]:
    """A parameter read from another tensor, as the checkpoint stores it: transposed or shifted where the base's is."""
    node = graph.nodes[name]
    while node.op not in ("load", *AS_STORED):
        node = graph.nodes[node.inputs[0]]
    trained = node.attrs.get("trained_as")
    if isinstance(trained, dict):
        op, attrs = str(trained["op"]), {k: v for k, v in trained.items() if k != "op"}
        node = Node(op, (), node.type, attrs)
    if node.op in AS_STORED:
        stored = f"{new}~stored"
        kind = infer(node.op, (Type(tensor.dtype, tensor.shape),), **node.attrs)
        return {stored: _load(tensor), new: Node(node.op, (stored,), kind, node.attrs)}
    return {new: _load(tensor)}


def _load(tensor: TensorInfo) -> Node:
    return Node("load", (), Type(tensor.dtype, tensor.shape), {"tensor": tensor.ref})


def free_name(graph: Graph, name: str) -> str:
    """Where the old node of a weight goes when it is altered once more: ~base, then ~a0, ~a1 …"""
    if f"{name}~base" not in graph.nodes:
        return f"{name}~base"
    n = 0
    while f"{name}~a{n}" in graph.nodes:
        n += 1
    return f"{name}~a{n}"


def find_parameter(graph: Graph, name: str) -> str | None:
    """By its own name, or with the model's prefix (model., transformer.) put before it or taken away."""
    bare = re.sub(r"^(model|transformer)\.", "", name)
    for candidate in (name, bare, f"model.{name}", f"transformer.{name}"):
        if candidate in graph.nodes and graph.nodes[candidate].op in ("load", *AS_STORED, *AS_CODES, "blend", "set_rows"):
            return candidate
    return None


def retyped(graph: Graph) -> Graph:
    """The graph with every type inferred anew, after the type of a weight has changed."""
    types: dict[str, Type] = {}
    nodes: dict[str, Node] = {}
    for name, node in graph.nodes.items():
        got = OPS[node.op].infer(tuple(types[i] for i in node.inputs), dict(node.attrs))
        types[name] = got or node.type
        nodes[name] = node if types[name] == node.type else replace(node, type=types[name])
    return replace(graph, nodes=nodes)


def _recorded(work: _Attaching, unused: Sequence[str]) -> Graph:
    """What was attached, in meta: provenance, and the fate of each tensor that is not in the graph."""
    graph, adapter = work.graph, work.adapter
    entry: dict[str, Attr] = {
        "name": adapter.name, "weight": adapter.weight, "kind": adapter.kind, "modules": len(work.modules),
        "unused": [key_of(ref) for ref in unused], "base": adapter.base,
        "base_revision": adapter.base_revision, "revision": adapter.revision,
    }  # fmt: skip
    listed, dropped, config = graph.meta.get("adapters", []), graph.meta.get("dropped", []), graph.meta.get("config")
    assert isinstance(listed, list) and isinstance(dropped, list)
    reasons = {**adapter.dropped, **dict.fromkeys(unused, "matches no weight; allowed by --allow-unused-adapter-keys")}
    reasons |= {t.ref: "the same as the embedding's, to which the head is tied" for t in _tied_copies(work)}
    saved = {r.parameter for r in adapter.replacements if r.kind == "saved"}
    covered = (r.tensor.ref for r in adapter.replacements if r.kind == "base" and r.parameter in saved)
    reasons |= dict.fromkeys(covered, "the copy that was trained takes its place")
    gone: list[Attr] = [{"tensor": ref, "reason": reason} for ref, reason in reasons.items()]
    embedding = embedding_of(graph)
    if isinstance(config, dict) and embedding is not None and "vocab" in config:
        graph = graph.with_meta(config={**config, "vocab": graph.nodes[embedding].type.dims[0]})
    more: dict[str, Attr] = {"dropped": [*dropped, *gone]} if gone else {}
    return graph.with_meta(adapters=[*listed, entry], **more)


def _tied_copies(work: _Attaching) -> list[TensorInfo]:
    loaded = {node.attrs.get("tensor") for node in work.graph.nodes.values()}
    return [t for t in work.adapter.tensors() if t.ref in work.adapter.twins and t.ref not in loaded]
