"""Every byte counted: what each part of a file is, and what a way of storing weights would take, from shapes alone.

    files(plan, graph)       part by part what lies in each file, gaps too: the parts add up to the file's size
    account(graph, storage)  bytes of a model in a storage by class and device, whether or not anything here writes it

Classes are placement's: codes, the finest level of metadata, the levels above it, tables, adapters, what is not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qconvert.dtypes import DTYPES
from qconvert.emit import Entry, FilePlan, Plan
from qconvert.graph import Graph, n_rows
from qconvert.layouts import layout_of
from qconvert.placement import Buffer, Class, Placement, beside, blocks_of, class_of, offloaded, pieces_of
from qconvert.report import nbytes_text, table
from qconvert.scheme import SCHEMES, Level, Scheme

Part = Literal["header", "constants", "companion", "codes", "meta1", "meta2", "tables", "adapter", "dense", "padding"]
Parts = Mapping[Part, int]

# what lies in files -------------------------------------------------------------------------------


class Span(NamedTuple):
    """Bytes begin..end of a file, and how many of them are what."""

    begin: int
    end: int
    parts: Parts


def files(plan: Plan, graph: Graph) -> list[dict[str, Any]]:
    """{path, nbytes, parts} of each file; a companion is a file without weights (config.json, a tokenizer)."""
    spans: dict[Path, list[Span]] = {f.path: list(known_spans(f)) for f in plan.files}
    for file in plan.files:
        for entry in file.entries:
            for name, span in entry_spans(entry, graph, file.path.name):
                spans[file.path.with_name(name)].append(span)
    root = plan.folder or plan.place
    return [
        {"path": str(f.path.relative_to(root)), "nbytes": f.nbytes, "parts": summed(spans[f.path], f.nbytes)}
        for f in plan.files
    ]


def known_spans(file: FilePlan) -> Iterator[Span]:
    """What was made from headers alone."""
    kind: Part = "header" if file.entries or file.nbytes > len(file.header) else "companion"
    yield Span(0, len(file.header), {kind: len(file.header)})
    for offset, data in file.between:
        yield Span(offset, offset + len(data), {"constants": len(data)})


def entry_spans(entry: Entry, graph: Graph, own: str) -> Iterator[tuple[str, Span]]:
    """Each piece of a weight, and the name of the file that has it."""
    n, kinds = n_rows(entry.shape), entry_parts(entry, graph)
    pieces = [(plane.offset, plane.file_nbytes(n)) for plane in entry.pieces]
    by_piece = [{kind: nbytes} for kind, nbytes in kinds]
    if [sum(p.values()) for p in by_piece] != [nbytes for _, nbytes in pieces]:  # several parts in one piece
        assert len(pieces) == 1, entry
        by_piece = [dict(kinds)]
    for name, (offset, nbytes), parts in zip(entry.files_of_pieces(own), pieces, by_piece, strict=True):
        yield name, Span(offset, offset + nbytes, parts)


def entry_parts(entry: Entry, graph: Graph) -> list[tuple[Part, int]]:
    """Part and nbytes of all that an entry holds, in the order of its planes."""
    owner, _, suffix = entry.value.partition("~")
    if suffix and owner in graph.nodes and (kind := dict(beside(owner, graph.nodes[owner])).get(entry.value)):
        return [(kind, entry.nbytes)]
    if "." not in entry.dtype:
        slots = {i for node in graph.nodes.values() if node.op == "input" for i in node.inputs}
        return [("adapter" if entry.value in slots else "dense", entry.nbytes)]
    layout, n, k = layout_of(entry.dtype), n_rows(entry.shape), entry.shape[-1]
    together = {} if layout.pieces(n, k) else in_blocks(layout.scheme, n, k)
    return [*(together.items() if sum(together.values()) == entry.nbytes else pieces_of(entry.dtype, entry.shape))]


def in_blocks(scheme: Scheme, n: int, k: int) -> dict[Part, int]:
    """Of blocks that hold codes and all levels."""
    out: dict[Part, int] = {"codes": n * k * scheme.bits // 8}
    for i, level in enumerate(scheme.levels):
        kind = class_of(scheme, i)
        out[kind] = out.get(kind, 0) + level_nbytes(level, n, k)
    return out


def summed(spans: Sequence[Span], nbytes: int) -> dict[str, int]:
    """Bytes by part; what no span covers is padding. AssertionError where two overlap or one ends behind the file."""
    out, at = dict[str, int](), 0
    for span in sorted(spans):
        assert at <= span.begin and span.end - span.begin == sum(span.parts.values()), (at, span)
        out["padding"] = out.get("padding", 0) + span.begin - at
        for part, n in span.parts.items():
            out[part] = out.get(part, 0) + n
        at = span.end
    assert at <= nbytes, (at, nbytes)
    out["padding"] = out.get("padding", 0) + nbytes - at
    return {part: n for part in ORDER if (n := out.get(part, 0))}


ORDER = ("header", "constants", "companion", "codes", "meta1", "meta2", "tables", "adapter", "dense", "padding")


def totals(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The same of all files together."""
    out: dict[str, int] = {}
    for file in found:
        for part, n in file["parts"].items():
            out[part] = out.get(part, 0) + n
    return {part: out[part] for part in ORDER if part in out}


