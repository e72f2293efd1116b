"""Reports and plans as text for a person."""

from __future__ import annotations

from typing import Any

from qconvert.conversion import Result
from qconvert.facts import Facts
from qconvert.report import Report, check_table, gate_table, nbytes_text, table


def report_text(report: Report) -> str:
    """Checks, sizes, fates and the verdict."""
    parts = []
    if report.fallbacks:
        parts.append(fallback_text(report))
    parts += [f"note: {n}" for n in report.notes]
    if report.checks:
        parts.append("checks\n" + check_table(report.checks))
    if "mean_kl" in report.quality:
        parts.append(quality_text(report.quality))
    if report.gates:
        parts.append("gates\n" + gate_table(report.gates))
    if report.outputs:
        parts.append(size_text(report))
    parts.append(Facts(report.data()).verdict)
    return "\n".join(parts)


def fallback_text(report: Report) -> str:
    rows = [(f["tensor"], f"{f['wanted']} -> {f['got']}", f["reason"]) for f in report.fallbacks]
    shown = rows if len(rows) <= 12 else [*rows[:11], (f"… and {len(rows) - 11} more", "", "")]
    return f"warning: {len(rows)} tensors did not get the type that {report.quant} wants\n" + table(shown)


def quality_text(q: dict[str, Any], worst: int = 3) -> str:
    """What the bits cost on the evaluation text."""
    kl = f"KL mean {q['mean_kl']:.3g}, p99 {q['p99_kl']:.3g}, p99.9 {q['p999_kl']:.3g}"
    perplexity = f"perplexity {q['perplexity_reference']:.4g} -> {q['perplexity']:.4g} (x {q['perplexity_ratio']:.4f})"
    lines = [
        f"quality {kl}; top-1 {100 * q['top1']:.2f} %; {perplexity}",
        f"        {q['n_tokens']} tokens of {q['text']}, {q['sequence']} at a time; against the model as trained, f32",
    ]
    if tune := q.get("fine_tune"):
        left = "it changed nothing here" if tune["share"] is None else f"{100 * tune['share']:.1f} % of the fine-tune survives"
        lines.append(f"        {left}: KL to it {tune['kl_quantized']:.3g}, of the base without it {tune['kl_base']:.3g}")
    if q["layers"]:
        first, last = q["layers"][0]["relative_error"], q["layers"][-1]["relative_error"]
        lines.append(f"        error of the residual stream {first:.2g} after the first layer, {last:.2g} after the last")
    tensors = sorted(q["tensors"], key=lambda t: -(t["weighted"] or t["error"]))[:worst]
    if tensors:
        told = ", ".join(f"{t['tensor']} {t['type']} {t['weighted'] or t['error']:.2g}" for t in tensors)
        lines.append(f"        largest errors of weights (squared, relative, by inputs): {told}")
    return "\n".join(lines)


def size_text(report: Report) -> str:
    bpw = report.outputs[0]["bpw"]
    size = report.accounting.get("size", {})
    parts = " + ".join(f"{nbytes_text(v)} {k}" for k, v in size.items() if k != "total" and v)
    tensors = report.accounting.get("tensors", {})
    lines = [
        f"type    {report.quant}",
        f"size    {nbytes_text(size.get('total', 0))} = {parts}",
        f"bits    {bpw['codes']:.3f} codes, {bpw['linear']:.3f} with metadata, {bpw['file']:.3f} the whole file (per weight)",
    ]
    if ways := report.accounting.get("three_ways"):
        codes, linear, file = (nbytes_text(ways[way]) for way in ("codes", "linear", "file"))
        lines.append(f"bytes   {codes} codes, {linear} with metadata, {file} the whole file")
    lines += device_lines(report.accounting.get("placement", {}))
    if tensors:
        fate = f"inputs  {tensors['used']} tensors written, {tensors['folded']} folded in, {len(tensors['dropped'])} dropped"
        lines.append("\n".join([fate, *(f"          {d['tensor']}: {d['reason']}" for d in tensors["dropped"])]))
    return "\n".join(lines)


def device_lines(placement: dict[str, Any]) -> list[str]:
    """Where the weights lie, where not all lie together."""
    devices, staging = placement.get("devices", {}), placement["staging"] if placement else 0
    if not devices.keys() - {"any"}:
        return []
    lines = []
    for device, classes in devices.items():
        parts = [f"{nbytes_text(n)} {kind}" for kind, n in classes.items()]
        if device == "gpu" and staging:
            parts.append(f"{nbytes_text(staging)} staging")
        lines.append(f"        {device:<10}  {' + '.join(parts)}")
    return ["devices", *lines]


def plan_text(result: Result) -> str:
    """The dry run: every tensor with its type and bytes, then the totals."""
    rows = [("tensor", "shape", "type", "bytes")]
    rows += [(e.name, "x".join(map(str, e.shape)), e.dtype.rpartition(".")[2], str(e.nbytes)) for e in result.plan.entries]
    report = result.report
    lines = [table(rows, indent="")]
    lines += [f"{f.path}  {f.nbytes} bytes" for f in result.plan.files]
    if report.fallbacks:
        lines.append(fallback_text(report))
    lines += [f"note: {n}" for n in report.notes]
    if report.gates:
        lines.append("gates\n" + gate_table(report.gates))
    return "\n".join([*lines, size_text(report)])
