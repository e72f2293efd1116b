"""The vocabulary of a GGUF file: the tokenizer it was trained with, as key/values, and how its pre-tokenizer was found."""

from __future__ import annotations

import logging
from typing import NamedTuple

from qconvert.errors import InputError
from qconvert.formats import gguf_tokenizer
from qconvert.formats.gguf_kv import KV
from qconvert.formats.gguf_pretokenizers import PreTokenizer, find_pre, known_by_structure
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.graph import Graph
from qconvert.request import Request
from qconvert.target import TOKENIZER_FILES, Source, tokenizer_folder
from qconvert.tokenizer import Tokenizer, read_tokenizer

log = logging.getLogger("qconvert")


class Vocabulary(NamedTuple):
    """tokenizer is None only in a dry run of a folder without one."""

    tokenizer: Tokenizer | None
    pre: PreTokenizer
    kvs: tuple[KV, ...]
    notes: tuple[str, ...]


def vocabulary(source: Source, graph: Graph, request: Request) -> Vocabulary:
    """Read the tokenizer and find its pre-tokenizer: by trial in llama.cpp, or by its structure in a dry run."""
    folder, config = tokenizer_folder(source), graph.meta["config"]
    assert isinstance(config, dict) and isinstance(config["vocab"], int)
    try:
        tokenizer = read_tokenizer(folder, config["vocab"], model_folder=source.checkpoint.folder)
    except InputError:
        if request.dry_run and not any((folder / f).exists() for f in TOKENIZER_FILES):
            return Vocabulary(
                None, PreTokenizer("", False, "no tokenizer"), (), ("no tokenizer: its header bytes are not counted",)
            )
        raise
    if request.dry_run:
        name = request.pre_tokenizer or known_by_structure(tokenizer) or "default"
        pre = PreTokenizer(name, False, "by structure")
    else:
        pre = find_pre(tokenizer, LlamaCpp(), forced=request.pre_tokenizer)
    log.debug("pre-tokenizer %s: %s", pre.name, pre.reason)
    return Vocabulary(
        tokenizer, pre, tuple(gguf_tokenizer.metadata(tokenizer, pre.name)), tuple(gguf_tokenizer.notes(tokenizer))
    )
