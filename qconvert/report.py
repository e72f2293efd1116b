"""What a conversion did, said once: rows of checks, sizes that add up, and the same facts as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from qconvert.emit import Entry, Plan
from qconvert.graph import Graph
from qconvert.layouts import layout_of
from qconvert.scheme import FOLDED

SCHEMA = "qconvert-report/1"  # of Report.data(), described by report.schema.json; another number means other fields
Verdict = Literal["pass", "fail", "skip", "info"]
REQUIRED = "--require-verified"


class Row(NamedTuple):
    """One check: `what` was measured by `metric`; fail if value > limit. A skip has a reason and is never a pass."""

    what: str
    metric: str
    value: float | None
    limit: float | None
    verdict: Verdict
    reason: str = ""


def judged(what: str, metric: str, value: float, limit: float, reason: str = "") -> Row:
    """A row that passes up to and including its limit; NaN fails."""
    return Row(what, metric, value, limit, "pass" if value <= limit else "fail", reason)


class Gate(NamedTuple):
    """A limit that an output must keep. What was not measured fails; a skip was not judged (yet), and is never a pass."""

    flag: str
    metric: str
    bound: Literal["<=", ">="]
    limit: float
    value: float | None
    verdict: Literal["pass", "fail", "skip"]
    origin: Literal["flag", "recipe", "default", "baseline"]  # of the limit
    place: str = ""  # where it was said: recipe.yaml:7, the baseline's file
    reason: str = ""

    def __str__(self) -> str:
        """--max-kl 0.05 (recipe.yaml:7): mean_kl is 0.1; or why it is not known."""
        said = {"flag": "", "recipe": f" ({self.place})", "default": " (default)", "baseline": f" (--baseline {self.place})"}
        found = "" if self.value is None else f"{self.metric} is {self.said(self.value)}"
        limit = "" if self.flag == REQUIRED else f" {self.said(self.limit)}"
        return f"{self.flag}{limit}{said[self.origin]}: {'; '.join(filter(None, (found, self.reason)))}"

    def said(self, x: float) -> str:
        return nbytes_text(x) if self.metric == "nbytes" else number(x)


class Size(NamedTuple):
    """Bytes of an output by what they are; the parts add up to the files' sizes."""

    header: int
    codes: int
    metadata: int  # scales, minima, offsets
    dense: int  # tensors that are not quantized
    padding: int

    @property
    def total(self) -> int:
        return sum(self)


class Bpw(NamedTuple):
    """Bits per weight: codes and linear over the linears' weights (embeddings and adapters apart), file over all weights."""

    codes: float
    linear: float
    file: float


def size_of(plan: Plan) -> Size:
    codes, others = sum(code_nbytes(e) for e in plan.entries), metadata_beside(plan)
    codes += sum(codes_alone(plan).values())
    quantized = sum(e.nbytes for e in plan.entries if "." in e.dtype or e.value in others)
    dense = sum(e.nbytes for e in plan.entries) - quantized
    header = sum(f.known_nbytes for f in plan.files)
    return Size(header, codes, quantized - codes, dense, plan.nbytes - header - quantized - dense)


def metadata_beside(plan: Plan) -> set[str]:
    """Values NAME~what that lie beside the packed rows of NAME."""
    packed = {e.value for e in plan.entries if "." in e.dtype}
    packed |= {e.value.partition("~")[0] for e in plan.entries if e.value.endswith(f"~{FOLDED}")}
    return {e.value for e in plan.entries if e.value not in packed and e.value.partition("~")[0] in packed}


def codes_alone(plan: Plan) -> dict[str, int]:
    """Weights that have no packed rows, only codes that rows share and what lies beside: the nbytes of those codes."""
    packed = {e.value for e in plan.entries if "." in e.dtype}
    folded = ((e.value.partition("~")[0], e.nbytes) for e in plan.entries if e.value.endswith(f"~{FOLDED}"))
    return {name: nbytes for name, nbytes in folded if name not in packed}


def code_nbytes(entry: Entry) -> int:
    return int(math.prod(entry.shape) * layout_of(entry.dtype).scheme.code_bits) // 8 if "." in entry.dtype else 0


class Nbytes(NamedTuple):
    """Sizes three ways: codes and linear of the linears (embeddings and adapters apart), file of all files."""

    codes: int
    linear: int
    file: int