# what a storage would take ------------------------------------------------------------------------


class Storage(NamedTuple):
    """How the linears of a model are kept. per_column: dtype of a factor for each input; per_matrix: bytes of a codebook.

    table, head: scheme or dtype of the embedding and of the output layer. lora: rank by role, None: no adapter; each map
    of it has a bias too, all in f16. blocks: codes and levels lie among each other, so none can lie elsewhere.
    """

    bits: int
    levels: tuple[Level, ...] = ()
    per_column: str | None = None
    per_matrix: int = 0
    table: str = "f16"
    head: str = "f16"
    lora: Mapping[str, int] | None = None
    blocks: bool = False


def twice(*roles: Literal["scale", "zero"], group: int, above: int) -> tuple[Level, ...]:
    """u8 entries for each group, of which `above` share a factor and an offset in f16 (HQQ's quantized metadata)."""
    coarse = group * above
    return tuple(
        level for role in roles
        for level in (Level(role, "f16", coarse), Level(role, "u8", group), Level(role, "f16", coarse, adds=True))
    )  # fmt: skip


ATTENTION, FFN = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
HQQ_PLUS = {**dict.fromkeys(ATTENTION, 32), **dict.fromkeys(FFN, 8)}  # hqq's examples/hqq_plus.py
HQQ_LEVELS = twice("scale", "zero", group=8, above=128)
ROW = Level("scale", "f16", None)

# Ways in which people have stored Llama-2-7B and its like; not all are written here.
STORAGES: Mapping[str, Storage] = {
    "fp16": Storage(16),
    "HQQ 1-bit g8, f16 scale, f16 zero": Storage(1, (Level("scale", "f16", 8), Level("zero", "f16", 8))),
    "HQQ 1-bit g8, f16 scale, u8 zero": Storage(1, (Level("scale", "f16", 8), Level("zero", "u8", 8))),
    "HQQ 1-bit g8, as released": Storage(1, HQQ_LEVELS),
    "HQQ+ 1-bit g8": Storage(1, HQQ_LEVELS, lora=HQQ_PLUS),
    "HQQ 2-bit g8": Storage(2, HQQ_LEVELS),
    "HQQ+ 2-bit g8": Storage(2, HQQ_LEVELS, lora=HQQ_PLUS),
    "QuIP# E8P 2-bit": Storage(2, (ROW,), per_column="f16"),
    "AQLM 1x8 g8": Storage(1, (ROW,), per_matrix=(1 << 8) * 8 * 2),
    "AQLM 2x8 g8": Storage(2, (ROW,), per_matrix=2 * (1 << 8) * 8 * 2),
    "AQLM 1x16 g8": Storage(2, (ROW,), per_matrix=(1 << 16) * 8 * 2),
    "NF4 g64, twice quantized": Storage(
        4, (Level("scale", "f32", 64 * 256), Level("scale", "u8", 64), Level("scale", "f32", None, None, adds=True))
    ),
    "IQ2_XXS, Q4_K embedding, Q6_K head": Storage(2, (Level("scale", "f16", 256),), table="q4_k", head="q6_k", blocks=True),
}  # fmt: skip


class Account(NamedTuple):
    """What a storage takes. codes, linears: nbytes of linears, without and with all metadata; n_linear, n_weights: weights of
    linears, and all."""

    placement: Placement
    codes: int
    linears: int
    n_linear: int
    n_weights: int

    @property
    def classes(self) -> dict[str, int]:
        return self.placement.by_device().get("gpu", {})

    @property
    def nbytes(self) -> int:
        return sum(self.classes.values())

    @property
    def bits(self) -> dict[str, float]:
        """Of a weight three ways: codes alone, linears with their metadata, everything but adapters."""
        own = self.nbytes - self.classes.get("adapter", 0)
        codes, linear = (8 * nbytes / self.n_linear for nbytes in (self.codes, self.linears))
        return {"codes": codes, "linear": linear, "file": 8 * own / self.n_weights}

    def without(self, kind: Class) -> Placement:
        """The same where all of a class waits in pinned memory of the host."""
        return offloaded(self.placement, (kind,), "cpu-pinned", None)


