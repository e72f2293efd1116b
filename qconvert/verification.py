"""Prove a file that exists, whoever made it, against the model and adapters it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qconvert.errors import InputError, UnsupportedError
from qconvert.lowering import read_source, transform
from qconvert.parallel import default_threads
from qconvert.report import Report
from qconvert.request import Request, adapters_of, parse_model
from qconvert.sources import Store
from qconvert.target import reader_of


def verify_file(path: Path, against: str, adapters: Sequence[str] = (), threads: int | None = None) -> Report:
    """Run every check that needs no plan: the file's values through the graph, and its runtime. Report.exit is 6 on failure."""
    if not path.exists():
        raise InputError(f"{path} is not a file")
    known = reader_of(path)
    if known is None:
        raise UnsupportedError(f"{path}: no file of a known format", hint="a .gguf file, a .onnx file or its folder")
    reader, found = known
    name, named = parse_model(against)
    request = Request(name, (*named, *adapters_of(adapters)))
    store = Store()
    try:
        source = read_source(request, store)
        merged = transform(request, source)[0][-1].graph
        return reader.verify(found, source, merged, threads or default_threads())
    finally:
        store.close()