def bpw_of(plan: Plan, graph: Graph) -> tuple[Bpw, Nbytes]:
    written = set(graph.parameters())
    linears = [e for e in plan.entries if len(e.shape) > 1 and e.value in written and not _embeds(graph, e)]
    others = metadata_beside(plan)
    alone = codes_alone(plan)
    weights = {e.value for e in linears} | alone.keys()
    names = weights | {v for v in others if v.partition("~")[0] in weights}
    n_alone = sum(math.prod(graph.nodes[name].type.dims) for name in alone)
    n = max(1, sum(math.prod(e.shape) for e in linears) + n_alone)
    everything = max(1, sum(math.prod(e.shape) for e in plan.entries if e.value not in others) + n_alone)
    codes = sum(code_nbytes(e) or e.nbytes for e in linears) + sum(alone.values())
    nbytes = sum(e.nbytes for e in plan.entries if e.value in names)
    return Bpw(8 * codes / n, 8 * nbytes / n, 8 * plan.nbytes / everything), Nbytes(codes, nbytes, plan.nbytes)


def _embeds(graph: Graph, entry: Entry) -> bool:
    return str(graph.root(entry.value).attrs.get("role", "")).endswith("_embd")


class Fate(NamedTuple):
    """Where every input tensor ended: written under a name, folded into another, or dropped with a reason."""

    used: int
    folded: int
    dropped: tuple[tuple[str, str], ...]


def fate_of(graph: Graph, plan: Plan, refs: Sequence[str]) -> Fate:
    """refs: every tensor of the sources. What no output reaches and no pass dropped is a bug, named here."""
    main = {str(graph.root(e.value).attrs.get("tensor")) for e in plan.entries}
    reached = {str(graph.nodes[s].attrs["tensor"]) for e in plan.entries for s in graph.sources(e.value)}
    listed = graph.meta.get("dropped", [])
    reasons = {str(d["tensor"]): str(d["reason"]) for d in listed if isinstance(d, dict)} if isinstance(listed, list) else {}
    dropped = []
    for ref in refs:
        if ref not in reached:
            name = ref.partition("#")[2]
            dropped.append((ref, reasons.get(name) or reasons.get(ref) or "replaced by the adapter's own copy"))
    return Fate(len(main & set(refs)), len((reached - main) & set(refs)), tuple(dropped))


@dataclass(frozen=True)
class Report:
    """All facts of one run; `data()` is what --json writes."""

    outputs: list[dict[str, Any]]
    checks: list[Row] = field(default_factory=list)
    runtime: dict[str, str] | None = None
    accounting: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)  # what quality.quality measured, or why nothing was
    budget: dict[str, Any] = field(default_factory=dict)  # how each weight's type was found, by size or KL
    quant: str = ""
    fallbacks: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pipeline: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [r for r in self.checks if r.verdict == "fail"]

    @property
    def verified(self) -> bool:
        """The runtime itself gave the right answers, and nothing failed; of a rehearsal there is no file that it is said of."""
        if "rehearsal" in self.accounting:
            return False
        ran = any(r.what.startswith("runtime") and r.verdict == "pass" for r in self.checks)
        return ran and not self.failed

    @property
    def failed_gates(self) -> list[Gate]:
        return [g for g in self.gates if g.verdict == "fail"]

    @property
    def exit(self) -> int:
        if self.failed:
            return 6
        flags = {g.flag for g in self.failed_gates}
        return 7 if flags - {REQUIRED} else 8 if flags else 0

    def data(self) -> dict[str, Any]:
        """As report.schema.json has it; JSON has no NaN and no infinity, they are null there."""
        facts = {
            "schema": SCHEMA,
            "outputs": self.outputs,
            "verified": self.verified,
            "runtime": self.runtime,
            "checks": [r._asdict() for r in self.checks],
            "gates": [g._asdict() for g in self.gates],
            "accounting": self.accounting,
            "quality": self.quality,
            "budget": self.budget,
            "quant": self.quant,
            "fallbacks": self.fallbacks,
            "notes": self.notes,
            "pipeline": self.pipeline,
            "provenance": self.provenance,
            "exit": self.exit,
        }
        return cast(dict[str, Any], finite(facts))


def finite(value: object) -> object:
    """Nested data with None for every number that JSON cannot say."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join((indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip() for row in rows)


def some(names: Sequence[str], n: int = 3) -> str:
    """The first n names, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def check_table(rows: Sequence[Row]) -> str:
    cells = [("", "check", "metric", "value", "limit")]
    for r in rows:
        value = "" if r.value is None else number(r.value)
        limit = "" if r.limit is None else f"<= {number(r.limit)}"
        cells.append((r.verdict, r.what, r.metric, value, limit + (f"  {r.reason}" if r.reason else "")))
    return table(cells)


def gate_table(gates: Sequence[Gate]) -> str:
    cells = [("", "gate", "metric", "value", "limit", "from")]
    for g in gates:
        limit = f"{g.bound} {g.said(g.limit)}"
        value = "" if g.value is None else g.said(g.value)
        cells.append((g.verdict, g.flag, g.metric, value, limit, "  ".join(filter(None, (g.origin, g.place, g.reason)))))
    return table(cells)


def number(x: float) -> str:
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e15:
        return str(int(x))
    return f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.4g}"


def nbytes_text(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError
