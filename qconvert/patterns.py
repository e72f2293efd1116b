"""Patterns for names of modules that an input brings: matched as PEFT does, refused where matching could take for ever."""

from __future__ import annotations

import re
from functools import cache
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

REPEATS = (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT)
MANY, DEPTH, LENGTH = 16, 4, 2000  # how often is unbounded; unbounded repeats one behind another; characters


@cache
def matcher(pattern: str) -> re.Pattern[str]:
    """For a whole name, or the end of one behind a dot.

    re.error for what is no expression, or has repeats whose ways to match a name of 100 characters cannot be counted:
    repeats within repeats, and more than DEPTH in all.
    """
    if len(pattern) > LENGTH:
        raise re.error(f"{len(pattern)} characters, more than {LENGTH}")
    n, depth = repeats(parser.parse(pattern))
    if depth > 1 or n > DEPTH:
        raise re.error("repeats within repeats" if depth > 1 else f"{n} repeats without a bound, more than {DEPTH}")
    return re.compile(rf"(.*\.)?({pattern})$")


def repeats(tree: Any) -> tuple[int, int]:
    """Of a parsed expression: how many repeats have no bound, and how deep they lie in one another."""
    n = depth = 0
    for opcode, argument in tree:
        inner = [repeats(part) for part in subpatterns(argument)]
        more = int(opcode in REPEATS and argument[1] > MANY)
        n += more + sum(i[0] for i in inner)
        depth = max(depth, more + max((i[1] for i in inner), default=0))
    return n, depth


def subpatterns(argument: Any) -> list[Any]:
    if isinstance(argument, parser.SubPattern):
        return [argument]
    return [s for part in argument for s in subpatterns(part)] if isinstance(argument, tuple | list) else []
