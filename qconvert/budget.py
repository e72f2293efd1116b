"""A type for each weight, so that a file has at most so many bytes, or is the smallest whose KL is below a limit.

menu (types and exact bytes, from the format) -> costs in KL (sensitivity) -> the best mixture for every size at once
(dynamic programming) -> swaps that a measurement of the whole mixture confirms -> types
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qconvert.errors import GateError, UnsupportedError, UsageError, uninterrupted
from qconvert.evaluation import Text, overlap
from qconvert.graph import Graph
from qconvert.report import nbytes_text
from qconvert.request import Request, parse_nbytes
from qconvert.target import Menu
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
BUCKETS = 1 << 16  # into which bytes are divided; what rounding leaves is filled afterwards
CANDIDATES, ROUNDS = 8, 3  # swaps that are measured, and how often the best of them is taken
POINTS = 8  # of the curve that are measured
JUDGED = 1024  # tokens on which they are
Types = Mapping[str, str]


class Wish(NamedTuple):
    """At most nbytes, or the fewest with a KL of at most max_kl; said: as the user did."""

    nbytes: int | None
    max_kl: float | None
    said: str


def wish_of(request: Request, graph: Graph) -> Wish | None:
    """None where the user says the type, or nothing of size. UsageError for flags that contradict each other."""
    sizes = [("--target-size", request.target_size), ("--target-bpw", request.target_bpw)]
    given = [flag for flag, value in sizes if value is not None]
    typed = next((f for f, v in (("--quant", request.quant), ("--bits", request.bits)) if v is not None), None)
    if not request.chooses_types:
        return None
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} both say the size", hint="say it once")
    pins = "; --tensor-type pins one" if request.to == "gguf" else ""
    if given and typed:
        raise UsageError(f"{given[0]} and {typed}: types are chosen by the size", hint=f"drop {typed}{pins}")
    for flag in ("pure", "split_max_size", "dry_run"):
        if getattr(request, flag):
            why = "weights must be read to know what they cost" if flag == "dry_run" else "each weight gets a type, in one file"
            raise UsageError(f"--{flag.replace('_', '-')} with {given[0] if given else '--max-kl'}: {why}")
    if request.target_size is not None:
        return Wish(parse_nbytes(request.target_size), None, f"--target-size {request.target_size}")
    if request.target_bpw is not None:
        if not 0 < request.target_bpw <= 32:
            raise UsageError(f"--target-bpw {request.target_bpw:g}: bits per weight, the whole file's", hint="--target-bpw 4.5")
        return Wish(int(request.target_bpw * n_weights(graph) / 8), None, f"--target-bpw {request.target_bpw:g}")
    return Wish(None, request.max_kl, f"--max-kl {request.max_kl:g}")


def n_weights(graph: Graph) -> int:
    return sum(int(np.prod(graph.nodes[name].type.dims)) for name in graph.parameters())


# the best mixture for every size ------------------------------------------------------------------


@dataclass(frozen=True)
class Frontier:
    """Of all mixtures, the least sum of costs for every number of bytes. sizes, cost: weight -> type -> bytes, KL."""

    sizes: Mapping[str, Mapping[str, int]]
    cost: Mapping[str, Mapping[str, float]]
    fixed: int  # bytes that no choice changes
    best: npt.NDArray[np.float64]  # [buckets]
    taken: npt.NDArray[np.uint8]  # [weights, buckets]
    unit: int

    @property
    def least(self) -> int:
        return self.fixed + sum(min(of.values()) for of in self.sizes.values())

    @property
    def most(self) -> int:
        return self.fixed + sum(max(of.values()) for of in self.sizes.values())

    def nbytes(self, types: Types) -> int:
        return self.fixed + sum(of[types[w]] for w, of in self.sizes.items())

    def predicted(self, types: Types) -> float:
        return sum(of[types[w]] for w, of in self.cost.items())

    def mixture(self, nbytes: int) -> dict[str, str]:
        """The best of at most nbytes, which is not less than `least`."""
        at = min(len(self.best) - 1, (nbytes - self.least) // self.unit)
        types: dict[str, str] = {}
        for w, row in reversed(list(zip(self.sizes, self.taken, strict=True))):
            types[w] = list(self.sizes[w])[row[at]]
            at -= steps(self.sizes[w], self.unit)[row[at]]
        return self.filled(types, nbytes)

    def filled(self, types: dict[str, str], nbytes: int) -> dict[str, str]:
        """The same with what rounding left spent on the dearest weights that it buys more bits for."""
        while True:
            room, here = nbytes - self.nbytes(types), []
            for w, of in self.sizes.items():
                for t, size in of.items():
                    more, gain = size - of[types[w]], self.cost[w][types[w]] - self.cost[w][t]
                    if 0 <= more <= room and gain > 0:
                        here.append((gain / (more + 1), w, t))
            if not here:
                return types
            _, w, t = max(here)
            types[w] = t


def frontier(sizes: Mapping[str, Mapping[str, int]], cost: Mapping[str, Mapping[str, float]], fixed: int) -> Frontier:
    """Types of a weight from the fewest bytes to the most."""
    least, most = (sum(pick(of.values()) for of in sizes.values()) for pick in (min, max))
    unit = max(32, -(-(most - least) // BUCKETS))
    n = (most - least) // unit + len(sizes) + 1  # rounding up takes one more for each weight
    best, taken = np.zeros(n), np.zeros((len(sizes), n), np.uint8)
    for row, (w, of) in zip(taken, sizes.items(), strict=True):
        new = np.full(n, np.inf)
        for i, (t, step) in enumerate(zip(of, steps(of, unit), strict=True)):
            found = np.full(n, np.inf)
            found[step:] = best[: n - step] + cost[w][t]
            row[found < new] = i
            new = np.minimum(new, found)
        best = new
    return Frontier(sizes, cost, fixed, best, taken, unit)


def steps(of: Mapping[str, int], unit: int) -> list[int]:
    return [-(-(size - min(of.values())) // unit) for size in of.values()]


def undominated(sizes: Mapping[str, int], error: Mapping[str, float]) -> dict[str, int]:
    """Without types that another is better than at no more bytes; from the fewest bytes to the most."""
    kept: dict[str, int] = {}
    for t in sorted(sizes, key=lambda t: (sizes[t], error[t], t)):
        if all(error[t] < error[k] for k in kept):
            kept[t] = sizes[t]
    return kept


def swaps(front: Frontier, types: Types, nbytes: int, n: int) -> list[dict[str, str]]:
    """Neighbours of a mixture within nbytes, those of the least predicted cost first: one weight changes, or two do."""
    moves: list[tuple[float, int, str, str]] = []
    for w, of in front.sizes.items():
        order = list(of)
        at = order.index(types[w])
        for other in order[max(0, at - 1) : at + 2]:
            if other != types[w]:
                moves.append((front.cost[w][other] - front.cost[w][types[w]], of[other] - of[types[w]], w, other))
    room, found = nbytes - front.nbytes(types), list[tuple[float, tuple[tuple[str, str], ...]]]()
    for i, (cost, size, w, t) in enumerate(moves):
        if size <= room and cost <= 0:
            found.append((cost, ((w, t),)))
        pairs = [(c, v, u) for c, s, v, u in moves[:i] if v != w and size + s <= room and (size > 0) != (s > 0)]
        found += [(cost + c, ((w, t), (v, u))) for c, v, u in pairs]
    return [{**types, **dict(change)} for _, change in sorted(found)[:n]]


# bytes --------------------------------------------------------------------------------------------


class Files:
    """Bytes of the files that mixtures make. units: a weight -> all that have its type, of which it is the first.

    A mixture says the type of each unit; lowered: types of all weights -> the graph that they make, and the bytes of its files.
    """

    def __init__(self, menu: Menu, lowered: Callable[[Types], tuple[Weights, int]]) -> None:
        self.menu, self.lowered, self.known = menu, lowered, dict[tuple[str, ...], int]()
        rest = [w for w in menu.sizes if not any(w in members for members in menu.together)]
        self.units = {members[0]: tuple(members) for members in (*menu.together, *((w,) for w in rest))}
        self.units = {w: self.units[w] for w in menu.sizes if w in self.units}
        self.sizes = {u: {t: sum(menu.sizes[w][t] for w in ws) for t in menu.sizes[u]} for u, ws in self.units.items()}
        self.smallest = {u: min(of, key=of.__getitem__) for u, of in self.sizes.items()}
        self.fixed = lowered(self.types(self.smallest))[1] - self.summed(self.smallest)

    def types(self, mixture: Types) -> dict[str, str]:
        """Of every weight on the menu."""
        return {w: mixture[u] for u, ws in self.units.items() for w in ws}

    def mixture(self, types: Types) -> dict[str, str] | None:
        """None where weights of a unit differ."""
        alike = all(types[w] == types[u] for u, ws in self.units.items() for w in ws)
        return {u: types[u] for u in self.units} if alike else None

    def summed(self, mixture: Types) -> int:
        return sum(self.sizes[u][t] for u, t in mixture.items())

    def nbytes(self, mixture: Types) -> int:
        if self.menu.exact:
            return self.fixed + self.summed(mixture)
        key = tuple(mixture[u] for u in self.units)
        if key not in self.known:
            self.known[key] = self.lowered(self.types(mixture))[1]
        return self.known[key]


def fitting(front: Frontier, files: Files, nbytes: int) -> dict[str, str]:
    """The best prediction whose files have at most nbytes: where headers are longer than thought, less is asked for."""
    types = front.mixture(max(front.least, nbytes))
    ask = nbytes - (files.nbytes(types) - front.nbytes(types))
    while True:
        types = front.mixture(max(front.least, ask))
        over = files.nbytes(types) - nbytes
        if over <= 0 or ask <= front.least:
            return types if over <= 0 else files.smallest
        ask -= over


# the choice ---------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """types: of every weight on the menu; facts: what the report says of how they were found."""

    types: dict[str, str]
    nbytes: int
    facts: dict[str, Any]


def choose(
    wish: Wish, menu: Menu, lowered: Callable[[Types], tuple[Weights, int]], calibration: Text, evaluation: Text
) -> Choice:
    """lowered: types -> the graph that they make and the bytes of its files.

    GateError with what is nearest where the wish cannot be met.
    """
    with uninterrupted():
        from qconvert.sensitivity import Bench, Mixture, costs, relative_error  # load torch
    start, files = time.perf_counter(), Files(menu, lowered)
    refuse_too_small(wish, files)
    names = list(dict.fromkeys(t for of in menu.sizes.values() for t in of))
    graphs = {t: lowered({w: t if t in of else next(iter(of)) for w, of in menu.sizes.items()})[0] for t in names}
    mixture = Mixture(graphs)
    bench, judge = Bench(mixture, calibration.sequences), Bench(mixture, evaluation.part(JUDGED))
    errors = {w: {t: relative_error(bench, w, t) for t in of} for w, of in menu.sizes.items()}
    units, others = files.units, {p: names[0] for p in mixture.graph.parameters() if p not in menu.sizes}
    sizes = {u: undominated(files.sizes[u], summed(errors, ws, files.sizes[u])) for u, ws in units.items()}
    found = costs(bench, {w: list(sizes[u]) for u, ws in units.items() for w in ws}, errors, list(units.values()))
    front = frontier(sizes, {u: summed(found.cost, ws, sizes[u]) for u, ws in units.items()}, files.fixed)

    def kl(of: Bench, types: Types) -> float:
        return of.kl({**files.types(types), **others})  # what no type is chosen for is as it is written too

    stock = stock_points(files, front, partial(kl, judge))
    if wish.nbytes is not None:
        types = within(wish, front, files, partial(kl, bench), [s for s in stock if s["nbytes"] <= wish.nbytes])
    else:
        types = below(wish, front, files, partial(kl, Bench(mixture, evaluation.sequences)))
    nbytes = files.nbytes(types)
    log.info("choose types      %6.1f s   %d measured, %s", time.perf_counter() - start, found.n_measured, nbytes_text(nbytes))
    facts = {
        "wish": wish.said, "nbytes": nbytes, "types": files.types(types), "measured": kl(judge, types),
        "calibration": calibration.name, "calibration_tokens": calibration.n_tokens, "evaluation": evaluation.name,
        "evaluation_tokens": judge.tokens.numel(), "n_measured": found.n_measured,
        "overlap": overlap(calibration.sequences, evaluation.sequences), "curve": curve(front, files, partial(kl, judge)),
        "stock": [{k: v for k, v in s.items() if k != "types"} for s in stock],
        "costs": {w: dict(of) for w, of in found.cost.items()},
    }  # fmt: skip
    return Choice(files.types(types), nbytes, facts)


def summed(of: Mapping[str, Mapping[str, float]], weights: Sequence[str], types: Iterable[str]) -> dict[str, float]:
    return {t: sum(of[w][t] for w in weights) for t in types}


def refuse_too_small(wish: Wish, files: Files) -> None:
    least = files.nbytes(files.smallest)
    if wish.nbytes is not None and wish.nbytes < least:
        why = f"{wish.said}: the smallest file is {least} bytes, {nbytes_text(least)}"
        raise GateError(why, hint="; ".join(filter(None, (f"--target-size {least}", files.menu.smaller))))


def stock_points(files: Files, front: Frontier, kl: Callable[[Types], float]) -> list[dict[str, Any]]:
    """The format's usual mixes: name, bytes and measured KL."""
    found = []
    for name, of in files.menu.stock.items():
        types = files.mixture(of)
        if types and front.least <= files.fixed + files.summed(types) <= front.most:
            found.append({"name": name, "nbytes": files.nbytes(types), "measured": kl(types), "types": types})
    return sorted(found, key=lambda p: p["nbytes"])


