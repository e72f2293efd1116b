"""Somebody's ONNX decoder in onnxruntime: which inputs are tokens, mask, positions and cache, it is told by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import UnsupportedError, VerificationError
from qconvert.formats.onnx_runtime import session

DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
CACHE = re.compile(r"(\d+)\D*(key|value)s?$")
LOGITS = "logits"
Cache = dict[str, NDArray[Any]]


class Decoder:
    """One open decoder; each call begins a fresh sequence. UnsupportedError for inputs that nobody here can feed.

    heads: how many there are of keys, and their width, where the file says neither.
    """

    def __init__(self, path: Path, heads: tuple[int, int], threads: int, *, exact: bool = False) -> None:
        self.path, self._session = path, session(path, threads, exact)
        inputs, outputs = self._session.get_inputs(), [o.name for o in self._session.get_outputs()]
        self._types = {i.name: DTYPES.get(i.type) for i in inputs}
        self._cache = [paired(path, i, outputs, heads) for i in inputs if CACHE.search(i.name)]
        wrong = [f"an input {i}" for i in self._types.keys() - {TOKENS, MASK, POSITIONS, *(c.past for c in self._cache)}]
        wrong += [f"no input {TOKENS}"] * (TOKENS not in self._types) + [f"no output {LOGITS}"] * (LOGITS not in outputs)
        if wrong:
            raise UnsupportedError(
                f"{path}: it has {min(wrong)}", hint=f"decoders take {TOKENS}, {MASK}, {POSITIONS}, a cache, and give {LOGITS}"
            )

    @property
    def cached(self) -> bool:
        return bool(self._cache)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token, all at once: ids [T] -> f32[T,V]."""
        return self._step(tokens, 0, self._empty())[0]

    def decoded(self, tokens: Sequence[int], n_steps: int) -> NDArray[np.float32]:
        """The same by the cache: all but the last n_steps tokens at once, then one at a time."""
        first = len(tokens) - n_steps
        out, past = self._step(tokens[:first], 0, self._empty())
        rows = [out]
        for at in range(first, len(tokens)):
            out, past = self._step([tokens[at]], at, past)
            rows.append(out)
        return np.concatenate(rows)

    def _empty(self) -> Cache:
        return {c.past: np.zeros(c.shape, self._types[c.past]) for c in self._cache}

    def _step(self, tokens: Sequence[int], at: int, past: Cache) -> tuple[NDArray[np.float32], Cache]:
        n = len(tokens)
        values = {TOKENS: np.array([tokens]), MASK: np.ones((1, at + n)), POSITIONS: np.arange(at, at + n)[None]}
        feeds = {name: value.astype(self._types[name]) for name, value in values.items() if name in self._types} | past
        try:
            logits, *present = self._session.run([LOGITS, *(c.present for c in self._cache)], feeds)
        except Exception as e:
            raise VerificationError(f"{self.path}: onnxruntime cannot run it: {e}") from e
        if logits.shape[1] != n:
            raise UnsupportedError(f"{self.path}: logits of {logits.shape[1]} tokens alone, {n} were given")
        return logits[0].astype(np.float32), {c.past: p for c, p in zip(self._cache, present, strict=True)}

    def close(self) -> None:
        self._session = None


class Pair(NamedTuple):
    """A past input, the output that is its next value, and the shape that it begins with."""

    past: str
    present: str
    shape: tuple[int, ...]


def paired(path: Path, given: Any, outputs: Sequence[str], heads: tuple[int, int]) -> Pair:
    key = found.groups() if (found := CACHE.search(given.name)) else ()
    present = [o for o in outputs if (m := CACHE.search(o)) and m.groups() == key]
    if len(present) != 1 or len(given.shape) != 4 or isinstance(given.shape[2], int):
        raise UnsupportedError(f"{path}: {given.name}{given.shape} is no cache [batch, heads, past, head_dim] that grows")
    _, n, _, width = given.shape
    n, width = (said if isinstance(said, int) else known for said, known in zip((n, width), heads, strict=True))
    return Pair(given.name, present[0], (1, n, 0, width))
