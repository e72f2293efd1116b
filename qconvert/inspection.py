"""What is in a file or folder, from headers alone: tensors, types, and the true bits of a weight, three ways."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from qconvert.errors import UsageError
from qconvert.formats.gguf_header import read_header
from qconvert.report import nbytes_text, table
from qconvert.scheme import SCHEMES
from qconvert.sources import Store, find_model
from qconvert.text import format


class Item(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def inspect_file(text: str) -> dict[str, Any]:
    """Facts about a .gguf file, a .safetensors or .bin file, or a checkpoint or adapter folder."""
    path = Path(text) if Path(text).is_file() else find_model(text)
    if path.is_file() and (path.suffix == ".gguf" or _magic(path) == b"GGUF"):
        header = read_header(path)
        items = [Item(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors]
        return facts(str(path), "gguf", items, header.file_nbytes, header.kv)
    store = Store()
    try:
        store.add("base", path)
        tensors = store.tensors("base")
        items = [Item(name, i.dtype, i.shape, math.prod(i.shape) * _nbytes(i.dtype)) for name, i in tensors.items()]
        folder = store.roots["base"]
        files = {folder / i.ref.partition("#")[0].partition("/")[2] for i in tensors.values()}
    finally:
        store.close()
    kind = "safetensors" if any(f.suffix == ".safetensors" for f in files) else "pytorch"
    return facts(str(path), kind, items, sum(f.stat().st_size for f in files), {})


def _magic(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(4)


def _nbytes(dtype: str) -> int:
    bits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(bits or 8) // 8


def facts(path: str, kind: str, items: list[Item], file_nbytes: int, kv: dict[str, object]) -> dict[str, Any]:
    return {
        "path": path,
        "format": kind,
        "nbytes": file_nbytes,
        "weights": sum(math.prod(i.shape) for i in items),
        "bpw": bits_per_weight(items, file_nbytes),
        "types": dict(Counter(i.dtype for i in items)),
        "metadata": {k: v for k, v in kv.items() if not isinstance(v, list)}
        | {k: f"[{len(v)} entries]" for k, v in kv.items() if isinstance(v, list)},
        "tensors": [i._asdict() for i in items],
    }


def bits_per_weight(items: list[Item], file_nbytes: int) -> dict[str, float]:
    """codes and linear over matrices other than embeddings; file over every weight."""
    linears = [i for i in items if len(i.shape) > 1 and "embd" not in i.name and "embed" not in i.name] or items
    n = max(1, sum(math.prod(i.shape) for i in linears))
    codes = sum(math.prod(i.shape) * SCHEMES[i.dtype].bits if i.dtype in SCHEMES else 8 * i.nbytes for i in linears)
    everything = max(1, sum(math.prod(i.shape) for i in items))
    return {"codes": codes / n, "linear": 8 * sum(i.nbytes for i in linears) / n, "file": 8 * file_nbytes / everything}


def inspection_text(found: dict[str, Any]) -> str:
    rows = [("tensor", "shape", "type", "bytes")]
    rows += [(t["name"], "x".join(map(str, t["shape"])), t["dtype"], str(t["nbytes"])) for t in found["tensors"]]
    lines = [f"{found['path']}: {found['format']}, {nbytes_text(found['nbytes'])}, {found['weights']:,} weights"]
    lines += [f"  {k} = {short(v)}" for k, v in found["metadata"].items()]
    bpw = found["bpw"]
    types = ", ".join(f"{n} {t}" for t, n in found["types"].items())
    return "\n".join(
        [*lines, table(rows, ""), f"types   {types}",
         f"bits    {bpw['codes']:.3f} codes, {bpw['linear']:.3f} with metadata, {bpw['file']:.3f} the whole file (per weight)"]
    )  # fmt: skip


def short(value: object, width: int = 90) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def graph_text(model: str) -> str:
    """The graph of MODEL[+ADAPTER]... as text, adapters attached."""
    from qconvert.conversion import read_source
    from qconvert.request import Request, parse_model

    name, adapters = parse_model(model)
    if Path(name).is_file():
        raise UsageError(f"{name} is one file; a graph needs a checkpoint folder with config.json")
    store = Store()
    logging.getLogger("qconvert").setLevel(logging.WARNING)
    try:
        return format(read_source(Request(name, adapters), store).graph)
    finally:
        store.close()
