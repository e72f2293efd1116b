"""Conversions that are not of this machine alone: outputs by URL, and weights that others evaluate."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from qconvert.emit import Executor
from qconvert.request import Request
from qconvert.url_files import is_url, refuse_existing, staging, upload


class Elsewhere(NamedTuple):
    """Where an output is wanted, and the folder here where it is made."""

    url: str
    folder: Path

    def place(self, path: Path) -> str:
        return f"{self.url.rpartition('/')[0]}/{path.relative_to(self.folder).as_posix()}"

    def send(self) -> None:
        """Copy what was made, and what was written beside it; small files, which name the others, last."""
        made = sorted((p for p in self.folder.rglob("*") if p.is_file()), key=lambda path: -path.stat().st_size)
        upload([(path, self.place(path)) for path in made])


def made_here(request: Request, stack: ExitStack) -> tuple[Request, Elsewhere | None]:
    """Of an output by URL: the request that makes it in a folder here, which `stack` removes."""
    if not isinstance(request.output, str) or not is_url(request.output):
        return request, None
    url = request.output.rstrip("/")
    refuse_existing(url, request.force or request.dry_run)
    folder = stack.enter_context(staging(url))
    return replace(request, output=folder / url.rpartition("/")[2], force=True), Elsewhere(url, folder)


def executor_of(request: Request) -> Executor | None:
    """None: threads."""
    if request.executor == "threads":
        return None
    from qconvert.ray_executor import RayExecutor

    return RayExecutor()
