"""What a conversion says and proves of offloaded bytes: where all lie, what that costs, and that their copies are safe.

The files are proven as everything else is (each plane is read where the format says that it lies). Here the schedule is:
no latencies break it, and run on the files' own bytes it copies as many as were predicted and shows each block its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qconvert.emit import Plan
from qconvert.errors import UnsupportedError
from qconvert.graph import Graph
from qconvert.layouts import layout_of
from qconvert.placement import Arena, Buffer, Placement, accounting, copy_nbytes, pieces_of, placement_of
from qconvert.planes import Plane
from qconvert.prefetch import Step, execute, hazard, schedule
from qconvert.report import Row, judged, nbytes_text
from qconvert.request import Request, parse_nbytes
from qconvert.scheme import Bytes, scheme_of
from qconvert.second_level import Error, error, second_level_name, with_second_level
from qconvert.traffic import LINKS, MEMORY, Bandwidths, Traffic, traffic
from qconvert.weights import Weights

GB = 1e9
SAMPLE = 64  # rows of a weight
WEAKEST = 1.0  # bits per weight, metadata included: with fewer there is no type to name


def facts(graph: Graph, plan: Plan, request: Request) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The report's lines on placement, and what is worth a note. UnsupportedError where the files ignore the placement."""
    placed = placement_of(graph)
    lines = accounting(placed, graph, plan)
    vram = parse_nbytes(request.vram) if request.vram else None
    if not placed.away:
        fits = f"--vram {request.vram}: all {nbytes_text(placed.gpu_nbytes)} fit, so nothing is offloaded"
        return lines, (fits,) if request.offload_meta else ()
    if name := mixed(placed, places(plan)):
        raise UnsupportedError(f"--offload-meta: --to {request.to} does not keep apart what {name} has")
    link, memory = request.link_bandwidth, request.memory_bandwidth
    slowest = min(LINKS[b.device] for b in placed.buffers if b.device != "gpu")
    speeds = Bandwidths(link * GB if link else slowest, memory * GB if memory else MEMORY)
    found = traffic(placed, speeds, vram)
    told = {"link_bandwidth": speeds.link, "memory_bandwidth": speeds.memory, **found._asdict()}
    return {**lines, "decode": {**told, "tokens_per_second": 1 / found.seconds}}, notes(placed, found, speeds)


def notes(placed: Placement, found: Traffic, speeds: Bandwidths) -> tuple[str, ...]:
    """The bound on decoding; and where fewer bits without offloading would be faster by more than DEAR, that."""
    bound = (
        f"offloading: {nbytes_text(placed.h2d_nbytes)} go to the GPU for each token, at most {1 / found.seconds:.3g} tokens a "
        f"second at {speeds.link / GB:g} GB/s (memory {speeds.memory / GB:g} GB/s)"
    )
    if not found.dear:
        return (bound,)
    dear = f"offloading costs {found.seconds / found.resident_seconds:.1f} times what reading as much GPU memory does"
    if found.resident_bits < WEAKEST:
        return bound, dear
    fewer = f"{found.resident_bits:.2f} bits per weight would fit there without it"
    return bound, f"{dear}: {fewer}, {1 / found.resident_seconds:.3g} tokens a second"


Places = dict[str, list[tuple[str, Plane]]]


def places(plan: Plan) -> Places:
    """Value -> the name of the file of each plane, and the plane."""
    both = [(file.path.name, e) for file in plan.files for e in file.entries]
    return {e.value: list(zip(e.files_of_pieces(name), e.pieces, strict=True)) for name, e in both}


def mixed(placed: Placement, where: Places) -> str | None:
    """A file that has bytes of one device and of another."""
    devices: dict[str, str] = {}
    for b in placed.buffers:
        name = where[b.weight][min(b.piece, len(where[b.weight]) - 1)][0] if b.weight in where else ""
        if name and devices.setdefault(name, b.device) != b.device:
            return name
    return None


