"""Prove an ONNX decoder that somebody made, ours, onnxruntime-genai's builder's or optimum's, against its model.

Its answers at once and by its cache are held against the model as trained. What quantization costs has a known size:
that of our own at as many bits. And of a file of ours every weight is compared, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS, LogProbs, Tokens
from qconvert.companions import n_vocab, tokenizer_of
from qconvert.emit import Entry
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_check import (
    RUNTIME,
    FileReals,
    no_words,
    planes_of,
    read_initializers,
    room,
    round_activations,
    steps,
)
from qconvert.formats.onnx_columns import PREFIX as COLUMNS_PREFIX
from qconvert.formats.onnx_decoder import Decoder
from qconvert.formats.onnx_inspect import contents, read_proto
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_lowering import part_names, rows_name
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.graph import Graph
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.passes.untie_head import HEAD, UntieHead
from qconvert.pipeline import Function, Pass, Pipeline
from qconvert.report import Report, Row, judged
from qconvert.run import run
from qconvert.scheme import GROUPS
from qconvert.target import Item, Source
from qconvert.tokenizer import hard_corpus
from qconvert.weights import Weights, rows_per_block

FLOOR = 1e-6  # relative: rounding of f32 sums
WEIGHTS = "weights"
INTEGER_PRODUCTS = {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul"}
Logits = torch.Tensor
Places = Callable[[Graph], list[Entry]]


def verify(path: Path, source: Source, merged: Graph, threads: int, places: Places) -> Report:
    """Rows as at a conversion, but for the bytes. UnsupportedError for what is no decoder.

    places: a graph's weights as entries, as they would be written.
    """
    facts = {"model": source.name, "file": path.name}
    runtime = OnnxRuntime()
    if reason := runtime.missing():
        return Report([], [Row(RUNTIME, "not verified", None, None, "skip", reason)], provenance=facts)
    encode = (tokenizer := tokenizer_of(source, merged)) and tokenizer.reference()
    prompts = check.prompts_for(encode or no_words, hard_corpus(), n_vocab(merged), room(merged))
    with check.torch_threads(threads):
        (trained,) = run(source.graph, Weights(source.graph, source.store), prompts).values()
        rows = own_rows(path, source, merged, prompts, threads, places) if is_ours(path) else []
        compared = any(row.what == WEIGHTS and row.verdict != "skip" for row in rows)
        rows += runtime_rows(path, source, merged, trained, prompts, threads, judge_price=not compared)
    return Report([], rows, {"name": runtime.name, "version": runtime.version()}, provenance=facts)


# its answers --------------------------------------------------------------------------------------


def runtime_rows(
    path: Path, source: Source, merged: Graph, trained: Logits, prompts: Tokens, threads: int, judge_price: bool
) -> list[Row]:
    """At once and by the cache. Files of f32 are held to arithmetic, others to the price that their type has."""
    at_once, cached = answers(path, heads_of(merged), prompts, threads)
    kind = kind_of(contents(path).items)
    rows = [Row(f"{RUNTIME}, cached steps", "not run", None, None, "skip", "the file has no cache")] if cached is None else []
    if kind in ("f32", "f16"):
        limit, _ = LIMITS["runtime onnxruntime" if kind == "f32" else "runtime onnxruntime f16"]
        rows.insert(0, judged(f"{RUNTIME}, prompts", "relative error", worst(at_once, trained), limit))
        if cached is not None:
            rows.append(judged(f"{RUNTIME}, {steps(prompts)} cached steps", "relative error", worst(cached, trained), limit))
        return rows
    reference, said = (torch.log_softmax(x, -1) for x in (trained, at_once))
    price = check.distance(reference, said, prompts)
    rows = [*check.price_rows(price), *rows]
    by_cache = None if cached is None else torch.log_softmax(cached, -1)
    if judge_price:
        scheme, ours = own_price(path, source, merged, reference, prompts)
        what = f"{RUNTIME}, price over that of our own {scheme}"
        rows.append(judged(what, "mean KL / mean KL", price.mean_kl / ours, LIMITS["price"][0]))
        if by_cache is not None:
            again = check.distance(reference, by_cache, prompts).mean_kl / ours
            rows.append(judged(f"{what}, {steps(prompts)} cached steps", "mean KL / mean KL", again, LIMITS["price"][0]))
    if by_cache is not None and not integers_in(path):  # whose activations share a scale with all tokens of a call
        distance = check.distance(said, by_cache, prompts)
        rows.append(check.arithmetic_row(f"{RUNTIME}, {steps(prompts)} cached steps", "runtime 8-bit activations", distance))
    return rows


def heads_of(graph: Graph) -> tuple[int, int]:
    """How many heads of keys there are, and their width."""
    node = next(node for node in graph.nodes.values() if node.op == "attention")
    width = cast(int, graph.nodes[node.inputs[0]].type.shape[-1])
    return cast(int, node.attrs["kv_heads"]), width // cast(int, node.attrs["heads"])


def answers(
    path: Path, heads: tuple[int, int], prompts: Tokens, threads: int, exact: bool = False
) -> tuple[Logits, Logits | None]:
    """Logits f32[B,T,V] at once, and by the cache where there is one."""
    model = Decoder(path, heads, threads, exact=exact)
    try:
        at_once = torch.stack([torch.from_numpy(model.logits(p)) for p in prompts])
        if not model.cached:
            return at_once, None
        return at_once, torch.stack([torch.from_numpy(model.decoded(p, steps(prompts))) for p in prompts])
    finally:
        model.close()


def worst(got: Logits, want: Logits) -> float:
    return float(np.max([check.relative(g.numpy(), w) for g, w in zip(got, want, strict=True)]))


def kind_of(items: Sequence[Item]) -> str:
    """f32 or f16 where nothing is quantized, else the scheme that most weights have, as we call it."""
    weights: dict[str, int] = {}
    for item in items:
        if len(item.shape) > 1 and not item.of:
            weights[item.dtype] = weights.get(item.dtype, 0) + int(np.prod(item.shape))
    quantized = {dtype: n for dtype, n in weights.items() if dtype not in ("f32", "f16", "bf16")}
    if not quantized:
        return "f16" if weights.keys() & {"f16", "bf16"} else "f32"
    return max(quantized, key=lambda dtype: quantized[dtype])


def own_price(path: Path, source: Source, merged: Graph, reference: LogProbs, prompts: Tokens) -> tuple[str, float]:
    """A scheme of ours, and the mean KL of the model with linears quantized to it by us, and activations to 8 bits."""
    scheme = yardstick(path)
    quant, _, group = scheme.partition("_g")
    types = dict.fromkeys(merged.parameters(), "f32")
    for name in {node.inputs[1] for node in merged.nodes.values() if node.op == "linear"}:
        k = merged.nodes[name].type.dims[-1]
        if fits := [g for g in GROUPS if g <= int(group) and k % g == 0]:
            types[name] = f"{quant}_g{fits[-1]}"
    graph = Pipeline((Quantize(quant, "mse", types), Pack("onnx"))).run(merged)
    weights = Weights(graph, source.store)
    quantized = check.log_probs(graph, weights, prompts, lambda node, x: round_activations(graph, node, x))
    return scheme, check.distance(reference, quantized, prompts).mean_kl


def yardstick(path: Path) -> str:
    """The file's own scheme where we have it; 4 bits where activations are integers too, which costs more than weights of 8."""
    if integers_in(path):
        return "int4_g32"
    kind = kind_of(contents(path).items)
    if f"onnx.{kind}" in LAYOUTS:
        return kind
    return "int8_g32" if "8" in kind.partition("_")[0] else "int4_g32"


