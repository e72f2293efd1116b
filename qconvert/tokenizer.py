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
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from qconvert import tokenizer_json as tj
from qconvert.chat import read_chat_templates
from qconvert.errors import InputError, UnsupportedError, misshapen, require
from qconvert.sentencepiece_model import SPACE, cut_bpe, merges_of, read_sentencepiece
from qconvert.tokenizer_json import AddedToken, read_json

Kind = Literal["bpe", "spm", "unigram"]  # byte-level BPE; BPE over "▁" with byte fallback; unigram
TokenType = Literal["normal", "unknown", "control", "user", "unused", "byte"]
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
UNICODE_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED = -1e6  # the score of a piece that no merge makes: below every merge's


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
        return tuple(form for form in UNICODE_FORMS if form in {step["type"] for step in tj.normalizers(self.document)})

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def keeps_first_space(self) -> bool:
        """Whether text that begins with a space gets no second one in front: Metaspace, unlike SentencePiece."""
        metaspace = any(step["type"] == "Metaspace" for step in tj.pre_tokenizers(self.document))
        return metaspace and self.add_space_prefix and not self.remove_extra_whitespaces

    @property
    def prefixes_only_first(self) -> bool:
        """Whether text behind an added token gets no space in front, where the text's beginning does."""
        steps = tj.pre_tokenizers(self.document)
        return any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)

    def plain(self, text: str) -> str:
        """The text as a runtime without Unicode normal forms, that puts a space before any text, must be asked it."""
        for form in self.unicode_forms:
            text = unicodedata.normalize(form, text)
        return text.lstrip(" ") if self.keeps_first_space else text

    def reference(self) -> Callable[[str], list[int]]:
        """text -> ids by Hugging Face's `tokenizers`; added tokens in the text are seen, none is put around it."""
        tokenizers = require("tokenizers", "reading a tokenizer")
        try:
            encoder = tokenizers.Tokenizer.from_str(json.dumps(self.document))
        except BaseException as e:  # of no class that is promised; a panic of its is no Exception
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise InputError(f"the tokenizer is none that `tokenizers` reads: {e}", hint="is tokenizer.json damaged?") from e

        def encode(text: str) -> list[int]:
            return list(encoder.encode(text, add_special_tokens=False).ids)

        return encode

    @cached_property
    def is_sentencepiece(self) -> bool:
        """Whether the merges are what scores make of a vocabulary: every way to make a piece, best piece first."""
        if self.kind != "spm" or self.scores is None:
            return False
        scores = self.scores
        pieces = {t: (i, scores[i]) for i, t in enumerate(self.tokens) if self.types[i] == "normal"}
        ranked = [pieces[a + b][1] for a, b in self.merges if a + b in pieces]
        return ranked == sorted(ranked, reverse=True) and set(merges_of(pieces)) <= set(self.merges)

    def sentencepiece(self, text: str) -> list[int] | None:
        """The ids of SentencePiece's own rule for a text without added tokens; None for tokenizers not made by it."""
        if not self.is_sentencepiece or self.scores is None or self.types.count("byte") != 256:
            return None
        if self.remove_extra_whitespaces:
            text = re.sub(" {2,}", " ", text).strip(" ")
        text = (" " + text if self.add_space_prefix and text else text).replace(" ", SPACE)
        return cut_bpe(text, self._ids, self.scores)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.tokens) if self.types[i] in ("normal", "byte")}

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
        re.sub(r"\\(u[0-9a-f]{4}|[nrt\\])", lambda m: escapes.get(m[1]) or chr(int(m[1][1:], 16)), line) for line in lines
    )


def read_tokenizer(folder: Path, vocab_rows: int, *, model_folder: Path | None = None) -> Tokenizer:
    """Read the tokenizer in a folder, for an embedding of `vocab_rows` rows.

    From tokenizer.json, else tokenizer.model (SentencePiece), else vocab.json and merges.txt. Rows beyond the
    vocabulary become unused tokens "[PADi]". config.json and generation_config.json are the model folder's, where the
    tokenizer lies elsewhere (beside an adapter).
    Errors: InputError for missing, unreadable or contradicting files, and for ids beyond the embedding;
    UnsupportedError for models other than BPE and Unigram.
    """
    with misshapen(f"{folder}: the tokenizer"):
        return _read(folder, vocab_rows, model_folder or folder)


