"""A type for each weight of an ONNX folder: from the words of a user, or chosen one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qconvert.formats.onnx_arch import Form
from qconvert.formats.onnx_columns import LAYOUTS as COLUMNS
from qconvert.formats.onnx_columns import PREFIX as COLUMNS_PREFIX
from qconvert.formats.onnx_int8_plan import Integer
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_mixtures import mixture_passes, pairs, routers, why_pair
from qconvert.formats.onnx_moves import kept, ordering, quant_of
from qconvert.formats.onnx_schemes import gathered
from qconvert.formats.onnx_storage import Storage
from qconvert.graph import Graph, Type
from qconvert.passes.untie_head import UntieHead, embedding_of, is_tied
from qconvert.pipeline import Pass
from qconvert.request import Fallback
from qconvert.scheme import GROUPS
from qconvert.tokenizer import Tokenizer

PLAIN = {"fp32": "f32", "fp16": "f16"}
DTYPE_NBYTES = {"f32": 4, "f16": 2, "i64": 8}


@dataclass(frozen=True)
class Options:
    """quant: a name of QUANTS, or uint4f with float zero points; group: weights along a row that share a scale.

    group is None for plain types. types: of weights for which one was chosen each. checked: the installed onnxruntime is
    asked whether it has the kernels.
    """

    form: Form
    quant: str
    group: int | None
    accuracy_level: int
    checked: bool
    fallback: Fallback
    name: str  # of the model and its adapters
    tokenizer: Tokenizer | None
    files: Mapping[str, bytes]  # what lies beside the model
    storage: Storage
    config: Mapping[str, object]  # config.json of the model
    metadata: Mapping[str, str]
    integer: Integer | None = None
    notes: tuple[str, ...] = ()
    any_quant: bool = True  # --quant was not given: codes that a source has are kept with zero points too
    any_group: bool = True
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return "mixed" if self.types else self.quant


def first_passes(graph: Graph, options: Options) -> tuple[Pass, ...]:
    """What comes before quantization, and makes the weights that there are then."""
    order = ordering(graph, options.quant, options.group, options.any_quant, options.any_group)
    return (*order, *mixture_passes(graph, options.form, options.quant), *portable_head(graph, options))


def portable_head(graph: Graph, options: Options) -> tuple[UntieHead, ...]:
    """Standard nodes gather rows and multiply columns, so no bytes serve both an embedding and a quantized head."""
    apart = options.form.contrib or options.group is None or not is_tied(graph)
    return () if apart else (UntieHead(),)


def types_of(graph: Graph, options: Options) -> tuple[dict[str, str], dict[str, str], list[dict[str, str]]]:
    """Weight -> dtype or scheme; weight -> layouts, where it lies [K,N]; and what did not get the scheme that was asked for."""
    types, columns, fallbacks = {}, {}, []
    matrices, embedding, alike = quantizable(graph), embedding_of(graph), pairs(graph)
    for name in graph.parameters():
        dims = graph.nodes[name].type.dims
        if graph.nodes[name].type.dtype == "i64":
            continue
        if name in alike:
            dims = (*dims[:-1], math.gcd(*alike[name]))
        if name in options.types:
            types[name] = options.types[name]
            if not options.form.contrib and name != embedding and types[name] not in DTYPE_NBYTES:
                columns[name] = COLUMNS_PREFIX
            continue
        if options.group is None or name not in matrices:
            types[name] = PLAIN.get(options.quant, "f32") if len(dims) > 1 else "f32"
            continue
        quant = quant_of(graph, name, options.quant, options.any_quant)
        held = gathered(options.quant) if name == embedding else options.quant
        keeps = kept(graph, name, held, options.group, options.any_quant, options.any_group)
        if name in alike and len({graph.nodes[n].type.dtype for n in alike}) > 1:
            keeps = None  # both weights of an expert get the same groups
        if keeps and (options.form.contrib or name == embedding or COLUMNS[f"{COLUMNS_PREFIX}.{keeps}"].fits(dims[0])):
            wanted = types[name] = keeps
        else:
            wanted, types[name] = f"{quant}_g{options.group}", fitting(replace(options, quant=quant), dims, name == embedding)
        if types[name] != "f32" and not options.form.contrib and name != embedding:
            columns[name] = COLUMNS_PREFIX
        if types[name] != wanted:
            reason = why_other(options, dims, name == embedding)
            if name in alike:
                reason = why_pair(*alike[name], options.group)
            fallbacks.append({"tensor": name, "wanted": wanted, "got": types[name], "reason": reason})
    return types, columns, fallbacks


def fitting(options: Options, dims: tuple[int, ...], embeds: bool) -> str:
    """The scheme for a weight [N,K]: of the largest group that divides rows, of 8 bits where less cannot lie [K,N]."""
    group = next((g for g in GROUPS[::-1] if options.group and g <= options.group and dims[-1] % g == 0), None)
    if group is None:
        return "f32"
    wanted = f"{gathered(options.quant) if embeds else options.quant}_g{group}"
    whole = options.form.contrib or embeds or COLUMNS[f"{COLUMNS_PREFIX}.{wanted}"].fits(dims[0])
    return wanted if whole else f"int8_g{group}"


def why_other(options: Options, dims: tuple[int, ...], embeds: bool) -> str:
    if options.group and dims[-1] % options.group:
        return f"rows of {dims[-1]} do not divide into groups of {options.group}"
    if embeds:
        return f"onnxruntime gathers no rows of {options.quant}"
    return f"{dims[0]} outputs do not fill bytes side by side"


def quantizable(graph: Graph) -> set[str]:
    """Weights of linears and experts, and the embedding of tokens."""
    tokens = {n for n, node in graph.nodes.items() if node.op == "input" and "default" not in node.attrs}
    linears = {n.inputs[1] for n in graph.nodes.values() if n.op == "linear"} - routers(graph) | pairs(graph).keys()
    return linears | {n.inputs[1] for n in graph.nodes.values() if n.op == "embed" and n.inputs[0] in tokens}


def row_planes(kind: Type) -> list[tuple[int, int | None]]:
    """nbytes of each piece of one row, and bits of a value where rows become columns."""
    if kind.dtype in LAYOUTS:
        return [(nbytes, None) for nbytes in LAYOUTS[kind.dtype].planes(kind.dims[-1])]
    if kind.dtype in COLUMNS:
        layout = COLUMNS[kind.dtype]
        return list(zip(layout.planes(kind.dims[1]), layout.bits, strict=True))
    return [(math.prod(kind.dims) // kind.rows * DTYPE_NBYTES[kind.dtype], None)]
