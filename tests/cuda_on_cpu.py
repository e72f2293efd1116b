"""Kernels in CUDA C on a CPU: the same source through g++, each thread of a block a fiber (cuda_on_cpu.h)."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qconvert.kernels.nvrtc import cuda_source

HERE = Path(__file__).parent
GXX = shutil.which("g++")
Argument = np.ndarray | int
Launch = Callable[..., None]  # (grid, *arguments)


def kernel_names(name: str) -> list[str]:
    return re.findall(r"^KERNEL (\w+)\(", cuda_source(name), re.MULTILINE)


def built(name: str, cuda_arch: int, folder: Path) -> Callable[[str], Launch]:
    """The kernels of `name`.cu by name, as the preprocessor shows them to an architecture (__CUDA_ARCH__: 520, 610)."""
    source = cuda_source(name)
    runs = "".join(
        f'extern "C" void run_{k}(unsigned x, unsigned y, int n, void** args) {{ launch<{k}>(x, y, n, args); }}\n'
        for k in kernel_names(name)
    )
    made, library = folder / f"{name}_{cuda_arch}.cpp", folder / f"{name}_{cuda_arch}.so"
    made.write_text(f'#include "{HERE / "cuda_on_cpu.h"}"\n{source}\n{runs}')
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-attributes", f"-D__CUDA_ARCH__={cuda_arch}"]
    done = subprocess.run(["g++", *flags, "-o", str(library), str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))

    def kernel(name: str) -> Launch:
        function = getattr(loaded, f"run_{name}")

        def launch(grid: tuple[int, int], *arguments: Argument) -> None:
            held = [
                ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(np.require(a, requirements="CW").ctypes.data)
                for a in arguments
            ]
            pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
            function(*grid, 128, pointers)

        return launch

    return kernel
