"""The report as one HTML page: nothing is loaded from elsewhere, plots are SVG, light or dark as the reader's system is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qconvert import __version__, plots
from qconvert.facts import Facts, counted, printable
from qconvert.report import nbytes_text, number

STYLE = """
:root{--bg:#fff;--fg:#1c2026;--soft:#5d6672;--line:#d9dee5;--card:#f6f7f9;--good:#1a7f4b;--bad:#c02f2f;
--c0:#2f6fdb;--c1:#d9730d;--c2:#2a9d6a;--c3:#8b5fbf;--c4:#c8385a;--c5:#1b9aaa;--c6:#a68a16;--c7:#7a828e}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e8ebef;--soft:#9aa4b1;--line:#333a44;--card:#1d2127;--good:#4cc38a;
--bad:#ff7a7a;--c0:#6ea2ff;--c1:#ff9f43;--c2:#58c896;--c3:#b994e6;--c4:#f0708f;--c5:#55c7d6;--c6:#d4b948;--c7:#9aa4b1}}
*{box-sizing:border-box}body{margin:0 auto;padding:24px 16px 64px;max-width:860px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:22px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:34px 0 6px}p{margin:4px 0;color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:18px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:20px}
.tile span{color:var(--soft);font-size:12.5px}svg{display:block;width:100%;height:auto;margin:6px 0}
.t,.small{font-size:11.5px;fill:var(--soft)}.small{font-size:10.5px}.name{font-size:12px;fill:var(--fg)}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.mark{stroke:var(--c1);stroke-dasharray:4 3}
.ring{fill:none;stroke:var(--c4);stroke-width:2.5}.s0{fill:none;stroke:var(--c0);stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}
th,td{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500}.n{text-align:right;font-variant-numeric:tabular-nums}details{margin:8px 0}
summary{cursor:pointer;color:var(--soft)}
""" + "".join(f".c{i}{{background:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(plots.N_COLOURS))

PARTS = {
    "header": "header", "constants": "constants", "companion": "files beside", "codes": "codes",
    "meta1": "scales, finest level",
    "meta2": "scales, levels above", "tables": "tables", "adapter": "adapters", "dense": "not quantized", "padding": "padding",
}  # fmt: skip


def html_page(outputs: Sequence[Facts]) -> str:
    """All of the report of one output or of several, one below the other."""
    made = ", ".join(escape(printable(facts.title)) for facts in outputs)
    body = [part for facts in outputs for part in output_parts(facts)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{made}</title><style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def output_parts(facts: Facts) -> list[str]:
    data = facts.data
    word = "bad" if facts.of("fail") else "good" if data.get("verified") else ""
    of = ", ".join(said for said in (facts.source, data.get("quant", ""), f"qconvert {__version__}") if said)
    return [
        f"<h1>{escape(printable(facts.title))}</h1>", f"<p>{escape(printable(of))}</p>",
        f'<p class="{word}">{escape(printable(facts.verdict))}</p>', f"<p>{counted(facts.cases)}</p>",
        *([f"<p>{escape(printable(data['hint']))}</p>"] if data.get("hint") else []), *tiles(facts),
        *quality_parts(data.get("quality", {})), *budget_parts(data.get("budget", {})),
        *byte_parts(data.get("accounting", {})), *cases(facts), *notes(data),
    ]  # fmt: skip


def tiles(facts: Facts) -> list[str]:
    q, found = facts.data.get("quality", {}), list[tuple[str, str]]()
    if facts.outputs:
        bpw = facts.outputs[0]["bpw"]
        size = facts.data["accounting"].get("size", {}).get("total", 0)
        found.append((nbytes_text(size), "all files"))
        linears = f"linears {bpw['linear']:.3f}, codes {bpw['codes']:.3f}"
        found.append((f"{bpw['file']:.3f} bits", f"per weight, whole file; {linears}"))
    if "mean_kl" in q:
        found.append((number(q["mean_kl"]), f"mean KL; p99 {number(q['p99_kl'])}, p99.9 {number(q['p999_kl'])}"))
        found.append((f"{100 * q['top1']:.2f} %", "top token unchanged"))
        found.append((f"x {q['perplexity_ratio']:.4f}", f"perplexity, {q['perplexity_reference']:.4g} before"))
    if (tune := q.get("fine_tune")) and tune["share"] is not None:
        why = f"of the fine-tune survives; KL {number(tune['kl_quantized'])} of {number(tune['kl_base'])}"
        found.append((f"{100 * tune['share']:.1f} %", why))
    cells = (f'<div class="tile"><b>{escape(b)}</b><span>{escape(what)}</span></div>' for b, what in found)
    return [f'<div class="tiles">{"".join(cells)}</div>'] if found else []


def quality_parts(q: Mapping[str, Any]) -> list[str]:
    if "mean_kl" not in q:
        return [f"<h2>Quality</h2><p>not measured: {escape(str(q['skipped']))}</p>"] if "skipped" in q else []
    marks = {"mean": q["mean_kl"], "p99": q["p99_kl"], "p99.9": q["p999_kl"]}
    said = f"{q['n_tokens']} tokens of {q['text']}, {q['sequence']} at a time, against the model as trained, f32"
    out = ["<h2>KL to the model as trained</h2>", f"<p>{escape(said)}</p>", plots.kl_histogram(q["histogram"], marks)]
    if q["layers"]:
        out += ["<h2>Error after each layer</h2>", "<p>of the residual stream, relative</p>", plots.layer_errors(q["layers"])]
    if q["tensors"]:
        said = "squared and relative, each input channel by its mean square on the text"
        rows = [(t["tensor"], t["type"], number(t["error"]), "" if t["weighted"] is None else number(t["weighted"]))
                for t in q["tensors"]]  # fmt: skip
        listed = table(("weight", "type", "error", "by inputs"), rows, numbers=2)
        out += ["<h2>Error of each weight</h2>", f"<p>{said}</p>", plots.tensor_errors(q["tensors"], place_of), folded(listed)]
    return out


def place_of(tensor: str) -> tuple[int | None, str]:
    """Layer and kind of a weight, from its name."""
    found = re.search(r"\.(\d+)\.", tensor)
    kind = tensor.removesuffix(".weight").rpartition(".")[2]
    return (int(found[1]) if found else None), kind


def budget_parts(b: Mapping[str, Any]) -> list[str]:
    if not b:
        return []
    said = (
        f"{b['wish']}: {b['n_measured']} measurements on {b['calibration_tokens']} tokens of {b['calibration']}; "
        f"KL below on {b['evaluation_tokens']} tokens of {b['evaluation']}"
    )
    rows = [(p["name"], f"{p['nbytes']:,}", number(p["measured"])) for p in b["stock"]]
    rows.append(("chosen here", f"{b['nbytes']:,}", number(b["measured"])))
    return ["<h2>KL by bytes</h2>", f"<p>{escape(said)}</p>", plots.pareto(b),
            folded(table(("mix", "bytes", "KL"), rows, numbers=2), "the usual mixes")]  # fmt: skip


def byte_parts(a: Mapping[str, Any]) -> list[str]:
    if not a.get("files"):
        return []
    def named(parts: Mapping[str, int]) -> dict[str, int]:
        return {PARTS.get(k, k): n for k, n in parts.items()}
    bars = [("all files", named(a["parts"]))]
    weights = [f for f in a["files"] if f["parts"].keys() - {"companion"}]
    bars += [(f["path"], named(f["parts"])) for f in weights[:8] if len(weights) > 1]
    devices = a.get("placement", {}).get("devices", {})
    if devices.keys() - {"any"}:
        bars += [(f"on {device}", named(of)) for device, of in devices.items()]
    kinds = list(PARTS)
    rows = [(f["path"], f"{f['nbytes']:,}", *(f"{f['parts'].get(k, 0):,}" for k in kinds)) for f in a["files"]]
    listed = table(("file", "bytes", *PARTS.values()), rows, numbers=len(kinds) + 1)
    return ["<h2>Where the bytes are</h2>", plots.stacked(bars), folded(listed, "every file; parts add up to its size")]


def cases(facts: Facts) -> list[str]:
    """What was judged, group by group; quality has tiles of its own."""
    out = []
    for group, name in (("run", "Run"), ("gates", "Gates"), ("checks", "Checks"), ("findings", "Findings")):
        rows = [(c.verdict, c.name, c.metric, c.value, c.limit, c.reason) for c in facts.cases if c.group == group]
        if rows:
            shown = table(("", "what", "metric", "value", "limit", ""), rows)
            out += [f"<h2>{name}</h2>", f'<div class="scroll">{shown}</div>']
    return out


def notes(data: Mapping[str, Any]) -> list[str]:
    out = []
    if data.get("notes"):
        out += ["<h2>Notes</h2>", *(f"<p>{escape(printable(n))}</p>" for n in data["notes"])]
    if data.get("fallbacks"):
        rows = [(f["tensor"], f["wanted"], f["got"], f["reason"]) for f in data["fallbacks"]]
        listed = table(("weight", "wanted", "got", "why"), rows)
        out += ["<h2>Weights of another type</h2>", folded(listed, f"{len(rows)} weights")]
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """The last `numbers` columns are numbers."""
    def cells(tag: str, row: Sequence[str]) -> str:
        first = len(row) - numbers
        return "".join(f'<{tag}{" class=n" if i >= first else ""}>{escape(printable(c))}</{tag}>' for i, c in enumerate(row))
    return f"<table><tr>{cells('th', head)}</tr>" + "".join(f"<tr>{cells('td', r)}</tr>" for r in rows) + "</table>"


def folded(inner: str, summary: str = "all of them") -> str:
    return f'<details><summary>{escape(summary)}</summary><div class="scroll">{inner}</div></details>'
