"""Prove a GGUF file: its bytes against the graph, its values through gguf-py, its answers through llama.cpp.

file readers:  gguf-py (independent of ours)      runtime: llama.cpp's own kernels, in this process
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import check
from qconvert.check import Tokens
from qconvert.emit import Entry, row_ranges
from qconvert.formats import gguf_vocabulary_check
from qconvert.formats.gguf_activations import as_ggml, round_q8_0, round_q8_k
from qconvert.formats.gguf_kernels import kernel_rows
from qconvert.formats.gguf_values import BY_GGML, Tensor, by_rows, dequantized, read_tensors
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.graph import Graph
from qconvert.parallel import in_parallel
from qconvert.report import Row, judged
from qconvert.scheme import Array
from qconvert.target import Lowered, Source
from qconvert.tokenizer import Tokenizer, hard_corpus
from qconvert.transcoded import stored_rows
from qconvert.weights import Weights

RUNTIME = "runtime llama.cpp"


@dataclass(frozen=True)
class FileReals:
    """The file's weights as real numbers, dequantized by gguf-py; names are the graph's (see `names`)."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]  # parameter -> tensor

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        tensor = self.tensors[self.names[name]]
        return dequantized(np.asarray(by_rows(tensor.data)[begin:end]), tensor.type.name)

    def dtype(self, name: str) -> str:
        return str(self.tensors[self.names[name]].type.name).lower()


def prove(
    source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks in the order of the stages, and the runtime that ran (None where there is none)."""
    tensors, graph = read_tensors(parts), lowered.graph
    tokenizer = lowered.options.vocabulary.tokenizer
    reals = FileReals(tensors, {e.value: e.name for e in lowered.plan.entries})
    prompts = check.prompts_for(tokenizer.reference(), hard_corpus(), n_vocab(graph), context(lowered.legal.header))
    rows = [bytes_row(lowered.plan.entries, tensors, weights, threads)]
    with check.torch_threads(threads):
        steps, merged = check.stage_rows(lowered.stages, source.store, prompts)
        quantized = check.log_probs(graph, weights, prompts)
        rows += [*steps, *check.price_rows(check.distance(merged, quantized, prompts))]
        rows += stored_rows(graph, weights, reals)
        read = check.log_probs(graph, reals, prompts)
        reader = "ggml" if any(t.type.name.lower() in BY_GGML for t in tensors.values()) else "gguf-py"
        rows.append(check.arithmetic_row(f"file read by {reader}", "file", check.distance(quantized, read, prompts)))
        del merged, quantized, read
        answers, runtime = in_runtime(parts, tokenizer, graph, reals, prompts, threads)
    return rows + answers, runtime


def bytes_row(entries: Sequence[Entry], tensors: Mapping[str, Tensor], weights: Weights, threads: int) -> Row:
    """Every tensor of the file equals the graph's, byte for byte; the first that does not is named."""
    wrong: list[str] = [f"{e.name} is missing" for e in entries if e.name not in tensors]

    def compare(block: tuple[Entry, int, int]) -> None:
        entry, begin, end = block
        data = np.ascontiguousarray(by_rows(tensors[entry.name].data)[begin:end]).view(np.uint8).reshape(-1)
        if not np.array_equal(data, weights.encoded(entry.value, begin, end)):
            wrong.append(f"{entry.name}, rows {begin}..{end}")

    if not wrong:
        in_parallel(((e, *block) for e in entries for block in row_ranges(e.shape)), compare, threads)
    return judged("file bytes", f"of {len(entries)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def in_runtime(
    paths: Sequence[Path], tokenizer: Tokenizer, graph: Graph, reals: FileReals, prompts: Tokens, threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """llama.cpp loads the file: token ids, chat template, stop tokens, kernels, and its logits.

    The logits are held against the graph over the file's weights, its activations rounded as ggml rounds them.
    """
    runtime = LlamaCpp()
    if reason := runtime.missing():
        return [Row(RUNTIME, "not verified", None, None, "skip", reason)], None
    model = runtime.open(paths[0], max(map(len, prompts)), threads, shards=paths if len(paths) > 1 else ())
    try:
        rows = gguf_vocabulary_check.rows(model, tokenizer)
        rows += kernel_rows(reals.tensors)
        got = check.runtime_log_probs(model, prompts)
    finally:
        model.close()
    want = check.log_probs(graph, reals, prompts, lambda node, x: as_ggml(reals.dtype(node.inputs[1]))(x))
    row = check.arithmetic_row(RUNTIME, runtime_kind(reals), check.distance(want, got, prompts))
    return [*rows, row], {"name": runtime.name, "version": runtime.version()}


def runtime_kind(reals: FileReals) -> str:
    """The row of check.LIMITS for the coarsest rounding of activations in the file."""
    roundings = {as_ggml(reals.dtype(name)) for name in reals.names if reals.tensors[reals.names[name]].data.ndim > 1}
    if round_q8_0 in roundings:
        return "runtime blocks of 32"
    if round_q8_k in roundings:
        return "runtime blocks of 256"
    return "runtime f32" if roundings <= {as_ggml("f32")} else "runtime f16"


def context(header: Sequence[Any]) -> int:
    return int(next(kv.value for kv in header if kv.key.endswith(".context_length")))


def n_vocab(graph: Graph) -> int:
    value = graph.nodes[graph.outputs[0]].type.shape[-1]
    assert isinstance(value, int)
    return value
