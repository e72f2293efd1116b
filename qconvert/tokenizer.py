"""A checkpoint's tokenizer as one neutral record, read without transformers.

`Tokenizer` holds what any runtime format needs to write; `Tokenizer.reference()` cuts text as Hugging Face does,
through the `tokenizers` library, and is what the written form is compared with.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qconvert.chat import read_chat_templates
from qconvert.errors import InputError, UnsupportedError, require
from qconvert.sentencepiece_model import SPACE, read_sentencepiece, tokenizer_json

Kind = Literal["bpe", "spm", "unigram"]  # byte-level BPE; BPE over "▁" with byte fallback; unigram
TokenType = Literal["normal", "unknown", "control", "user", "unused", "byte"]
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
UNICODE_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED = -1e6  # the score of a piece that no merge makes: below every merge's


class AddedToken(NamedTuple):
    """A token matched in the text before everything else; a special one is control, never shown."""

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


@dataclass(frozen=True)
class Tokenizer:
    """Everything about a tokenizer that a runtime format writes; ids index `tokens`, `scores` and `types`.

    kind          how text is cut (Kind)
    tokens        V texts: byte-level pieces in GPT-2's printable alphabet, added tokens as they stand in the text
    scores        V floats for spm and unigram, None for bpe
    merges        pairs in order of rank, for bpe and spm
    special       ids of bos, eos, unk, pad, sep, cls, mask, where there is one
    stops         every id that ends a generation: eos and generation_config's list, eos first
    document      tokenizer.json as read, or as made from older files, with all added tokens
    chat_templates  by name; "default" is the one in use
    """

    kind: Kind
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[tuple[str, str], ...]
    added: tuple[AddedToken, ...]
    special: Mapping[str, int]
    stops: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    ignore_merges: bool
    charsmap: bytes | None
    chat_templates: Mapping[str, str]
    document: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def n_padding(self) -> int:
        """Rows of the embedding that no text reaches."""
        return sum(t == "unused" for t in self.types)

    @property
    def unicode_forms(self) -> tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...]:
        """Unicode normal forms that are applied to text first; few runtimes do."""
        return tuple(form for form in UNICODE_FORMS if form in {step["type"] for step in _normalizers(self.document)})

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def keeps_first_space(self) -> bool:
        """Whether text that begins with a space gets no second one in front: Metaspace, unlike SentencePiece."""
        return self.add_space_prefix and "Metaspace" in _pre_types(self.document) and not self.remove_extra_whitespaces

    def plain(self, text: str) -> str:
        """The text as a runtime without Unicode normal forms, that puts a space before any text, must be asked it."""
        for form in self.unicode_forms:
            text = unicodedata.normalize(form, text)
        return text.lstrip(" ") if self.keeps_first_space else text

    def reference(self) -> Callable[[str], list[int]]:
        """text -> ids by Hugging Face's `tokenizers`; added tokens in the text are seen, none is put around it."""
        tokenizers = require("tokenizers", "reading a tokenizer")
        encoder = tokenizers.Tokenizer.from_str(json.dumps(self.document))

        def encode(text: str) -> list[int]:
            return list(encoder.encode(text, add_special_tokens=False).ids)

        return encode

    def around(self, ids: Sequence[int]) -> list[int]:
        """The ids with the BOS and EOS that this tokenizer puts around a text."""
        bos, eos = self.special.get("bos"), self.special.get("eos")
        return [*([bos] if self.add_bos and bos is not None else []), *ids] + (
            [eos] if self.add_eos and eos is not None else []
        )


@cache
def hard_corpus() -> tuple[str, ...]:
    """Short texts on which tokenizers tend to differ: digits, contractions, white space, scripts, code, emoji."""
    escapes = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    lines = (Path(__file__).parent / "hard_corpus.txt").read_text("utf-8").split("\n")[:-1]
    return tuple(
        re.sub(r"\\(u[0-9a-f]{4}|[nrt\\])", lambda m: escapes.get(m[1]) or chr(int(m[1][1:], 16)), line)
        for line in lines
    )


