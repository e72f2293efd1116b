"""A text to calibrate on, as sequences of tokens, and the ranges of activations over it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from qconvert.companions import context_of, n_vocab
from qconvert.errors import InputError, UnsupportedError, UsageError, uninterrupted
from qconvert.graph import Graph
from qconvert.histograms import Histogram, Rule
from qconvert.parallel import default_threads
from qconvert.request import Request
from qconvert.sources import Store
from qconvert.tokenizer import Tokenizer
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
LENGTH = 512  # tokens of a sequence, at most: what llama-imatrix cuts text into
N_TOKENS = 64 * LENGTH  # of a text, where not said otherwise
N_RANGE_TOKENS = 8 * LENGTH  # ranges settle sooner
LONGEST = 16  # characters of a token on average, at most: text beyond is not read
OWN = "the text that ships with qconvert"


@dataclass(frozen=True)
class Calibration:
    """Texts, each of a file; name: of the file or folder, None for the text that ships. store: of the weights.

    n_tokens: that are taken, None: as many as suit the purpose. threads: that torch runs on.
    """

    store: Store
    tokenizer: Tokenizer | None
    texts: tuple[str, ...]
    name: str | None
    threads: int
    n_tokens: int | None = None

    @property
    def whose(self) -> str:
        if self.tokenizer is None:
            return "random tokens: the model has no tokenizer that could cut a text"
        return self.name or OWN


def calibration_of(request: Request, store: Store, tokenizer: Tokenizer | None) -> Calibration:
    """UsageError, InputError for a file that is no text; UnsupportedError where nothing can cut it."""
    path, threads = request.calibrate, request.threads or default_threads()
    if path is None:
        return Calibration(store, tokenizer, (own_text(),), None, threads, request.calibrate_tokens)
    if tokenizer is None:
        raise UnsupportedError(f"--calibrate {path}: the model has no tokenizer that could cut the text", hint="leave it out")
    texts = tuple(read_text(file, "--calibrate") for file in files_of(path))
    if not texts:
        raise InputError(f"--calibrate {path}: an empty folder")
    return Calibration(store, tokenizer, texts, str(path), threads, request.calibrate_tokens)


def own_text() -> str:
    """Prose, dialogue, lists, tables, code and markup in several languages, written for this."""
    return (Path(__file__).parent / "calibration.txt").read_text("utf-8")


def files_of(path: Path) -> list[Path]:
    """All of a folder, sorted; or the file itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def read_text(path: Path, flag: str) -> str:
    """UsageError, InputError for a file that is no text."""
    try:
        return path.read_text("utf-8")
    except OSError as e:
        raise UsageError(f"{flag} {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{flag} {path}: not a text in UTF-8: {e}") from e


def cut(calibration: Calibration, graph: Graph, n_tokens: int) -> list[list[int]]:
    """Sequences of token ids, of each file in turn, until there are n_tokens; what is no whole sequence is left out.

    They are those of llama-imatrix: each begins with what the tokenizer puts before a text, in place of what it covers.
    InputError where the text is too short.
    """
    length, vocab, tokenizer = min(LENGTH, context_of(graph)), n_vocab(graph), calibration.tokenizer
    n = -(-(calibration.n_tokens or n_tokens) // length)
    if tokenizer is None:
        return [np.random.default_rng(i).integers(0, vocab, length).tolist() for i in range(min(n, 4))]
    encode, bare = tokenizer.reference(), tokenizer.around([-1])
    before = bare.index(-1)
    behind = len(bare) - 1 - before

    def sequences(text: str) -> Iterator[list[int]]:
        ids = [*bare[:before], *(i for i in encode(text[: LONGEST * n * length]) if i < vocab)]
        for at in range(0, max(1, len(ids) - length + 1), length):
            yield tokenizer.around(ids[at + before : at + length - behind])

    turns = zip_longest(*map(sequences, calibration.texts))
    found = [s for turn in turns for s in turn if s is not None and len(s) == length][:n]
    found = found or [max((s for text in calibration.texts for s in sequences(text)), key=len)]
    if (n_found := sum(map(len, found)) - (len(bare) - 1) * len(found)) < 2:
        raise InputError(f"--calibrate {calibration.name}: {n_found} tokens are no text to calibrate on")
    return found


def spreads_of(
    graph: Graph, calibration: Calibration, outputs: bool, rule: Rule
) -> tuple[dict[str, dict[str, Histogram]], tuple[str, ...]]:
    """Linear -> round_input and, with `outputs`, round_output -> its extremes, bias left out, and of inputs, where the rule
    reads them, counts; and a note: of which text. Inputs that have histograms in the graph are as these say."""
    known = stored_spreads(graph, calibration.store) if rule.kind != "minmax" and not outputs else None
    if known is not None:
        return known, (f"ranges of activations are those of {rule.told}",)
    texts = cut(calibration, graph, N_RANGE_TOKENS)
    find = partial(_spreads, graph, calibration, texts, outputs, rule.kind != "minmax")
    found = calibration.store.known(f"ranges {outputs} {rule.kind != 'minmax'}", (texts, graph), find)
    own = "" if calibration.name or calibration.tokenizer is None else "; --calibrate FILE takes them from yours"
    how = "" if rule.kind == "minmax" else f", of {rule.told}"
    return found, (f"ranges of activations are of {sum(map(len, texts))} {_tokens_of(calibration)}{how}{own}",)


def stored_spreads(graph: Graph, store: Store) -> dict[str, dict[str, Histogram]] | None:
    """Of what linears read, from W~histogram and W~extremes; None where one is missing."""
    found, read = {}, dict[str, Histogram]()
    for name, node in graph.nodes.items():
        if node.op != "linear":
            continue
        if (counts := graph.nodes.get(f"{node.inputs[1]}~histogram")) is None:
            return None
        ends = graph.nodes[f"{node.inputs[1]}~extremes"]
        if (key := str(counts.attrs["tensor"])) not in read:
            bins, (low, high) = (store.read(str(n.attrs["tensor"]), 0, n.type.dims[0]) for n in (counts, ends))
            read[key] = Histogram(float(low), float(high), bins)
        found[name] = {"round_input": read[key]}
    return found


def _spreads(
    graph: Graph, calibration: Calibration, texts: list[list[int]], outputs: bool, whole: bool
) -> dict[str, dict[str, Histogram]]:
    start = time.perf_counter()
    with uninterrupted():
        from qconvert.check import torch_threads  # loads torch
        from qconvert.layerwise import run_layerwise
        from qconvert.observers import RangeWatcher
    watcher = RangeWatcher(graph, outputs, whole)
    with torch_threads(calibration.threads):
        run_layerwise(graph, Weights(graph, calibration.store), texts, watcher)
    log.info("calibrate         %6.1f s   %d tokens", time.perf_counter() - start, sum(map(len, texts)))
    return watcher.ranges()


def _tokens_of(calibration: Calibration) -> str:
    return calibration.whose if calibration.tokenizer is None else f"tokens of {calibration.whose}"
