"""round-base: weights as an adapter saw them that was trained on a base in 4 bits (QLoRA).

    W~original    : bf16[N,K] = load()
    W~seen.peaks  : f32[N,G] = block_peaks(W~original)
    W~seen.scales : f32[N,G] = nested(...), the peaks quantized once more as nest-scales does, where they are
    W~seen.codes  : nf4_g64[N,K] = quantize(W~original, W~seen.scales)
    W             : f32[N,K] = cast(W~seen.codes)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qconvert.dtypes import FLOATS
from qconvert.graph import Graph, Node, Type
from qconvert.passes.untie_head import has_head, head_of
from qconvert.peer_weights import NESTED

log = logging.getLogger("qconvert")
BLOCK = 64  # bitsandbytes' default, which transformers does not change


@dataclass(frozen=True)
class RoundBase:
    """Every weight of a linear but the head's, as bitsandbytes rounds it when transformers loads a model in 4 bits.

    kind: nf4 or fp4; double: the scales are quantized once more. What adapters replaced stays as it is.
    """

    name: ClassVar[str] = "round-base"
    kind: str = "nf4"
    double: bool = True

    def __call__(self, graph: Graph) -> Graph:
        head = graph.nodes[head_of(graph)].inputs[1] if has_head(graph) else None
        chosen = set[str]()
        for node in graph.nodes.values():
            if node.op == "linear" and (name := node.inputs[1]) != head:
                weight = graph.nodes[name]
                if weight.op not in ("load", "transpose") or weight.type.dtype not in FLOATS:
                    continue
                if weight.type.dims[1] % BLOCK:
                    log.info("round-base: left %s alone: rows of %d do not divide into %d", name, weight.type.dims[1], BLOCK)
                    continue
                chosen.add(name)
        return graph.rewrite(lambda name, node: self.rounded(name, node) if name in chosen else None)

    def rounded(self, name: str, node: Node) -> Mapping[str, Node]:
        (n, k), original = node.type.dims, f"{name}~original"
        peaks, mean, nested, second, scales, codes = (
            f"{name}~seen.{part}" for part in ("peaks", "mean", "nested", "second", "scales", "codes")
        )
        f32, kind = Type("f32", (n, k // BLOCK)), Type(f"{self.kind}_g{BLOCK}", (n, k))
        nodes = {original: node}
        if self.double:
            nodes |= {
                peaks: Node("block_peaks", (original,), f32, {"group": BLOCK}),
                mean: Node("mean_magnitude", (peaks,), Type("f32", (1,))),
                nested: Node("nest", (peaks, mean), Type("u8", f32.shape)),
                second: Node("nest", (peaks, mean), Type("f32", (-(-n * k // BLOCK // NESTED),))),
                scales: Node("nested", (nested, second, mean), f32),
            }
        inputs = (original, scales) if self.double else (original,)
        nodes[codes] = Node("quantize", inputs, kind, {"solver": "absmax"})
        return {**nodes, name: Node("cast", (codes,), Type("f32", (n, k)))}
