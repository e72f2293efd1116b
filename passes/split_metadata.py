"""split-metadata: say on which device each class of a weight's bytes lies, and how far ahead what is away is copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from qconvert.errors import UnsupportedError, UsageError
from qconvert.graph import Graph, Node
from qconvert.placement import CLASSES, DEVICES, Class, apart, offloaded, placement_of
from qconvert.report import nbytes_text
from qconvert.request import parse_nbytes

log = logging.getLogger("qconvert")
STAYS = "meta2"  # small, and read before what it scales


@dataclass(frozen=True)
class SplitMetadata:
    """Move as little of `classes` (joined by +) to `device` as lets the rest fit into `vram`; all of it where that is "".

    Packed weights get the attribute placement {class: device}, the graph the meta value prefetch. Runs after pack.
    """

    name: ClassVar[str] = "split-metadata"
    device: str = "cpu-pinned"
    classes: str = "meta1"
    vram: str = ""
    prefetch: int = 1

    def __call__(self, graph: Graph) -> Graph:
        if self.device not in DEVICES[1:]:
            raise UsageError(f"{self.name}: device={self.device}: there are {', '.join(DEVICES[1:])}")
        classes = self.classes.split("+")
        if unknown := set(classes) - set(CLASSES) | {STAYS} & set(classes):
            raise UsageError(
                f"{self.name}: classes={self.classes}: {min(unknown)} cannot be moved",
                hint=f"there are {', '.join(c for c in CLASSES if c != STAYS)}",
            )
        if self.prefetch < 0:
            raise UsageError(f"{self.name}: prefetch={self.prefetch}: blocks of look-ahead, from 0 on")
        joint = next((n for n in graph.parameters() if not apart(graph.nodes[n])), None)
        if joint is not None:
            raise UnsupportedError(
                f"{self.name}: {joint} is {graph.nodes[joint].type.dtype}, which has no scales that lie apart from its codes",
                hint="a format that keeps them apart: --to onnx, --to safetensors",
            )
        before = placement_of(graph)._replace(ahead=self.prefetch)
        if not any(b.kind in classes for b in before.buffers):
            what = f"no weight has {' or '.join(classes)}, so there is nothing to move"
            raise UnsupportedError(f"{self.name}: {what}", hint="a quantized type: --bits 4")
        vram = parse_nbytes(self.vram) if self.vram else None
        after = offloaded(before, cast(list[Class], classes), self.device, vram)
        if not after.away:
            log.info("%s: all %s fit, nothing is moved", self.name, nbytes_text(before.gpu_nbytes))
            return graph
        places: dict[str, dict[str, str]] = {}
        for b in after.buffers:
            if b.device != "gpu":
                places.setdefault(b.weight, {})[b.kind] = b.device

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name not in places:
                return None
            return {name: replace(node, attrs={**node.attrs, "placement": {**places[name]}})}

        return graph.rewrite(rule).with_meta(prefetch=self.prefetch)
