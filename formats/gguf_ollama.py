"""A Modelfile for Ollama: the GGUF, its stop tokens and sampling, and its chat template in Go's syntax.

chat template (Jinja) -> rendered with marked contents -> what stands around them -> Go template -> rendered again on other
conversations: written only where every text is the same. Else Ollama has the template in the GGUF itself.
Source: ollama/ollama, docs/modelfile.mdx, parser/parser.go, server/images.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qconvert.chat import CONVERSATIONS, render
from qconvert.companions import context_of, tokenizer_of
from qconvert.emit import Plan
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_gotemplate import Message, Pieces, rendered
from qconvert.request import Request
from qconvert.target import Lowered, Source
from qconvert.tokenizer import Tokenizer

USUAL_CONTEXT = 4096  # Ollama's, where nothing is said
# of generation_config.json -> of a Modelfile
SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"
}  # fmt: skip
SYSTEM, USER, ANSWER, AGAIN = "qSystemq", "qUserq", "qAnswerq", "qAgainq"  # that no template has
LONG: tuple[tuple[Message, ...], ...] = tuple(
    (*first, {"role": "user", "content": "a {{ b }}\n\n- c"}, {"role": "assistant", "content": "d\n\ne"},
     {"role": "user", "content": "ünd? 日本"}, {"role": "assistant", "content": "ja"}, {"role": "user", "content": "g"})
    for first in ((), ({"role": "system", "content": "Two\n\nparagraphs."},))
)  # fmt: skip
SPACES: tuple[Message, ...] = ({"role": "user", "content": " a \n"},)


class Found(NamedTuple):
    """system: the template's own where a conversation has none. notes: what the Go template does otherwise."""

    template: str
    system: str
    notes: tuple[str, ...]


def mark(plan: Plan) -> str:
    return f"FROM ./{plan.files[0].path.name}"


def modelfile(request: Request, source: Source, lowered: Lowered) -> str:
    """UnsupportedError where Ollama could not run it."""
    plan = lowered.plan
    if request.to != "gguf":
        raise UnsupportedError(f"--modelfile: Ollama runs no {request.to}", hint="--to gguf")
    if len(plan.files) > 1:
        raise UnsupportedError("--modelfile: Ollama reads a GGUF of one file", hint="drop --split-max-size")
    name, tokenizer = plan.files[0].path.name, tokenizer_of(source, lowered.graph)
    if not name.isprintable() or '"' in name or name.strip() != name:
        raise UnsupportedError(f"--modelfile: {name!a} is no name that a Modelfile can say", hint="-o NAME.gguf")
    stops, chat = (stop_texts(tokenizer), template_lines(tokenizer)) if tokenizer else ([], [])
    context = context_of(lowered.graph)
    longest = f"PARAMETER num_ctx {context}"
    if context > USUAL_CONTEXT:
        longest = f"# the model's longest, in place of Ollama's usual one, takes memory: {longest}"
    lines = [mark(plan), *chat, *(f'PARAMETER stop "{text}"' for text in stops), longest]
    return "\n".join([*lines, *sampling(source.checkpoint.generation_config)]) + "\n"


def template_lines(tokenizer: Tokenizer) -> list[str]:
    """TEMPLATE, and SYSTEM where the model has one of its own; a comment that says why there is none, or what it leaves out."""
    if tokenizer.chat_template is None:
        return ["# no TEMPLATE: the model has no chat template"]
    tokens = {f"{role}_token": tokenizer.tokens[i] for role, i in tokenizer.special.items()}
    try:
        found = go_template(tokenizer.chat_template, tokens, tokenizer.add_bos)
    except (InputError, UnsupportedError) as e:
        return [f"# no TEMPLATE: {one_line(e.message)}; Ollama takes the one in the GGUF, or the nearest that it knows"]
    said = [*(f"# {note}" for note in found.notes), f'TEMPLATE """{found.template}"""']
    return [*said, f'SYSTEM """{found.system}"""'] if found.system else said


def one_line(text: str) -> str:
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())[:200]


def stop_texts(tokenizer: Tokenizer) -> list[str]:
    """Of every token that ends a generation, as far as a Modelfile can say them."""
    texts = dict.fromkeys(tokenizer.tokens[i] for i in tokenizer.stops)
    return [t for t in texts if t.isprintable() and '"' not in t and t.strip() == t != ""]