def rows(weights: Weights, plan: Plan, parts: Sequence[Path]) -> list[Row]:
    """The schedule's proof and its run; what a second level would save. parts: the plan's files where they lie now."""
    graph = weights.graph
    placed = placement_of(graph)
    if not placed.away:
        return []
    blocks, staged, where, wrong = placed.blocks, placed.staged(), places(plan), set[str]()
    files = {file.path.name: part for file, part in zip(plan.files, parts, strict=True)}
    proven, run = (schedule([block in staged for block in blocks], placed.ahead, forwards) for forwards in (3, 2))

    def stored(b: Buffer) -> Bytes:
        name, plane = where[b.weight][b.piece]
        nbytes = plane.file_nbytes(graph.nodes[b.weight].type.rows)
        return np.memmap(files[name], np.uint8, "r", plane.offset, (nbytes,))

    def host(block: int) -> Bytes:
        return together(staged[blocks[block]], stored)

    def compute(step: Step, slot: Bytes) -> None:
        for b, found in apart(staged.get(blocks[step.block], ()), slot):
            if not np.array_equal(found, stored(b)):
                wrong.add(b.weight)

    copied = execute(run, host, placed.slot_nbytes, compute).of_last_forward if staged else 0
    lookups = [where[b.weight][b.piece][1].nbytes for b in placed.buffers if b.device != "gpu" and b.row_nbytes]
    broken = hazard(proven)
    return [
        judged("prefetch schedule", "latencies that break it", float(broken is not None), 0.0, broken.what if broken else ""),
        judged("prefetch of the file", "tensors that differ", float(len(wrong)), 0.0, min(wrong, default="")),
        judged("traffic", "bytes not predicted", abs(copied + sum(lookups) - placed.h2d_nbytes), 0.0),
        *second_level_rows(weights, sorted({b.weight for b in placed.buffers if b.device != "gpu" and b.kind == "meta1"})),
    ]


def second_level_rows(weights: Weights, names: Sequence[str]) -> list[Row]:
    """What u8 entries with a level of their own above them would cost and save, for a runtime that has such; no file here has.

    The largest error of a weight's first rows.
    """
    errors, now, then = list[Error](), 0, 0.0
    for name in names:
        kind = weights.graph.nodes[name].type
        if "." not in kind.dtype:
            continue  # it has one
        layout, k, n = layout_of(kind.dtype), kind.dims[-1], kind.rows
        new = scheme_of(second_level_name(layout.scheme, k, "u8"))
        if new is None or new.bits_per_weight >= layout.scheme.bits_per_weight:
            continue
        q = layout.unpack(cast(Bytes, weights.rows(name, 0, min(n, SAMPLE))))
        errors.append(error(q, with_second_level(q, new)))
        now += sum(nbytes for kind_, nbytes in pieces_of(kind.dtype, kind.dims) if kind_ == "meta1")
        then += n * k * (new.bits_per_weight - new.bits) / 8
    if not errors:
        return []
    scales, values = max(max(e.levels.values()) for e in errors), max(e.weights for e in errors)
    saved = f"{nbytes_text(now)} of metadata would be {nbytes_text(then)}"
    return [
        Row("second level, u8", "relative error, scales", scales, None, "info"),
        Row("second level, u8", "relative error, weights", values, None, "info", saved),
    ]


def together(arenas: Sequence[Arena], stored: Callable[[Buffer], Bytes]) -> Bytes:
    """The bytes of a block's arenas as they lie on the host, to be moved by one copy."""
    out = np.zeros(copy_nbytes(arenas), np.uint8)
    for b, place in apart(arenas, out):
        place[:] = stored(b)
    return out


def apart(arenas: Sequence[Arena], memory: Bytes) -> Iterator[tuple[Buffer, Bytes]]:
    """Each buffer of a block's arenas and where it lies in a slot."""
    at = 0
    for arena in arenas:
        for b, begin in zip(arena.buffers, arena.offsets, strict=False):
            yield b, memory[at + begin : at + begin + b.nbytes]
        at += arena.room
