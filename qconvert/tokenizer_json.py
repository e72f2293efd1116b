"""tokenizer.json, read or made from the older files that mean the same, and what its steps say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qconvert.errors import InputError
from qconvert.sentencepiece_model import EXTRA_SPACES, SPACE, as_tokenizer_json, read_sentencepiece


class AddedToken(NamedTuple):
    """A token matched in the text before everything else; a special one is control, never shown."""

    id: int
    text: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, wanted an object")
    return value


def read_document(folder: Path) -> dict[str, Any]:
    """tokenizer.json of a folder, or one made from tokenizer.model, or from vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        document = read_json(folder / "tokenizer.json")
        if not isinstance(document.get("model"), dict) or not document["model"].get("vocab"):
            raise InputError(f"{folder / 'tokenizer.json'}: has no model with a vocabulary")
        document["model"].setdefault("type", "BPE" if "merges" in document["model"] else "Unigram")
        return document
    if (folder / "tokenizer.model").is_file():
        return as_tokenizer_json(read_sentencepiece(folder / "tokenizer.model"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level_document(folder)
    raise InputError(
        f"{folder}: no tokenizer: wanted tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
        hint="save it there: AutoTokenizer.from_pretrained(base).save_pretrained(folder)",
    )


def _byte_level_document(folder: Path) -> dict[str, Any]:
    """GPT-2's two files as a tokenizer.json."""
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := next((pair for pair in merges if len(pair) != 2), None):
        raise InputError(f"{folder / 'merges.txt'}: {' '.join(wrong)!r} is not a pair")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "vocab": read_json(folder / "vocab.json"), "merges": merges}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    return {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": byte_level} | {
        "decoder": byte_level, "normalizer": None, "post_processor": None, "truncation": None, "padding": None,
    }  # fmt: skip


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return [part for s in step[inner] for part in _flat(s, inner)] if step.get("type") == "Sequence" else [step]


def normalizers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The normalizer's steps, sequences laid flat."""
    return _flat(document.get("normalizer"), "normalizers")


def pre_tokenizers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps, sequences laid flat."""
    return _flat(document.get("pre_tokenizer"), "pretokenizers")


def vocabulary(document: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """(text, id) of every piece, added tokens aside."""
    vocab = document["model"]["vocab"]
    if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
        ids: dict[int, str] = {}
        for text, i in vocab.items():
            if i in ids:
                raise InputError(f"the vocabulary has {ids[i]!r} and {text!r} as token {i}")
            ids[i] = text
    return vocab.items() if isinstance(vocab, dict) else ((text, i) for i, (text, _) in enumerate(vocab))


def merges(document: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """BPE's pairs in order of rank, from either spelling."""
    listed = document["model"].get("merges") or ()
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in listed]
    return tuple([(left, right) for left, right in pairs])


def added_tokens(folder: Path, document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """tokenizer.json's added tokens, then those that only tokenizer_config.json or added_tokens.json knows."""
    found: dict[int, dict[str, Any]] = {}
    for token in document.get("added_tokens") or ():
        if token["content"] != found.setdefault(token["id"], token)["content"]:
            other = found[token["id"]]["content"]
            raise InputError(f"{folder / 'tokenizer.json'}: {token['content']!r} and {other!r} are both token {token['id']}")
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    listed |= {i: {"content": text} for text, i in read_json(folder / "added_tokens.json").items() if i not in listed}
    for i, token in listed.items():
        if i in found and found[i]["content"] != token["content"]:
            raise InputError(
                f"{folder}: token {i} is {found[i]['content']!r} in tokenizer.json and {token['content']!r} beside it"
            )
        found[i] = {**found.get(i, {}), **token}
    return {i: _added_token(i, token) for i, token in sorted(found.items())}


def _added_token(i: int, token: Mapping[str, Any]) -> AddedToken:
    special = bool(token.get("special"))
    flags = {flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
    return AddedToken(i, token["content"], special, bool(token.get("normalized", not special)), **flags)


def with_added_tokens(document: Mapping[str, Any], added: Iterable[AddedToken]) -> dict[str, Any]:
    """The document with these added tokens in place of its own."""
    listed = []
    for token in added:
        entry = token._asdict()
        listed.append({"content": entry.pop("text"), **entry})
    return {**document, "added_tokens": listed}


def around(document: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The ids that the post-processor puts before and behind a text."""
    for step in _flat(document.get("post_processor"), "processors"):
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            return int(step["cls"][1]), int(step["sep"][1])
        if step["type"] == "TemplateProcessing":
            names = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            ids = [step["special_tokens"][name]["ids"][0] if name else None for name in names]
            at = names.index(None) if None in names else 0  # where the text stands
            return (ids[0] if at else None), (ids[-1] if at < len(ids) - 1 else None)
    return None, None


def adds_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a text is cut as if a space stood before it."""
    if any(s["type"] == "Prepend" and s["prepend"] == SPACE for s in normalizers(document)):
        return True
    for step in pre_tokenizers(document):
        if step["type"] == "Metaspace":
            return bool(step.get("add_prefix_space", True)) and step.get("prepend_scheme", "always") != "never"
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return True
    return False


def removes_extra_spaces(document: Mapping[str, Any]) -> bool:
    """Whether runs of spaces become one and those at the ends none, as SentencePiece may do."""
    return any(step["type"] == "WhitespaceSplit" for step in pre_tokenizers(document)) or any(
        step["type"] == "Replace" and step["pattern"].get("Regex") == EXTRA_SPACES for step in normalizers(document)
    )
