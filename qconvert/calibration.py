"""Ranges of activations: the least and the largest value that each linear reads and makes over a text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

import numpy as np

from qconvert.companions import n_vocab
from qconvert.emit import default_threads
from qconvert.errors import InputError, UnsupportedError, UsageError, uninterrupted
from qconvert.graph import Attr, Graph, Node
from qconvert.request import Request
from qconvert.sources import Store
from qconvert.tokenizer import Tokenizer, hard_corpus
from qconvert.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qconvert")
LENGTH = 256  # tokens of a sequence, at most
N_TOKENS = 4096  # of a text, at most
VALUES = 1 << 24  # of the widest activation of one batch: 64 MB

Range = tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """A text, which ranges are taken from; name: of its file, None for the one that ships. store: of the weights.

    threads: that torch runs on.
    """

    store: Store
    tokenizer: Tokenizer | None
    text: str
    name: str | None
    threads: int


def calibration_of(request: Request, store: Store, tokenizer: Tokenizer | None) -> Calibration:
    """UsageError, InputError for a file that is no text; UnsupportedError where nothing can cut it."""
    path, threads = request.calibrate, request.threads or default_threads()
    if path is None:
        return Calibration(store, tokenizer, "\n".join(hard_corpus()), None, threads)
    if tokenizer is None:
        raise UnsupportedError(f"--calibrate {path}: the model has no tokenizer that could cut the text", hint="leave it out")
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise UsageError(f"--calibrate {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"--calibrate {path}: not a text in UTF-8: {e}") from e
    return Calibration(store, tokenizer, text, str(path), threads)


def ranges_of(graph: Graph, calibration: Calibration) -> tuple[dict[str, dict[str, Range]], str]:
    """Linear -> round_input, round_output -> its range, bias left out; and a note that says which text they are of."""
    context = cast(int, cast(Mapping[str, Attr], graph.meta["config"])["context"])
    sequences = cut(calibration, n_vocab(graph), min(LENGTH, context))
    start, n = time.perf_counter(), sum(map(len, sequences))
    with uninterrupted():
        from qconvert.check import torch_threads  # loads torch
    with torch_threads(calibration.threads):
        found = widest_ranges(graph, Weights(graph, calibration.store), sequences)
    log.info("calibrate         %6.1f s   %d tokens", time.perf_counter() - start, n)
    if calibration.tokenizer is None:
        return found, f"ranges of activations are of {n} random tokens: the model has no tokenizer that could cut a text"
    text = calibration.name or "the text that ships with qconvert; --calibrate FILE takes them from yours"
    return found, f"ranges of activations are of {n} tokens of {text}"


def cut(calibration: Calibration, vocab: int, length: int) -> list[list[int]]:
    """Token ids of the text in sequences of `length`, each with what the tokenizer puts around a text."""
    tokenizer = calibration.tokenizer
    if tokenizer is None:
        return [np.random.default_rng(i).integers(0, vocab, length).tolist() for i in range(4)]
    ids = [i for i in tokenizer.reference()(calibration.text) if i < vocab][:N_TOKENS]
    step = length - len(tokenizer.around([]))
    if len(ids) < 2 or step < 1:
        raise InputError(f"--calibrate {calibration.name}: {len(ids)} tokens are no text to take ranges from")
    return [tokenizer.around(ids[i : i + step]) for i in range(0, len(ids), step)]


def widest_ranges(graph: Graph, weights: Weights, sequences: list[list[int]]) -> dict[str, dict[str, Range]]:
    from qconvert.run import run

    inputs: dict[str, Range] = {}
    outputs: dict[tuple[str, ...], Range] = {}

    def note_input(node: Node, x: Tensor) -> Tensor:
        inputs[node.inputs[0]] = widened(inputs.get(node.inputs[0]), x)
        return x

    def note_output(node: Node, y: Tensor) -> Tensor:
        outputs[node.inputs[:2]] = widened(outputs.get(node.inputs[:2]), y)
        return y

    for batch in batches(graph, sequences):
        run(graph, weights, batch, round_input=note_input, round_output=note_output)
    linears = {name: node for name, node in graph.nodes.items() if node.op == "linear"}
    return {n: {"round_input": inputs[v.inputs[0]], "round_output": outputs[v.inputs[:2]]} for n, v in linears.items()}


def widened(before: Range | None, x: Tensor) -> Range:
    low, high = float(x.min()), float(x.max())
    return (low, high) if before is None else (min(low, before[0]), max(high, before[1]))


def batches(graph: Graph, sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences of one length, as many as memory is meant for."""
    widest = max(int(node.type.shape[-1]) for node in graph.nodes.values() if node.op == "linear")
    for length, group in groupby(sequences, len):
        same = list(group)
        step = max(1, VALUES // (length * widest))
        for i in range(0, len(same), step):
            yield same[i : i + step]
