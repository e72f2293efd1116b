"""Prove a GGUF that somebody made: its weights against the model's, its answers through llama.cpp.

A quantizer's error has a known size: that of ggml's own on the same weights. A tensor that is off by much more was
not made from these weights, whatever it was quantized with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qconvert import check, kernels
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats import gguf_arch
from qconvert.formats.gguf_check import FileReals, context, in_runtime, n_vocab
from qconvert.formats.gguf_names import gguf_name
from qconvert.formats.gguf_values import Tensor, by_rows, read_tensors
from qconvert.formats.gguf_vocabulary import vocabulary
from qconvert.gguf_reader import read_header
from qconvert.graph import Graph
from qconvert.layouts import layout_of
from qconvert.passes.permute_rope import PermuteRope
from qconvert.passes.rope_factors import RopeFactors
from qconvert.passes.untie_head import UntieHead
from qconvert.pipeline import Function, Pass, Pipeline
from qconvert.report import Report, Row, judged
from qconvert.request import Request
from qconvert.scheme import CODEBOOKS, GGML_SCHEMES, Array
from qconvert.sources import gguf_files
from qconvert.target import Source
from qconvert.tokenizer import hard_corpus
from qconvert.weights import Weights, rows_per_block

FLOOR = 1e-6  # relative: rounding of f32 sums


def verify(path: Path, source: Source, merged: Graph, threads: int) -> Report:
    """Rows as at a conversion, but for the bytes. InputError where the file is another architecture's."""
    paths = gguf_files(path)
    arch = gguf_arch.describe(merged)
    header = read_header(paths[0])
    if (found := header.kv.get("general.architecture")) != arch.hyper.arch:
        raise InputError(f"{path} is a {found} file; {source.name} would be {arch.hyper.arch}")
    tensors = read_tensors(paths)
    graph = Pipeline(passes_for(arch, merged, tensors)).run(merged)
    names = matched(path, graph, tensors)
    rows = [weights_row(graph, Weights(graph, source.store), names, tensors)]
    tokenizer = vocabulary(source, merged, Request(source.name, dry_run=True)).tokenizer
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer to compare the file's with")
    prompts = check.prompts_for(tokenizer.reference(), hard_corpus(), n_vocab(graph), context(arch.kvs))
    reference = check.log_probs(source.graph, Weights(source.graph, source.store), prompts)
    reals = FileReals(tensors, names)
    read = check.log_probs(graph, reals, prompts)
    rows += check.price_rows(check.distance(reference, read, prompts))
    got, runtime = in_runtime(paths, tokenizer, graph, reals, prompts, threads)
    return Report([], [*rows, *got], runtime, provenance={"model": source.name, "file": path.name})


def passes_for(arch: gguf_arch.Description, merged: Graph, tensors: Mapping[str, Tensor]) -> tuple[Pass | Function, ...]:
    passes: list[Pass | Function] = [UntieHead()] if "output.weight" in tensors else []
    passes += [PermuteRope()] if arch.permuted else []
    passes += [RopeFactors(arch.rope_factors)] if arch.rope_factors else []
    return tuple(passes)


def matched(path: Path, graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter -> tensor. InputError for the first that is missing, left over, or of another shape."""
    names = {p: gguf_name(graph, p) for p in graph.parameters()}
    if missing := sorted(set(names.values()) - tensors.keys()):
        raise InputError(f"{path} lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(tensors.keys() - set(names.values())):
        raise InputError(f"{path} has {len(extra)} tensors that the model has not, first {extra[0]}")
    for parameter, name in names.items():
        n, found = graph.nodes[parameter].type.rows, len(by_rows(tensors[name].data))
        if found != n:
            raise InputError(f"{path}: {name} has {found} rows, {parameter} has {n}")
    return names


def weights_row(graph: Graph, weights: Weights, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Row:
    """The worst tensor's error, in units of what its type costs anyway."""
    reals = FileReals(tensors, names)
    worst, where = 0.0, ""
    for parameter, name in names.items():
        ratio = error_ratio(graph, weights, reals, parameter, tensors[name].type.name.lower())
        if ratio > worst:
            worst, where = ratio, f"worst is {name}"
    return judged("weights", "error / ggml's own", worst, check.LIMITS["weights"][0], where)


def error_ratio(graph: Graph, weights: Weights, reals: FileReals, parameter: str, dtype: str) -> float:
    kind = graph.nodes[parameter].type
    n, step = kind.rows, rows_per_block(kind.dims[-1] if len(kind.dims) > 1 else 1)
    file = own = norm = 0.0
    for i in range(0, n, step):
        want = np.asarray(weights.real(parameter, i, min(n, i + step)), np.float64)
        got = reals.real(parameter, i, min(n, i + step)).reshape(want.shape)
        file += float(np.square(got - want).sum())
        own += float(np.square(rounded(want, dtype) - want).sum())
        norm += float(np.square(want).sum())
    return float(np.sqrt(file / max(own, FLOOR**2 * norm, 1e-30)))


def rounded(want: Array, dtype: str) -> Array:
    """Weights as their type holds them at best: by ggml's quantizer, or rounded."""
    value = np.ascontiguousarray(want, np.float32)
    match dtype:
        case "f32" | "f64":
            return value
        case "f16":
            return value.astype(np.float16)
        case "bf16":
            return kernels.widen_bf16(kernels.narrow_bf16(value))
        case _ if dtype in GGML_SCHEMES:
            importance = np.ones(value.shape[-1], np.float32) if dtype in CODEBOOKS else None
            return layout_of(f"gguf.{dtype}").unpack(kernels.search(dtype, value, importance=importance)).dequantize()
    raise UnsupportedError(f"tensors of type {dtype} cannot be judged yet", hint=f"these can: {', '.join(GGML_SCHEMES)}")
