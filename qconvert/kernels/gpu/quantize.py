"""Quantizing on a GPU, or by Triton's interpreter where TRITON_INTERPRET=1 asks for it: the bytes that the CPU makes.

search(scheme, x f32[N,K]) -> u8[N, row nbytes]      as kernels.search

solve.py has what finds affine codes, columns.py what solvers take column by column.

Row blocks go to the GPU and bytes come back, from any thread, each on a stream of its own.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qconvert.errors import UnsupportedError, require
from qconvert.scheme import F32, MINIFLOATS, SCHEMES, Array, Bytes, scheme_of

if TYPE_CHECKING:
    import torch

    from qconvert.graph import Node
    from qconvert.kernels.gpu.launch import Launch


class Search(NamedTuple):
    """A scheme's kernel: the file it stands in, weights of a sub-block, bytes of a block and of the words it is written in."""

    file: str
    lane: int
    nbytes: int
    word: int


SEARCHES: dict[str, Search] = {
    "q8_0": Search("block_kernels", 32, 34, 2),
    "q4_0": Search("block_kernels", 32, 18, 2),
    "q4_1": Search("block_kernels", 32, 20, 2),
    "q5_0": Search("block_kernels", 32, 22, 2),
    "q5_1": Search("block_kernels", 32, 24, 2),
    "q2_k": Search("line_kernels", 16, 84, 4),
    "q4_k": Search("line_kernels", 32, 144, 4),
    "q5_k": Search("line_kernels", 32, 176, 4),
    "q3_k": Search("scale_kernels", 16, 110, 2),
    "q6_k": Search("scale_kernels", 16, 210, 2),
    "iq4_nl": Search("block_kernels", 32, 18, 2),
    "iq4_xs": Search("block_kernels", 32, 136, 4),
}
FILES = ("lane_kernels", "line_kernels", "scale_kernels", "block_kernels")
LANES = 128  # sub-blocks of a program on a GPU: one a thread
INTERPRETED_LANES = 1 << 14  # the interpreter pays by the numpy call


@cache
def device() -> str:
    """Where kernels run: cuda, or cpu where they are interpreted. UnsupportedError without a GPU, or without Triton."""
    torch, triton = (require(module, "--device cuda") for module in ("torch", "triton"))
    if triton.knobs.runtime.interpret:
        return "cpu"
    if not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        build = f"torch {torch.__version__}" + ("" if seen is None else f", CUDA_VISIBLE_DEVICES={seen!r}")
        raise UnsupportedError(
            f"--device cuda: torch.cuda.is_available() finds no GPU ({build})",
            hint="--device cpu writes the same bytes; a GPU needs its driver and a torch built for CUDA or ROCm",
        )
    return "cuda"


def has(node: Node) -> bool:
    """Whether this kind of quantize node has a kernel here. Without statistics; rows that are one group are too few lanes."""
    solver, dtype = node.attrs.get("solver"), node.type.dtype
    if len(node.inputs) > 1 or (dtype in SCHEMES) != (solver == "search"):
        return False
    if dtype in SCHEMES:
        return dtype in SEARCHES
    scheme = scheme_of(dtype)
    if solver != "mse" or scheme is None or scheme.name in MINIFLOATS or len(scheme.table) not in (0, 16):
        return False
    group = scheme.levels[0].group
    return group is not None and group % 16 == 0 and all(level.role in ("scale", "zero") for level in scheme.levels)


@cache
def steps(scheme: str) -> F32 | None:
    """f32[n]: what the scheme's search tries; None where it tries nothing."""
    from qconvert.kernels import iq4_quants, min_quants, scale_quants

    factors = np.arange(-iq4_quants.TRIES, iq4_quants.TRIES + 1).astype(np.float32) + iq4_quants.FIRST
    found: dict[str, F32] = {
        "q2_k": min_quants.STEPS_2, "q4_k": min_quants.STEPS_4, "q5_k": min_quants.STEPS_5, "q6_k": scale_quants.RANGES_32,
        "iq4_nl": np.append(np.float32(1), factors), "iq4_xs": np.append(np.float32(1), factors),
    }  # fmt: skip
    return found.get(scheme)


def searching(scheme: str, x: torch.Tensor, interpreted: bool) -> tuple[torch.Tensor, Launch]:
    """x [N,K] f32, f16 or bf16: where its blocks u8[N, row nbytes] will be, and the launch that makes them."""
    torch = require("torch", "--device cuda")
    from qconvert.kernels.gpu.launch import Launch, up
    from qconvert.kernels.gpu.loading import loaded

    (n, k), (file, lane, nbytes, word), block = x.shape, SEARCHES[scheme], SCHEMES[scheme].block
    n_blocks = n * k // block
    out = torch.empty((n, k // block * nbytes), dtype=torch.uint8, device=x.device)
    kernel = getattr(dict(zip(FILES, loaded(interpreted, *FILES), strict=True))[file], scheme)
    n_lanes = n * k // lane
    lanes = min(INTERPRETED_LANES, max(16, up(n_lanes))) if interpreted else LANES
    args: tuple[object, ...] = x, out.view(-1).view(torch.int16 if word == 2 else torch.int32), n_blocks
    switches: dict[str, object] = {"LANES": lanes, "enable_fp_fusion": False}
    if (tried := steps(scheme)) is not None:
        args, switches = (*args, torch.from_numpy(tried).to(x.device)), {"N_STEPS": len(tried), **switches}
    return out, Launch(kernel, (-(-n_lanes // lanes),), args, switches)


def search(scheme: str, x: F32) -> Bytes:
    """x f32[N,K] -> u8[N, row nbytes], byte for byte kernels.search; K is a multiple of the scheme's block."""
    with STAGE.stream():
        out, launch = searching(scheme, STAGE.up(np.asarray(x, np.float32)), device() == "cpu")
        if x.size:
            launch.run()
        return STAGE.down(out)


class Stage(threading.local):
    """A thread's stream, and the pinned memory through which it copies."""

    def __init__(self) -> None:
        self.pinned: dict[str, torch.Tensor] = {}
        self.own: torch.cuda.Stream | None = None

    def stream(self) -> torch.cuda.StreamContext:
        cuda = require("torch.cuda", "--device cuda")
        if self.own is None and device() == "cuda":
            self.own = cuda.Stream()
        context: torch.cuda.StreamContext = cuda.stream(self.own)
        return context

    def buffer(self, way: str, nbytes: int) -> torch.Tensor:
        """u8[nbytes] of pinned memory, kept for the next time."""
        torch = require("torch", "--device cuda")
        if way not in self.pinned or self.pinned[way].numel() < nbytes:
            self.pinned[way] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self.pinned[way][:nbytes]

    def up(self, x: Array) -> torch.Tensor:
        from qconvert.kernels.gpu.records import tensor

        here = tensor(np.ascontiguousarray(x), "cpu")
        if device() == "cpu":
            return here
        assert self.own is not None
        self.own.synchronize()  # what was staged before may still be on its way
        staged = self.buffer("up", x.nbytes).view(here.dtype).view(here.shape)
        return staged.copy_(here).to("cuda", non_blocking=True)

    def down(self, out: torch.Tensor) -> Array:
        if out.device.type == "cpu":
            here: Array = out.numpy()
            return here
        staged = self.buffer("down", out.nbytes).view(out.dtype).view(out.shape)
        staged.copy_(out, non_blocking=True)
        assert self.own is not None
        self.own.synchronize()
        values: Array = staged.numpy().copy()
        return values


STAGE = Stage()
