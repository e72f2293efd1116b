"""Where a model's bytes lie while it runs: buffers by class, on devices, in arenas that move as one.

Knows no file format: a layout says which pieces of a weight lie apart (Layout.pieces), a node's attribute `placement` on
which device a class of them lies, graph.meta["prefetch"] how far ahead of its use a block's offloaded bytes are copied.
Blocks are the layers, what comes before them (embedding) and after (head), in the order in which the graph reads them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast, get_args

from qconvert.dtypes import DTYPES
from qconvert.emit import Plan
from qconvert.errors import ResourceError
from qconvert.graph import Graph, Node, n_rows
from qconvert.layouts import layout_of
from qconvert.report import nbytes_text
from qconvert.scheme import FOLDED, Scheme

Class = Literal["codes", "meta1", "meta2", "tables", "adapter", "dense"]
Device = Literal["gpu", "cpu-pinned", "cpu-mmap", "disk"]
CLASSES: tuple[Class, ...] = get_args(Class)
DEVICES: tuple[Device, ...] = get_args(Device)
ALIGNMENT = 256  # of an arena: what cudaMalloc gives, and more than any kernel asks for
LOAD = 16  # of a buffer in it: the widest load of a kernel


class Buffer(NamedTuple):
    """One piece of a weight. block: whose kernels read all of it; None: only rows of it are looked up.

    piece: which of the weight's planes. row_nbytes: what a lookup of one row takes; 0 where none is made.
    """

    weight: str
    piece: int
    kind: Class
    block: str | None
    nbytes: int
    row_nbytes: int
    device: Device = "gpu"


class Arena(NamedTuple):
    """The buffers of one class and block on one device, one behind another: one copy moves them."""

    kind: Class
    block: str
    device: Device
    buffers: tuple[Buffer, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each buffer begins, and the end."""
        *inner, last = (b.nbytes for b in self.buffers)
        begins = tuple(accumulate((n + -n % LOAD for n in inner), initial=0))
        return (*begins, begins[-1] + last)

    @property
    def nbytes(self) -> int:
        return self.offsets[-1]

    @property
    def room(self) -> int:
        """What it takes where the next one is aligned too."""
        return self.nbytes + -self.nbytes % ALIGNMENT


class Placement(NamedTuple):
    """Every buffer of a model in the order of execution; ahead: how many blocks before its use a copy starts, at most.

    n_weights: of the tensors that are quantized.
    """

    buffers: tuple[Buffer, ...]
    ahead: int = 1
    n_weights: int = 0

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(b.block for b in self.buffers if b.block is not None))

    @property
    def arenas(self) -> tuple[Arena, ...]:
        found: dict[tuple[str, Class, Device], list[Buffer]] = {}
        for b in self.buffers:
            if b.block is not None:
                found.setdefault((b.block, b.kind, b.device), []).append(b)
        order = {block: i for i, block in enumerate(self.blocks)}
        keys = sorted(found, key=lambda key: (order[key[0]], CLASSES.index(key[1])))
        return tuple(Arena(kind, block, device, tuple(found[block, kind, device])) for block, kind, device in keys)

    def staged(self) -> dict[str, tuple[Arena, ...]]:
        """Blocks with arenas away from the GPU, and those, which are copied for each forward pass."""
        away = [a for a in self.arenas if a.device != "gpu"]
        return {block: found for block in self.blocks if (found := tuple(a for a in away if a.block == block))}

    @property
    def away(self) -> bool:
        """Whether anything lies elsewhere than on the GPU."""
        return any(b.device != "gpu" for b in self.buffers)

    def elsewhere(self) -> dict[tuple[Class, Device], list[tuple[Buffer, ...]]]:
        """What is not on the GPU, by class and device; buffers that lie together, in the order of execution."""
        out: dict[tuple[Class, Device], list[tuple[Buffer, ...]]] = {}
        lookups = [(b,) for b in self.buffers if b.block is None]
        for together in (*lookups, *(a.buffers for a in self.arenas)):
            if together[0].device != "gpu":
                out.setdefault((together[0].kind, together[0].device), []).append(together)
        return out

    @property
    def slots(self) -> int:
        return min(self.ahead + 1, len(self.staged()))

    @property
    def slot_nbytes(self) -> int:
        return max((sum(a.room for a in arenas) for arenas in self.staged().values()), default=0)

    @property
    def staging_nbytes(self) -> int:
        """The ring of slots on the GPU that offloaded arenas pass through."""
        return self.slots * self.slot_nbytes

    @property
    def h2d_nbytes(self) -> int:
        """Of one forward pass over one token: each staged arena once, and a row of each offloaded lookup."""
        return sum(map(copy_nbytes, self.staged().values())) + sum(b.row_nbytes for b in self.buffers if b.device != "gpu")

    @property
    def gpu_nbytes(self) -> int:
        """Weights that stay, and staging."""
        return sum(b.nbytes for b in self.buffers if b.device == "gpu") + self.staging_nbytes

    def by_device(self) -> dict[str, dict[str, int]]:
        out: dict[str, dict[str, int]] = {}
        for b in self.buffers:
            of = out.setdefault(b.device, {})
            of[b.kind] = of.get(b.kind, 0) + b.nbytes
        return {d: {c: out[d][c] for c in CLASSES if c in out[d]} for d in DEVICES if d in out}


