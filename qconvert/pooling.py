"""How an embedding model makes one vector of a text: sentence-transformers' modules.json and its folders.

Source: sentence-transformers 6.2, base/modules, sentence_transformer/modules/pooling.py; older spellings too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, cast

from qconvert.errors import InputError, UnsupportedError
from qconvert.sources import inside, read_json

LEGACY = "pooling_mode_"
MODES = {"cls": "cls", "mean": "mean", "cls_token": "cls", "mean_tokens": "mean"}  # new spellings, then old ones
# Keys of a pooling's config.json that say nothing of how it computes
DESCRIPTIVE = ("word_embedding_dimension", "embedding_dimension", "module_input_name", "module_output_name")


class Pooling(NamedTuple):
    """mode: the vector of the first token ("cls"), or the mean over tokens; then scaled to length 1 where `unit`."""

    mode: str
    unit: bool


def read_pooling(folder: Path) -> Pooling | None:
    """None where the model says nothing of it. UnsupportedError for a module or mode that no graph has."""
    if not (folder / "modules.json").is_file():
        return None
    kinds = [(str(m.get("type")).rpartition(".")[2], str(m.get("path"))) for m in _modules(folder / "modules.json")]
    for (kind, _), wanted in zip(kinds, ("Transformer", "Pooling", "Normalize"), strict=False):
        if kind != wanted:
            raise UnsupportedError(f"{folder / 'modules.json'}: the module {kind} where {wanted} was wanted")
    if len(kinds) > 3:
        raise UnsupportedError(f"{folder / 'modules.json'}: the module {kinds[3][0]} is not supported")
    if len(kinds) < 2:
        return None
    path = inside(folder, f"{kinds[1][1]}/config.json")
    return Pooling(_mode(read_json(path), path), len(kinds) == 3)


def _modules(path: Path) -> list[dict[str, object]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise InputError(f"{path}: a list of modules was wanted")
    return cast(list[dict[str, object]], value)


def _mode(config: dict[str, object], path: Path) -> str:
    modes: list[object] = []
    for k, value in config.items():
        if k == "pooling_mode":
            modes += value if isinstance(value, list) else [value]
        elif k.startswith(LEGACY):
            modes += [k.removeprefix(LEGACY)] if value else []
        elif k == "include_prompt":
            if value is not True:
                raise UnsupportedError(f"{path}: include_prompt = {value!r}: a prompt cannot be told from the text")
        elif k not in DESCRIPTIVE:
            raise InputError(f"{path}: {k} = {str(value)[:80]} is a setting that is not known")
    known = {MODES.get(str(mode)) for mode in modes}
    (mode,) = known if len(modes) == 1 else (None,)
    if mode is None:
        raise UnsupportedError(f"{path}: pooling by {', '.join(map(str, modes)) or 'nothing'}", hint="cls and mean are known")
    return mode
