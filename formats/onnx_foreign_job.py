"""What is known of a foreign model on its way out, before its bytes are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.emit import Plan
from qconvert.graph import Graph

if TYPE_CHECKING:
    from qconvert.formats.onnx_foreign_nodes import Quantized


@dataclass(frozen=True)
class Rewritten:
    """`graph` makes the bytes that `plan` places, of weights alone; `left`: weight -> why it has another type."""

    path: Path
    graph: Graph
    plan: Plan
    quant: str
    left: Mapping[str, str]
    refs: tuple[str, ...]
    pipeline: str
    notes: tuple[str, ...]
    changed: tuple[Quantized, ...]
    inputs: Path | None  # to compare outputs on
