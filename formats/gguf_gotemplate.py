"""Go templates for Ollama, of the few constructs that are written here, and what they make of a conversation.

pieces -> text of the template; text + messages -> prompt, as Go's text/template and Ollama's server make it.
Source: ollama/ollama, template/template.go (Execute, collate); Go, text/template.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Message = Mapping[str, str]
ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class Pieces(NamedTuple):
    """What stands around the messages of each role.

    start: before all, where there is no system message. around: role -> what is before and behind; "system" is not there
    where none is taken. after_system: before the user's message that comes after the system message, where both are one
    turn; None: it begins as any. end: behind all.
    """

    start: str
    around: Mapping[str, tuple[str, str]]
    after_system: str | None
    end: str

    def __str__(self) -> str:
        start = literal(self.start)
        if start and "system" in self.around:
            start = f"{{{{ if not .System }}}}{start}{{{{ end }}}}"
        out = [start, "{{ range $i, $_ := .Messages }}"]
        for n, (role, (before, behind)) in enumerate(self.around.items()):
            first = literal(before)
            if role == "user" and self.after_system is not None:
                first = f"{{{{ if and $.System (eq $i 1) }}}}{literal(self.after_system)}{{{{ else }}}}{first}{{{{ end }}}}"
            choice = f'{"else " if n else ""}if eq .Role "{role}"'
            out.append(f"{{{{ {choice} }}}}{first}{{{{ .Content }}}}{literal(behind)}")
        return "".join([*out, "{{ end }}{{ end }}", literal(self.end)])


def literal(text: str) -> str:
    """Text as a template says it: strings of Go where it would be an action, or where a Modelfile's parser drops characters."""
    parts = re.split(r'(\{\{|\}\}|"{2,}|[^\x20-\x7e\n]+)', text)
    return "".join(p if i % 2 == 0 or plain(p) else f"{{{{ {quoted(p)} }}}}" for i, p in enumerate(parts))


def quoted(text: str) -> str:
    """A string of Go, which is one of Python as well."""
    escaped = (f"\\U{ord(c):08x}" if not " " <= c <= "~" else f"\\{c}" if c in '"\\' else c for c in text)
    return f'"{"".join(escaped)}"'


def plain(text: str) -> bool:
    """Letters, digits, punctuation and symbols beyond ASCII, which Go calls printable."""
    return text.isprintable() and not re.search(r'[\s{}"\U00010000-\U0010ffff]', text)


def rendered(template: str, messages: Sequence[Message]) -> str:
    """The prompt. ValueError for what is none of the constructs above."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    tokens = list(tokens_of(template))
    out, at = block(tokens, 0, {"System": system, "Messages": collated(messages)}, None)
    if at != len(tokens):
        raise ValueError("an end without a beginning")
    return out


def collated(messages: Sequence[Message]) -> list[Message]:
    """Ollama makes one of neighbours with one role."""
    out: list[dict[str, str]] = []
    for m in messages:
        if out and out[-1]["role"] == m["role"]:
            out[-1]["content"] += f"\n\n{m['content']}"
        else:
            out.append(dict(m))
    return list(out)


class Token(NamedTuple):
    action: bool
    text: str


def tokens_of(template: str) -> Iterator[Token]:
    at = 0
    for found in ACTION.finditer(template):
        if found.start() > at:
            yield Token(False, template[at : found.start()])
        yield Token(True, found[1])
        at = found.end()
    if at < len(template):
        yield Token(False, template[at:])


Values = Mapping[str, object]


def block(tokens: Sequence[Token], at: int, values: Values, message: tuple[int, Message] | None) -> tuple[str, int]:
    """What tokens from `at` on make up to their `end` or `else`, and where that is."""
    out = []
    while at < len(tokens):
        action, text = tokens[at]
        if not action:
            out.append(text)
        elif text == "end" or text.startswith("else"):
            return "".join(out), at
        elif text.startswith("if "):
            made, at = conditional(tokens, at, values, message)
            out.append(made)
        elif text == "range $i, $_ := .Messages":
            end, listed = at, values["Messages"]
            assert isinstance(listed, list)
            _, end = block(tokens, at + 1, values, (0, {"role": "", "content": ""}))
            out += [block(tokens, at + 1, values, each)[0] for each in enumerate(listed)]
            at = end
        elif text == ".Content" and message:
            out.append(message[1]["content"])
        elif STRING.fullmatch(text):
            out.append(ast.literal_eval(text))
        else:
            raise ValueError(f"an action that is not known: {text}")
        at += 1
    return "".join(out), at


def conditional(tokens: Sequence[Token], at: int, values: Values, message: tuple[int, Message] | None) -> tuple[str, int]:
    """What an if with its elses makes, and where its end is."""
    made: str | None = None
    while tokens[at].text != "end":
        condition = tokens[at].text.removeprefix("else").strip()
        text, at = block(tokens, at + 1, values, message)
        if made is None and (not condition or holds(condition.removeprefix("if "), values, message)):
            made = text
        if at == len(tokens):
            raise ValueError("an if without an end")
    return made or "", at


def holds(condition: str, values: Values, message: tuple[int, Message] | None) -> bool:
    if condition == "not .System":
        return not values["System"]
    if message and condition == "and $.System (eq $i 1)":
        return bool(values["System"]) and message[0] == 1
    if message and (role := re.fullmatch(r'eq \.Role "(\w+)"', condition)):
        return message[1]["role"] == role[1]
    raise ValueError(f"a condition that is not known: {condition}")
