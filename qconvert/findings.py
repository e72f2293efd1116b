"""What is wrong with a file that somebody made: one record for all formats, and what every tokenizer is asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from qconvert.chat import render
from qconvert.errors import InputError
from qconvert.scheme import Array

Severity = Literal["error", "warning", "note"]
# tokens that models are trained to begin a turn of a conversation with
TURNS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|turn>", "[INST]", "<|start_of_role|>")
MARKED = re.compile(r"<[|｜/]?[\w▁ -]{1,40}[|｜]?>|\[/?[A-Z_]{2,20}\]")
CONVERSATION = ({"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is four."})


class Finding(NamedTuple):
    """error: it does not run, or is not what was meant; warning: it may be; note: good to know. place: a tensor or a key.

    rule: what kind it is, a name of RULES that does not change.
    """

    severity: Severity
    place: str
    what: str
    do: str
    rule: str = "finding"


class Vocabulary(NamedTuple):
    """A tokenizer, whoever stores it. `marked`: ids that are no plain text (control, user-defined).

    stops: ids that end a generation, by the file's keys; by_text: texts at which the runtime ends it whatever the keys say.
    n_rows: of the embedding; None where the file has none.
    """

    tokens: Sequence[str]
    marked: Collection[int]
    stops: Sequence[int]
    template: str | None
    special: dict[str, int]  # bos, eos ...
    by_text: Collection[str] = ()
    n_rows: int | None = None


# kinds of findings; reports name them
UNREAD = "not-looked-into"
RULES = {
    "finding": "Something is wrong with the file",
    UNREAD: "A part of the file was not looked into, so that nothing is known of it",
    "damaged-file": "Bytes are missing, overlap, or belong to no tensor",
    "stale-file": "A file beside the others is of another model, or names other files than there are",
    "not-finite": "Weights or scales are NaN or infinite",
    "wrong-type": "The file is not of the type that its name, its keys or its configuration say",
    "missing-key": "A key that programs need is missing",
    "wrong-key": "Keys contradict each other, the tensors or the vocabulary",
    "rope": "Keys of rotary embedding are missing, stale or contradict each other",
    "tied-head": "The head is tied and should not be, or repeats the embedding",
    "vocabulary": "Tokens do not fit the embedding, or one text is two tokens",
    "stop-token": "No token ends a generation, or one that does not exist",
    "chat-template": "There is no chat template, or it does not fit the vocabulary",
}


class Places(NamedTuple):
    """What the format calls each thing, and how to mend it."""

    tokens: str
    stops: str
    template: str
    types: str
    mend_stops: str


def of_vocabulary(vocabulary: Vocabulary, places: Places, causal: bool) -> list[Finding]:
    """causal: the model writes text, so it must know where to end."""
    tokens, ids = vocabulary.tokens, {text: i for i, text in enumerate(vocabulary.tokens)}
    found: list[Finding] = []
    if vocabulary.n_rows is not None and len(tokens) > vocabulary.n_rows:
        what = f"{len(tokens)} tokens, and the embedding has {vocabulary.n_rows} rows"
        found.append(
            Finding(
                "error", places.tokens, what, "resize the embedding, or take the tokenizer that belongs to it", "vocabulary"
            )
        )
    if len(ids) < len(tokens) and (twice := first_twice(tokens)):
        what = f"{twice!r} is token {ids[twice]} and one before it; {len(tokens) - len(ids)} more tokens than texts"
        found.append(
            Finding(
                "error", places.tokens, what, "give each token a text of its own: llama.cpp aborts on two alike", "vocabulary"
            )
        )
    for name, i in vocabulary.special.items():
        if not 0 <= i < len(tokens):
            what = f"{name} is token {i}, and there are {len(tokens)}"
            found.append(
                Finding("error", places.stops if name == "eos" else f"{name} token", what, "correct the id", "vocabulary")
            )
    if not causal:
        return found
    ends = [i for i in vocabulary.stops if 0 <= i < len(tokens)]
    by_text = [ids[t] for t in vocabulary.by_text if t in ids]
    if not ends and not by_text:
        found.append(Finding("warning", places.stops, "no token ends a generation", places.mend_stops, "stop-token"))
    chat = [t for t in TURNS if t in ids]
    if vocabulary.template is None:
        if chat and any(ids[t] in vocabulary.marked for t in chat):
            what = f"none, and the vocabulary has {', '.join(chat)}"
            found.append(
                Finding("note", places.template, what, "add it, if it was trained on chat: programs guess one", "chat-template")
            )
        return found
    return found + of_template(vocabulary, places, ids, {tokens[i] for i in {*ends, *by_text}})


def of_template(vocabulary: Vocabulary, places: Places, ids: dict[str, int], ends: set[str]) -> list[Finding]:
    assert vocabulary.template is not None
    tokens = vocabulary.tokens
    plain = [t for t in dict.fromkeys(MARKED.findall(vocabulary.template)) if t in ids and ids[t] not in vocabulary.marked]
    found = []
    if plain:
        what = f"the template writes {', '.join(plain[:5])}, which are plain text by their type: they would be cut to pieces"
        found.append(Finding("warning", places.types, what, "make them control tokens", "chat-template"))
    special = {"bos_token": "", "eos_token": ""}
    special |= {f"{name}_token": tokens[i] for name, i in vocabulary.special.items() if 0 <= i < len(tokens)}
    try:
        text = render(vocabulary.template, CONVERSATION, special, add_generation_prompt=False)
    except InputError as e:
        found.append(
            Finding("warning", places.template, e.message, "correct the template; programs without one guess", "chat-template")
        )
        return found
    behind = text.rpartition(CONVERSATION[-1]["content"])
    said = [t for t in MARKED.findall(behind[2]) if t in ids] if behind[1] else []
    if said and not ends & set(said):
        what = f"the template ends an answer with {said[0]}, token {ids[said[0]]}, at which a generation does not end"
        found.append(Finding("warning", places.stops, what, places.mend_stops, "stop-token"))
    return found


def first_twice(texts: Iterable[str]) -> str | None:
    """The first text that stands there a second time; empty ones aside, which runtimes name anew."""
    seen: set[str] = set()
    for text in texts:
        if text in seen and text:
            return text
        seen.add(text)
    return None


def n_not_finite(values: Array) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def not_finite(place: str, n: int, what: str, of: int) -> Finding:
    return Finding(
        "error", place, f"{n:,} of {of:,} {what} are NaN or infinite", "convert it again, from finite weights", "not-finite"
    )
