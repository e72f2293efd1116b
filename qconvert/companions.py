"""What lies beside a model's weights as it was: the tokenizer's files and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from qconvert.errors import UnsupportedError
from qconvert.graph import Graph
from qconvert.sources import inside
from qconvert.target import TOKENIZER_FILES, Source, tokenizer_folder
from qconvert.tokenizer import Tokenizer, read_tokenizer

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip

SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def tokenizer_of(source: Source, graph: Graph) -> Tokenizer | None:
    """None where there is none, or one that only transformers reads: the files are carried as they are."""
    folder = tokenizer_folder(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return read_tokenizer(folder, n_vocab(graph), model_folder=source.checkpoint.folder)
    except UnsupportedError:
        return None


def n_vocab(graph: Graph) -> int:
    """Rows of the embedding of tokens, which is a graph's first."""
    return next(graph.nodes[n.inputs[1]].type.dims[0] for n in graph.nodes.values() if n.op == "embed")


def gives_logits(graph: Graph) -> bool:
    """One output, with a value for each token of the vocabulary."""
    return len(graph.outputs) == 1 and graph.nodes[graph.outputs[0]].type.shape[-1] == n_vocab(graph)


def carried(source: Source) -> dict[str, bytes]:
    """The tokenizer's files and generation_config.json, as they are."""
    folder = tokenizer_folder(source)
    files = {name: inside(folder, name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "generation_config.json" not in files and (source.checkpoint.folder / "generation_config.json").is_file():
        files["generation_config.json"] = inside(source.checkpoint.folder, "generation_config.json").read_bytes()
    return files


def sentence_files(folder: Path) -> dict[str, bytes]:
    """What sentence-transformers reads of an embedding model: its modules, and the settings of each."""
    if not (folder / "modules.json").is_file():
        return {}
    paths = [str(module.get("path", "")) for module in json.loads(inside(folder, "modules.json").read_bytes())]
    names = [*SENTENCES, *(f"{path}/config.json" for path in paths if path)]
    return {name: inside(folder, name).read_bytes() for name in names if (folder / name).is_file()}


def context_of(graph: Graph) -> int:
    config = graph.meta["config"]
    assert isinstance(config, dict) and isinstance(config["context"], int)
    return config["context"]
