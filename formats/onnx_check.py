"""Prove an ONNX folder: its bytes against the graph, its form by onnx's checker, its answers in onnxruntime.

file reader: the onnx package         second oracle: its reference implementation, functions inlined
runtime: onnxruntime's own kernels, prompts at once and by the cache; onnxruntime-genai
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS, Distance, LogProbs, Tokens
from qconvert.companions import n_vocab
from qconvert.emit import Entry, encoded_rows, entry_ranges
from qconvert.errors import VerificationError
from qconvert.formats import onnx_int8_check as int8
from qconvert.formats.onnx_arch import context_length
from qconvert.formats.onnx_columns import LAYOUTS as COLUMNS
from qconvert.formats.onnx_expert_kernels import expert_rows
from qconvert.formats.onnx_genai_check import genai_rows
from qconvert.formats.onnx_kernels import ROWS, kernel_rows, kernels_of
from qconvert.formats.onnx_layouts import LAYOUTS, rounds
from qconvert.formats.onnx_lowering import part_names, rows_name
from qconvert.formats.onnx_mixtures import experts_level, unrounded
from qconvert.formats.onnx_proto import bits_of
from qconvert.formats.onnx_reference import Expected, reference_rows
from qconvert.formats.onnx_runtime import Model, OnnxRuntime
from qconvert.formats.onnx_safetensors import safetensors_rows
from qconvert.formats.onnx_swap_check import swap_rows
from qconvert.graph import Graph, Node, n_rows
from qconvert.layouts import layout_of
from qconvert.parallel import in_parallel
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.run import run
from qconvert.scheme import Array
from qconvert.target import Lowered, Source
from qconvert.tokenizer import hard_corpus
from qconvert.transcoded import stored_rows
from qconvert.weights import Weights

RUNTIME = "runtime onnxruntime"
STEPS = 8  # of a sequence's last tokens, one at a time by the cache
NEW_TOKENS = 16


def prove(
    source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks in the order of the stages, and the runtime that ran (None where there is none)."""
    path, graph = parts[0], lowered.graph
    rows, reals = file_rows(path, lowered, weights, threads)
    if any(row.verdict == "fail" for row in rows[1:]):
        return rows, None
    tokenizer = lowered.options.tokenizer
    encode = tokenizer and tokenizer.reference()
    prompts = check.prompts_for(encode or no_words, hard_corpus(), n_vocab(graph), room(graph))
    with check.torch_threads(threads):
        merge, merged = check.stage_rows(lowered.stages, source.store, prompts)
        (quantized,) = run(graph, reals, prompts).values()
        rows += [*merge, *check.price_rows(check.distance(merged, torch.log_softmax(quantized, -1), prompts))]
        del merged
        rows += stored_rows(graph, weights, reals)
        rows += reference_rows(path, prompts[0], lambda tokens, n: calls(graph, reals, tokens, n))
        answers, runtime = in_runtime(path, lowered, reals, quantized, prompts, threads)
        answers += swap_rows(path, lowered, weights, reals, prompts, steps(prompts), n_new(graph, prompts), threads)
    return rows + answers, runtime


# the file -----------------------------------------------------------------------------------------


def file_rows(path: Path, lowered: Lowered, weights: Weights, threads: int) -> tuple[list[Row], FileReals]:
    """What the onnx package says of the file, its bytes after that; and the weights as it reads them."""
    written = set(lowered.graph.parameters())
    entries = [e for e in lowered.plan.entries if e.value in written]
    initializers = read_initializers(path)
    rows = [checker_row(path), bytes_row(entries, initializers, weights, threads), *safetensors_rows(initializers)]
    return rows, FileReals(lowered.graph, {e.value: planes_of(e, initializers) for e in entries})


@dataclass(frozen=True)
class Place:
    """Where the onnx package finds a tensor's bytes."""

    file: Path
    offset: int
    nbytes: int
    dims: tuple[int, ...]
    bits: int | None = None  # of a value, where rows of the weight are columns here


