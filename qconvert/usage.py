"""How outputs are run: what a format says of its own, found by name (registry group "usages")."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from qconvert import registry


class Made(NamedTuple):
    """An output. files: names, within the folder where it is one; task: the Hub's pipeline_tag; modelfile: Ollama's, if any."""

    name: str
    quant: str
    files: tuple[str, ...]
    folder: str | None
    task: str | None
    modelfile: str | None = None


class Command(NamedTuple):
    """What to type or to run, in `language`, where `runtime` is installed."""

    runtime: str
    language: str
    code: str


class Usage(NamedTuple):
    """library: the Hub's library_name."""

    library: str
    commands: tuple[Command, ...]


def usage_of(format: str, made: Made) -> Usage:
    """No commands for a format that says nothing."""
    if format not in registry.entries("usages"):
        return Usage(format, ())
    return cast(Callable[[Made], Usage], registry.find("usages", format))(made)