def within(
    wish: Wish, front: Frontier, files: Files, kl: Callable[[Types], float], stock: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The best that fits, by measurement: from the best prediction, or a usual mix that beats it, swap by swap."""
    assert wish.nbytes is not None
    starts = [fitting(front, files, wish.nbytes)]
    for p in (p for p in stock if on_menu(front, p["types"])):
        fuller = front.filled(dict(p["types"]), front.nbytes(p["types"]) + wish.nbytes - p["nbytes"])
        starts += [t for t in (p["types"], fuller) if files.nbytes(t) <= wish.nbytes]
    best, types = min(((kl(t), t) for t in starts), key=lambda pair: pair[0])
    for _ in range(ROUNDS):
        room = front.nbytes(types) + wish.nbytes - files.nbytes(types)
        near = [t for t in swaps(front, types, room, CANDIDATES) if files.nbytes(t) <= wish.nbytes]
        tried = [(kl(t), i, t) for i, t in enumerate(near)]
        if not tried or min(tried)[0] >= best:
            break
        best, _, types = min(tried, key=lambda each: each[:2])
    return dict(types)


def on_menu(front: Frontier, types: Types) -> bool:
    return all(types[w] in of for w, of in front.sizes.items())


def below(wish: Wish, front: Frontier, files: Files, kl: Callable[[Types], float], rounds: int = 9) -> dict[str, str]:
    """The smallest mixture of the frontier whose KL is within the limit, by bisection."""
    assert wish.max_kl is not None
    low, high = front.least, front.most
    if kl(smallest := front.mixture(low)) <= wish.max_kl:
        return smallest
    best = front.mixture(high)
    if (nearest := kl(best)) > wish.max_kl:
        size = nbytes_text(files.nbytes(best))
        raise GateError(f"{wish.said}: the largest file, {size}, has {nearest:.3g}", hint=f"--max-kl {nearest:.2g}")
    for _ in range(rounds):
        if high - low <= max(front.unit, front.least // 1000):
            break
        middle = (low + high) // 2
        types = front.mixture(middle)
        if kl(types) <= wish.max_kl:
            best, high = types, min(middle, front.nbytes(types))
        else:
            low = middle
    return best


def curve(front: Frontier, files: Files, kl: Callable[[Types], float]) -> list[dict[str, Any]]:
    """Bytes, predicted KL, and KL as measured on the evaluation text, from the smallest file to the largest that differs."""
    sizes = np.geomspace(front.least, front.most, 4 * POINTS + 1)
    points, seen = list[dict[str, Any]](), set[int]()
    for i, size in enumerate(sizes):
        types = front.mixture(max(front.least, int(size)))
        nbytes, predicted = files.nbytes(types), front.predicted(types)
        if nbytes in seen or (points and (nbytes < points[-1]["nbytes"] or predicted > points[-1]["predicted"])):
            continue
        seen.add(nbytes)
        points.append({"nbytes": nbytes, "predicted": predicted, "measured": None if i % 4 else kl(types)})
    return points


def refuse(format: str, wish: Wish) -> UnsupportedError:
    return UnsupportedError(
        f"{wish.said}: --to {format} has one type for all weights of a file here",
        hint="--to gguf, safetensors and onnx have one for each",
    )