def read_initializers(path: Path) -> dict[str, Place]:
    """Every tensor outside the protobuf. VerificationError where its length is not what its shape takes."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    places = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if not uses_external_data(tensor):
            continue
        found, dims = ExternalDataInfo(tensor), tuple(tensor.dims)
        wanted = -(-int(np.prod(dims)) * bits_of(tensor.data_type) // 8)
        if found.length != wanted:
            raise VerificationError(f"{path}: {tensor.name} has {found.length} bytes, {list(dims)} takes {wanted}")
        places[tensor.name] = Place(path.parent / found.location, found.offset or 0, wanted, dims)
    return places


def checker_row(path: Path) -> Row:
    """onnx.checker's full check, shapes inferred; nodes of com.microsoft are opaque to it."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        return judged("onnx.checker", "complaints", 1.0, 0.0, str(e).splitlines()[0])
    return judged("onnx.checker", "complaints", 0.0, 0.0)


def planes_of(entry: Entry, initializers: Mapping[str, Place]) -> list[Place]:
    """The pieces of a weight. VerificationError for one that is missing, or codes that lie in two places."""
    if "." not in entry.dtype:
        names = [entry.name]
    else:
        codes, *more = part_names(entry.name)
        both = [n for n in (codes, rows_name(entry.name)) if n in initializers]
        if len({(initializers[n].offset, initializers[n].nbytes) for n in both}) > 1:
            raise VerificationError(f"{entry.name}: its codes lie in two places")
        names = [*(both[:1] or [codes]), *more[: len(entry.planes) - 1]]
    if missing := [n for n in names if n not in initializers]:
        raise VerificationError(f"{missing[0]} is missing from the file")
    bits = [plane.bits for plane in entry.pieces]
    return [replace(initializers[name], bits=b) for name, b in zip(names, bits, strict=True)]


def read_rows(planes: Sequence[Place], n: int, begin: int, end: int) -> Array:
    """u8[rows, nbytes] of rows begin..end of n, all pieces side by side."""
    pieces = []
    for place in planes:
        if place.bits is not None:
            pieces.append(read_columns(place, n, begin, end))
            continue
        width = place.nbytes // n
        data = np.fromfile(place.file, np.uint8, (end - begin) * width, offset=place.offset + begin * width)
        pieces.append(data.reshape(end - begin, -1))
    return np.concatenate(pieces, axis=1)


