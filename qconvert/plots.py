"""Plots as SVG text: no library, no script, colours by class so that the page's light and dark styles decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from qconvert.report import nbytes_text

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 42
N_COLOURS = 8


class Axis(NamedTuple):
    """Values low..high on pixels a..b."""

    low: float
    high: float
    a: float
    b: float
    log: bool = False

    def __call__(self, v: float) -> float:
        low, high, v = (math.log10(max(x, 1e-30)) if self.log else float(x) for x in (self.low, self.high, v))
        return self.a + (self.b - self.a) * (v - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, (last - first) // 6)
            tens = [10.0**i for i in range(first, last + 1, every) if self.low <= 10.0**i <= self.high * 1.0001]
            many = [m * 10.0**i for i in range(first, last + 1) for m in (1, 2, 5) if self.low <= m * 10.0**i <= self.high]
            return tens if len(tens) > 2 else many
        step = nice((self.high - self.low) / 5)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The next of 1, 2, 5, 10 … that is not less."""
    ten = 10.0 ** math.floor(math.log10(max(step, 1e-30)))
    return next(m * ten for m in (1, 2, 5, 10) if m * ten >= step * 0.999)


def around(values: Sequence[float], log: bool = False, zero: bool = False) -> tuple[float, float]:
    """An axis' ends with some room."""
    found = [v for v in values if v > 0] if log else list(values)
    low, high = min(found, default=1e-6 if log else 0.0), max(found, default=1.0)
    if log:
        return low / 1.6, max(high * 1.6, low * 2)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return (0.0 if zero else low - room), high + room


def number(v: float) -> str:
    return f"{v:.0e}".replace("e-0", "e-").replace("e+0", "e") if v and (abs(v) < 1e-3 or abs(v) >= 1e5) else f"{v:.4g}"


def svg(body: Sequence[str], title: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, True)}">{"".join(body)}</svg>'


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "t") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def axes(x: Axis, y: Axis, x_name: str, y_name: str, x_label: Callable[[float], str] = number) -> list[str]:
    """Lines, ticks and names."""
    out = []
    for v in y.ticks():
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        out.append(text(LEFT - 8, y(v) + 4, number(v), "end"))
    for v in x.ticks():
        out.append(f'<line class="axis" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{y.a:.1f}" y2="{y.a + 4:.1f}"/>')
        out.append(text(x(v), y.a + 17, x_label(v)))
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.a:.1f}" y2="{y.a:.1f}"/>')
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, kind="name"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text class="name" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_name)}</text>'
    )
    return out


