"""A SentencePiece model file (tokenizer.model) as the tokenizer.json that behaves like it.

Only the fields that decide how text is cut are read, by a small protobuf reader.
Source of the field numbers: sentencepiece's src/sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qconvert.errors import InputError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"


class Piece(NamedTuple):
    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    pieces: tuple[Piece, ...]
    model_type: int
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
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not a SentencePiece model ({e})") from e
    if not pieces:
        raise InputError(f"{path}: not a SentencePiece model: it holds no pieces")
    model_type = int(trainer.get(3, UNIGRAM))
    if model_type not in (UNIGRAM, BPE):
        raise UnsupportedError(f"{path}: SentencePiece model type {model_type}; known are unigram (1) and bpe (2)")
    charsmap = _bytes(normalizer.get(2, b""))
    return SentencePieceModel(
        tuple(pieces), model_type, charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    )


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))[0]
    return Piece(_bytes(fields[1]).decode("utf-8"), score, int(fields.get(3, NORMAL)))


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


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
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
        body = {"type": "BPE", "vocab": vocab, "merges": merges_of(model.pieces), "fuse_unk": True}
        body |= {"unk_token": None if unknown is None else model.pieces[unknown].text, "byte_fallback": byte_fallback}
        body |= dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return {"version": "1.0", "added_tokens": added, "normalizer": _normalizer(model), "model": body} | {
        "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
    }  # fmt: skip


def _normalizer(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def merges_of(pieces: tuple[Piece, ...]) -> list[list[str]]:
    """Every way to join two pieces into a third, best score first: what SentencePiece's BPE does at each step."""
    ids = {p.text: i for i, p in enumerate(pieces) if p.type in (NORMAL, UNUSED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-pieces[i].score, left, right, text[:cut], text[cut:]))
    return [[left, right] for *_, left, right in sorted(merges)]
