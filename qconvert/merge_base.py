"""QLoRA: which base an adapter goes into that was trained beside weights in 4 bits: those weights, or the original ones.

q / delta = |W - dq(NF4(W))| / |what the adapter changes| says how far apart the two are, seen from the adapter: beyond 1
the base it was trained on and the original differ by more than the fine-tune did.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qconvert.adapters import Adapter
from qconvert.emit import row_ranges
from qconvert.errors import QConvertError, UnsupportedError, UsageError, uninterrupted
from qconvert.graph import Graph, Node
from qconvert.model_cache import find_model
from qconvert.parallel import default_threads
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.passes.round_base import RoundBase
from qconvert.request import Request
from qconvert.scheme import scheme_of
from qconvert.sources import Store, read_json
from qconvert.stored_forms import method_of
from qconvert.weights import Weights

if TYPE_CHECKING:
    from qconvert.check import Distance

log = logging.getLogger("qconvert")
TRAINED: Mapping[str, RoundBase | None] = {
    "nf4": RoundBase(), "nf4-single": RoundBase("nf4", False), "fp4": RoundBase("fp4"), "fp4-single": RoundBase("fp4", False),
    "16bit": None, "model": None,
}  # fmt: skip
WARN, REFUSE = 1.0, 5.0  # q / delta
NF4_STEP = 2 / 15  # of a block's greatest magnitude, on the mean
MERGES = ("merge", "dora", "merge_pooled")
N_SEQUENCES, LENGTH = 4, 128

Policy = Literal["original", "dequantized"]


@dataclass(frozen=True)
class Choice:
    """policy None: there was nothing to choose. ratios: weight -> q / delta; facts go into the report's accounting."""

    graph: Graph
    policy: Policy | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def choose_base(request: Request, adapters: Sequence[Adapter], store: Store, graph: Graph, stored: Path) -> Choice:
    """graph: with each adapter beside its linears; the one to merge comes back. stored: the model's folder.

    UsageError for flags without an adapter that was trained in 4 bits; UnsupportedError where the original base is too far
    from the one that was trained on, unless --allow-lossy.
    """
    wanted = request.merge_base or "auto"
    if wanted not in ("auto", "original", "dequantized"):
        raise UsageError(f"--merge-base {wanted}: there are auto, original, dequantized")
    if request.trained_on is not None and request.trained_on not in TRAINED:
        raise UsageError(f"--trained-on {request.trained_on}: there are {', '.join(TRAINED)}")
    own = _in_4_bits(stored)
    if own is not None and adapters:
        if wanted == "original":
            why = f"--merge-base original: {stored} has weights in {own} alone"
            raise UsageError(why, hint=f"give the 16-bit checkpoint as MODEL, and --trained-on {own}")
        return Choice(graph, None, (f"adapters go into the weights in {own} that they were trained beside, dequantized",))
    trained = request.trained_on or next((t for a in adapters if (t := _trained_on(a)) is not None), None)
    rounding = TRAINED.get(trained or "model")
    if rounding is None:
        if request.merge_base not in (None, "auto", "original"):
            why = f"--merge-base {wanted}: nothing says that the adapter was trained on a base in 4 bits"
            raise UsageError(why, hint="--trained-on nf4")
        return Choice(graph)
    rounded = rounding(graph)
    if request.dry_run:
        return Choice(rounded if wanted != "original" else graph, "dequantized" if wanted != "original" else "original")
    return _measured(request, store, graph, rounded, wanted, str(trained))


def _in_4_bits(folder: Path) -> str | None:
    """nf4, fp4 … where a checkpoint's own weights are bitsandbytes' 4 bits."""
    path = folder / "config.json"
    method = method_of(read_json(path)) if path.is_file() else None
    if method is None or method[0] != "bitsandbytes" or method[1].get("load_in_8bit"):
        return None
    kind = str(method[1].get("bnb_4bit_quant_type", "fp4"))
    return kind if method[1].get("bnb_4bit_use_double_quant") else f"{kind}-single"


def _trained_on(adapter: Adapter) -> str | None:
    """By the name of its base: Unsloth's end in bnb-4bit; a folder or repository at hand has a config.json."""
    base = adapter.base or ""
    if base.lower().removesuffix("/").endswith("bnb-4bit"):
        return "nf4"
    with suppress(QConvertError, OSError):
        return _in_4_bits(find_model(base)) if base else None
    return None


def _measured(request: Request, store: Store, graph: Graph, rounded: Graph, wanted: str, trained: str) -> Choice:
    squares = ratios_of(graph, rounded, store)
    ratios = {name: math.sqrt(q / d) if d else math.inf for name, (q, d) in squares.items()}
    if not ratios:
        return Choice(graph)
    total = math.sqrt(sum(q for q, _ in squares.values()) / max(sum(d for _, d in squares.values()), 1e-300))
    worst = max(ratios, key=ratios.__getitem__)
    told = [f"trained on {trained}: q/delta is {total:.3g}, worst {ratios[worst]:.3g} ({worst})"]
    facts: dict[str, Any] = {"trained_on": trained, "q_over_delta": {"all": total, **ratios}}
    distances = measure(request, store, graph, rounded) if request.check else {}
    for name, d in distances.items():
        told.append(f"merged into the {name} base: mean KL {d.mean_kl:.3g} from what was trained, NLL {d.delta_nll:+.3g}")
        facts[name] = d._asdict()
    policy = _policy(wanted, total, distances, request.calibrate is not None)
    if policy == "original" and total > REFUSE and not request.allow_lossy:
        raise UnsupportedError(
            f"--merge-base original: q/delta is {total:.3g}: rounding moved the base by more than the adapter does, and "
            "without it the adapter corrects an error that is not there",
            hint="--merge-base dequantized merges into what it was trained on; --allow-lossy insists",
        )
    if policy == "original" and total > WARN:
        log.warning("q/delta is %.3g: the original base is farther from the one trained on than the adapter moves it", total)
        told.append(f"q/delta above {WARN:g}: --merge-base dequantized is what was trained")
    told.append(f"merged into the {policy} base ({'--merge-base ' if wanted != 'auto' else ''}{wanted})")
    return Choice(rounded if policy == "dequantized" else graph, policy, tuple(told), {**facts, "policy": policy})