def integers_in(path: Path) -> set[str]:
    """Ops of the file that make integers of activations."""
    return INTEGER_PRODUCTS & {node.op_type for node in read_proto(path).graph.node}


# a file of ours -----------------------------------------------------------------------------------


def is_ours(path: Path) -> bool:
    return any(p.key == "qconvert.version" for p in read_proto(path).metadata_props)


def own_rows(path: Path, source: Source, merged: Graph, prompts: Tokens, threads: int, places: Places) -> list[Row]:
    """Every weight against the model's; then the file's values through the graph against the file in onnxruntime."""
    try:
        graph = as_in_file(path, merged)
    except UnsupportedError as e:
        return [Row(WEIGHTS, "not compared", None, None, "skip", e.message)]
    initializers = read_initializers(path)
    reals = FileReals(graph, {entry.value: planes_of(entry, initializers) for entry in places(graph)})
    rows = [weights_row(source, merged, graph, reals)]
    (want,) = run(graph, reals, prompts).values()
    at_once, cached = answers(path, heads_of(merged), prompts[:1], threads, exact=True)
    limit, _ = LIMITS["runtime onnxruntime"]
    rows.append(judged(f"{RUNTIME}, the file's weights, prompts", "relative error", worst(at_once, want[:1]), limit))
    if cached is not None:
        what = f"{RUNTIME}, the file's weights, {steps(prompts)} cached steps"
        rows.append(judged(what, "relative error", worst(cached, want[:1]), limit))
    return rows