def read_tokenizer(folder: Path, vocab_rows: int) -> Tokenizer:
    """Read the tokenizer of a checkpoint whose embedding has `vocab_rows` rows.

    From tokenizer.json, else tokenizer.model (SentencePiece), else vocab.json and merges.txt. Rows beyond the
    vocabulary become unused tokens "[PADi]".
    Errors: InputError for missing, unreadable or contradicting files, and for ids beyond the embedding;
    UnsupportedError for models other than BPE and Unigram.
    """
    config = _json(folder / "tokenizer_config.json")
    inline = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    document = _document(folder)
    added = _added_tokens(folder, document, config)
    document["added_tokens"] = [_added_json(token, document) for token in added]
    kind = _kind(folder, document)
    by_id = _by_id(folder, document, added, vocab_rows)
    tokens = _padded(by_id, vocab_rows)
    special = _special_ids(folder, config, {text: i for i, text in by_id.items()})
    add_bos, add_eos, special = _around(document, config, special)
    steps = _normalizers(document)
    charsmap = next((s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"), None)
    return Tokenizer(
        kind=kind,
        tokens=tokens,
        types=_types(kind, document, added, by_id, vocab_rows),
        scores=_scores(kind, folder, document, tokens),
        merges=_merges(document),
        added=added,
        special=special,
        stops=_stops(folder, special),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=_adds_space_prefix(document),
        remove_extra_whitespaces=any(s["type"] == "Strip" for s in steps) or "WhitespaceSplit" in _pre_types(document),
        ignore_merges=bool(document["model"].get("ignore_merges")),
        charsmap=base64.b64decode(charsmap) if charsmap else None,
        chat_templates=read_chat_templates(folder, inline),
        document=document,
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, wanted an object")
    return value


def _document(folder: Path) -> dict[str, Any]:
    if (folder / "tokenizer.json").is_file():
        document = _json(folder / "tokenizer.json")
        if not isinstance(document.get("model"), dict) or "vocab" not in document["model"]:
            raise InputError(f"{folder / 'tokenizer.json'}: has no model with a vocabulary")
        document["model"].setdefault("type", "BPE" if "merges" in document["model"] else "Unigram")
        return document
    if (folder / "tokenizer.model").is_file():
        return tokenizer_json(read_sentencepiece(folder / "tokenizer.model"))
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
    model: dict[str, Any] = {"type": "BPE", "vocab": _json(folder / "vocab.json"), "merges": merges}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    return {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": byte_level} | {
        "decoder": byte_level, "normalizer": None, "post_processor": None, "truncation": None, "padding": None,
    }  # fmt: skip


def _kind(folder: Path, document: Mapping[str, Any]) -> Kind:
    model = document["model"]
    if model["type"] == "Unigram":
        return "unigram"
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedError(
            f"{folder}: a {model['type']} tokenizer; known are byte-level BPE, SentencePiece, Unigram"
        )
    if "ByteLevel" in _pre_types(document):
        return "bpe"
    if model.get("byte_fallback"):
        return "spm"
    raise UnsupportedError(f"{folder}: a BPE tokenizer that is neither byte-level nor falls back to bytes")


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return [part for s in step[inner] for part in _flat(s, inner)] if step.get("type") == "Sequence" else [step]


def _normalizers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _flat(document.get("normalizer"), "normalizers")


def _pre_types(document: Mapping[str, Any]) -> set[str]:
    return {step["type"] for step in _flat(document.get("pre_tokenizer"), "pretokenizers")}


def _vocab(document: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    vocab = document["model"]["vocab"]
    return vocab.items() if isinstance(vocab, dict) else ((text, i) for i, (text, _) in enumerate(vocab))


def _added_tokens(folder: Path, document: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """tokenizer.json's added tokens, then those that only tokenizer_config.json or added_tokens.json knows, by id."""
    found: dict[int, dict[str, Any]] = {token["id"]: token for token in document.get("added_tokens") or ()}
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    listed |= {i: {"content": text} for text, i in _json(folder / "added_tokens.json").items() if i not in listed}
    for i, token in listed.items():
        if i in found and found[i]["content"] != token["content"]:
            raise InputError(
                f"{folder}: token {i} is {found[i]['content']!r} in tokenizer.json and {token['content']!r} beside it"
            )
        found[i] = {**found.get(i, {}), **token}
    return tuple(
        AddedToken(i, t["content"], *(bool(t.get(flag)) for flag in ("special", "lstrip", "rstrip", "single_word")))
        for i, t in sorted(found.items())
    )


def _added_json(token: AddedToken, document: Mapping[str, Any]) -> dict[str, Any]:
    known = {t["id"]: t for t in document.get("added_tokens") or ()}.get(token.id, {})
    normalized = bool(known.get("normalized", not token.special))
    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return {"id": token.id, "content": token.text, "special": token.special, "normalized": normalized} | flags


def _by_id(folder: Path, document: Mapping[str, Any], added: Iterable[AddedToken], vocab_rows: int) -> dict[int, str]:
    """id -> text of the vocabulary and the added tokens; the ids fit the embedding and no text stands twice."""
    by_id = {i: text for text, i in _vocab(document)}
    by_id |= {token.id: token.text for token in added}
    beyond = sorted(i for i in by_id if i >= vocab_rows)
    if beyond:
        raise InputError(
            f"{folder}: {len(beyond)} tokens have no row in the embedding of {vocab_rows}, first: "
            + ", ".join(f"{i} {by_id[i]!r}" for i in beyond[:4]),
            hint="tokenizer and weights are of different models, or resize_token_embeddings was not saved",
        )
    ids: dict[str, int] = {}
    for i, text in sorted(by_id.items()):
        if text in ids:
            raise InputError(f"{folder}: {text!r} is token {ids[text]} and token {i}")
        ids[text] = i
    return by_id


def _padded(by_id: Mapping[int, str], vocab_rows: int) -> tuple[str, ...]:
    taken = set(by_id.values())
    return tuple(by_id[i] if i in by_id else _padding(i, taken) for i in range(vocab_rows))


def _padding(i: int, taken: set[str]) -> str:
    name = f"[PAD{i}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _types(
    kind: Kind, document: Mapping[str, Any], added: Iterable[AddedToken], by_id: Mapping[int, str], vocab_rows: int
) -> tuple[TokenType, ...]:
    types: list[TokenType] = ["normal" if i in by_id else "unused" for i in range(vocab_rows)]
    if kind != "bpe":
        for i, text in by_id.items():
            if BYTE_TOKEN.fullmatch(text):
                types[i] = "byte"
    for token in added:
        types[token.id] = "control" if token.special else "user"
    model = document["model"]
    for i, text in by_id.items():
        if i == model.get("unk_id") or (kind != "unigram" and text == model.get("unk_token")):
            types[i] = "unknown"
    return tuple(types)


def _merges(document: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    merges = document["model"].get("merges") or ()
    pairs = (tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges)
    return tuple((left, right) for left, right in pairs)


def _scores(kind: Kind, folder: Path, document: Mapping[str, Any], tokens: Sequence[str]) -> tuple[float, ...] | None:
    """Scores of the pieces: stored ones, else by rank of the merge that makes the piece, which gives the same order."""
    if kind == "bpe":
        return None
    if kind == "unigram":
        by_text = {text: float(score) for text, score in document["model"]["vocab"]}
        return tuple(by_text.get(text, 0.0) for text in tokens)
    if (folder / "tokenizer.model").is_file():
        pieces = read_sentencepiece(folder / "tokenizer.model").pieces
        if [p.text for p in pieces] == list(tokens[: len(pieces)]):
            return tuple(p.score for p in pieces) + (0.0,) * (len(tokens) - len(pieces))
    ranks: dict[str, float] = {}
    for rank, (left, right) in enumerate(_merges(document)):
        ranks.setdefault(left + right, -float(rank))
    return tuple(ranks.get(text, 0.0 if BYTE_TOKEN.fullmatch(text) else UNMERGED) for text in tokens)


def _special_ids(folder: Path, config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """bos, eos, unk ... by text from tokenizer_config.json or special_tokens_map.json, else by id from config.json."""
    map_, model = _json(folder / "special_tokens_map.json"), _json(folder / "config.json")
    special: dict[str, int] = {}
    for name in SPECIAL:
        entry = config.get(f"{name}_token") or map_.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = model.get(f"{name}_token_id")
        if isinstance(text, str) and text in ids:
            special[name] = ids[text]
        elif isinstance(number, int) and number in ids.values():
            special[name] = number
    return special


def _around(
    document: Mapping[str, Any], config: Mapping[str, Any], special: dict[str, int]
) -> tuple[bool, bool, dict[str, int]]:
    """(add_bos, add_eos, special): tokenizer_config.json's word if it has one, else what the post-processor does."""
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
        return bos and "bos" in special, eos and "eos" in special, special
    first, last = _template(document)
    special = {**({} if first is None else {"bos": first}), **({} if last is None else {"eos": last}), **special}
    return first is not None and first == special["bos"], last is not None and last == special["eos"], special


def _template(document: Mapping[str, Any]) -> tuple[int | None, int | None]:
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


def _stops(folder: Path, special: Mapping[str, int]) -> tuple[int, ...]:
    listed = _json(folder / "generation_config.json").get("eos_token_id", [])
    stops = [special["eos"]] if "eos" in special else []
    stops += [i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)]
    return tuple(dict.fromkeys(stops))


def _adds_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a text is cut as if a space stood before it."""
    if any(s["type"] == "Prepend" and s["prepend"] == SPACE for s in _normalizers(document)):
        return True
    for step in _flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return bool(step.get("add_prefix_space", True)) and step.get("prepend_scheme", "always") != "never"
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return True
    return False
