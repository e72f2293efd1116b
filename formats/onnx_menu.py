"""The types that each weight of an ONNX folder may have, for a budget of bytes: groups of 2, 4 and 8 bits, or f16 and f32.

No type is offered that onnxruntime computes slowly (see onnx_cliffs). The weights of experts get one type, as a QMoE has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qconvert.formats.onnx_cliffs import cliff
from qconvert.formats.onnx_columns import LAYOUTS as COLUMNS
from qconvert.formats.onnx_columns import PREFIX as COLUMNS_PREFIX
from qconvert.formats.onnx_files import ALIGNMENT
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_mixtures import pairs
from qconvert.formats.onnx_schemes import gathered, not_portable
from qconvert.formats.onnx_types import Options, first_passes, quantizable, row_planes
from qconvert.graph import Graph, Type
from qconvert.passes.untie_head import embedding_of
from qconvert.planes import Plane
from qconvert.scheme import GROUPS, Scheme, scheme_of
from qconvert.target import Menu

KINDS = ("int2", "uint2", "int4", "uint4", "int8")
OF_8_BITS = (32, 128)  # groups: more of them buy little
OF_EXPERTS = ("int4", "uint4", "int8")  # what a QMoE multiplies by
PLAIN = ("f16", "f32")
STOCK = ("int4_g32", "uint4_g32", "int4_g128", "int8_g32", "f16")


def menu(graph: Graph, options: Options) -> Menu:
    """Of what is multiplied or gathered; all else is f32."""
    graph = begun(graph, options)
    matrices, experts, embedding = quantizable(graph), pairs(graph), embedding_of(graph)
    sizes: dict[str, dict[str, int]] = {}
    for name in graph.parameters():
        dims = graph.nodes[name].type.dims
        if name not in matrices:
            continue
        k = math.gcd(*experts[name]) if name in experts else dims[-1]
        columns = not options.form.contrib and name != embedding
        types = schemes(options, OF_EXPERTS if name in experts else KINDS, k)
        if columns:
            types = [t for t in types if COLUMNS[f"{COLUMNS_PREFIX}.{t}"].fits(dims[0])]
        if name == embedding:
            types = [t for t in types if t.partition("_")[0] == gathered(t.partition("_")[0])]
        types += [] if name in experts and types else PLAIN
        of = {t: nbytes_of(t, dims, columns) for t in types}
        sizes[name] = dict(sorted(of.items(), key=lambda each: each[1]))
    stock = {t: every for t in STOCK if (every := alike(sizes, t))}
    together = [tuple(experts)] if len(experts) > 1 else []
    return Menu(sizes, stock, together, False, smaller(options))


def begun(graph: Graph, options: Options) -> Graph:
    """After the passes that the types of weights are chosen behind."""
    for each in first_passes(graph, options):
        graph = each(graph)
    return graph


def schemes(options: Options, kinds: Sequence[str], k: int) -> list[str]:
    """Of rows of k weights, and of the zero points and the group that were asked for."""
    if not options.any_quant:
        own = [options.quant.replace("4", bits) for bits in "248"]
        kinds = own if kinds is KINDS else [kind for kind in own if kind in kinds]
    groups = GROUPS if options.any_group else (options.group,)
    found = []
    for kind in kinds if options.form.contrib else [kind for kind in kinds if not not_portable(kind)]:
        for g in groups if "8" not in kind or not options.any_group else OF_8_BITS:
            scheme = scheme_of(f"{kind}_g{g}")
            if g and k % g == 0 and scheme and f"onnx.{scheme.name}" in LAYOUTS and not is_slow(options, scheme):
                found.append(scheme.name)
    return found


def is_slow(options: Options, scheme: Scheme) -> bool:
    """But for zero points that were asked for."""
    return scheme.zero_point != "float" and cliff(scheme, options.accuracy_level) is not None


def nbytes_of(dtype: str, dims: tuple[int, ...], columns: bool) -> int:
    """With the padding of each piece."""
    prefix = COLUMNS_PREFIX if columns else "onnx"
    kind = Type(dtype if scheme_of(dtype) is None else f"{prefix}.{dtype}", dims)
    pieces = [Plane(0, nbytes, bits).file_nbytes(kind.rows) for nbytes, bits in row_planes(kind)]
    return sum(nbytes + -nbytes % ALIGNMENT for nbytes in pieces)


def alike(sizes: Mapping[str, Mapping[str, int]], wanted: str) -> dict[str, str] | None:
    """That type for all weights; None where one cannot have it."""
    types = {w: wanted if wanted in of else next(iter(of)) for w, of in sizes.items()}
    return types if all(t == wanted or len(sizes[w]) == 1 for w, t in types.items()) else None


def smaller(options: Options) -> str:
    """What allows files smaller than the smallest of a menu."""
    asked = [flag for flag, free in (("--group", options.any_group), ("--zero-point", options.any_quant)) if not free]
    ways = [f"without {' and '.join(asked)}"] if asked else []
    ways += ["--form ort has 2 bits"] if not options.form.contrib else []
    return ", or ".join([*ways, "--to gguf has smaller types"])


def with_types(graph: Graph, options: Options, types: Mapping[str, str]) -> Options:
    """quant and group are those of experts, as what a QMoE needs depends on them."""
    graph = begun(graph, options)
    of_experts = scheme_of(next((types[w] for w in pairs(graph) if w in types), ""))
    if of_experts is not None:
        options = replace(options, quant=of_experts.name.partition("_")[0], group=of_experts.block)
    return replace(options, types=types)
