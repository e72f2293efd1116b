"""What is known of a foreign model on its way out, before its bytes are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.emit import Plan
from qconvert.formats.onnx_foreign_sites import Site
from qconvert.graph import Graph


@dataclass(frozen=True)
class Rewritten:
    """`graph` makes the bytes that `plan` places, of weights alone; `left`: weight -> why it was not quantized."""

    path: Path
    source: Any  # ModelProto
    proto: Any  # ModelProto
    graph: Graph
    plan: Plan
    quant: str
    sites: Mapping[str, Site]
    left: Mapping[str, str]
    refs: tuple[str, ...]
    pipeline: str
    inputs: Path | None = None  # to compare outputs on
    notes: tuple[str, ...] = ()
