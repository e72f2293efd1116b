"""What offloading costs: bytes for each token, the tokens a second that bandwidths allow, and whether fewer bits cost less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qconvert.placement import Device, Placement, copy_nbytes, resident_bits
from qconvert.prefetch import schedule, simulate

DEAR = 2  # times the time of fewer bits that stay: worth a word


# bytes a second to the GPU: PCIe 4.0 x16; half of it where a driver copies pageable memory first; an NVMe drive
LINKS: Mapping[Device, float] = {"cpu-pinned": 25e9, "cpu-mmap": 12e9, "disk": 5e9}
MEMORY = 1e12  # of a GPU


class Bandwidths(NamedTuple):
    """Bytes a second: from where offloaded bytes lie to the GPU, and of the GPU's own memory."""

    link: float
    memory: float = MEMORY


class Traffic(NamedTuple):
    """Of decoding one token alone, by bandwidths: a bound, as arithmetic and launches come on top.

    seconds: a token takes, with the schedule's copies beside its computations. link_seconds and memory_seconds: what
    copying and what reading take by themselves. resident_seconds: what as many bytes of GPU memory, weights and staging, take
    to read, were they all the weights, in `resident_bits` bits.
    """

    seconds: float
    link_seconds: float
    memory_seconds: float
    resident_seconds: float
    resident_bits: float

    @property
    def dear(self) -> bool:
        return self.seconds > DEAR * self.resident_seconds


def traffic(placement: Placement, bandwidths: Bandwidths, vram: int | None = None) -> Traffic:
    """A block's computation reads all its bytes once, from GPU memory; lookups are waited for. vram: what there is."""
    link, memory = bandwidths
    blocks, staged = placement.blocks, placement.staged()
    copy = {block: copy_nbytes(arenas) / link for block, arenas in staged.items()}
    read = dict.fromkeys(blocks, 0.0)
    for b in placement.buffers:
        if b.block is not None:
            read[b.block] += b.nbytes / memory
    looked_up = sum(b.row_nbytes for b in placement.buffers if b.device != "gpu") / link
    forwards = 4
    steps = schedule([block in staged for block in blocks], placement.ahead, forwards)
    spans = simulate(steps, [(copy if s.stream == "copy" else read)[blocks[s.block]] for s in steps])
    ends = [s.end for s, step in zip(spans, steps, strict=True) if step.stream == "compute" and step.block == len(blocks) - 1]
    n_resident, unread = vram or placement.gpu_nbytes, sum(b.nbytes for b in placement.buffers if b.block is None)
    return Traffic(
        ends[-1] - ends[-2] + looked_up, sum(copy.values()) + looked_up, sum(read.values()), (n_resident - unread) / memory,
        resident_bits(placement, n_resident),
    )  # fmt: skip
