"""What is in a file or folder, from headers alone: tensors, types, and the true bits of a weight, three ways."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qconvert.accountant import accounts, accounts_text
from qconvert.build import build
from qconvert.doctor import diagnose
from qconvert.errors import QConvertError, UsageError
from qconvert.findings import Finding
from qconvert.model_cache import find_model
from qconvert.report import nbytes_text, table
from qconvert.scheme import scheme_of
from qconvert.shape_checkpoint import shape_checkpoint, shapes_alone
from qconvert.sources import Store
from qconvert.target import Contents, Item, reader_of
from qconvert.text import format


def inspect_file(text: str) -> dict[str, Any]:
    """Facts about a file of a known format, a .safetensors or .bin file, or a checkpoint or adapter folder."""
    path = Path(text) if Path(text).exists() else find_model(text)
    if shapes_alone(path):
        return storages(path)
    if known := reader_of(path):
        reader, found = known
        return facts(str(path), reader.inspect(found)) | {"findings": [f._asdict() for f in findings(path)]}
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
    return facts(str(path), Contents(kind, items, sum(f.stat().st_size for f in files), {}))


def storages(folder: Path) -> dict[str, Any]:
    """Of a model of which only config.json is there: what ways of storing it would take."""
    graph = build(shape_checkpoint(folder, Store()))
    rows = accounts(graph)
    weights = sum(math.prod(graph.nodes[name].type.dims) for name in graph.parameters())
    return {"path": str(folder), "format": "config.json alone", "weights": weights, "storages": rows}


def findings(path: Path) -> tuple[Finding, ...]:
    """What headers alone tell to be wrong."""
    try:
        return diagnose(path, values=False).findings
    except QConvertError:
        return ()  # what is in a file can be told whatever state it is in


def _nbytes(dtype: str) -> int:
    bits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(bits or 8) // 8


def facts(path: str, found: Contents) -> dict[str, Any]:
    kv = found.metadata
    return {
        "path": path,
        "format": found.format,
        "nbytes": found.nbytes,
        "weights": sum(math.prod(i.shape) for i in found.items if not i.of),
        "bpw": bits_per_weight(found.items, found.nbytes),
        "parts": parts(found.items, found.nbytes),
        "types": dict(Counter(i.dtype for i in found.items if not i.of)),
        "metadata": {k: v for k, v in kv.items() if not isinstance(v, list)}
        | {k: f"[{len(v)} entries]" for k, v in kv.items() if isinstance(v, list)},
        "tensors": [i._asdict() for i in found.items],
    }


def parts(items: Sequence[Item], file_nbytes: int) -> dict[str, int]:
    """Bytes by what they are; what no tensor takes is header, padding and what lies beside the weights."""
    out = dict.fromkeys(("codes", "metadata", "dense"), 0)
    for i in items:
        scheme = scheme_of(i.dtype.rpartition(".")[2])
        codes = math.prod(i.shape) * scheme.bits // 8 if scheme and not i.of else 0
        out["codes"] += codes
        out["metadata" if scheme or i.of else "dense"] += i.nbytes - codes
    return {**out, "header and padding": file_nbytes - sum(i.nbytes for i in items)}


def bits_per_weight(items: Sequence[Item], file_nbytes: int) -> dict[str, float]:
    """codes and linear over matrices other than embeddings; file over every weight."""
    whole = [i for i in items if not i.of]
    linears = [i for i in whole if len(i.shape) > 1 and "embd" not in i.name and "embed" not in i.name] or whole
    n = max(1, sum(math.prod(i.shape) for i in linears))
    codes = sum(math.prod(i.shape) * s.bits if (s := scheme_of(i.dtype)) else 8 * i.nbytes for i in linears)
    names = {i.name for i in linears}
    nbytes = sum(i.nbytes for i in items if (i.of or i.name) in names)
    everything = max(1, sum(math.prod(i.shape) for i in whole))
    return {"codes": codes / n, "linear": 8 * nbytes / n, "file": 8 * file_nbytes / everything}


def inspection_text(found: dict[str, Any]) -> str:
    if "storages" in found:
        head = f"{found['path']}: {found['format']}, {found['weights']:,} weights; bits are per weight"
        return f"{head}\n{accounts_text(found['storages'])}"
    rows = [("tensor", "shape", "type", "bytes")]
    for t in found["tensors"]:
        kind = f"{t['dtype']} of {t['of']}" if t["of"] else t["dtype"]
        rows.append((t["name"], "x".join(map(str, t["shape"])), kind, str(t["nbytes"])))
    lines = [f"{found['path']}: {found['format']}, {nbytes_text(found['nbytes'])}, {found['weights']:,} weights"]
    lines += [f"  {k} = {short(v)}" for k, v in found["metadata"].items()]
    bpw = found["bpw"]
    types = ", ".join(f"{n} {t}" for t, n in found["types"].items())
    sizes = " + ".join(f"{nbytes_text(n)} {what}" for what, n in found["parts"].items() if n)
    return "\n".join(
        [*lines, table(rows, ""), f"types   {types}", f"size    {nbytes_text(found['nbytes'])} = {sizes}",
         *(f"{f['severity']:8}{f['place']}: {f['what']}" for f in found.get("findings", ())),
         f"bits    {bpw['codes']:.3f} codes, {bpw['linear']:.3f} with metadata, {bpw['file']:.3f} the whole file (per weight)"]
    )  # fmt: skip


def short(value: object, width: int = 90) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def graph_text(model: str) -> str:
    """The graph of MODEL[+ADAPTER]... as text, adapters attached."""
    from qconvert.lowering import read_source
    from qconvert.request import Request, parse_model

    name, adapters = parse_model(model)
    if Path(name).is_file() and Path(name).suffix != ".gguf":
        raise UsageError(f"{name} is one file; a graph needs a checkpoint folder with config.json")
    store = Store()
    logging.getLogger("qconvert").setLevel(logging.WARNING)
    try:
        return format(read_source(Request(name, adapters), store).graph)
    finally:
        store.close()
