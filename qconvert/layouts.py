"""Layouts by name: `gguf.q4_k` is the entry q4_k of the format gguf's table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import cast

from qconvert import registry
from qconvert.errors import UnsupportedError
from qconvert.scheme import Layout


@cache
def layout_of(name: str) -> Layout:
    table = cast(Mapping[str, Layout], registry.find("layouts", name.partition(".")[0]))
    if name not in table:
        raise UnsupportedError(f"no layout is called {name!r}", hint=f"there are {', '.join(table)}")
    return table[name]