def _policy(wanted: str, ratio: float, distances: Mapping[str, Distance], text: bool) -> Policy:
    """auto: what was trained, but where the bases are near and the user's text is likelier by the original one."""
    if wanted != "auto":
        return "original" if wanted == "original" else "dequantized"
    nearer = text and len(distances) == 2 and distances["original"].delta_nll < distances["dequantized"].delta_nll
    return "original" if ratio <= WARN and nearer else "dequantized"


def ratios_of(graph: Graph, rounded: Graph, store: Store) -> dict[str, tuple[float, float]]:
    """Weight -> |W - rounded W|^2 and |what adapters add to W|^2, of weights where there are both."""
    merged = MergeAdapters()(graph)
    plain, other, sums = Weights(merged, store), Weights(rounded, store), dict[str, tuple[float, float]]()
    for name, node in merged.nodes.items():
        if node.op not in MERGES or f"{name}~original" not in rounded.nodes:
            continue
        q = d = 0.0
        for begin, end in row_ranges(node.type.dims):
            original, total = (w.real(n, begin, end) for w, n in ((other, f"{name}~original"), (plain, name)))
            q += float(np.square((original - other.real(name, begin, end)).astype(np.float64)).sum())
            d += float(np.square((total - original).astype(np.float64)).sum())
        sums[name] = q, d
    return sums


def measure(request: Request, store: Store, graph: Graph, rounded: Graph) -> dict[str, Distance]:
    """How far the model is, merged into each base, from the adapter beside the base it was trained on."""
    with uninterrupted():
        from qconvert import check  # loads torch
    with check.torch_threads(request.threads or default_threads()):
        prompts = prompts_of(request, store, graph)
        trained = check.log_probs(rounded, Weights(rounded, store), prompts)
        out = {}
        for name, each in (("original", graph), ("dequantized", rounded)):
            merged = MergeAdapters()(each)
            out[name] = check.distance(trained, check.log_probs(merged, Weights(merged, store), prompts), prompts)
        return out


def prompts_of(request: Request, store: Store, graph: Graph, skip: int = 0) -> list[list[int]]:
    """Sequences of one length of the text to calibrate on, or of the one that ships; skip: those before it."""
    from qconvert.calibration import N_TOKENS, calibration_of, cut
    from qconvert.companions import n_vocab
    from qconvert.tokenizer import read_tokenizer

    tokenizer = None
    with suppress(QConvertError):
        tokenizer = read_tokenizer(store.roots["base"], n_vocab(graph))
    rows = [row[:LENGTH] for row in cut(calibration_of(request, store, tokenizer), graph, N_TOKENS)]
    whole = [row for row in rows if len(row) == len(rows[0])]
    return whole[skip : skip + N_SEQUENCES] or whole[-N_SEQUENCES:]


# back to 4 bits of a table ------------------------------------------------------------------------


def refuse_erasing(graph: Graph, store: Store, request: Request) -> tuple[str, ...]:
    """Notes on adapters that are merged and rounded to NF4 or FP4 again. UnsupportedError where that erases them.

    It does where, in most blocks, what the adapter adds is less than half a step of the grid.
    """
    erased = n = 0
    weights, name = Weights(graph, store), ""
    for node in graph.nodes.values():
        scheme = scheme_of(node.type.dtype)
        below = _unmerged(graph, node) if node.op == "quantize" and scheme is not None and len(scheme.table) == 16 else None
        if below is None or scheme is None or request.dry_run or not scheme.name.startswith(("nf4", "fp4")):
            continue
        name, rows = name or node.inputs[0].partition("~")[0], min(64, node.type.rows)
        total = weights.real(node.inputs[0], 0, rows)
        delta = (total - weights.real(below, 0, rows)).reshape(rows, -1, scheme.block)
        peaks = np.abs(total).reshape(delta.shape).max(-1)
        size = np.sqrt(np.square(delta.astype(np.float64)).mean(-1))
        erased, n = erased + int((size < peaks * NF4_STEP / 2).sum()), n + size.size
    if not n:
        return ()
    told = f"in {erased / n:.0%} of blocks adapters add less than half a step of the grid that rounds them, first {name}"
    if 2 * erased > n and not request.allow_lossy:
        raise UnsupportedError(
            f"an adapter merged and rounded to 4 bits again is mostly erased: {told}",
            hint="--quant w8a16 or bf16, or PEFT beside the 4-bit base; --allow-lossy writes it",
        )
    return (told,)


def _unmerged(graph: Graph, node: Node) -> str | None:
    """What adapters were merged into, below a quantized weight; None where there are none."""
    name = node.inputs[0]
    while graph.nodes[name].op not in MERGES and graph.nodes[name].inputs:
        name = graph.nodes[name].inputs[0]
    if graph.nodes[name].op not in MERGES:
        return None
    while graph.nodes[name].op in MERGES:
        name = graph.nodes[name].inputs[0]
    return name
