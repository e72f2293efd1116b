"""Which of llama.cpp's pre-tokenizers cuts text as a given byte-level BPE tokenizer does, found by trying them.

A GGUF file only names its pre-tokenizer; the regular expression behind the name lives in the runtime. So the proof is a
vocabulary-only file per candidate, loaded in llama.cpp, that must give Hugging Face's ids on a corpus of hard texts.
tokenizer.json's own expression only decides who is tried first, and is all there is where llama.cpp is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

from qconvert.errors import UnsupportedError, UsageError, VerificationError
from qconvert.formats.gguf_kv import KV, encode, header
from qconvert.formats.gguf_tokenizer import metadata
from qconvert.tokenizer import Tokenizer, hard_corpus
from qconvert.tokenizer_json import pre_tokenizers

PRE_KEY = "tokenizer.ggml.pre"
UNREAD = "default"  # what is written for SentencePiece and Unigram, where llama.cpp reads no name
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The steps of tokenizer.json's pre-tokenizer, and the names that stand for them. Of two names for one expression the
# first skips the merges of words that are tokens ("ignore_merges"), the second does not; None where there is none.
STRUCTURES: Mapping[tuple[str, ...], tuple[str | None, str | None]] = {
    ("ByteLevel",): (None, "gpt-2"),
    ("Digits 1", "ByteLevel"): (None, "starcoder"),
    ("Punctuation", "ByteLevel", "Digits", "[0-9][0-9][0-9]"): (None, "falcon"),
    (LLAMA3,): ("llama-bpe", "dbrx"),
    (QWEN2,): (None, "qwen2"),
    (QWEN35,): (None, "qwen35"),
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3): (None, "deepseek-v3"),
    (CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?", "{1,3}"),): (None, "gpt-4o"),
    (CASED % ("", "", ""),): ("tekken", None),
    (" ?[^(\\s|[.,!?…。，、।۔،])]+",): (None, "bloom"),
}

# One name for each way of cutting that llama.cpp knows for byte-level BPE, the common ones first.
CANDIDATES = (
    "gpt-2", "llama-bpe", "dbrx", "qwen2", "starcoder", "gpt-4o", "tekken", "deepseek-v3", "falcon", "qwen35", "glm4",
    "chatglm-bpe", "deepseek-llm", "deepseek-coder", "minicpm5", "jais-2", "bloom", "viking", "youtu", "tiny_aya",
    "granite-embed-multi-97m", "superbpe", "bailingmoe", "seed-coder", "ufakzeka", "afmoe", "laguna", "exaone-moe",
    "spark2_5", "chameleon", "default",
)  # fmt: skip


class Difference(NamedTuple):
    """A text that Hugging Face (wanted) and llama.cpp (got) cut differently; `as_sentencepiece`: llama.cpp is right."""

    text: str
    wanted: list[int]
    got: list[int]
    as_sentencepiece: bool


class PreTokenizer(NamedTuple):
    """name: what GGUF calls it; verified: llama.cpp gave equal ids; reason: how it was found, or why not verified."""

    name: str
    verified: bool
    reason: str
    differences: tuple[Difference, ...] = ()


class Vocabulary(Protocol):
    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...
    def close(self) -> None: ...


class Runtime(Protocol):
    def missing(self) -> str | None: ...
    def open_vocab(self, path: Path) -> Vocabulary: ...


def find_pre(tokenizer: Tokenizer, runtime: Runtime, *, forced: str | None = None) -> PreTokenizer:
    """The pre-tokenizer name of a tokenizer, by behaviour where llama.cpp is installed, else by structure.

    Errors: UnsupportedError naming the nearest candidate and its first differing text, when none fits; UsageError for a
    forced name that llama.cpp does not know.
    """
    missing = runtime.missing()
    if missing is not None:
        name = forced or known_by_structure(tokenizer)
        if name is None:
            raise UnsupportedError(
                f"the pre-tokenizer {structure(tokenizer)} is not a known one, and without llama.cpp none can be tried",
                hint=f"{missing}, or --pre-tokenizer NAME",
            )
        return PreTokenizer(name, False, f"not verified: {missing}")
    with TemporaryDirectory(prefix="qconvert-") as folder:
        trial = Trial(tokenizer, runtime, Path(folder) / "vocab.gguf")
        return _forced(forced, trial) if forced is not None else _first_equal(tokenizer, trial)


def _forced(name: str, trial: Trial) -> PreTokenizer:
    try:
        return trial.of(name)
    except VerificationError as e:
        raise UsageError(f"--pre-tokenizer {name}: {e.message}", hint="known are " + ", ".join(CANDIDATES)) from e


def known_by_structure(tokenizer: Tokenizer) -> str | None:
    """The name whose published expression this tokenizer has; None where none has."""
    if tokenizer.kind != "bpe":
        return UNREAD
    skips, merges = STRUCTURES.get(structure(tokenizer), (None, None))
    return (skips or merges) if tokenizer.ignore_merges else (merges or skips)


def structure(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The steps of tokenizer.json's pre-tokenizer: a split by its expression, others by their kind."""
    return tuple(step for step in map(_name, pre_tokenizers(tokenizer.document)) if step is not None)


def _name(step: Mapping[str, Any]) -> str | None:
    match step["type"]:
        case "Split":
            return str(step["pattern"].get("Regex") or step["pattern"].get("String"))
        case "ByteLevel" if not step.get("use_regex", True):
            return None  # it only writes the bytes
        case "Digits" if step.get("individual_digits"):
            return "Digits 1"
        case kind:
            return str(kind)


