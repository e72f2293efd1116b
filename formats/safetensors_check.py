"""Prove a folder of safetensors: bytes against the graph, values by the dialect's own library, answers in transformers.

file reader: the folder through the graph's own ops, after safetensors and the dialect's library agreed on its bytes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from qconvert import check
from qconvert.check import LIMITS, Tokens
from qconvert.companions import n_vocab
from qconvert.emit import encoded_rows
from qconvert.formats import safetensors_encoder_check as encoders
from qconvert.formats import safetensors_hqq_check as hqq
from qconvert.formats import safetensors_mlx_check as mlx
from qconvert.formats import safetensors_transformers as transformers
from qconvert.formats.safetensors_activations import rounding
from qconvert.formats.safetensors_dialects import Dialect, Loading, RoundsActivations, Written
from qconvert.formats.safetensors_experts import expert_matrices, expert_stacks, not_run
from qconvert.formats.safetensors_files import Stored, opened_tensors
from qconvert.formats.safetensors_kernels import Dequantized, kernel_rows, why_not_whole
from qconvert.formats.safetensors_names import stored_transposed
from qconvert.formats.safetensors_swap_check import peft_rows, swap_rows, unasked_rows
from qconvert.formats.safetensors_written import all_stored, written
from qconvert.graph import Graph, Node, Type, n_rows
from qconvert.layouts import layout_of
from qconvert.parallel import in_parallel
from qconvert.passes.untie_head import has_head
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.run import run
from qconvert.scheme import Array
from qconvert.solvers import rounded_to
from qconvert.sources import Store
from qconvert.stored_forms import Tensors, stored_form
from qconvert.target import Lowered, Source
from qconvert.tokenizer import hard_corpus
from qconvert.transcoded import stored_rows
from qconvert.weights import Weights

RUNTIME = "runtime transformers"
KERNELS = "runtime Triton, interpreted"
ALIAS = "written"
BLOCK = 1 << 22  # weights whose bytes are compared at a time


def prove(
    source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks in the order of the stages, and the runtime that ran (None where there is none)."""
    folder, graph, options = parts[0].parent, lowered.graph, lowered.options
    store = Store()
    try:
        store.add(ALIAS, folder)
        rows = [bytes_row(folder, all_stored(graph), weights, threads)]
        if rows[0].verdict == "fail":
            return rows, None
        reals = Weights(as_read(graph, store), store)
        rows += options.dialect.byte_rows(folder, reals, written(graph, options.wanted))
        if any(row.verdict == "fail" for row in rows):
            return rows, None
        with check.torch_threads(threads):
            judge = encoder_rows if not has_head(graph) else decoder_rows
            return judge(folder, source, lowered, weights, reals, rows)
    finally:
        store.close()


def context(graph: Graph) -> int:
    config = graph.meta.get("config")
    length = config.get("context") if isinstance(config, dict) else None
    return length if isinstance(length, int) else 2048


# the files ----------------------------------------------------------------------------------------


def bytes_row(folder: Path, stored: Sequence[Stored], weights: Weights, threads: int) -> Row:
    """Every tensor as the safetensors library reads it, against the graph's bytes, laid out anew."""
    wrong: list[str] = []
    with opened_tensors(folder) as tensors:
        known = {t.name for s in stored for t in s.tensors}
        wrong += [f"{name} (unknown)" for name in tensors if name not in known]

        def compare(s: Stored) -> None:
            pieces: list[list[Array]] = [[] for _ in s.entry.planes]
            n = n_rows(s.entry.shape)
            step = max(1, BLOCK // max(1, s.entry.shape[-1])) if len(s.entry.shape) > 1 else n
            for begin in range(0, n, step):
                rows, at = encoded_rows(weights, s.entry, begin, min(n, begin + step)), 0
                for i, plane in enumerate(s.entry.planes):
                    pieces[i].append(rows[:, at : at + plane.nbytes].copy())
                    at += plane.nbytes
            laid = iter(pieces)  # in the order of the tensors that have a plane
            for t in s.tensors:
                found = tensors.tensor(t.name)
                got = found.reshape(-1).contiguous().view(torch.uint8).numpy()
                want = np.frombuffer(t.data, np.uint8)
                if t.plane is not None:
                    want = t.plane.laid_out(np.concatenate(next(laid)))
                if tuple(found.shape) != t.shape or not np.array_equal(got, want):
                    wrong.append(t.name)

        in_parallel(stored, compare, threads)
    return judged(f"bytes by safetensors: {len(known)} tensors", "differ", float(len(wrong)), 0.0, min(wrong, default=""))


def as_read(graph: Graph, store: Store) -> Graph:
    """The graph with the folder's tensors in the place of what was written there."""
    tensors, turned, new = store.tensors(ALIAS), stored_transposed(graph), read_apart(graph, store)
    for s in (s for s in all_stored(graph) if s.entry.value.partition("~")[0] not in new):
        loads = {}
        for t in (t for t in s.tensors if t.plane is not None):
            info = tensors[t.name]
            name = f"{s.entry.value}~read_{t.name.rpartition('.')[2]}"
            loads[name] = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref})
        kind = graph.nodes[s.entry.value].type
        if "." in kind.dtype:
            scheme = layout_of(kind.dtype).scheme.name
            made = Node("assemble", tuple(loads), Type(scheme, kind.shape), {"layout": kind.dtype})
            new[s.entry.value] = {**loads, s.entry.value: made}
        elif s.entry.name in turned:
            new[s.entry.value] = {**loads, s.entry.value: Node("transpose", tuple(loads), kind)}
        else:
            new[s.entry.value] = {s.entry.value: next(iter(loads.values()))}
    return graph.rewrite(lambda name, _: new.get(name))