def _read(folder: Path, vocab_rows: int, model_folder: Path) -> Tokenizer:
    config = read_json(folder / "tokenizer_config.json")
    inline = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    document = tj.read_document(folder)
    kind = _kind(folder, document)
    added = tj.added_tokens(folder, document, config)
    by_id = _by_id(folder, document, added, vocab_rows)
    model = read_json(model_folder / "config.json")
    special = _special_ids(folder, config, model, document, {text: i for i, text in by_id.items()})
    for i in (special[name] for name in ("bos", "eos") if name in special):
        added.setdefault(i, AddedToken(i, by_id[i], True, False, False, False, False))
    add_bos, add_eos = _around(document, config, special)
    unknown = special.get("unk") if special.get("unk") not in (special.get("bos"), special.get("eos")) else None
    types = _types(kind, unknown, added.values(), by_id, vocab_rows)
    tokens = _padded(by_id, vocab_rows)
    steps = tj.normalizers(document)
    charsmap = next((s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"), None)
    return Tokenizer(
        kind=kind,
        tokens=tokens,
        types=types,
        scores=_scores(kind, folder, document, tokens),
        merges=tj.merges(document),
        added=tuple(added[i] for i in sorted(added)),
        special=special,
        stops=tuple(i for i in _stops(model_folder, special) if i in by_id),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=tj.adds_space_prefix(document),
        remove_extra_whitespaces=tj.removes_extra_spaces(document),
        ignore_merges=bool(document["model"].get("ignore_merges")),
        charsmap=base64.b64decode(charsmap) if charsmap else None,
        chat_templates=read_chat_templates(folder, inline),
        document=tj.with_added_tokens(document, (added[i] for i in sorted(added))),
    )


def _kind(folder: Path, document: Mapping[str, Any]) -> Kind:
    model = document["model"]
    if model["type"] == "Unigram":
        return "unigram"
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedError(f"{folder}: a {model['type']} tokenizer; known are byte-level BPE, SentencePiece, Unigram")
    if any(step["type"] == "ByteLevel" for step in tj.pre_tokenizers(document)):
        return "bpe"
    if model.get("byte_fallback"):
        return "spm"
    raise UnsupportedError(f"{folder}: a BPE tokenizer that is neither byte-level nor falls back to bytes")


def _by_id(folder: Path, document: Mapping[str, Any], added: Mapping[int, AddedToken], vocab_rows: int) -> dict[int, str]:
    """id -> text of the vocabulary and the added tokens; the ids fit the embedding and no text stands twice."""
    by_id = {i: text for text, i in tj.vocabulary(document)}
    by_id |= {i: token.text for i, token in added.items()}
    if odd := next((i for i in by_id if type(i) is not int or i < 0), None):
        raise InputError(f"{folder}: {by_id[odd]!r} has the id {odd!r}; a count was wanted")
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
    return tuple([by_id[i] if i in by_id else _padding(i, taken) for i in range(vocab_rows)])


def _padding(i: int, taken: set[str]) -> str:
    name = f"[PAD{i}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _types(
    kind: Kind, unknown: int | None, added: Iterable[AddedToken], by_id: Mapping[int, str], vocab_rows: int
) -> tuple[TokenType, ...]:
    types: list[TokenType] = ["normal" if i in by_id else "unused" for i in range(vocab_rows)]
    if kind != "bpe":
        for i, text in by_id.items():
            if BYTE_TOKEN.fullmatch(text):
                types[i] = "byte"
    for token in added:
        types[token.id] = "control" if token.special else "user"
    if kind != "bpe" and unknown is not None:  # byte-level BPE knows every byte, its "unk" is some other token
        types[unknown] = "unknown"
    return tuple(types)


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
    for rank, (left, right) in enumerate(tj.merges(document)):
        ranks.setdefault(left + right, -float(rank))
    return tuple(ranks.get(text, 0.0 if BYTE_TOKEN.fullmatch(text) else UNMERGED) for text in tokens)


def _special_ids(
    folder: Path,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    document: Mapping[str, Any],
    ids: Mapping[str, int],
) -> dict[str, int]:
    """bos, eos, unk ... by text from tokenizer_config.json or special_tokens_map.json, else by id from config.json,
    else from the SentencePiece model, else from what the post-processor puts around a text."""
    by_text = read_json(folder / "special_tokens_map.json")
    special: dict[str, int] = {}
    for name in SPECIAL:
        entry = config.get(f"{name}_token") or by_text.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = model.get(f"{name}_token_id")
        if isinstance(text, str) and text in ids:
            special[name] = ids[text]
        elif isinstance(number, int) and number in ids.values():
            special[name] = number
    if (folder / "tokenizer.model").is_file():
        pieces = read_sentencepiece(folder / "tokenizer.model")
        stored = {name: pieces.pieces[i].text for name, i in pieces.special.items()}
        special = {name: ids[text] for name, text in stored.items() if text in ids} | special
    unknown = document["model"].get("unk_id")  # Unigram's, by id; BPE's by text
    unknown = ids.get(document["model"].get("unk_token") or "") if unknown is None else unknown
    if unknown is not None:
        special.setdefault("unk", unknown)
    first, last = tj.around(document)
    return {**({} if first is None else {"bos": first}), **({} if last is None else {"eos": last}), **special}


def _around(document: Mapping[str, Any], config: Mapping[str, Any], special: Mapping[str, int]) -> tuple[bool, bool]:
    """(add_bos, add_eos): tokenizer_config.json's word if it has one, else what the post-processor does."""
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
        return bos and "bos" in special, eos and "eos" in special
    first, last = tj.around(document)
    return first is not None and first == special["bos"], last is not None and last == special["eos"]


def _stops(folder: Path, special: Mapping[str, int]) -> tuple[int, ...]:
    listed = read_json(folder / "generation_config.json").get("eos_token_id", [])
    stops = [special["eos"]] if "eos" in special else []
    stops += [i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)]
    return tuple(dict.fromkeys(stops))
