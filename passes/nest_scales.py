"""nest-scales: the scales of packed weights are quantized once more: less their mean, in blocks of 256, by bitsandbytes' map.

    NAME~peaks : f32[N,G] = block_peaks(NAME~real)       NAME~second : f32[blocks] = nest(NAME~peaks, NAME~mean)
    NAME~mean  : f32[1] = mean_magnitude(NAME~peaks)     NAME~scales : f32[N,G] = nested(NAME~nested, NAME~second, NAME~mean)
    NAME~nested : u8[N,G] = nest(NAME~peaks, NAME~mean)  NAME~code   : nf4_g64[N,K] = quantize(NAME~real, NAME~scales)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from qconvert.graph import Attr, Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.peer_weights import NESTED
from qconvert.scheme import Scheme, scheme_of
from qconvert.tensor_layouts import Tensors


@dataclass(frozen=True)
class NestScales:
    """Of weights whose packed rows leave that to other values. dtype: that bitsandbytes gives dequantized weights."""

    name: ClassVar[str] = "nest-scales"
    dtype: str = "bfloat16"

    def __call__(self, graph: Graph) -> Graph:
        packs = {f"{name}~code": name for name, node in graph.nodes.items() if leaves_scales(node)}

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name in packs:
                return self.codes(packs[name], node)
            if f"{name}~code" not in packs:
                return None
            (n, k), scheme = node.type.dims, layout_of(node.type.dtype).scheme
            note: dict[str, Attr] = {
                "quant_type": scheme.name.partition("_")[0], "blocksize": scheme.levels[0].group, "dtype": self.dtype,
                "shape": [n, k], "nested_blocksize": NESTED, "nested_dtype": "float32",
            }  # fmt: skip
            attrs: dict[str, Attr] = {"json": note, "key": "nested_offset"}
            state = Node("note", (f"{name}~mean",), Type("u8", (NOTE_NBYTES,)), attrs)
            return {f"{name}~state": state, name: replace(node, inputs=(f"{name}~code", f"{name}~state"))}

        return graph.rewrite(rule)

    def codes(self, name: str, code: Node) -> dict[str, Node]:
        """Codes that a source stores are found again: the greatest of a block's weights is its scale."""
        (n, k), real, below = code.type.dims, f"{name}~stored", {f"{name}~stored": code}
        if code.op == "quantize":
            real, below = code.inputs[0], {}
        group = cast(Scheme, scheme_of(code.type.dtype)).block
        peaks, mean, nested, second = (f"{name}~{part}" for part in ("peaks", "mean", "nested", "second"))
        f32, blocks = Type("f32", (n, k // group)), -(-n * k // group // NESTED)
        return {
            **below,
            peaks: Node("block_peaks", (real,), f32, {"group": group}),
            mean: Node("mean_magnitude", (peaks,), Type("f32", (1,))),
            nested: Node("nest", (peaks, mean), Type("u8", f32.shape)),
            second: Node("nest", (peaks, mean), Type("f32", (blocks,))),
            f"{name}~scales": Node("nested", (nested, second, mean), f32),
            f"{name}~code": Node("quantize", (real, f"{name}~scales"), code.type, {"solver": "absmax"}),
        }


def leaves_scales(node: Node) -> bool:
    """A pack whose rows are codes alone, beside a second level of scales."""
    layout = layout_of(node.type.dtype) if node.op == "pack" else None
    return isinstance(layout, Tensors) and any(each.suffix == "second" for each in layout.beside)


NOTE_NBYTES = 256  # of a quant_state, filled up with spaces