def legend(names: Sequence[str]) -> str:
    items = (f'<span><i class="c{i % N_COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def x_axis(values: Sequence[float], log: bool = False) -> Axis:
    return Axis(*around(values, log), LEFT, WIDTH - RIGHT, log)


def y_axis(values: Sequence[float], log: bool = False, zero: bool = False) -> Axis:
    return Axis(*around(values, log, zero), HEIGHT - BOTTOM, TOP, log)


# the plots ----------------------------------------------------------------------------------------


def kl_histogram(counts: Sequence[int], marks: Mapping[str, float]) -> str:
    """counts: bin i is from 10**(i/6 - 8); marks: name -> KL."""
    used = [i for i, n in enumerate(counts) if n] or [0]
    low, high = 10 ** (used[0] / 6 - 8), 10 ** ((used[-1] + 1) / 6 - 8)
    high = max([high, *marks.values()])
    x, y = Axis(low, high * 1.2, LEFT, WIDTH - RIGHT, True), y_axis([*counts], zero=True)
    body = axes(x, y, "KL of a position, nats", "positions")
    for i, n in enumerate(counts):
        a, b = x(10 ** (i / 6 - 8)), x(10 ** ((i + 1) / 6 - 8))
        if n:
            label = f"{number(10 ** (i / 6 - 8))} to {number(10 ** ((i + 1) / 6 - 8))}: {n}"
            body.append(f'<rect class="f0" x="{a + 0.5:.1f}" y="{y(n):.1f}" width="{b - a - 1:.1f}" height="{y.a - y(n):.1f}">'
                        f"<title>{label}</title></rect>")  # fmt: skip
    for i, (name, v) in enumerate(sorted(marks.items(), key=lambda each: each[1])):
        if v > 0:
            body.append(f'<line class="mark" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{TOP}" y2="{y.a:.1f}"/>')
            side, anchor = (-4, "end") if x(v) > 0.75 * WIDTH else (4, "start")
            body.append(text(x(v) + side, TOP + 10 + 13 * i, f"{name} {number(v)}", anchor))
    return svg(body, "Distribution of KL over positions")


def layer_errors(rows: Sequence[Mapping[str, Any]]) -> str:
    n, y = len(rows), y_axis([r["relative_error"] for r in rows], zero=True)
    step, last = (WIDTH - RIGHT - LEFT) / n, max(1, n - 1)
    x = Axis(0, last, LEFT + step / 2, LEFT + step * (last + 0.5))
    body = axes(x, y, "layer", "relative error", lambda v: number(v) if v < n and v == int(v) else "")
    for r in rows:
        v, at = r["relative_error"], x(r["layer"])
        body.append(f'<rect class="f0" x="{at - 0.35 * step:.1f}" y="{y(v):.1f}" width="{0.7 * step:.1f}" '
                    f'height="{y.a - y(v):.1f}"><title>layer {r["layer"]}: {v:.3g}</title></rect>')  # fmt: skip
    return svg(body, "Error of the residual stream after each layer")


def tensor_errors(rows: Sequence[Mapping[str, Any]], place: Callable[[str], tuple[int | None, str]]) -> str:
    """A dot for each weight: layer across, error upwards, colour by kind. place: tensor -> layer (None: of no layer), kind."""
    placed = [(place(r["tensor"]), r, r["weighted"] or r["error"]) for r in rows if r["error"] > 0]
    kinds = list(dict.fromkeys(kind for (_, kind), _, _ in placed))
    last = max((layer for (layer, _), _, _ in placed if layer is not None), default=0)
    x, y = Axis(-1, last + 1, LEFT, WIDTH - RIGHT), y_axis([v for _, _, v in placed], log=True)
    body = axes(x, y, "layer (left: of no layer)", "squared error, relative", lambda v: number(v) if 0 <= v <= last else "")
    apart = min(12.0, (x(1) - x(0)) / (len(kinds) + 1))
    for (layer, kind), r, v in placed:
        at = x(-0.5 if layer is None else layer) + (0 if layer is None else apart * (kinds.index(kind) - len(kinds) / 2))
        label = f"{r['tensor']} {r['type']}: {v:.3g}"
        body.append(f'<circle class="f{kinds.index(kind) % N_COLOURS}" cx="{at:.1f}" cy="{y(v):.1f}" r="4">'
                    f"<title>{escape(label)}</title></circle>")  # fmt: skip
    return svg(body, "Error of each weight") + legend(kinds)


def stacked(rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """A bar for each row, its parts one behind another."""
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    most, height, body = max(sum(parts.values()) for _, parts in rows) or 1, 34, list[str]()
    for i, (name, parts) in enumerate(rows):
        at, y = 150.0, 6 + i * height
        body.append(text(142, y + 16, name if len(name) < 24 else f"…{name[-22:]}", "end"))
        for kind, n in parts.items():
            width = (WIDTH - 150 - 90) * n / most
            body.append(f'<rect class="f{kinds.index(kind) % N_COLOURS}" x="{at:.1f}" y="{y}" width="{width:.2f}" height="24">'
                        f"<title>{escape(kind)}: {n:,} bytes</title></rect>")  # fmt: skip
            at += width
        body.append(text(at + 8, y + 16, nbytes_text(sum(parts.values())), "start"))
    return svg(body, "Bytes by class", 12 + height * len(rows)) + legend(kinds)


def pareto(budget: Mapping[str, Any]) -> str:
    """Bytes and KL of mixtures of types: predicted, measured, the format's usual mixes, and what was chosen."""
    curve, stock = budget["curve"], budget["stock"]
    chosen = (budget["nbytes"], budget["measured"])
    kls = [p[k] for p in curve for k in ("predicted", "measured") if p[k]] + [p["measured"] for p in stock] + [chosen[1]]
    x = x_axis([p["nbytes"] for p in [*curve, *stock]], log=True)
    y = y_axis(kls, log=True)
    body = axes(x, y, "bytes of the file", "KL, nats", nbytes_text)
    line = " ".join(f"{x(p['nbytes']):.1f},{y(p['predicted']):.1f}" for p in curve if p["predicted"] > 0)
    body.append(f'<polyline class="s0" points="{line}"/>')
    for p in curve:
        if p["measured"]:
            body.append(dot(x(p["nbytes"]), y(p["measured"]), 0, f"{nbytes_text(p['nbytes'])}: KL {p['measured']:.3g}"))
    for p in stock:
        if p["measured"] > 0:
            said = f"{p['name']}, {nbytes_text(p['nbytes'])}: KL {p['measured']:.3g}"
            body.append(dot(x(p["nbytes"]), y(p["measured"]), 1, said))
            body.append(text(x(p["nbytes"]) + 6, y(p["measured"]) - 5, p["name"], "start", "small"))
    if chosen[1] > 0:
        body.append(f'<circle class="ring" cx="{x(chosen[0]):.1f}" cy="{y(chosen[1]):.1f}" r="8"><title>chosen: '
                    f"{nbytes_text(chosen[0])}, KL {chosen[1]:.3g}</title></circle>")  # fmt: skip
    return svg(body, "KL by bytes") + legend(["types chosen weight by weight (line: predicted, dots: measured)", "usual mixes"])


def dot(x: float, y: float, colour: int, title: str) -> str:
    return f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(title)}</title></circle>'
