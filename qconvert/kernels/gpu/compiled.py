"""The kernels compiled for a GPU that need not be here: what a launch on it would compile, and what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from qconvert.errors import UnsupportedError, require
from qconvert.kernels.gpu.launch import Launch, Scales, Tiles, expansion, multiplication
from qconvert.kernels.gpu.loading import TRITON
from qconvert.kernels.gpu.operand import Operand
from qconvert.kernels.gpu.records import place

# name -> Triton's backend, architecture, threads a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Binary(NamedTuple):
    kernel: str
    target: str
    nbytes: int  # of the cubin or hsaco
    registers: int  # of a thread; on AMD vector registers
    spilled: int  # bytes of a thread's local memory on NVIDIA, registers on AMD
    shared: int  # bytes of a block


class Driver:
    """Stands where Triton looks for a GPU, and says which one to compile for."""

    def __init__(self, target: str) -> None:
        self.name = target
        self.target = require("triton.backends.compiler", "compiling kernels").GPUTarget(*TARGETS[target])

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Launches compile for `target` inside."""
    triton = require("triton", "compiling kernels")
    if not isinstance(triton.language.standard._sum_combine, triton.runtime.JITFunction):
        raise UnsupportedError("TRITON_INTERPRET=1 is set: Triton's own functions are interpreted", hint="unset it")
    driver = triton.runtime.driver
    before = driver._active  # reset_active() would look for a GPU
    driver.set_active(Driver(target))
    try:
        yield
    finally:
        driver.set_active(before)


def compiled_product(
    w: Operand, target: str, m: int, dtype: torch.dtype = torch.float16, group: int = 0, tiles: Tiles | None = None
) -> list[Binary]:
    """The kernels of a product of x [m,K] by w, that of its low-rank part first, compiled for `target`.

    dtype int8: of integers, with a scale for each `group` columns of x (0: a row).
    """
    k, placed = w.shape[1], place(w, "cpu")
    x, real = torch.empty((m, k), dtype=dtype), torch.empty((m, k))
    t = Scales(torch.empty((m, -(-k // group) if group else 1)), group) if dtype == torch.int8 else None
    _, launches = multiplication(x, placed, t, real, tiles=tiles, interpreted=False)
    return [compiled(launch, target) for launch in launches]


def compiled_dequantize(w: Operand, target: str) -> Binary:
    return compiled(expansion(place(w, "cpu"), torch.float32, interpreted=False)[1], target)


def assembly(launch: Launch, target: str) -> str:
    """PTX, or AMD's instructions."""
    with TRITON, compiling_for(target):
        text: str = launch.compile().asm["ptx" if target.startswith("sm") else "amdgcn"]
    return text


def compiled(launch: Launch, target: str) -> Binary:
    with TRITON, compiling_for(target):
        kernel = launch.compile()
    if target.startswith("sm"):
        registers, spilled = cubin_usage(kernel.asm["cubin"])
        binary = kernel.asm["cubin"]
    else:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
        registers, spilled = int(found["vgpr_count"]), int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        binary = kernel.asm["hsaco"]
    return Binary(kernel.metadata.name, target, len(binary), registers, spilled, kernel.metadata.shared)


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, by the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = require("triton.knobs", "compiling kernels").nvidia.cuobjdump.path
        done = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