def as_in_file(path: Path, merged: Graph) -> Graph:
    """The graph with weights of the types that the file's have. InputError where one is missing, UnsupportedError for types."""
    if integers := integers_in(path):
        raise UnsupportedError(f"weights beside {min(integers)} are not compared yet")
    tensors, items = {t.name: t for t in read_proto(path).graph.initializer}, {i.name: i for i in contents(path).items}
    passes: list[Pass | Function] = [UntieHead()] if {HEAD, part_names(HEAD)[0]} & tensors.keys() else []
    graph = Pipeline(tuple(passes)).run(merged)
    types, columns = {}, {}
    for name in graph.parameters():
        item = item_of(path, name, graph.nodes[name].type.dims, items)
        types[name] = item.dtype
        if item.name != name and item.name != rows_name(name) and len(tensors[item.name].dims) == 2:
            columns[name] = COLUMNS_PREFIX
    return Pipeline((Quantize("file", "mse", types), Pack("onnx", columns))).run(graph)


def item_of(path: Path, weight: str, dims: tuple[int, ...], items: Mapping[str, Item]) -> Item:
    """The tensor that is a weight, or its codes."""
    names = (weight, part_names(weight)[0], rows_name(weight))
    item = next((items[n] for n in names if n in items), None)
    if item is None:
        raise InputError(f"{path}: has no {weight}, neither plain nor as {' or '.join(names[1:])}")
    if item.dtype not in ("f32", "f16") and f"onnx.{item.dtype}" not in LAYOUTS:
        raise UnsupportedError(f"{weight} is {item.dtype}, which is not compared yet")
    if item.shape not in (dims, dims[::-1]):
        raise InputError(f"{path}: {item.name} is {list(item.shape)}, the model's {weight} is {list(dims)}")
    return item


def weights_row(source: Source, merged: Graph, graph: Graph, reals: FileReals) -> Row:
    """The worst weight's error, in units of what its type costs anyway."""
    whole = Pipeline((UntieHead(),)).run(merged) if HEAD in graph.nodes and HEAD not in merged.nodes else merged
    real, own = Weights(whole, source.store), Weights(graph, source.store)
    ratios = {name: error_ratio(name, graph, real, own, reals) for name in graph.parameters()}
    name = max(ratios, key=lambda n: ratios[n])
    return judged(WEIGHTS, "error / our own", ratios[name], LIMITS["weights"][0], f"worst is {name}")


def error_ratio(name: str, graph: Graph, real: Weights, own: Weights, reals: FileReals) -> float:
    kind = graph.nodes[name].type
    n, step = kind.rows, rows_per_block(kind.dims[-1] if len(kind.dims) > 1 else 1)
    file = ours = norm = 0.0
    for i in range(0, n, step):
        j = min(n, i + step)
        want = np.asarray(real.real(name, i, j), np.float64)
        file += float(np.square(reals.real(name, i, j).reshape(want.shape) - want).sum())
        ours += float(np.square(own.real(name, i, j) - want).sum())
        norm += float(np.square(want).sum())
    return float(np.sqrt(file / max(ours, FLOOR**2 * norm, 1e-30)))
