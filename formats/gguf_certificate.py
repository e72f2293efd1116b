"""A GGUF's certificate: one string among its key/values; its tensors by its own header; llama.cpp asked again."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from qconvert.certificate import KEY, Answers, Expected, Located
from qconvert.emit import FilePlan
from qconvert.errors import uninterrupted
from qconvert.formats import gguf_kv
from qconvert.formats.gguf_kv import KV
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.gguf_reader import ALIGNMENT, end_of_keys, read_header
from qconvert.sources import gguf_files
from qconvert.target import Lowered
from qconvert.weights import Weights

COUNT = 16  # where the number of keys lies


class Certifier:
    quoted = False

    def header(self, file: FilePlan, key: str, value: bytes) -> bytes:
        """With one more key behind the others; so long that what follows stays aligned."""
        old, at = file.header, end_of_keys(file.header, file.path)
        (n,) = struct.unpack_from("<Q", old, COUNT)
        spaces = -len(gguf_kv.encode(KV(key, "str", value.decode()))) % ALIGNMENT
        new = gguf_kv.encode(KV(key, "str", value.decode() + " " * spaces))
        return old[:COUNT] + struct.pack("<Q", n + 1) + old[COUNT + 8 : at] + new + old[at:]

    def certificate(self, found: Path) -> tuple[Path, str] | None:
        first = gguf_files(found)[0]
        text = read_header(first).kv.get(KEY)
        return (first, text) if isinstance(text, str) else None

    def files(self, first: Path, names: Sequence[str]) -> list[Path]:
        """A file may have another name by now; of a split one they are numbered."""
        return gguf_files(first)

    def located(self, files: Sequence[Path]) -> list[Located]:
        return [
            Located(t.name, path, t.offset, t.nbytes, f"{t.dtype}{list(t.shape)}")
            for path in files for t in read_header(path).tensors
        ]  # fmt: skip

    def facts(self, file: Path) -> Mapping[str, object]:
        return read_header(file).kv

    def expected(self, lowered: Lowered, weights: Weights, files: Sequence[Path], prompts: list[list[int]]) -> Expected:
        """The graph over the file's weights, its activations rounded as ggml rounds them."""
        with uninterrupted():
            from qconvert.formats.gguf_activations import as_ggml
            from qconvert.formats.gguf_check import FileReals, runtime_kind
            from qconvert.formats.gguf_values import read_tensors
            from qconvert.run import run
        reals = FileReals(read_tensors(files), {e.value: e.name for e in lowered.plan.entries})
        (logits,) = run(
            lowered.graph, reals, prompts, round_input=lambda node, x: as_ggml(reals.dtype(node.inputs[1]))(x)
        ).values()  # fmt: skip
        return Expected(runtime_kind(reals), "mean KL", [x.numpy() for x in logits])

    def answers(self, found: Path, prompts: list[list[int]], threads: int) -> list[Answers]:
        runtime, what = LlamaCpp(), "runtime llama.cpp"
        if reason := runtime.missing():
            return [Answers(what, None, reason)]
        model = runtime.open(found, max(map(len, prompts)), threads)
        try:
            logits = [model.logits(p) for p in prompts]
        finally:
            model.close()
        return [Answers(what, logits, about={"name": runtime.name, "version": runtime.version()})]
