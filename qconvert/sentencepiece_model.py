"""A SentencePiece model file (tokenizer.model) as the tokenizer.json that behaves like it.

Only the fields that decide how text is cut are read, by a small protobuf reader.
Source of the field numbers: sentencepiece's src/sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from qconvert.errors import InputError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
EXTRA_SPACES = " {2,}"
SPECIAL_FIELDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # of TrainerSpec, with its defaults


class Piece(NamedTuple):
    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """special: ids of unk, bos, eos and pad, where the model has them."""

    pieces: tuple[Piece, ...]
    model_type: int
    special: Mapping[str, int]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse a .model file. InputError where it is not one; UnsupportedError for word and character models."""
    try:
        pieces: list[Piece] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                pieces.append(_piece(dict(_fields(_bytes(value)))))
            elif field == 2:
                trainer = dict(_fields(_bytes(value)))
            elif field == 3:
                normalizer = dict(_fields(_bytes(value)))
        return _model(path, pieces, trainer, normalizer)
    except (IndexError, KeyError, struct.error, TypeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not a SentencePiece model ({e})") from e


def _model(
    path: Path, pieces: list[Piece], trainer: Mapping[int, int | bytes], normalizer: Mapping[int, int | bytes]
) -> SentencePieceModel:
    if not pieces:
        raise InputError(f"{path}: not a SentencePiece model: it holds no pieces")
    model_type = _number(trainer.get(3, UNIGRAM))
    if model_type not in (UNIGRAM, BPE):
        raise UnsupportedError(f"{path}: SentencePiece model type {model_type}; known are unigram (1) and bpe (2)")
    special = {name: _signed(trainer.get(field, default)) for name, (field, default) in SPECIAL_FIELDS.items()}
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type,
        special={name: i for name, i in special.items() if 0 <= i < len(pieces)},
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _signed(value: int | bytes) -> int:
    number = _number(value)
    return number - (1 << 64) if number >> 63 else number


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))[0]
    return Piece(_bytes(fields[1]).decode("utf-8"), score, _number(fields.get(3, NORMAL)))


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("a string stands where a number should")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number stands where a string should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise TypeError(f"wire type {wire} at byte {at}")
        n, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if at + n > len(data):
            raise IndexError(f"{n} bytes at {at} reach beyond the end")
        yield tag >> 3, data[at : at + n]
        at += n


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise TypeError(f"a number without end at byte {at}")


def as_tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """The model written as a tokenizer.json; for BPE the merges follow from the scores."""
    added = [
        {"id": i, "content": p.text, "special": p.type != USER_DEFINED, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for i, p in enumerate(model.pieces)
        if p.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    unknown = next((i for i, p in enumerate(model.pieces) if p.type == UNKNOWN), None)
    byte_fallback = any(p.type == BYTE for p in model.pieces)
    if model.model_type == UNIGRAM:
        body: dict[str, Any] = {"type": "Unigram", "vocab": [[p.text, p.score] for p in model.pieces]}
        body |= {"unk_id": unknown, "byte_fallback": byte_fallback}
    else:
        vocab = {p.text: i for i, p in enumerate(model.pieces)}
        mergeable = {p.text: (i, p.score) for i, p in enumerate(model.pieces) if p.type in (NORMAL, UNUSED)}
        body = {"type": "BPE", "vocab": vocab, "merges": merges_of(mergeable), "fuse_unk": True}
        body |= {"unk_token": None if unknown is None else model.pieces[unknown].text, "byte_fallback": byte_fallback}
        body |= dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return {"version": "1.0", "added_tokens": added, "normalizer": _normalizer(model), "model": body} | {
        "post_processor": _bos_first(model), "pre_tokenizer": None, "decoder": None, "truncation": None, "padding": None
    }  # fmt: skip


def _bos_first(model: SentencePieceModel) -> dict[str, Any] | None:
    """Llama's habit, which the model file itself does not tell: BOS before each text of a BPE model."""
    bos = model.special.get("bos")
    if bos is None or model.model_type != BPE:
        return None
    token, text = {"id": model.pieces[bos].text, "type_id": 0}, {"id": "A", "type_id": 0}
    single = [{"SpecialToken": token}, {"Sequence": text}]
    special = {token["id"]: {"id": token["id"], "ids": [bos], "tokens": [token["id"]]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _normalizer(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": EXTRA_SPACES}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def merges_of(pieces: Mapping[str, tuple[int, float]]) -> list[tuple[str, str]]:
    """Every way to join two pieces {text: (id, score)} into a third, best score of the third first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for text, (_, score) in pieces.items():
        for cut in range(1, len(text)):
            left, right = pieces.get(text[:cut]), pieces.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-score, left[0], right[0], text[:cut], text[cut:]))
    return [(left, right) for *_, left, right in sorted(merges)]


def cut_bpe(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """SentencePiece's BPE: join the two neighbours that make the piece of the best score, the leftmost of equals first.

    `text` has its spaces written as "▁"; a character that is no piece becomes its bytes.
    Hugging Face's BPE ranks pairs instead of pieces, so the two differ where a piece can be made in several ways.
    """
    symbols = list(text)
    while True:
        joined = [ids.get(a + b) for a, b in pairwise(symbols)]
        best = max((scores[i] for i in joined if i is not None), default=None)
        if best is None:
            break
        at = next(n for n, i in enumerate(joined) if i is not None and scores[i] == best)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    out: list[int] = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out