def read_apart(graph: Graph, store: Store) -> dict[str, dict[str, Node]]:
    """Weights of which other values of the graph lie beside the codes, as the folder would be read as input."""
    packed = {n: graph.nodes[n].type.dtype for n in graph.parameters() if "." in graph.nodes[n].type.dtype}
    apart = [name for name, dtype in packed.items() if not layout_of(dtype).whole]
    if not apart:
        return {}
    path, found = store.roots[ALIAS] / "config.json", store.tensors(ALIAS)
    form = stored_form(json.loads(path.read_text(encoding="utf-8")), str(path))
    tensors = Tensors(found.__contains__, found.__getitem__, lambda info: store.read(info.ref, 0, (*info.shape, 1)[0]))
    assert form is not None
    new = {}
    for name in apart:
        n, k = graph.nodes[name].type.dims
        nodes = form.parameter(name, (n, k), {}, tensors)
        assert nodes is not None, name
        apart_from = {i: i if i == name else f"{i}~read" for i in nodes}  # the graph may have read such a weight before
        new[name] = {apart_from[i]: replace(each, inputs=tuple(map(apart_from.__getitem__, each.inputs)))
                     for i, each in nodes.items()}  # fmt: skip
    return new


# answers ------------------------------------------------------------------------------------------


class Answering(Protocol):
    """A model that is loaded; complaints: keys that were missing, unexpected or misshapen."""

    complaints: Sequence[str]
    about: dict[str, str]

    def logits(self, tokens: Sequence[int]) -> Array: ...


class Runtime(Protocol):
    """A module that runs folders."""

    def unavailable(self, folder: Path) -> str | None: ...

    def load(self, folder: Path, loading: Loading) -> Answering: ...


@dataclass(frozen=True)
class Rounded:
    """Weights that were quantized, rounded to the dtype in which transformers dequantizes them."""

    reals: Reals
    names: frozenset[str]
    dtype: str

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        value = self.reals.real(name, begin, end)
        return rounded_to(self.dtype, value) if name in self.names and self.dtype != "f32" else value


RUNTIMES: Mapping[str, Runtime] = {"transformers": transformers, "mlx-lm": mlx, "hqq": hqq}
Answer = Callable[[Answering, Reals], list[Row]]  # the runtime's, against the graph with those weights


def decoder_rows(
    folder: Path, source: Source, lowered: Lowered, weights: Weights, reals: Weights, rows: list[Row]
) -> tuple[list[Row], dict[str, str] | None]:
    graph, options = lowered.graph, lowered.options
    encode = options.tokenizer and options.tokenizer.reference()
    prompts = check.prompts_for(encode or (lambda _: []), hard_corpus(), n_vocab(graph), context(graph))
    merge, merged = check.stage_rows(lowered.stages, source.store, prompts)
    (quantized,) = run(graph, reals, prompts).values()
    rows += [*merge, *check.price_rows(check.distance(merged, torch.log_softmax(quantized, -1), prompts))]
    rows += swap_rows(folder, lowered, weights, reals, prompts)
    rows += stored_rows(graph, weights, reals) + kernel_rows(folder, graph, reals)
    facts = written(graph, options.wanted)
    answers, runtime = in_runtime(folder, graph, options.dialect.loading(facts), facts, reals, prompts)
    if {row.verdict for row in answers} == {"pass"}:
        answers += rounded_rows(folder, graph, options.dialect, facts, reals, prompts)
    return rows + answers, runtime


def encoder_rows(
    folder: Path, source: Source, lowered: Lowered, weights: Weights, reals: Weights, rows: list[Row]
) -> tuple[list[Row], dict[str, str] | None]:
    graph, facts = lowered.graph, written(lowered.graph, lowered.options.wanted)
    some = encoders.asked(folder, graph, context(graph))
    rows += encoders.graph_rows(source, lowered, reals, some)
    rows += stored_rows(graph, weights, reals) + kernel_rows(folder, graph, reals)

    def answer(model: Answering, expected: Reals) -> list[Row]:
        assert isinstance(model, transformers.Model)
        return encoders.runtime_rows(RUNTIME, model, graph, expected, some)

    answers, runtime = answered(folder, graph, lowered.options.dialect.loading(facts), facts, reals, answer)
    return rows + answers, runtime


