"""Which text a conversion's quality is measured on, cut into sequences; and whether another text shares it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from qconvert.calibration import OWN, files_of, own_text, read_text
from qconvert.companions import context_of, n_vocab
from qconvert.errors import InputError
from qconvert.graph import Graph
from qconvert.tokenizer import Tokenizer

LENGTH = 256  # tokens of a sequence, at most
MOST, LEAST = 4096, 512  # tokens of a text
OPERATIONS = 1e12  # of one evaluation: a quarter of a minute of two cores
LOGITS = 1 << 24  # that are kept
RUN = 16  # tokens in a row that two texts have in common, not by chance
SHIPPED = "the evaluation text that ships with qconvert"


class Text(NamedTuple):
    """Token ids in sequences of one length; name: of the file, or that it is ours."""

    name: str
    sequences: list[list[int]]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """Of the ids: texts are the same where this is, whatever they are called."""
        return sha256(json.dumps(self.sequences).encode()).hexdigest()

    def part(self, n_tokens: int) -> list[list[int]]:
        """The first sequences, of about n_tokens."""
        return self.sequences[: max(1, n_tokens // len(self.sequences[0]))]


def evaluation_text(path: Path | None, tokenizer: Tokenizer, graph: Graph, n_tokens: int) -> Text:
    """About n_tokens of a file, or of the text that ships with the package."""
    name, vocab, context = str(path) if path else SHIPPED, n_vocab(graph), context_of(graph)
    text = read_text(path, "--eval") if path else (Path(__file__).parent / "evaluation.txt").read_text("utf-8")
    ids = [i for i in tokenizer.reference()(text) if i < vocab]
    return Text(name, cut(ids, tokenizer.around, min(LENGTH, context), n_tokens, name))


def calibration_text(path: Path | None, tokenizer: Tokenizer, graph: Graph, n_tokens: int) -> Text:
    """About n_tokens of --calibrate FILE or folder, or of the text that ships for it."""
    vocab, context = n_vocab(graph), context_of(graph)
    text = "\n".join(read_text(p, "--calibrate") for p in files_of(path)) if path else own_text()
    ids, name = [i for i in tokenizer.reference()(text) if i < vocab], str(path) if path else OWN
    return Text(name, cut(ids, tokenizer.around, min(LENGTH, context), n_tokens, name))


def cut(
    ids: Sequence[int], around: Callable[[Sequence[int]], list[int]], length: int, n_tokens: int, name: str
) -> list[list[int]]:
    """Whole sequences from the beginning on, each with what the tokenizer puts around a text; a short text is one."""
    step = max(1, min(length, len(ids)) - len(around([])))
    n = max(1, min(n_tokens // length, len(ids) // step))
    found = [around(ids[i * step : (i + 1) * step]) for i in range(n)]
    if len(found[0]) < 2:
        raise InputError(f"{name}: {len(ids)} tokens are no text to measure on")
    return found


def affordable(graph: Graph, n_runs: int) -> int:
    """Tokens of an evaluation: QCONVERT_EVAL_TOKENS, else many for a small model, fewer for a large one."""
    if wanted := asked():
        return wanted
    n = sum(math.prod(graph.nodes[p].type.dims) for p in graph.parameters())
    return max(LEAST, min(MOST, int(OPERATIONS / (2 * n * n_runs))))


def asked() -> int | None:
    wanted = os.environ.get("QCONVERT_EVAL_TOKENS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else None


def calibration_tokens(graph: Graph) -> int:
    """On which the costs of types are measured; their logits are kept."""
    if wanted := asked():
        return wanted
    return max(LENGTH, min(4 * LENGTH, LOGITS // n_vocab(graph)))


def overlap(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], run: int = RUN) -> float:
    """The share of b's runs of tokens that are in a too."""
    seen = {tuple(s[i : i + run]) for s in a for i in range(len(s) - run + 1)}
    runs = [tuple(s[i : i + run]) for s in b for i in range(len(s) - run + 1)]
    return sum(r in seen for r in runs) / max(1, len(runs))
