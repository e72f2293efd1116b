"""Chat templates of a checkpoint, and their rendering as transformers does it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from qconvert.errors import MISSHAPEN, InputError, require

if TYPE_CHECKING:
    from jinja2 import Environment, nodes
    from jinja2.parser import Parser
    from jinja2.runtime import Context

LINES, MOST = 100_000, 1_000_000  # of code that a rendering runs; characters, entries or the number that a product makes
CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello, who are you?"},),
    (
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And twice that?\n\n  Say why."},
    ),
    ({"role": "system", "content": "You are terse."}, {"role": "user", "content": "Name a prime."}),
)


def read_chat_templates(folder: Path, inline: object) -> dict[str, str]:
    """Templates by name; "default" is the one in use.

    chat_template.jinja and additional_chat_templates/*.jinja stand before `inline`, the value of "chat_template" in
    chat_template.json or tokenizer_config.json: one text, or a list of {"name", "template"}.
    """
    files = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    try:
        if files:
            return {name: path.read_text("utf-8") for name, path in sorted(files.items())}
    except ValueError as e:
        raise InputError(f"{folder}: a chat template is not UTF-8: {e}") from e
    if isinstance(inline, str):
        return {"default": inline}
    if inline is None:
        return {}
    if not isinstance(inline, list):
        raise InputError(f"{folder}: chat_template is {str(inline)[:80]!r}; a text was wanted")
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in inline}
    except (KeyError, TypeError) as e:
        raise InputError(f"{folder}: chat_template is a list without names and templates") from e


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text that a template makes of a conversation; `tokens` has bos_token, eos_token ... by name.

    Sandboxed: a template comes from the input and may touch nothing. InputError where it fails, refuses, or does not end.
    """
    environment = _environment()
    from jinja2 import TemplateError

    try:
        with few_lines():
            text: str = environment.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **tokens
            )
    except (TemplateError, *MISSHAPEN) as e:
        raise InputError(f"the chat template cannot be rendered: {e}") from e
    return text


@contextmanager
def few_lines() -> Iterator[None]:
    """Around a rendering: InputError where more than LINES lines of the template's code run, as in loops within loops."""
    before, left = sys.gettrace(), LINES

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise InputError(f"the chat template runs for more than {LINES} lines", hint="do not trust this input")
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line(frame, event, argument) if frame.f_code.co_filename == "<template>" else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


@cache
def _environment() -> Environment:
    """Jinja as transformers sets it up."""
    require("jinja2", "rendering a chat template")
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what the assistant says, marked for training; renders as its content."""

        tags = {"generation"}  # noqa: RUF012  # declared by jinja2

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Products are refused that would fill the memory, also before a line runs: jinja2 folds constants."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            factors = [len(x) if isinstance(x, Sized) else abs(x) for x in (left, right)]
            if (operator == "**" and factors[1] > 64) or factors[0] * factors[1] > MOST:
                raise ValueError(f"{operator} makes more than {MOST}")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
