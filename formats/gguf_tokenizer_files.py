"""The tokenizer of a GGUF as the files that checkpoints have: tokenizer.json and what lies beside it.

The inverse of gguf_tokenizer.metadata. What a GGUF does not hold is left out (normal forms, white space that added tokens
swallow), so text is cut as llama.cpp cuts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_pretokenizers import STRUCTURES
from qconvert.formats.gguf_tokenizer import MODELS, SPECIAL_KEYS, TOKEN_TYPES
from qconvert.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    as_tokenizer_json,
)

GGML = "tokenizer.ggml."
KV = Mapping[str, object]
# names under which llama.cpp cuts as under another's. Source: llama-vocab.cpp
ALIKE: Mapping[str, str] = {
    alias: name
    for name, text in {
        "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert olmo roberta-bpe",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "qwen2": "deepseek-r1-qwen kormo",
        "starcoder": "refact command-r smollm codeshell exaone minerva-7b",
        "dbrx": "smaug-bpe",
        "gpt-4o": "llama4",
    }.items()
    for alias in text.split()
}
HINT = "--tokenizer FOLDER names a folder with the model's tokenizer.json"


def tokenizer_files(kv: KV, path: Path) -> dict[str, object]:
    """File name -> JSON or text; nothing where the file holds no tokenizer.

    UnsupportedError for a pre-tokenizer whose expression is not known here.
    """
    model = kv.get(f"{GGML}model")
    tokens = strings(kv, "tokens", path)
    if model in (None, "none", "no_vocab") or not tokens:
        return {}
    kinds = {name: kind for kind, name in MODELS.items()}
    if model not in kinds:
        raise UnsupportedError(f"{path}: the tokenizer model {model!r} is not read from GGUF", hint=HINT)
    types = cast(list[int], kv.get(f"{GGML}token_type") or [TOKEN_TYPES["normal"]] * len(tokens))
    if len(types) != len(tokens) or not set(TOKEN_TYPES.values()).issuperset(types):
        raise InputError(f"{path}: {GGML}token_type does not have a type of 1 to 6 for each of {len(tokens)} tokens")
    special = special_ids(kv, len(tokens), path)
    kind = kinds[str(model)]
    document = byte_level(kv, path, tokens, types) if kind == "bpe" else sentencepiece(kv, path, tokens, types, special)
    add_bos, add_eos = adds(kv, "bos", kind), adds(kv, "eos", kind)
    if any(name in str(kv.get("general.name", "")).lower() for name in ("phi-3", "phi3")):
        swallow_space(document["added_tokens"])
    document["post_processor"] = around(tokens, special, add_bos, add_eos)
    texts = {f"{name}_token": tokens[i] for name, i in special.items() if name in SPECIAL_KEYS}
    config = {**texts, "add_bos_token": add_bos, "add_eos_token": add_eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"clean_up_tokenization_spaces": False}
    files: dict[str, object] = {"tokenizer.json": document, "tokenizer_config.json": config, **templates(kv)}
    stops = [special[name] for name in ("eos", "eot", "eom") if name in special]
    generation = {f"{name}_token_id": special[name] for name in ("bos", "pad") if name in special}
    files["generation_config.json"] = generation | ({"eos_token_id": stops} if stops else {})
    return files


def strings(kv: KV, name: str, path: Path) -> list[str]:
    value = kv.get(GGML + name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{path}: {GGML}{name} is no list of texts")
    return value


def special_ids(kv: KV, n: int, path: Path) -> dict[str, int]:
    """bos, eos, unk … by our names, and llama.cpp's other stops."""
    found = {}
    for name, key in {**SPECIAL_KEYS, "eot": "eot", "eom": "eom"}.items():
        value = kv.get(f"{GGML}{key}_token_id")
        if value is None or value == 0xFFFFFFFF:
            continue
        if not isinstance(value, int) or not 0 <= value < n:
            raise InputError(f"{path}: {GGML}{key}_token_id is {value}, and there are {n} tokens")
        found[name] = value
    return found


def adds(kv: KV, name: str, kind: str) -> bool:
    """Whether a text gets this token by itself; what llama.cpp does where the file does not say."""
    llama3 = ALIKE.get(str(kv.get(f"{GGML}pre")), kv.get(f"{GGML}pre")) == "llama-bpe"
    otherwise = {"bos": kind == "spm" or (kind == "bpe" and llama3), "eos": kind == "unigram"}[name]
    return bool(kv.get(f"{GGML}add_{name}_token", otherwise))


def added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Those that are matched in a text before all else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole = {TOKEN_TYPES[t] for t in ("unknown", "control", "user")}
    return [
        {"id": i, "content": text, "special": kind != TOKEN_TYPES["user"], **flags}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in whole
    ]


