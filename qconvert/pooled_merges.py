"""QA-LoRA merged into codes: which weights allow it, and which targets keep it.

What a pooled adapter adds is one number for each group of inputs, so it moves the offset of a group and no code. That is
exact where (i) an adapter's group is whole groups of the weight, (ii) the target keeps offsets or zero points as real
numbers, (iii) columns lie in the order of their groups, (iv) nothing else is trained on the path, (v) groups lie along
inputs. Else the sum is a real weight like any other, and rounding it a second time may undo the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.errors import UnsupportedError
from qconvert.graph import Graph, Node
from qconvert.moves import shifted
from qconvert.scheme import Scheme, scheme_of

TARGETS = "--quant Q4_1 or Q5_1 (GGUF), --zero-point float (ONNX), hqq, mlx-4bit, torchao-int4 (safetensors)"


def why_not_shifted(base: Node, group: int) -> str | None:
    """What keeps a pooled adapter out of a weight's offsets; None where it fits, or the weight has no codes."""
    if base.op == "unsort":
        return "(iii) columns are in groups by their importance (desc_act)"
    scheme = scheme_of(base.type.dtype)
    if scheme is None:
        return None
    if shifted(scheme) is None:
        what = "levels of a table" if scheme.table else "minima or zero points that are integers themselves"
        return f"(ii) {scheme.name} has {what}"
    if group % scheme.block:
        return f"(i) the adapter pools {group} inputs, the weight has groups of {scheme.block}"
    return None


def refuse_rounding(graph: Graph, allow: bool) -> tuple[str, ...]:
    """Notes on a graph of packed weights. UnsupportedError where an adapter would be rounded away, unless `allow`."""
    lost = [(name.partition("~")[0], why) for name, node in graph.nodes.items() if (why := _why_lost(graph, name, node))]
    if lost and not allow:
        name, why = lost[0]
        refusal = f"QA-LoRA cannot be merged exactly into {len(lost)} weights, first {name}: {why}"
        raise UnsupportedError(refusal, hint=f"{TARGETS}; --allow-lossy rounds a second time; the report says what that costs")
    notes = dict[str, int]()
    for node in graph.nodes.values():
        if node.op == "transcode" and (merged := _merged_below(graph, node)) is not None:
            base = scheme_of(graph.nodes[merged.inputs[0]].type.dtype)
            text = f"{_bits(base)} -> {_bits(scheme_of(node.type.dtype))}"
            notes[text] = notes.get(text, 0) + 1
    told = [f"{n} weights have a QA-LoRA adapter in their offsets: {text}" for text, n in notes.items()]
    more = f": {lost[0][0]}: {lost[0][1]}" if lost else ""
    return (*told, *([f"{len(lost)} weights with a QA-LoRA adapter are rounded a second time{more}"] if lost else []))


def _bits(scheme: Scheme | None) -> str:
    return "?" if scheme is None else f"{scheme.name} of {scheme.bits_per_weight:g} bits"


def _why_lost(graph: Graph, name: str, node: Node) -> str | None:
    """Why a second rounding of a merged weight may undo the merge; None where nothing is rounded."""
    if node.op != "quantize" or (merged := _merged_below(graph, node)) is None:
        return None
    if "why" in merged.attrs:
        return str(merged.attrs["why"])
    return f"(ii) {node.type.dtype} keeps no offset as it is" if scheme_of(merged.type.dtype) else None


def _merged_below(graph: Graph, node: Node) -> Node | None:
    return next((n for n in _chain(graph, node) if n.op == "merge_pooled"), None)


def _chain(graph: Graph, node: Node) -> Iterator[Node]:
    """What a weight is made from, along first inputs."""
    while node.inputs:
        node = graph.nodes[node.inputs[0]]
        yield node