def sampling(config: Mapping[str, object]) -> list[str]:
    if config.get("do_sample") is False:
        return []
    found = ((name, config.get(key)) for key, name in SAMPLING.items())
    return [f"PARAMETER {name} {v:g}" for name, v in found if isinstance(v, int | float) and not isinstance(v, bool)]


# the template --------------------------------------------------------------------------------------


def go_template(jinja: str, tokens: Mapping[str, str], adds_bos: bool) -> Found:
    """UnsupportedError where what it makes is not what this one makes; InputError where it cannot be rendered.

    adds_bos: the runtime puts BOS before a prompt, so the template must not.
    """
    if re.search(r"strftime_now|datetime|random", jinja):
        raise UnsupportedError("the chat template says the time, or chance")
    bos = tokens.get("bos_token", "") if adds_bos else ""

    def wanted(messages: Sequence[Message]) -> str:
        return render(jinja, messages, tokens).removeprefix(bos)

    pieces = pieces_of(wanted)
    has_system = "system" in pieces.around
    pieces, default = own_system(pieces)
    template = str(pieces)
    for conversation in (*CONVERSATIONS, *LONG):
        first, *_ = conversation
        if first["role"] == "system" and not has_system:
            continue
        asked = conversation if first["role"] == "system" or not default else (as_system(default), *conversation)
        if rendered(template, asked) != wanted(conversation):
            raise UnsupportedError("the chat template does more than to put texts around messages")
    notes = []
    if not has_system:
        notes.append("the model's chat template takes no system message, so this one leaves it out")
    asked = (as_system(default), *SPACES) if default else SPACES
    if rendered(template, asked) != wanted(SPACES):
        notes.append("the model's chat template trims messages; this one does not")
    return Found(template, default, tuple(notes))


def as_system(text: str) -> Message:
    return {"role": "system", "content": text}


def pieces_of(wanted: Callable[[Sequence[Message]], str]) -> Pieces:
    """What stands around messages, from conversations whose contents are marks.

    Where one message's end and the next one's beginning meet, the cut is where it begins like a system message, if it does.
    """
    user, answer, again = ({"role": r, "content": c} for r, c in (("user", USER), ("assistant", ANSWER), ("user", AGAIN)))
    begin, between, back, last = cut(wanted((user, answer, again)), USER, ANSWER, AGAIN)
    alone, end = cut(wanted((user,)), USER)
    try:
        before, link, _ = cut(wanted((as_system(SYSTEM), user)), SYSTEM, USER)
    except (InputError, UnsupportedError):
        before, link = "", None
    before_user = common_suffix(begin, back if link is None else common_suffix(back, link) or back)
    before_user = before_user[like(before_user, before) :]
    behind_user = common_prefix(common_prefix(between, end), last)
    if at := like(between, before):
        behind_user = behind_user[:at]
    around = {
        "user": (before_user, behind_user),
        "assistant": (between[len(behind_user) :], back.removesuffix(before_user)),
    }
    folded = link is not None and not link.endswith(before_user)
    if link is not None:
        around["system"] = (before, "" if folded else link.removesuffix(before_user))
    return Pieces(alone.removesuffix(before_user), around, link if folded else None, end[len(behind_user) :])


def like(text: str, header: str) -> int:
    """Where in a text something begins as `header` does, by more than three characters; 0 where nothing does."""
    lengths = [len(common_prefix(text[i:], header)) for i in range(len(text))]
    return lengths.index(max(lengths)) if max(lengths, default=0) > 3 else 0


def own_system(pieces: Pieces) -> tuple[Pieces, str]:
    """The template's own system message, where it puts one before a conversation that has none: SYSTEM says it instead."""
    before, behind = pieces.around.get("system", ("", ""))
    start = pieces.start
    if not (before and behind and start.startswith(before) and start.endswith(behind)):
        return pieces, ""
    text = start[len(before) : len(start) - len(behind)]
    if not text or '"""' in text or text.strip() != text or not all(c.isprintable() or c == "\n" for c in text):
        return pieces, ""
    return pieces._replace(start=""), text


def cut(text: str, *marks: str) -> list[str]:
    """What is before, between and behind the marks; UnsupportedError where they are not there once each, in order."""
    out = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise UnsupportedError("the chat template leaves out messages, or repeats them")
        out.append(before)
    return [*out, text]


def common_prefix(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def common_suffix(a: str, b: str) -> str:
    return common_prefix(a[::-1], b[::-1])[::-1]