def in_runtime(
    folder: Path, graph: Graph, loading: Loading, facts: Written, reals: Reals, prompts: Tokens
) -> tuple[list[Row], dict[str, str] | None]:
    """Logits of the folder in its runtime, in f32, against the graph with the weights that it has then."""

    def answer(model: Answering, expected: Reals) -> list[Row]:
        (want,) = run(graph, expected, prompts, round_input=loading.round_input).values()
        limit, _ = LIMITS[loading.kind]
        worst = max(check.relative(model.logits(p), w) for p, w in zip(prompts, want, strict=True))
        row = judged(f"runtime {loading.runtime}", "logits, relative", worst, limit)
        if row.verdict != "pass" or not isinstance(model, transformers.Model):
            return [row]
        return [row, *peft_rows(folder, graph, model, expected, loading, prompts)]

    rows, about = answered(folder, graph, loading, facts, reals, answer)
    if rows[0].verdict == "skip":
        rows += unasked_rows(graph, rows[0].reason)
    if rows[0].verdict == "skip" and not expert_stacks(graph):
        more, about = interpreted(folder, graph, reals, prompts)
        rows += more
    return rows, about


def answered(
    folder: Path, graph: Graph, loading: Loading, facts: Written, reals: Reals, answer: Answer
) -> tuple[list[Row], dict[str, str] | None]:
    """What the runtime says, or why it does not."""
    what, by = f"runtime {loading.runtime}", RUNTIMES[loading.runtime]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    experts = expert_stacks(graph) | expert_matrices(graph)
    mixture = not_run(config, not experts & facts.quantized.keys()) if experts else None
    if why := mixture or loading.missing or by.unavailable(folder):
        return [Row(what, "not run", None, None, "skip", why)], None
    try:
        model = by.load(folder, loading) if has_head(graph) else transformers.load(folder, loading, head=False)
    except Exception as e:  # whatever it is, the runtime does not load what was written
        told = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
        return [judged(what, "errors as it loads", 1.0, 0.0, told)], None
    if model.complaints:
        return [judged(what, "keys not loaded", float(len(model.complaints)), 0.0, model.complaints[0])], model.about
    return answer(model, as_loaded(graph, loading, facts, reals)), model.about


def as_loaded(graph: Graph, loading: Loading, facts: Written, reals: Reals) -> Reals:
    """The weights as a runtime has them that rounds what it dequantizes."""
    rounded = {n for n, node in graph.nodes.items() if n in facts.quantized or facts.quantized.keys() & node.inputs}
    return Rounded(reals, frozenset(rounded), loading.rounded) if loading.rounded else reals


def rounded_rows(folder: Path, graph: Graph, dialect: Dialect, facts: Written, reals: Reals, prompts: Tokens) -> list[Row]:
    """The same with activations rounded, where the dialect's runtime does that.

    Measured 0 on golden/tiny. Sums in another order let some fall the other way; not rounded at all, KL is the price.
    """
    if not isinstance(dialect, RoundsActivations) or dialect.inputs is None:
        return []
    loading = dialect.rounding(facts)
    what, model = f"{RUNTIME}, rounded activations", transformers.load(folder, loading)
    if model.complaints:
        return [judged(what, "keys not loaded", float(len(model.complaints)), 0.0, model.complaints[0])]
    expected = Rounded(reals, frozenset(facts.quantized), loading.rounded) if loading.rounded else reals
    (exact,) = run(graph, expected, prompts).values()
    (want,) = run(graph, expected, prompts, round_input=rounding(graph, dialect.inputs)).values()
    got = torch.stack([torch.from_numpy(model.logits(p)) for p in prompts])
    exact, want, got = (torch.log_softmax(x, -1) for x in (exact, want, got))
    price, (limit, _) = check.distance(exact, want, prompts).mean_kl, LIMITS["merge"]
    cost = Row("price of rounded activations", "mean KL", price, None, "info")
    return [judged(what, "mean KL", check.distance(want, got, prompts).mean_kl, max(limit, price / 2)), cost]


def interpreted(folder: Path, graph: Graph, reals: Reals, prompts: Tokens) -> tuple[list[Row], dict[str, str] | None]:
    """Where the runtime is not at hand: the model with the Triton kernels in the place of its linear maps, on one prompt."""
    if why := why_not_whole(graph):
        return [Row(f"{KERNELS}, logits", "not run", None, None, "skip", why)], None
    import triton

    (want,), (got,) = (run(graph, weights, prompts[:1]).values() for weights in (reals, Dequantized(folder, graph, reals)))
    limit, _ = LIMITS["runtime transformers"]
    row = judged(f"{KERNELS}, logits", "relative", check.relative(got[0].numpy(), want[0]), limit)
    return [row], {"name": "Triton's interpreter", "version": str(triton.__version__)}