def _first_equal(tokenizer: Tokenizer, trial: Trial) -> PreTokenizer:
    known = known_by_structure(tokenizer)
    tried: list[PreTokenizer] = []
    for name in dict.fromkeys([*([known] if known else []), *(CANDIDATES if tokenizer.kind == "bpe" else ())]):
        try:
            tried.append(trial.of(name))
        except VerificationError:  # a name that this llama.cpp does not know
            continue
        if tried[-1].verified:
            return tried[-1]
    if not tried:
        raise UnsupportedError("llama.cpp loads this vocabulary under no pre-tokenizer")
    nearest = min(tried, key=lambda t: len(t.differences))
    difference = next(d for d in nearest.differences if not d.as_sentencepiece)
    raise UnsupportedError(
        f"llama.cpp cannot cut text like this tokenizer. Nearest is its pre-tokenizer {nearest.name!r}: "
        f"{nearest.reason}; {describe(difference, tokenizer)}",
        hint=f"--pre-tokenizer {nearest.name} takes it all the same",
    )


def describe(difference: Difference, tokenizer: Tokenizer) -> str:
    """The differing text with both token lists, shortened to the part around the first difference."""
    wanted, got = difference.wanted, difference.got
    same = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    part = slice(max(0, same - 2), same + 6)
    names = [[tokenizer.tokens[i] for i in ids[part]] for ids in (wanted, got)]
    return (
        f"text {difference.text!r} is, from token {part.start} on, {wanted[part]} {names[0]} in Hugging Face "
        f"and {got[part]} {names[1]} in llama.cpp"
    )


class Trial:
    """A vocabulary-only file whose last key, the pre-tokenizer's name, is rewritten for each candidate."""

    def __init__(self, tokenizer: Tokenizer, runtime: Runtime, path: Path) -> None:
        encode_text = tokenizer.reference()
        texts = [text for text in dict.fromkeys(map(tokenizer.plain, hard_corpus())) if text]
        self._wanted = {text: encode_text(text) for text in texts}
        self._tokenizer = tokenizer
        self._ids: Sequence[int] | None = None
        if tokenizer.kind == "bpe":
            tokenizer, self._ids = cut_down(tokenizer, texts)
        kvs = [kv for kv in metadata(tokenizer, UNREAD) if kv.key != PRE_KEY]
        fixed = [KV("general.architecture", "str", "llama"), *kvs, KV(PRE_KEY, "str", UNREAD)]
        data = header(fixed)
        self._begin = len(data) - len(encode(fixed[-1]))
        path.write_bytes(data)
        self._path, self._runtime = path, runtime

    def of(self, name: str) -> PreTokenizer:
        with self._path.open("r+b") as file:
            file.seek(self._begin)
            file.write(encode(KV(PRE_KEY, "str", name)))
            file.truncate()
        model = self._runtime.open_vocab(self._path)
        try:
            found = tuple(differences(self._tokenizer, self._wanted, model, self._ids))
        finally:
            model.close()
        reason = f"{len(self._wanted) - len(found)} of {len(self._wanted)} texts are cut alike"
        if as_sentencepiece := sum(d.as_sentencepiece for d in found):
            reason += f", {as_sentencepiece} as SentencePiece cuts them and Hugging Face does not"
        return PreTokenizer(name, as_sentencepiece == len(found), reason, found)


def cut_down(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with only the tokens that lie in the texts, which cuts these just alike, and the old ids of them.

    Byte-level BPE makes and looks up nothing but parts of the text, so no other token can matter, however it is split.
    """
    alphabet = byte_alphabet()
    written = ["".join(alphabet[byte] for byte in text.encode()) for text in texts]
    longest = max(map(len, tokenizer.tokens))
    parts = {text[i:j] for text in written for i in range(len(text)) for j in range(i + 1, i + 1 + longest)}
    added = {token.id for token in tokenizer.added if any(token.text in text for text in texts)}
    others = {token.id for token in tokenizer.added} - added
    kept = [i for i, text in enumerate(tokenizer.tokens) if i in added or (text in parts and i not in others)]
    kept_texts = {tokenizer.tokens[i] for i in kept}
    small = replace(
        tokenizer,
        tokens=tuple(tokenizer.tokens[i] for i in kept),
        types=tuple(tokenizer.types[i] for i in kept),
        merges=tuple(pair for pair in tokenizer.merges if kept_texts.issuperset((*pair, "".join(pair)))),
        special={}, stops=(), add_bos=False, add_eos=False, chat_templates={},
    )  # fmt: skip
    return small, kept


def byte_alphabet() -> list[str]:
    """The character in which byte-level BPE writes each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def differences(
    tokenizer: Tokenizer, wanted: Mapping[str, Sequence[int]], model: Vocabulary, ids: Sequence[int] | None = None
) -> Iterator[Difference]:
    """The texts whose ids in llama.cpp are not Hugging Face's; `ids` renames the ids of a vocabulary cut down."""
    for text, tokens in wanted.items():
        got = model.tokenize(text, False, True)
        if ids is not None:
            got = [ids[i] for i in got]
        if got != list(tokens):
            yield Difference(text, list(tokens), got, got == tokenizer.sentencepiece(text))
