"""qconvert: a compiler for model weights. `qconvert.convert("model", adapters=["a"], to="gguf", bits=4)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qconvert.conversion import Result as Result
    from qconvert.conversion import convert as convert
    from qconvert.conversion import convert_all as convert_all
    from qconvert.conversion import request_of as request_of
    from qconvert.graph import Graph as Graph
    from qconvert.graph import Node as Node
    from qconvert.graph import Type as Type

__version__ = "0.1.0"

# In a checkout passes/ and formats/ lie beside this folder; in a wheel they lie inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

_LAZY = {
    "convert": "conversion", "convert_all": "conversion", "request_of": "conversion", "Result": "conversion",
    "Graph": "graph", "Node": "graph", "Type": "graph",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # resolved on use, so that `import qconvert` and `qconvert --help` load neither numpy nor torch
    if name not in _LAZY:
        raise AttributeError(f"module 'qconvert' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"qconvert.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