def swallow_space(added: list[dict[str, Any]]) -> None:
    """Special tokens take the white space behind them: of phi-3 llama.cpp knows it by the model's name alone."""
    for token in added:
        token["rstrip"] = token["content"] == "</s>" or (token["special"] and token["content"] not in PHI3_PLAIN)


PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


# byte-level BPE -----------------------------------------------------------------------------------


def byte_level(kv: KV, path: Path, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    steps, skips_merges = pre_tokenizer(kv, path)
    added = added_tokens(tokens, types)
    vocab = {text: i for i, text in enumerate(tokens) if types[i] != TOKEN_TYPES["unused"]}
    merges = [merge.split(" ", 1) if not merge.startswith(" ") else [" ", merge[2:]] for merge in strings(kv, "merges", path)]
    merges = [pair for pair in merges if all(part in vocab for part in (*pair, "".join(pair)))]
    model: dict[str, Any] = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": skips_merges}
    model |= {"byte_fallback": False, "fuse_unk": False}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None} | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": byte, "model": model,
    }  # fmt: skip


def pre_tokenizer(kv: KV, path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Steps of tokenizer.json that cut as llama.cpp does under the name in the file; whether tokens are not merged."""
    name = str(kv.get(f"{GGML}pre", "none"))
    known = ALIKE.get(name, name)
    for steps, names in STRUCTURES.items():
        if known in names:
            byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": "ByteLevel" in steps}
            listed = [byte if step == "ByteLevel" else _step(step) for step in steps]
            return (listed if byte in listed else [*listed, byte]), names[0] == known
    known_names = sorted({n for names in STRUCTURES.values() for n in names if n} | ALIKE.keys())
    message = f"{path}: the pre-tokenizer {name!r} has no tokenizer.json here; there are {', '.join(known_names)}"
    raise UnsupportedError(message, hint=HINT)


def _step(name: str) -> dict[str, Any]:
    match name:
        case "Digits" | "Digits 1":
            return {"type": "Digits", "individual_digits": name == "Digits 1"}
        case "Punctuation":
            return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": name}, "behavior": "Isolated", "invert": False}


# SentencePiece ------------------------------------------------------------------------------------


def sentencepiece(
    kv: KV, path: Path, tokens: Sequence[str], types: Sequence[int], special: Mapping[str, int]
) -> dict[str, Any]:
    """BPE by scores, or unigram."""
    unigram = kv[f"{GGML}model"] == MODELS["unigram"]
    scores = kv.get(f"{GGML}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{path}: {len(tokens)} tokens, but no score for each of them")
    charsmap = bytes(b & 255 for b in cast(list[int], kv.get(f"{GGML}precompiled_charsmap", [])))
    model = SentencePieceModel(
        pieces=tuple(Piece(*piece) for piece in zip(tokens, scores, (_PIECES[t] for t in types), strict=True)),
        model_type=UNIGRAM if unigram else BPE,
        special={},
        charsmap=charsmap,
        add_dummy_prefix=bool(kv.get(f"{GGML}add_space_prefix", True)),
        remove_extra_whitespaces=bool(kv.get(f"{GGML}remove_extra_whitespaces", False)),
    )
    document = as_tokenizer_json(model)
    start = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_dummy_prefix else []
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    document["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}, *start]}
    return document


_PIECES = {
    TOKEN_TYPES[name]: piece
    for name, piece in (("normal", NORMAL), ("unknown", UNKNOWN), ("control", CONTROL), ("user", USER_DEFINED),
                        ("unused", UNUSED), ("byte", BYTE))
}  # fmt: skip


# what lies around ---------------------------------------------------------------------------------


def around(tokens: Sequence[str], special: Mapping[str, int], add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text and EOS behind it."""
    first = [special["bos"]] if add_bos and "bos" in special else []
    last = [special["eos"]] if add_eos and "eos" in special else []
    if not first and not last:
        return None

    def parts(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before, behind = ([{"SpecialToken": {"id": tokens[i], "type_id": type_id}} for i in ids] for ids in (first, last))
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *behind]

    named = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (*first, *last)}
    pair = [*parts("A", 0), *parts("B", 1)]
    return {"type": "TemplateProcessing", "single": parts("A", 0), "pair": pair, "special_tokens": named}


def templates(kv: KV) -> dict[str, object]:
    """Chat templates by the names of their files."""
    found: dict[str, object] = {}
    if isinstance(default := kv.get("tokenizer.chat_template"), str):
        found["chat_template.jinja"] = default
    for key, text in kv.items():
        name = key.removeprefix("tokenizer.chat_template.")
        if name != key and isinstance(text, str) and name.replace("_", "").replace("-", "").isalnum():
            found[f"additional_chat_templates/{name}.jinja"] = text
    return found
