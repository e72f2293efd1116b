"""How mixtures of experts are said in a form: onnxruntime's own nodes where they can say them, else one wide layer.

Measured with onnxruntime 1.20 to 1.31, CPU: MoE (from 1.23) and QMoE know gated experts of silu only, gate and up
interleaved; both divide the shares of the chosen experts by their sum. QMoE rounds activations to 8 bits at level 4
(4-bit weights, from 1.31), and 8-bit weights at every level from 1.31 on.
"""

from __future__ import annotations

import re

from qconvert.formats.onnx_arch import Form
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.graph import Graph
from qconvert.passes.flatten_experts import FlattenExperts
from qconvert.passes.interleave_experts import InterleaveExperts
from qconvert.pipeline import Pass

FUSED = ("fp32", "fp16", "int4", "uint4", "int8")  # what MoE and QMoE multiply by


def mixture_passes(graph: Graph, form: Form, quant: str) -> tuple[Pass, ...]:
    """Nothing for a model without experts."""
    if not any(node.op == "experts" for node in graph.nodes.values()):
        return ()
    fused = (InterleaveExperts(),) if form.contrib and quant in FUSED else ()
    return (*fused, FlattenExperts())


def routers(graph: Graph) -> set[str]:
    """Weights that choose experts: small, and what they choose changes at once, so they stay real."""
    chosen = {node.inputs[0] for node in graph.nodes.values() if node.op == "route"}
    return {graph.nodes[name].inputs[1] for name in chosen if graph.nodes[name].op == "linear"}


def pairs(graph: Graph) -> dict[str, tuple[int, int]]:
    """Weight of a QMoE -> the lengths of both its weights' rows, which get groups alike."""
    found: dict[str, tuple[int, int]] = {}
    for node in graph.nodes.values():
        if node.op == "experts" and len(node.inputs) == 4:
            both, down = node.inputs[2:]
            lengths = graph.nodes[both].type.dims[-1], graph.nodes[down].type.dims[-1]
            found |= {both: lengths, down: lengths}
    return found


def why_pair(k: int, f: int, group: int | None) -> str:
    return f"rows of {k} and {f}, which get groups alike, do not both divide into groups of {group}"


def experts_level(form: Form, bits: int, level: int) -> int | None:
    """That of a QMoE; None where it is not said: older runtimes do not load it, and for 8 bits it changes nothing."""
    return 4 if bits == level == 4 and form.name != "legacy" else None


def unrounded(graph: Graph, form: Form, level: int) -> frozenset[str]:
    """Quantized weights whose kernel leaves activations as they are."""
    layouts = {name: LAYOUTS.get(graph.nodes[name].type.dtype) for name in pairs(graph)}
    of_4_bits = {name for name, layout in layouts.items() if layout and layout.scheme.bits == 4}
    return frozenset(() if experts_level(form, 4, level) else of_4_bits)


def oldest_runtime(graph: Graph, form: Form, quant: str, group: int | None, level: int) -> str | None:
    """The first onnxruntime that multiplies these experts, and rightly; None for a model without.

    With zero points, rows of one group were wrong up to 1.30: measured, 1.2 relative, and silent.
    """
    if not pairs(graph):
        return None
    if quant in ("int4", "uint4") and experts_level(form, 4, level):
        return "1.31"
    one_group = any(k <= (group or 0) for lengths in pairs(graph).values() for k in lengths)
    return ("1.31" if one_group else "1.24") if quant == "uint4" else "1.23"


def mixture_notes(graph: Graph, version: str | None) -> tuple[str, ...]:
    if version is not None:
        return (f"experts need onnxruntime {version}",)
    if any(node.op == "route" for node in graph.nodes.values()):
        return ("every token passes through all experts: there is no node for this mixture",)
    return ()


def running_in(form: Form, version: str | None) -> Form:
    """The form, as it says of a file that needs that onnxruntime."""
    return form if version is None else form._replace(runs_in=re.sub(r"\b1\.\d+", version, form.runs_in))
