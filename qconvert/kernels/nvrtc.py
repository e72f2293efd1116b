"""CUDA C to machine code by NVRTC: no GPU, no driver and no toolkit, only the package that brings the library.

The major version of the library matters: 12 is the last that compiles for Maxwell, Pascal and Volta; 13 begins at sm_75.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from qconvert.errors import MissingDependency, QConvertError, UnsupportedError

PACKAGE = "nvidia-cuda-nvrtc-cu12==12.9.86"
LIBRARIES = ("lib/libnvrtc.so.12", "bin/nvrtc64_120_0.dll")  # within its folder
USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What one kernel takes, as the assembler counts: registers of a thread, bytes."""

    registers: int
    shared_nbytes: int
    stack_nbytes: int
    spilled_nbytes: int  # stored and loaded


class Compiled(NamedTuple):
    """cubin: an ELF file for `arch` alone; ptx: what it was assembled from."""

    arch: str
    cubin: bytes
    ptx: str
    kernels: Mapping[str, Usage]


def cuda_source(name: str) -> str:
    """A CUDA C file of ours."""
    return (files("qconvert.kernels") / "cuda" / f"{name}.cu").read_text(encoding="utf-8")


def compiled(name: str, arch: str) -> Compiled:
    """`name`.cu for sm_52, sm_61 ...; UnsupportedError for what NVRTC cannot compile for, MissingDependency without it."""
    nvrtc = library()
    if arch not in architectures():
        known = architectures()
        raise UnsupportedError(f"NVRTC does not compile for {arch}", hint=f"it knows {known[0]} to {known[-1]}")
    program = ctypes.c_void_p()
    source = cuda_source(name).encode()
    checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None))
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = got("ProgramLog", program).decode(errors="replace")
        if failed:
            raise QConvertError(f"{name}.cu does not compile for {arch}:\n{log}")
        return Compiled(arch, got("CUBIN", program), got("PTX", program).rstrip(b"\0").decode(), usage(log))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def usage(log: str) -> dict[str, Usage]:
    """Kernel -> what the assembler's log says that it takes."""
    found = {}
    for m in USAGE.finditer(log):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        spilled = int(m["stores"]) + int(m["loads"])
        found[m["name"]] = Usage(int(m["registers"]), int(shared[1]) if shared else 0, int(m["stack"]), spilled)
    return found


@cache
def architectures() -> tuple[str, ...]:
    """What the library at hand compiles for, oldest first."""
    count = ctypes.c_int()
    checked(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    checked(library().nvrtcGetSupportedArchs(numbers))
    return tuple(f"sm_{n}" for n in sorted(numbers))


@cache
def library() -> ctypes.CDLL:
    try:
        spec = find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:  # no package of nvidia's at all
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = next((p for f in folders for name in LIBRARIES if (p := Path(f, name)).exists()), None)
    if found is None:
        raise MissingDependency("kernels in CUDA C need NVRTC 12", hint=f"pip install {PACKAGE}")
    return ctypes.CDLL(str(found))


def got(what: str, program: ctypes.c_void_p) -> bytes:
    nbytes = ctypes.c_size_t()
    checked(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(nbytes)))
    buffer = ctypes.create_string_buffer(nbytes.value)
    checked(getattr(library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def checked(code: int) -> None:
    if code:
        describe = library().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise QConvertError(f"NVRTC: {describe(code).decode()}")
