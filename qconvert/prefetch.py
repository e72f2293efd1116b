"""Copying a block's offloaded bytes to the GPU before its kernels read them: schedule, proof of its safety, execution.

Two streams, each in order: copies and computations. Bytes pass through a ring of staging slots, one more than blocks of
look-ahead. The copy for use u of a slot waits until use u - slots was computed, which read that slot last; a computation
waits for its own copy. A host issues the steps in the order of the list; each waits only for what was issued before it,
as an event that was not recorded yet holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from qconvert.scheme import Bytes

Stream = Literal["copy", "compute"]


class Step(NamedTuple):
    """One item of a stream. after: steps of the list whose end it waits for. slot: written or read; None: reads none."""

    stream: Stream
    forward: int
    block: int
    slot: int | None
    after: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.stream} of block {self.block} (forward {self.forward})"

    @property
    def use(self) -> tuple[int, int]:
        return self.forward, self.block


def schedule(staged: Sequence[bool], ahead: int, forwards: int = 3) -> list[Step]:
    """Steps of some forward passes over blocks, of which those `staged` have bytes to copy.

    Three forwards show all there is: every use is to the one `slots` before it as the first such pair is.
    """
    uses = [(f, b) for f in range(forwards) for b, away in enumerate(staged) if away]
    n_slots, todo = min(ahead + 1, sum(staged)), iter(enumerate(uses))
    steps, computed, copied = list[Step](), dict[tuple[int, int], int](), dict[tuple[int, int], int]()

    def copy(n: int) -> None:
        for u, (f, b) in islice(todo, n):
            copied[f, b] = len(steps)
            steps.append(Step("copy", f, b, u % n_slots, (computed[uses[u - n_slots]],) if u >= n_slots else ()))

    copy(max(0, n_slots - 1))
    for use in ((f, b) for f in range(forwards) for b in range(len(staged))):
        if staged[use[1]]:
            copy(1)
        after = (copied[use],) if use in copied else ()
        computed[use] = len(steps)
        steps.append(Step("compute", *use, steps[after[0]].slot if after else None, after))
    return steps


# proof --------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """When a step ran."""

    start: float
    end: float


def before(steps: Sequence[Step], i: int) -> list[int]:
    """What step i waits for directly: the one before it in its stream, and events that were issued."""
    own = [j for j in range(i) if steps[j].stream == steps[i].stream]
    return [*own[-1:], *(j for j in steps[i].after if j < i)]


def simulate(steps: Sequence[Step], seconds: Sequence[float]) -> list[Span]:
    """When each step runs if it takes so long."""
    spans: list[Span] = []
    for i, each in enumerate(seconds):
        start = max((spans[j].end for j in before(steps, i)), default=0.0)
        spans.append(Span(start, start + each))
    return spans


def violations(steps: Sequence[Step], spans: Sequence[Span]) -> list[str]:
    """What goes wrong in one run: a slot read before its copy is complete, or overwritten before its use is done."""
    wrong = []
    for i, j, kind in conflicts(steps):
        if kind == "no copy":
            wrong.append(f"{steps[i]} reads slot {steps[i].slot}, which no copy fills")
        elif spans[i].end > spans[j].start:
            wrong.append(told(steps, i, j))
    return wrong


def conflicts(steps: Sequence[Step]) -> Iterator[tuple[int, int, str]]:
    """(i, j, why): step i must end before step j starts, for the bytes in a slot to be those that its reader wants."""
    copies = [i for i, s in enumerate(steps) if s.stream == "copy"]
    for r, reader in enumerate(steps):
        if reader.stream != "compute" or reader.slot is None:
            continue
        own = next((c for c in copies if steps[c].use == reader.use and steps[c].slot == reader.slot), None)
        if own is None:
            yield r, r, "no copy"
            continue
        yield own, r, "read"
        same = [c for c in copies if steps[c].slot == reader.slot]
        yield from ((r, c, "write") for c in same if c > own)
        yield from ((c, own, "write") for c in same if c < own)


def told(steps: Sequence[Step], i: int, j: int) -> str:
    if steps[i].stream == "copy" and steps[j].stream == "compute":
        return f"slot {steps[j].slot} is read before its copy is complete: {steps[j]}"
    return f"slot {steps[j].slot} is overwritten before its use is done: {steps[j]}, while {steps[i]} runs"


class Hazard(NamedTuple):
    """What can go wrong, and how long steps take when it does."""

    what: str
    seconds: tuple[float, ...]


def hazard(steps: Sequence[Step]) -> Hazard | None:
    """None where no assignment of latencies breaks the schedule, else one that does.

    A step is sure to end before another starts if and only if a chain of waits leads from one to the other; without one,
    an adversary lets the first take longer than all others together.
    """
    chains: list[int] = []  # of each step, those that it waits for, as bits
    for i in range(len(steps)):
        chains.append(0)
        for j in before(steps, i):
            chains[i] |= chains[j] | 1 << j
    for i, j, kind in conflicts(steps):
        if kind == "no copy" or not chains[j] >> i & 1:
            seconds = tuple(float(len(steps) + 1) if n == i else 1.0 for n in range(len(steps)))
            return Hazard(violations(steps, simulate(steps, seconds))[0], seconds)
    return None


# execution ----------------------------------------------------------------------------------------


class Copied(NamedTuple):
    """Bytes that went through the slots: in all, and in the last forward pass."""

    nbytes: int
    of_last_forward: int


def execute(
    steps: Sequence[Step], host: Callable[[int], Bytes], slot_nbytes: int, compute: Callable[[Step, Bytes], None], seed: int = 0
) -> Copied:
    """Run the steps on real bytes, in a random order that the waits allow; no step is skipped or run twice.

    host(block): what is copied; compute is given the slot of its block, as it is at its end. A copy puts half of its bytes
    there when it starts and half when it ends, so what is read too early or overwritten too soon is not what it should be.
    """
    rng, slots = np.random.default_rng(seed), np.zeros((1 + max((s.slot or 0) for s in steps), slot_nbytes), np.uint8)
    waits = [set(before(steps, i)) for i in range(len(steps))]
    begun, done, counts, sources = set[int](), set[int](), dict[int, int](), dict[int, Bytes]()
    while len(done) < len(steps):
        ready = sorted(begun - done) + [i for i in range(len(steps)) if i not in begun and waits[i] <= done]
        i = int(rng.choice(ready))
        step, slot = steps[i], slots[steps[i].slot or 0]
        if step.stream == "copy":
            source = sources.pop(i) if i in begun else sources.setdefault(i, host(step.block))
            half = slice(len(source) // 2) if i not in begun else slice(len(source) // 2, len(source))
            slot[half] = source[half]
            counts[step.forward] = counts.get(step.forward, 0) + source[half].nbytes
        elif i in begun:
            compute(step, slot)
        (done if i in begun else begun).add(i)
    return Copied(sum(counts.values()), counts.get(steps[-1].forward, 0))
