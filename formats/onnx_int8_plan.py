"""Products of integers, planned: which weights get codes for them, and where the ranges of activations come from.

int8-dynamic: each call rounds an activation by its own range.    w8a8: by a range taken beforehand from a text.
Weights have one scale for each output and are stored unsigned with 128 in the middle: on x86 without VNNI onnxruntime adds
products of unsigned by signed codes in 16 bits, which saturate (measured: 1 % to 19 % of error); unsigned by unsigned never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from qconvert.calibration import Calibration, calibration_of, spreads_of
from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.onnx_columns import PREFIX
from qconvert.formats.onnx_mixtures import routers
from qconvert.graph import Attr, Graph
from qconvert.histograms import MINMAX, Grid, Rule, chosen_ranges, rule_of
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.passes.quantize_activations import DYNAMIC, QuantizeActivations, grid_of
from qconvert.passes.untie_head import embedding_of
from qconvert.request import Request
from qconvert.solver_spec import reads_statistics
from qconvert.sources import Store
from qconvert.tokenizer import Tokenizer

QUANTS = ("int8-dynamic", "w8a8")
SCHEME = "int8_row"
GROUPS = (32, 16)  # of an embedding that no linear reads
OPERATORS = ("qdq", "qoperator")


@dataclass(frozen=True)
class Integer:
    """operators None: ranges are dynamic. calibration None: they are, or it is a dry run, which reads no weight."""

    operators: Literal["qdq", "qoperator"] | None = None
    calibration: Calibration | None = None
    rule: Rule = MINMAX


def integer_of(request: Request, quant: str, store: Store, tokenizer: Tokenizer | None) -> Integer | None:
    """The user's words about integers. UsageError for those that do not belong to `quant`."""
    if quant != "w8a8":
        given = (request.calibrate, "--calibrate"), (request.operators, "--operators")
        for value, flag in (*given, (request.activation_range, "--activation-range")):
            if value is not None and not (flag == "--calibrate" and reads_statistics(request.solver)):
                raise UsageError(f"{flag} {value}: {quant} has no fixed ranges of activations", hint="--quant w8a8")
        return Integer() if quant in QUANTS else None
    if request.adapters_as == "swap":
        raise UnsupportedError("--adapters swap: w8a8 fixes ranges, which each adapter changes", hint="--quant int8-dynamic")
    operators = request.operators or "qdq"
    if operators not in OPERATORS:
        raise UsageError(f"--operators {operators}: there are {', '.join(OPERATORS)}")
    calibration = calibration_of(request, store, tokenizer)
    kind: Literal["qdq", "qoperator"] = "qoperator" if operators == "qoperator" else "qdq"
    return Integer(kind, None if request.dry_run else calibration, rule_of(request.activation_range))


def refuse_group(request: Request, quant: str) -> None:
    if request.group is not None:
        raise UsageError(f"--group {request.group}: {quant} has one scale for each output", hint="--quant int8 has groups")


def types_of(graph: Graph) -> tuple[dict[str, str], dict[str, str], list[dict[str, str]]]:
    """Weight -> dtype or scheme; weight -> layouts, where it lies [K,N]; and an embedding that stays real."""
    types, columns, fallbacks = {}, {}, []
    linears = {node.inputs[1] for node in graph.nodes.values() if node.op == "linear"} - routers(graph)
    for name in graph.parameters():
        k = graph.nodes[name].type.dims[-1]
        if name in linears:
            types[name], columns[name] = SCHEME, PREFIX
        elif name == embedding_of(graph):
            group = next((g for g in GROUPS if k % g == 0), None)
            types[name] = f"int8_g{group}" if group else "f32"
            if group is None:
                reason = f"rows of {k} do not divide into groups of {GROUPS[-1]}"
                fallbacks.append({"tensor": name, "wanted": f"int8_g{GROUPS[0]}", "got": "f32", "reason": reason})
        else:
            types[name] = "f32"
    return types, columns, fallbacks


def passes_of(
    graph: Graph, quant: str, integer: Integer, types: Mapping[str, str], columns: Mapping[str, str]
) -> tuple[tuple[Quantize, Pack, QuantizeActivations], tuple[str, ...]]:
    """What makes products of integers of the linears, and a note that says whose ranges they have."""
    grids, notes = grids_of(graph, integer)
    return (Quantize(quant, "mse", types), Pack("onnx", columns), QuantizeActivations(quant, grids)), notes


def grids_of(graph: Graph, integer: Integer) -> tuple[dict[str, dict[str, Attr]], tuple[str, ...]]:
    """Linear -> the attributes of quantize-activations."""
    real = routers(graph)
    linears = [name for name, node in graph.nodes.items() if node.op == "linear" and node.inputs[1] not in real]
    if integer.operators is None:
        return {name: {"round_input": DYNAMIC} for name in linears}, ()
    sides = ("round_input", "round_output") if integer.operators == "qoperator" else ("round_input",)
    if integer.calibration is None:
        return {name: {side: grid_of(0, 0) for side in sides} for name in linears}, ()
    found, notes = spreads_of(graph, integer.calibration, len(sides) > 1, integer.rule)
    spreads = {side: {name: found[name][side] for name in linears} for side in sides}
    rules = {"round_input": integer.rule, "round_output": MINMAX}  # logits and the residual stream live by their peaks
    ranges = {side: chosen_ranges(spreads[side], rules[side], codes, False) for side in sides}
    return {name: {side: grid_of(*ranges[side][name]) for side in sides} for name in linears}, notes


def codes(low: float, high: float) -> Grid:
    grid = grid_of(low, high)
    step, zero = cast(float, grid["scale"]), cast(int, grid["zero"])
    return Grid(step, -zero, 255 - zero)
