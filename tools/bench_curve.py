"""The case `curve` of bench.py: KL by bits, over our schemes and over llama.cpp's types with an imatrix of the same text.

Embedding and head are f16 in every file and not counted, nor are norms: bits are those of linear weights. What llama.cpp
reads is measured there; the others, which no runtime at hand reads, by our evaluator on the same text: `judge` says which.
CURVE names those to measure, as "IQ2_XXS,gptq Q2_K,quip"; without it all.

    python tools/bench_curve.py OUT.svg         draw what bench_results.jsonl has of it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_onnx import DATA
from bench_pipeline import work_folder
from bench_quality import DOMAINS, LENGTH, SEEN, Domain, Result, data_nbytes, halves, kl, qconvert, tokens_of

THEIRS = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M",
    "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M",
)  # fmt: skip
OURS = (
    *(f"gptq {mix}" for mix in ("IQ1_S", "IQ1_M", "TQ1_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_0", "Q2_K_S", "Q2_K", "IQ3_XXS",
                                "IQ3_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M")),
    *(f"budget {mix}" for mix in ("IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ4_XS")),
)  # fmt: skip
ELSEWHERE = {"quip": ("quip", "ldlq")}  # by our evaluator: --to safetensors
F16 = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")


def curve(domain: Domain = DOMAINS[0]) -> Iterator[Result]:
    model = f"{DATA / 'models' / 'novels-13m'}+{DATA / 'adapters' / domain.adapter}"
    chosen = [name for name in os.environ.get("CURVE", "").split(",") if name]
    with work_folder() as folder:
        seen, unseen = halves(folder, domain)
        text = ["--calibrate", str(seen), "--calibrate-tokens", str(SEEN)]
        imatrix, kept = folder / "imatrix.gguf", folder / "statistics.safetensors"
        reference = qconvert(model, "F32", folder / "f32.gguf", *text, "--save-imatrix", str(imatrix))
        qconvert(model, "Q4_K_M", folder / "ours.gguf", *text, "--solver", "gptq", "--save-statistics", str(kept))
        statistics = ["--statistics", str(kept)]
        sequences = tokens_of(reference, unseen)
        n, dense = linears(reference)
        sizes: dict[str, int] = {}

        def point(whose: str, name: str, nbytes: int, found: float, judge: str) -> Result:
            case = f"curve {whose} {name}, novels-13m + {domain.adapter}"
            bits = round(8 * (nbytes - dense) / n, 3)
            return {"case": case, "whose": whose, "what": name, "nbytes": nbytes, "bits": bits, "kl": round(found, 6),
                    "judge": judge, "tokens": LENGTH * len(sequences)}  # fmt: skip

        for name in THEIRS if "LLAMA_CPP_BIN" in os.environ else ():
            if not chosen or name in chosen:
                file = llama_quantize(reference, folder / "theirs.gguf", name, imatrix)
                sizes[name] = data_nbytes(file)
                yield point("llama.cpp", name, sizes[name], kl(reference, file, sequences), "llama.cpp")
        for name in OURS:
            solver, mix = name.split()
            if (chosen and name not in chosen) or (solver == "budget" and mix not in sizes):
                continue
            file = folder / "ours.gguf"
            if solver == "budget":
                words = ["--target-size", str(sizes[mix] + header_nbytes(reference)), "--solver", "gptq", "-o", str(file)]
                words += ["--force", "--no-check", "-q", *F16, *text]
                subprocess.run([sys.executable, "-m", "qconvert", model, *words], check=True, stdout=subprocess.DEVNULL)
            else:
                qconvert(model, mix, file, "--solver", solver, *F16, *statistics)
            yield point("ours", name, data_nbytes(file), kl(reference, file, sequences), "llama.cpp")
        for name, (quant, solver) in ELSEWHERE.items():
            if not chosen or name in chosen:
                tokens = str(LENGTH * len(sequences))
                words = ["--to", "safetensors", "--quant", quant, "--solver", solver, *text, "--eval", str(unseen)]
                words += ["--eval-tokens", tokens, "-o", str(folder / name), "--force", "-q"]
                words += ["--json", str(folder / "quip.json")]
                subprocess.run([sys.executable, "-m", "qconvert", model, *words], check=True, stdout=subprocess.DEVNULL)
                said = json.loads((folder / "quip.json").read_text())
                nbytes = sum(p.stat().st_size for p in (folder / name).glob("*.safetensors"))
                yield point("ours", name, nbytes, said["quality"]["mean_kl"], "our evaluator")


def llama_quantize(reference: Path, out: Path, name: str, imatrix: Path) -> Path:
    tool = f"{os.environ['LLAMA_CPP_BIN']}/llama-quantize"
    words = ["--imatrix", str(imatrix), *F16, str(reference), str(out), name, "2"]
    subprocess.run([tool, *words], check=True, capture_output=True)
    return out


def linears(reference: Path) -> tuple[int, int]:
    """Of an F32 file: linear weights, and the bytes of all else where embedding and head are f16."""
    from qconvert.gguf_reader import read_header

    sizes = {t.name: t.nbytes // 4 for t in read_header(reference).tensors}
    wide = {name: n for name, n in sizes.items() if name in ("token_embd.weight", "output.weight")}
    n = sum(n for name, n in sizes.items() if name.startswith("blk.") and "norm" not in name)
    return n, 2 * sum(wide.values()) + 4 * (sum(sizes.values()) - sum(wide.values()) - n)


def header_nbytes(reference: Path) -> int:
    """What --target-size counts beside tensors; those of our files differ by a few words."""
    return reference.stat().st_size - data_nbytes(reference)


def below(points: Sequence[Result]) -> list[Result]:
    """Those that no other has fewer bytes and a smaller KL than: the curve."""
    best: list[Result] = []
    for p in sorted(points, key=lambda p: (float(p["nbytes"] or 0), float(p["kl"] or 0))):
        if not best or float(p["kl"] or 0) < float(best[-1]["kl"] or 0):
            best.append(p)
    return best


def plot(points: Sequence[Result]) -> str:
    from qconvert import plots
    from qconvert.html_report import STYLE

    values: list[dict[str, Any]] = [dict(p) for p in points]
    x, y = plots.x_axis([p["bits"] for p in values]), plots.y_axis([p["kl"] for p in values], log=True)
    body = [f"<style>{STYLE}</style>", *plots.axes(x, y, "bits per linear weight", "KL, nats")]
    for colour, whose in enumerate(("ours", "llama.cpp")):
        mine = [p for p in values if p["whose"] == whose]
        line = " ".join(f"{x(p['bits']):.1f},{y(p['kl']):.1f}" for p in map(dict, below(mine)))
        body.append(f'<polyline style="fill:none;stroke:var(--c{colour});stroke-width:1.5" points="{line}"/>')
        body.append(plots.dot(plots.WIDTH - 110, plots.TOP + 16 * colour, colour, whose))
        body.append(plots.text(plots.WIDTH - 100, plots.TOP + 16 * colour + 4, whose, "start"))
        for p in mine:
            said = f"{p['what']}: {p['bits']} bits, KL {p['kl']:.3g}, {p['judge']}"
            body.append(plots.dot(x(p["bits"]), y(p["kl"]), colour, said))
            name = p["what"].removeprefix("gptq ").partition(" ")[0]  # of a budget the size says whose it is
            at, anchor = (-2.0, "end") if x(p["bits"]) > plots.WIDTH - 60 else (6.0, "start")
            below_it = 14 if anchor == "end" else -6
            body.append(plots.text(x(p["bits"]) + at, y(p["kl"]) + below_it, name, anchor, "small"))
    return plots.svg(body, "KL by bits: ours and llama.cpp's").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')


CASES: dict[str, Callable[[], Iterator[Result]]] = {"curve": curve}

if __name__ == "__main__":
    from bench import RESULTS

    lines = map(json.loads, RESULTS.read_text("utf-8").splitlines())
    last = {line["case"]: line for line in lines if line["case"].startswith("curve ")}
    Path(sys.argv[1]).write_text(plot(list(last.values())), "utf-8")
