"""Files of Triton kernels, loaded twice: @triton.jit decides when it is applied whether a function is interpreted or compiled.

A file's KERNELS are launched; all its other functions are called by those. Files may import from one another.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from threading import RLock
from types import ModuleType

from qconvert.errors import require

TRITON = RLock()  # the interpreter changes Triton's language while it runs, the compiler asks for the one active driver


@cache
def loaded(interpreted: bool, *files: str) -> tuple[ModuleType, ...]:
    """qconvert.kernels.gpu.<file> each, for Triton's interpreter or for its compiler; those that are imported come first."""
    names = [f"qconvert.kernels.gpu.{file}" for file in files]
    with TRITON:
        triton = require("triton", "GPU kernels")
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = interpreted
            modules = tuple(import_module(name) for name in names)
        for name in names:  # the other way to load them must not meet these
            del sys.modules[name]
    if interpreted:
        # each call of a helper would patch Triton's language again, 1 ms: their kernel's call has done it
        launched = {kernel for module in modules for kernel in module.KERNELS}
        for module in modules:
            for name, value in list(vars(module).items()):
                if name not in launched and hasattr(value, "rewrite") and value.fn.__module__ in names:
                    setattr(module, name, value.rewrite())
    return modules