def read_columns(place: Place, n: int, begin: int, end: int) -> Array:
    """Columns begin..end of n as rows u8[rows, nbytes]: one value in a byte, or as many as it takes."""
    bits = place.bits or 8
    stride, size, first = n * bits // 8, max(1, bits // 8), begin * bits // 8
    array = np.memmap(place.file, np.uint8, "r", place.offset, (place.nbytes // stride, stride))
    data = np.array(array[:, first : -(-end * bits // 8)])
    if bits < 8:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        values = (data[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(data), -1)
        skipped = begin - first * 8 // bits
        return np.ascontiguousarray(values[:, skipped : skipped + end - begin].T)
    return np.ascontiguousarray(data.view(f"u{size}").T).view(np.uint8)


@dataclass(frozen=True)
class FileReals:
    """The file's weights as real numbers; that its bytes are the graph's is a check of its own."""

    graph: Graph
    planes: Mapping[str, Sequence[Place]]  # weight -> its pieces

    def packed(self, name: str, begin: int, end: int) -> Array:
        return read_rows(self.planes[name], self.graph.nodes[name].type.rows, begin, end)

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        kind = self.graph.nodes[name].type
        width = kind.dims[1:] and kind.dims[-1:]
        data = self.packed(name, begin, kind.rows if end is None else end)
        if "." in kind.dtype:
            return layout_of(kind.dtype).unpack(data).dequantize()
        return data.view({"f32": "<f4", "f16": "<f2", "i64": "<i8"}[kind.dtype]).astype(np.float32).reshape(-1, *width)


def bytes_row(entries: Sequence[Entry], initializers: Mapping[str, Place], weights: Weights, threads: int) -> Row:
    """Every tensor that the onnx package finds equals the graph's, byte for byte; the first that does not is named."""
    wrong: list[str] = []

    def compare(entry: Entry) -> None:
        n, planes = n_rows(entry.shape), planes_of(entry, initializers)
        for begin, end in entry_ranges(entry):
            data = read_rows(planes, n, begin, end)
            if not np.array_equal(data, encoded_rows(weights, entry, begin, end)):
                wrong.append(f"{entry.name}, rows {begin}..{end}")

    in_parallel(entries, compare, threads)
    return judged("file bytes", f"of {len(entries)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def first_rows(graph: Graph, planes: Mapping[str, Sequence[Place]]) -> dict[str, tuple[str, Array, tuple[str, ...]]]:
    """Of each quantized weight its layout, up to 64 rows from the file, and the ops that read it."""
    found = {}
    for name, places in planes.items():
        kind = graph.nodes[name].type
        if kind.dtype != int8.INTEGER and (kind.dtype in LAYOUTS or kind.dtype in COLUMNS):
            n = kind.rows
            readers = tuple(sorted({node.op for node in graph.nodes.values() if name in node.inputs} - {"experts"}))
            found[name] = (kind.dtype, read_rows(places, n, 0, min(n, ROWS)), readers)
    return found


# the runtime --------------------------------------------------------------------------------------


def in_runtime(
    path: Path, lowered: Lowered, reals: FileReals, exact: torch.Tensor, prompts: Tokens, threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """onnxruntime loads the file: kernels, logits with activations in f32, logits as it is, and the same through genai."""
    runtime, graph, tokenizer = OnnxRuntime(), lowered.graph, lowered.options.tokenizer
    if reason := runtime.missing():
        return [Row(RUNTIME, "not verified", None, None, "skip", reason)], None
    form, level = lowered.options.form, lowered.options.accuracy_level
    rows = kernel_rows(kernels_of(first_rows(graph, reals.planes)))
    rows += int8.kernel_rows(graph, lambda name, n: read_rows(reals.planes[name], graph.nodes[name].type.dims[0], 0, n))
    rows += expert_rows(graph, reals.packed, experts_level(form, 4, level))
    rows += exact_rows(path, exact, prompts, threads)
    if lowered.options.accuracy_level == 4:
        rows += rounded_rows(path, graph, reals, exact, prompts, threads, unrounded(graph, form, level))
    if (path.parent / "genai_config.json").is_file():
        rows += genai_rows(path, tokenizer and tokenizer.reference(), prompts[0], n_new(graph, prompts), threads)
    return rows, {"name": runtime.name, "version": runtime.version()}


def exact_rows(path: Path, want: torch.Tensor, prompts: Tokens, threads: int) -> list[Row]:
    """Logits of whole prompts, and of the first one's last tokens by the cache, with activations in f32.

    One prompt alone by the cache: 8-bit weights beside f32 activations are a slow path of onnxruntime's.
    """
    limit, _ = LIMITS["runtime onnxruntime"]
    model = OnnxRuntime().open(path, len(prompts[0]), threads, exact=True)
    try:
        at_once = np.max([check.relative(model.logits(p), w) for p, w in zip(prompts, want, strict=True)])
        cached = check.relative(model.decoded(prompts[0], steps(prompts)), want[0])
    finally:
        model.close()
    return [
        judged(f"{RUNTIME}, prompts", "relative error", float(at_once), limit),
        judged(f"{RUNTIME}, {steps(prompts)} cached steps", "relative error", cached, limit),
    ]


def rounded_rows(
    path: Path, graph: Graph, reals: Reals, exact: torch.Tensor, prompts: Tokens, threads: int,
    unrounded: Container[str] = (),
) -> list[Row]:  # fmt: skip
    """The file as it is: where its kernels round activations to 8 bits, the graph rounds them alike; not at `unrounded`."""
    if not is_rounded(graph):
        return []
    model = OnnxRuntime().open(path, len(prompts[0]), threads)
    try:
        at_once, cached = (torch.log_softmax(x, -1) for x in both_ways(model, prompts))
    finally:
        model.close()
    exact, want = (torch.log_softmax(x, -1) for x in (exact, rounded(graph, reals, prompts, unrounded)))
    by_cache = want
    if int8.is_integer(graph):
        by_cache = torch.log_softmax(rounded(graph, reals, prompts, first=len(prompts[0]) - steps(prompts)), -1)
    name = f"{RUNTIME}, 8-bit activations"
    limit = rounding_limit(graph, check.distance(exact, want, prompts))
    rows = [
        judged(f"{name}, {how}", "mean KL", check.distance(wanted, got, prompts).mean_kl, limit)
        for how, wanted, got in (("prompts", want, at_once), (f"{steps(prompts)} cached steps", by_cache, cached))
    ]
    cost = check.distance(exact, at_once, prompts)
    return [*rows, Row("price of 8-bit activations", "mean KL", cost.mean_kl, None, "info")]


def rounding_limit(graph: Graph, price: Distance) -> float:
    """How far off logits may be that were rounded alike; price: what rounding costs in the graph.

    Over whole tensors or fixed ranges, values that fall the other way add up to what rounding itself does after a few
    layers: two such results are apart as two independent ones are.
    """
    limit, _ = LIMITS["runtime 8-bit activations"]
    return max(limit, 2 * price.mean_kl) if int8.is_integer(graph) else limit


def rounded(
    graph: Graph, reals: Reals, prompts: Tokens, unrounded: Container[str] = (), first: int | None = None
) -> torch.Tensor:
    """Logits with activations rounded as the file's nodes round them; see onnx_int8_check.hooks for `first`."""

    def other(node: Node, x: torch.Tensor) -> torch.Tensor:
        return x if node.inputs[1] in unrounded else round_activations(graph, node, x)

    (logits,) = run(graph, reals, prompts, **int8.hooks(first, other)).values()
    return logits


def calls(graph: Graph, reals: Reals, tokens: Sequence[int], n: int) -> Expected:
    """What is expected of all but n tokens at once and the last n by the cache; where nodes round activations, with a limit."""
    prompts = [list(tokens)]
    (exact,) = run(graph, reals, prompts).values()
    if not int8.is_integer(graph):
        return Expected(exact[0], None)
    (want,) = run(graph, reals, prompts, **int8.hooks(len(tokens) - n, lambda _, x: x)).values()
    price = check.distance(torch.log_softmax(exact, -1), torch.log_softmax(want, -1), prompts)
    return Expected(want[0], rounding_limit(graph, price))


def is_rounded(graph: Graph) -> bool:
    """Whether some kernel rounds what a linear reads."""
    weights = {graph.nodes[n.inputs[1]].type.dtype for n in graph.nodes.values() if n.op == "linear"}
    return any("." in dtype and rounds(layout_of(dtype)) for dtype in weights)


def round_activations(graph: Graph, node: Node, x: torch.Tensor) -> torch.Tensor:
    """x as MatMulNBits rounds it at level 4: 8 bits, a scale for each of the weight's groups.

    Measured: as the kernels of onnxruntime 1.31 do on x86, to 3e-7.
    """
    dtype = graph.nodes[node.inputs[1]].type.dtype
    if "." not in dtype or not rounds(layout_of(dtype)):
        return x
    groups = x.reshape(*x.shape[:-1], -1, layout_of(dtype).scheme.block)
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    return (torch.round(groups * torch.where(scale > 0, 1 / scale, 0.0)) * scale).reshape(x.shape)


def both_ways(model: Model, prompts: Tokens) -> tuple[LogProbs, LogProbs]:
    """Logits f32[B,T,V] of prompts at once, and by the cache."""
    at_once = torch.stack([torch.from_numpy(model.logits(p)) for p in prompts])
    return at_once, torch.stack([torch.from_numpy(model.decoded(p, steps(prompts))) for p in prompts])


def steps(prompts: Tokens) -> int:
    return min(STEPS, len(prompts[0]) - 1)


# what to ask --------------------------------------------------------------------------------------


def no_words(text: str) -> list[int]:
    """Without a tokenizer prompts are random ids."""
    return []


def n_new(graph: Graph, prompts: Tokens) -> int:
    """Tokens that genai is to add to a prompt."""
    return min(NEW_TOKENS, context_length(graph)[0] - len(prompts[0]))


def room(graph: Graph) -> int:
    """How long a prompt may be, so that some tokens can follow."""
    context, _ = context_length(graph)
    return context - min(NEW_TOKENS, context // 4)
