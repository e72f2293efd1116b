"""The vocabulary of a GGUF file: the tokenizer that was trained with, as key/values, and how its pre-tokenizer was found."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qconvert.formats import gguf_pretokenizers, gguf_tokenizer
from qconvert.formats.gguf_kv import KV
from qconvert.graph import Graph
from qconvert.target import Source
from qconvert.tokenizer import Tokenizer, read_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Vocabulary(NamedTuple):
    tokenizer: Tokenizer
    kvs: tuple[KV, ...]
    note: str


def vocabulary(source: Source, graph: Graph, forced: str | None) -> Vocabulary:
    folder = tokenizer_folder(source)
    config = graph.meta["config"]
    assert isinstance(config, dict) and isinstance(config["vocab"], int)
    tokenizer = read_tokenizer(folder, config["vocab"])
    pre = gguf_pretokenizers.detect(tokenizer, forced)
    return Vocabulary(tokenizer, tuple(gguf_tokenizer.metadata(tokenizer, pre.name)), pre.note)


def tokenizer_folder(source: Source) -> Path:
    """The last adapter that brings a tokenizer (added tokens, a chat template), else the model's own folder."""
    folders = [source.checkpoint.folder, *(a.folder for a in source.adapters)]
    return next((f for f in reversed(folders) if any((f / name).exists() for name in FILES)), folders[0])
