"""A Tokenizer as the tokenizer.* metadata of a GGUF file.

Source of the keys: gguf-py's constants.Keys.Tokenizer and llama.cpp's llama-vocab.cpp.  Oracle: llama.cpp itself,
through formats/gguf_pretokenizers.py and the tests.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_kv import KV
from qconvert.sentencepiece_model import SPACE
from qconvert.tokenizer import Tokenizer

MODELS = {"bpe": "gpt2", "spm": "llama", "unigram": "t5"}
TOKEN_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}

# Tokens at which llama.cpp ends a generation by their text alone.
ENDS_BY_TEXT = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>",
    "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip


def metadata(tokenizer: Tokenizer, pre: str) -> list[KV]:
    """Every tokenizer.* key of the file; `pre` names the pre-tokenizer (find_pre).

    Errors: UnsupportedError for a vocabulary that llama.cpp would abort on.
    """
    _refuse_aborts(tokenizer)
    ggml = "tokenizer.ggml."
    kvs = [
        KV(ggml + "model", "str", MODELS[tokenizer.kind]),
        KV(ggml + "pre", "str", pre),
        KV(ggml + "tokens", "arr_str", token_texts(tokenizer)),
    ]
    if tokenizer.scores is not None:
        kvs.append(KV(ggml + "scores", "arr_f32", tokenizer.scores))
    kvs.append(KV(ggml + "token_type", "arr_i32", [TOKEN_TYPES[t] for t in tokenizer.types]))
    if tokenizer.kind == "bpe":
        kvs.append(KV(ggml + "merges", "arr_str", [_merge(*pair) for pair in tokenizer.merges]))
    if tokenizer.kind == "unigram":
        kvs.append(KV(ggml + "remove_extra_whitespaces", "bool", tokenizer.remove_extra_whitespaces))
        if tokenizer.charsmap is not None:
            kvs.append(KV(ggml + "precompiled_charsmap", "arr_u8", tokenizer.charsmap))
    kvs += [KV(f"{ggml}{key}_token_id", "u32", i) for key, i in special_ids(tokenizer).items()]
    kvs += [
        KV(ggml + "add_bos_token", "bool", tokenizer.add_bos),
        KV(ggml + "add_eos_token", "bool", tokenizer.add_eos),
        KV(ggml + "add_space_prefix", "bool", tokenizer.add_space_prefix),
    ]
    return kvs + list(_chat_templates(tokenizer))


def token_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The V texts as llama.cpp matches them: outside BPE a user token's "▁" is the space it stands for."""
    if tokenizer.kind == "bpe":
        return tokenizer.tokens
    pairs = zip(tokenizer.tokens, tokenizer.types, strict=True)
    return tuple(text.replace(SPACE, " ") if type_ == "user" else text for text, type_ in pairs)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """GGUF's name -> id. Stops that llama.cpp would not know by their text become its end of turn and of message."""
    ids = {SPECIAL_KEYS[name]: i for name, i in tokenizer.special.items() if name in SPECIAL_KEYS}
    if "eos" not in ids and (eos := _harmless_eos(tokenizer)) is not None:
        ids["eos"] = eos
    return ids | dict(zip(("eot", "eom"), _extra_stops(tokenizer), strict=False))


def notes(tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp will do otherwise than Hugging Face, in sentences for the report."""
    found = []
    if tokenizer.unicode_forms:
        forms = ", ".join(tokenizer.unicode_forms)
        found.append(f"llama.cpp does not bring text into the normal form {forms} first, as the tokenizer does")
    if tokenizer.keeps_first_space:
        found.append("llama.cpp puts a space before text that already begins with one; Hugging Face does not")
    if tokenizer.prefixes_only_first:
        found.append("llama.cpp puts a space before text behind a special token, the tokenizer only at the beginning")
    if stripping := [t.text for t in tokenizer.added if (t.lstrip or t.rstrip) and not t.text.isspace()]:
        found.append(
            f"llama.cpp keeps white space beside {len(stripping)} added tokens that drop it ({stripping[0]!r})"
        )
    if missed := _extra_stops(tokenizer)[2:]:
        texts = ", ".join(repr(tokenizer.tokens[i]) for i in missed)
        found.append(f"llama.cpp cannot be told to stop at {texts}")
    if not tokenizer.stops:
        found.append("the checkpoint names no end-of-sequence token")
    return found


def _extra_stops(tokenizer: Tokenizer) -> list[int]:
    eos = tokenizer.special.get("eos")
    return [i for i in tokenizer.stops if i != eos and tokenizer.tokens[i] not in ENDS_BY_TEXT]


def _harmless_eos(tokenizer: Tokenizer) -> int | None:
    """A token that ends a generation anyway or never comes: without the key llama.cpp would end at an ordinary one."""
    ending = (i for i, text in enumerate(tokenizer.tokens) if text in ENDS_BY_TEXT)
    never = (tokenizer.types.index(type_) for type_ in ("unused", "control") if type_ in tokenizer.types)
    return next(ending, next(never, None))


def _merge(left: str, right: str) -> str:
    # a space inside a piece would read as the separator; GPT-2's alphabet writes a space byte as U+0120
    return f"{left.replace(' ', chr(0x120))} {right.replace(' ', chr(0x120))}"


def _chat_templates(tokenizer: Tokenizer) -> Iterator[KV]:
    others = {name: text for name, text in tokenizer.chat_templates.items() if name != "default"}
    if tokenizer.chat_template is not None:
        yield KV("tokenizer.chat_template", "str", tokenizer.chat_template)
    if others:
        yield KV("tokenizer.chat_templates", "arr_str", list(others))
    for name, text in others.items():
        yield KV(f"tokenizer.chat_template.{name}", "str", text)


def _refuse_aborts(tokenizer: Tokenizer) -> None:
    texts = token_texts(tokenizer)
    if len(set(texts)) != len(texts):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise UnsupportedError(f"two tokens would both be {twice!r}, and llama.cpp wants each text once")
    if tokenizer.kind == "spm" and (n := sum(t == "byte" for t in tokenizer.types)) != 256:
        raise UnsupportedError(f"a SentencePiece BPE vocabulary with {n} byte tokens; llama.cpp needs all 256")