def copy_nbytes(arenas: Sequence[Arena]) -> int:
    """Of the one copy that moves a block's arenas."""
    return sum(a.room for a in arenas[:-1]) + arenas[-1].nbytes


# what a graph has ---------------------------------------------------------------------------------


def placement_of(graph: Graph) -> Placement:
    """Of a graph of packed weights. UnsupportedError where a class is placed that a layout does not keep apart."""
    buffers, ahead = tuple(buffers_of(graph)), cast(int, graph.meta.get("prefetch", 1))
    quantized = {b.weight for b in buffers if b.kind == "codes"}
    return Placement(buffers, ahead, sum(math.prod(graph.nodes[name].type.dims) for name in quantized))


def buffers_of(graph: Graph) -> Iterator[Buffer]:
    lookups = {n.inputs[1] for n in graph.nodes.values() if n.op == "embed"}
    adapters = adapters_of(graph)
    for name, block in blocks_of(graph).items():
        node = graph.nodes[name]
        places, rows = cast(Mapping[str, Device], node.attrs.get("placement", {})), node.type.rows
        if name in adapters:  # whose factors runtimes take as f32
            yield Buffer(name, 0, "adapter", block, 4 * math.prod(node.type.dims), 0, places.get("adapter", "gpu"))
            continue
        for i, (kind, nbytes) in enumerate(pieces_of(node.type.dtype, node.type.dims)):
            row_nbytes = -(-nbytes // rows) if name in lookups else 0
            yield Buffer(name, i, kind, block, nbytes, row_nbytes, places.get(kind, "gpu"))
        for value, kind in beside(name, node):
            own = graph.nodes[value]
            at = cast(Mapping[str, Device], own.attrs.get("placement", {})).get(kind, "gpu")
            yield Buffer(value, 0, kind, block, pieces_of(own.type.dtype, own.type.dims)[0][1], 0, at)


def beside(name: str, node: Node) -> list[tuple[str, Class]]:
    """Other values of the graph that hold a weight's metadata, and their class."""
    layout = layout_of(node.type.dtype) if "." in node.type.dtype else None
    found: list[tuple[str, Class]] = []
    for suffix, finest in layout.others if layout else ():
        found.append((f"{name}~{suffix}", "codes" if suffix == FOLDED else "meta1" if finest else "meta2"))
    return found


def adapters_of(graph: Graph) -> set[str]:
    """What adapters put into slots."""
    return {i for n in graph.nodes.values() if n.op == "input" for i in n.inputs}


def blocks_of(graph: Graph) -> dict[str, str | None]:
    """Weight -> the block that reads all of it, in that order; None: only rows of it are looked up."""
    fixed, reads = graph.constants(), list[tuple[str, bool]]()
    for node in graph.nodes.values():
        if node.op == "input" or not all(i in fixed for i in node.inputs):
            reads += [(name, node.op == "embed") for name in node.inputs if name in fixed]
    layers = [graph.root(name).attrs.get("layer") for name, _ in reads]
    last = max((i for i, layer in enumerate(layers) if layer is not None), default=-1)
    found, block = dict[str, str | None](), "embedding"
    for i, ((name, looked_up), layer) in enumerate(zip(reads, layers, strict=True)):
        block = f"layer {layer}" if layer is not None else block if i < last else "head"
        if looked_up:
            found.setdefault(name, None)
        elif found.get(name) is None:
            found.pop(name, None)  # it is needed whole here, not where rows of it were looked up
            found[name] = block
    return found


def pieces_of(dtype: str, dims: tuple[int, ...]) -> list[tuple[Class, int]]:
    """Class and nbytes of what a weight is made of, in the order of its planes."""
    if "." not in dtype:
        return [("dense", math.prod(dims) * DTYPES[dtype].nbytes)]
    layout, rows = layout_of(dtype), n_rows(dims)
    if not layout.row_nbytes(dims[-1]):
        return []  # all of it lies in values of their own
    if pieces := layout.pieces(rows, dims[-1]):
        return [(class_of(layout.scheme, piece.level), piece.nbytes) for piece in pieces]
    codes = math.prod(dims) * layout.scheme.bits // 8
    return [("codes", codes), ("meta1", rows * layout.row_nbytes(dims[-1]) - codes)]


def class_of(scheme: Scheme, level: int | None) -> Class:
    """Of the codes (None) or of a level: the finest factor of a role is meta1, what it is a multiple of, or added to, meta2."""
    if level is None:
        return "codes"
    role = scheme.levels[level].role
    if role == "divisor":
        return "meta2"  # of all scales
    factors = [i for i, other in enumerate(scheme.levels) if other.role == role and not other.adds]
    return "meta1" if level == factors[-1] else "meta2"


def apart(node: Node) -> bool:
    """Whether a weight's classes lie in places of their own."""
    kind = node.type
    return "." not in kind.dtype or bool(layout_of(kind.dtype).pieces(kind.rows, kind.dims[-1]))


# what goes where ----------------------------------------------------------------------------------


def offloaded(placement: Placement, classes: Collection[Class], device: Device, vram: int | None) -> Placement:
    """Move as little of `classes` to `device` as lets weights and staging fit into `vram` bytes; None: move all of it.

    Lookups go first (they cost a row of traffic), then layers, evenly spaced so that their copies are too, then the rest.
    ResourceError with numbers where all of it moved does not fit.
    """
    buffers = [b for b in placement.buffers if b.kind in classes]
    blocks = [block for block in placement.blocks if any(b.block == block for b in buffers)]
    layers = [block for block in blocks if block.startswith("layer ")]
    spaced = [[layers[(2 * i + 1) * len(layers) // (2 * m)] for i in range(m)] for m in range(len(layers) + 1)]
    choices: list[list[str | None]] = [[None, *some] for some in spaced] + [[None, *blocks]]
    if vram is None:
        return _moved(placement, classes, device, choices[-1])
    least = placement
    for choice in ([], *choices):
        if (moved := _moved(placement, classes, device, choice)).gpu_nbytes <= vram:
            return moved
        least = min(least, moved, key=lambda p: p.gpu_nbytes)
    raise _too_little(placement, least, vram)


def _moved(placement: Placement, classes: Collection[Class], device: Device, blocks: Collection[str | None]) -> Placement:
    buffers = (b._replace(device=device) if b.kind in classes and b.block in blocks else b for b in placement.buffers)
    return placement._replace(buffers=tuple(buffers))


def _too_little(placement: Placement, best: Placement, vram: int) -> ResourceError:
    stay = best.by_device().get("gpu", {})
    parts = [f"{nbytes_text(n)} {kind}" for kind, n in stay.items()] + [f"{nbytes_text(best.staging_nbytes)} staging"]
    least, ways = best.gpu_nbytes, [f"--vram {rounded_up(best.gpu_nbytes)}"]
    if best._replace(ahead=0).gpu_nbytes <= vram:
        ways.append("--prefetch 0")
    if (bits := resident_bits(placement, vram)) > 0:
        ways.append(f"fewer bits: {bits:.2f} per weight fit without offloading")
    return ResourceError(
        f"--vram {nbytes_text(vram)}: the least that is possible takes {nbytes_text(least)} = {' + '.join(parts)}",
        hint=", or ".join(ways),
    )


def resident_bits(placement: Placement, nbytes: int) -> float:
    """Bits per quantized weight, metadata included, with which all lies in `nbytes` of GPU memory."""
    fixed = sum(b.nbytes for b in placement.buffers if b.kind in ("dense", "adapter"))
    return 8 * (nbytes - fixed) / max(1, placement.n_weights)


def rounded_up(nbytes: int) -> str:
    """As --vram takes it: 1.19m, 6.4g; not less."""
    unit, name = next((u, name) for u, name in ((10**9, "g"), (10**6, "m"), (10**3, "k"), (1, "")) if nbytes >= u)
    return f"{-(-nbytes * 100 // unit) / 100:g}{name}"


# accounting ---------------------------------------------------------------------------------------


def accounting(placed: Placement, graph: Graph, plan: Plan) -> dict[str, Any]:
    """{devices: {device: {class: bytes}}, file_overhead, …}: weights by device and class, which with the overhead add up to
    the files. Where nothing was placed the only device is "any"."""
    kinds, away = {b.weight: b.kind for b in placed.buffers}, placed.away
    devices: dict[str, dict[str, int]] = {}
    for e in plan.entries:
        found: list[tuple[Class, int]] = [(kinds.get(e.value, "dense"), e.nbytes)]
        if "." in e.dtype:
            found = pieces_of(e.dtype, e.shape)
        places = cast(Mapping[str, str], graph.nodes[e.value].attrs.get("placement", {}))
        for kind, nbytes in found:
            of = devices.setdefault(places.get(kind, "gpu") if away else "any", {})
            of[kind] = of.get(kind, 0) + nbytes
    total = sum(sum(of.values()) for of in devices.values())
    ordered = {d: {kind: devices[d][kind] for kind in CLASSES if kind in devices[d]} for d in ("any", *DEVICES) if d in devices}
    return {
        "devices": ordered, "file_overhead": plan.nbytes - total, "staging": placed.staging_nbytes,
        "h2d_bytes_per_forward": placed.h2d_nbytes, "prefetch": placed.ahead if away else 0,
    }  # fmt: skip


def told(kind: Class, device: Device, ahead: int) -> dict[str, str]:
    """What the header of a file of offloaded bytes says of them."""
    return {"qconvert.class": kind, "placement": device, "prefetch": str(ahead)}
