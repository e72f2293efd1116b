"""A folder of safetensors that somebody made: what is in it, and whether it is what it should have been made from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from qconvert.build import build
from qconvert.dtypes import DTYPES, FLOATS
from qconvert.errors import InputError, QConvertError
from qconvert.formats.safetensors_dialects import Wanted, Written, dialect_of
from qconvert.formats.safetensors_names import linears
from qconvert.graph import Graph, Node, Type
from qconvert.report import Report, Row, judged
from qconvert.scheme import MINIFLOATS, SCHEMES, TERNARY, scheme_of
from qconvert.sources import Store, read_checkpoint
from qconvert.stored_forms import method_of
from qconvert.target import Contents, Item, Source
from qconvert.transcoded import stored_dtype
from qconvert.weights import Weights

ROWS = 64  # of each weight that are compared
FLOOR = 1e-6  # relative: rounding of f32 sums
# quant_method -> the dialect that says how transformers loads it
DIALECTS = {"bitsandbytes": "nf4", "mlx": "mlx-4bit", "torchao": "torchao-int4"}  # others have the method's name


def checkpoint_folder(path: Path) -> Path | None:
    """A model's folder of safetensors."""
    return path if path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None


def contents(folder: Path) -> Contents:
    """Weights that are quantized by the scheme that they have, with the tensors that hold them; all others as they are."""
    store = Store()
    try:
        checkpoint = read_checkpoint(folder, store)
        tensors = {info.ref: (name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        items, parts = list[Item](), set[str]()
        method = method_of(checkpoint.config)
        try:
            graph = build(checkpoint) if method else None
        except QConvertError:
            graph = None  # tensors can be listed whatever the model is
        for name, scheme in written_in(graph, "f32").quantized.items() if graph else ():
            assert graph is not None
            refs = [str(graph.nodes[load].attrs["tensor"]) for load in graph.sources(name)]
            first, *rest = (Item(tensors[ref][0], *tensors[ref][1:], nbytes(*tensors[ref][1:])) for ref in refs)
            items += [Item(name, scheme, graph.nodes[name].type.dims, first.nbytes), *(r._replace(of=name) for r in rest)]
            parts.update(refs)
        items += [Item(*tensors[ref], nbytes(*tensors[ref][1:])) for ref in tensors if ref not in parts]
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        known = {"model_type": checkpoint.config.get("model_type"), **({"quant_method": method[0]} if method else {})}
        return Contents("safetensors", sorted(items, key=lambda i: i.of or i.name), size, known)
    finally:
        store.close()


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (DTYPES[dtype].nbytes if dtype in DTYPES else 1)


def verify(folder: Path, source: Source, merged: Graph, threads: int) -> Report:
    """Rows as at a conversion, but for the bytes. InputError where the folder is another architecture's."""
    from qconvert import check
    from qconvert.companions import n_vocab, tokenizer_of
    from qconvert.formats.safetensors_check import context, in_runtime
    from qconvert.tokenizer import hard_corpus

    store = Store()
    try:
        checkpoint = read_checkpoint(folder, store)
        graph = build(checkpoint)
        if graph.meta["family"] != merged.meta["family"]:
            raise InputError(f"{folder} is a {graph.meta['family']} model; {source.name} is {merged.meta['family']}")
        weights, wanted = Weights(graph, store), Weights(merged, source.store)
        rows = [weights_row(folder, graph, weights, merged, wanted)]
        encode = (tokenizer := tokenizer_of(source, merged)) and tokenizer.reference()
        prompts = check.prompts_for(encode or (lambda _: []), hard_corpus(), n_vocab(graph), context(graph))
        with check.torch_threads(threads):
            trained = check.log_probs(source.graph, Weights(source.graph, source.store), prompts)
            rows += check.price_rows(check.distance(trained, check.log_probs(graph, weights, prompts), prompts))
            facts = written_in(graph, dense_dtype(checkpoint.config))
            method = method_of(checkpoint.config)
            dialect = dialect_of(name_of(method[0] if method else None, facts))
            answers, runtime = in_runtime(folder, graph, dialect.loading(facts), facts, weights, prompts)
        return Report([], [*rows, *answers], runtime, provenance={"model": source.name, "file": folder.name})
    finally:
        store.close()


def name_of(method: str | None, facts: Written) -> str:
    if method is None:
        return "bf16"
    if method == "bitsandbytes" and "int8_scb" in facts.quantized.values():
        return "int8-bnb"
    if method != "compressed-tensors":
        return DIALECTS.get(method, method)
    small = any(name in MINIFLOATS or name.startswith("int8_row") for name in facts.quantized.values())
    return "fp8" if small else "w4a16"


def dense_dtype(config: dict[str, object]) -> str:
    spelled = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return next((name for name, d in DTYPES.items() if d.torch == spelled), "f32")


def written_in(graph: Graph, dtype: str) -> Written:
    quantized = {n: s for n in graph.parameters() if scheme_of(s := stored_dtype(graph, n)) is not None}
    left = tuple(n.removesuffix(".weight") for n in sorted(linears(graph, heads=True) - quantized.keys()))
    return Written(quantized, left, Wanted(None, dtype))


def weights_row(folder: Path, graph: Graph, weights: Weights, merged: Graph, wanted: Weights) -> Row:
    """Some rows of every weight: plain ones as their dtype rounds, others within thrice the error of our own quantizer."""
    from qconvert.check import LIMITS

    worst, at, limit = 0.0, "", LIMITS["weights"][0]
    missing = sorted(set(merged.parameters()) ^ set(graph.parameters()))
    if missing:
        return judged("weights", "in one model alone", float(len(missing)), 0.0, missing[0])
    for name in graph.parameters():
        kind = graph.nodes[name].type
        if kind.dims != merged.nodes[name].type.dims:
            why = f"{name}: {list(kind.dims)}, not {list(merged.nodes[name].type.dims)}"
            return judged("weights", "misshapen", 1.0, 0.0, why)
        end = min(kind.rows, ROWS) if len(kind.dims) > 1 else kind.rows
        want, got = wanted.real(name, 0, end).astype(np.float64), weights.real(name, 0, end)
        norm = float(np.linalg.norm(want)) or 1.0
        error, own = float(np.linalg.norm(got - want)) / norm, own_error(graph, name, merged, wanted, end) / norm
        ratio = error / max(own, FLOOR)
        if not ratio <= worst:
            worst, at = ratio, name
    return judged("weights", "error over that of our own quantizer", worst, limit, at if not worst <= limit else "")


def own_error(graph: Graph, name: str, merged: Graph, wanted: Weights, end: int) -> float:
    """|w - ours| of the first rows, w in the scheme or the dtype that the folder has."""
    dtype = stored_dtype(graph, name)
    while dtype in ("f32", "f64") and graph.nodes[name].inputs:  # a number that the model adds
        name = graph.nodes[name].inputs[0]
        dtype = graph.nodes[name].type.dtype
    op = "cast" if dtype in FLOATS else "quantize"
    solver = {} if op == "cast" else {"solver": solver_of(dtype)}
    target = "f32" if dtype == "f64" else dtype
    parameter = name.partition("~")[0]
    below = {n: merged.nodes[n] for n in merged.nodes if n in merged.needed([parameter])}
    if solver.get("solver") == "absmean":
        below[f"{parameter}~mean"] = Node("mean_magnitude", (parameter,), Type("f32", (1,)), {"least": 1e-5})
    inputs = (parameter, *(n for n in (f"{parameter}~mean",) if n in below))
    node = Node(op, inputs, Type(target, merged.nodes[parameter].type.shape), solver)
    nodes = {**below, f"{parameter}~ours": node}
    ours = Weights(Graph(nodes, (f"{parameter}~ours",)), wanted.store)
    try:
        difference = ours.real(f"{parameter}~ours", 0, end) - wanted.real(parameter, 0, end).astype(np.float64)
    except (QConvertError, AssertionError):  # a scheme whose scales are not chosen row by row
        scheme = scheme_of(dtype)
        return float(np.linalg.norm(wanted.real(parameter, 0, end))) / (1 << (scheme.bits if scheme else 8))
    return float(np.linalg.norm(difference))



def solver_of(scheme: str) -> str:
    """Of the codes that a conversion to it would have."""
    if scheme in TERNARY:
        return "absmean"
    if scheme == "int8_scb":
        return "absmax"
    return "search" if scheme in SCHEMES else "rtn" if scheme in MINIFLOATS else "mse"