def account(graph: Graph, storage: Storage) -> Account:
    """Of a graph whose weights are as they were trained."""
    buffers, codes, linears, n_linear, n_weights = list[Buffer](), 0, 0, 0, 0
    lookups = {n.inputs[1] for n in graph.nodes.values() if n.op == "embed"}
    for name, block in blocks_of(graph).items():
        dims, role = graph.nodes[name].type.dims, str(graph.root(name).attrs.get("role"))
        n, k = n_rows(dims), dims[-1]
        n_weights += math.prod(dims)
        if linear := len(dims) > 1 and name not in lookups and role != "output":
            parts, n_linear, codes = linear_parts(storage, n, k), n_linear + n * k, codes + n * k * storage.bits // 8
            linears += sum(parts.values())
        else:
            dtype = "f16" if len(dims) < 2 else storage.head if role == "output" else storage.table
            parts = in_blocks(SCHEMES[dtype], n, k) if dtype in SCHEMES else {"dense": math.prod(dims) * DTYPES[dtype].nbytes}
        if linear and storage.lora and role in storage.lora:
            parts["adapter"] = 2 * (storage.lora[role] * (n + k) + n)
        for i, (kind, nbytes) in enumerate(parts.items()):
            buffers.append(Buffer(name, i, kind, block, nbytes, -(-nbytes // n) if name in lookups else 0))
    return Account(Placement(tuple(buffers), n_weights=n_linear), codes, linears, n_linear, n_weights)


def linear_parts(storage: Storage, n: int, k: int) -> dict[Any, int]:
    if not storage.levels:
        return {"dense": n * k * storage.bits // 8}
    scheme = Scheme("", storage.bits, storage.levels)
    out: dict[Any, int] = {"codes": n * k * storage.bits // 8}
    for i, level in enumerate(storage.levels):
        kind = class_of(scheme, i)
        out[kind] = out.get(kind, 0) + level_nbytes(level, n, k)
    if storage.per_column:
        out["meta1"] = out.get("meta1", 0) + k * DTYPES[storage.per_column].nbytes
    return out | ({"tables": storage.per_matrix} if storage.per_matrix else {})


def level_nbytes(level: Level, n: int, k: int) -> int:
    """Of a weight [n,k] whose groups run on from row to row where rows do not divide into them."""
    if level.group is None:
        entries = 1 if level.rows is None else -(-n // level.rows)
    else:
        entries = -(-n * k // (level.group * (level.rows or n)))
    return -(-entries * level.bits // 8)


def accounts(graph: Graph) -> list[dict[str, Any]]:
    """A row for every storage: bytes by class, bits three ways, and what lies where if the finest level waits on the host."""
    rows = []
    for name, storage in STORAGES.items():
        found = account(graph, storage)
        moved = found.placement if storage.blocks else found.without("meta1")
        host = moved.by_device().get("cpu-pinned", {})
        rows.append({
            "storage": name, "classes": found.classes, "nbytes": found.nbytes, "bits": found.bits,
            "gpu": found.nbytes - sum(host.values()), "host": sum(host.values()), "staging": moved.staging_nbytes,
            "h2d_bytes_per_forward": moved.h2d_nbytes,
        })  # fmt: skip
    return rows


def accounts_text(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("storage", "codes", "level 1", "level 2", "tables", "dense", "adapter", "total", "codes", "linear", "file",
            "GPU, level 1 on host", "host")  # fmt: skip
    cells = [head]
    for row in rows:
        classes, bits = row["classes"], row["bits"]
        kinds = ("codes", "meta1", "meta2", "tables", "dense", "adapter")
        sizes = [nbytes_text(classes[kind]) if kind in classes else "-" for kind in kinds]
        cells.append((
            row["storage"], *sizes, nbytes_text(row["nbytes"]), *(f"{bits[way]:.4g}" for way in ("codes", "linear", "file")),
            nbytes_text(row["gpu"]), nbytes_text(row["host"]),
        ))  # fmt: skip
    return table(cells, "")
