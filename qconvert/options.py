"""The flags of `qconvert convert`, by what they are about: the order is that of --help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

LISTS = ("passes", "formats", "families", "solvers", "layouts", "types", "dialects", "runtimes", "targets")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

INPUT: tuple[Decorator, ...] = (
    click.option("-a", "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]", help="A PEFT folder; repeatable."),
    click.option("--adapters", "adapters_as", type=click.Choice(["merge", "swap"]), default="merge", show_default=True,
                  help="swap, ONNX and safetensors: each adapter a file beside one base, which takes any of them as it runs."),
    click.option("--tokenizer", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER",
                  help="In place of the model's own, which a GGUF may hold in a form that is not read."),
    click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz",
                  help="ONNX as input: arrays by name, on which outputs are compared. Default: random numbers."),
    click.option("--allow-unused-adapter-keys", is_flag=True, help="Go on where adapter tensors match nothing."),
    click.option("--pooling", type=click.Choice(["peft", "repo", "paper", "sum"]),
                  help="QA-LoRA: what its inputs were pooled to, where adapter_config.json does not say."),
    click.option("--merge-base", type=click.Choice(["auto", "original", "dequantized"]),
                  help="QLoRA: MODEL as it is, or rounded as it was in training. Default: by measurement."),
    click.option("--trained-on", type=click.Choice(["nf4", "nf4-single", "fp4", "fp4-single", "16bit", "model"]),
                  help="The base in training, where the adapter does not say; model: MODEL itself."),
    click.option("--refit-adapters", is_flag=True,
                  help="--adapters swap: their factors take up what quantization lost, where KL on other text falls."),
    click.option("--allow-lossy", is_flag=True, help="Go on where rounding may undo an adapter, which is refused."),
)  # fmt: skip
TYPE: tuple[Decorator, ...] = (
    click.option("--to", multiple=True, default=("gguf",), show_default=True, metavar="FORMAT[:TYPE]",
                  help="gguf, onnx, safetensors, or gguf:Q4_K_M at once. Several (repeat it, or commas) share one reading, "
                  "merge and calibration; each is judged by itself, and the exit code is that of the first that fails."),
    click.option("--quant", "--outtype", metavar="TYPE", help="Q4_K_M, F16 ... or int4, fp16 ...; see --list types."),
    click.option("--bits", type=int, help="8 6 5 4 3 2: Q8_0 Q6_K Q5_K_M Q4_K_M Q3_K_M Q2_K; ONNX 8 4 2: int8 ...; "
                  "safetensors 8 4 16: w8a16 w4a16 bf16. Default 4."),
    click.option("--group", type=int, help="ONNX: weights that share a scale, 16 32 64 128 256. Default 32."),
    click.option("--zero-point", type=click.Choice(["none", "int", "float"]), help="ONNX: of each group; int4 has none."),
    click.option("--solver", metavar="NAME[{option=value ...}]",
                  help="How codes are chosen: rtn, lsq, hqq, gptq{damp=0.01}, recover (QAT). Default: search (GGUF) or mse."),
    click.option("--accuracy-level", type=int, help="ONNX: 4 rounds activations to 8 bits: fast; 0 does not. Default 4."),
    click.option("--form", type=click.Choice(["ort", "portable", "legacy"]), default="ort", show_default=True,
                  help="ONNX: onnxruntime's nodes with bodies in standard ones; standard ones alone; opset 21."),
    click.option("--operators", type=click.Choice(["qdq", "qoperator"]),
                  help="ONNX w8a8: MatMul of dequantized codes (default), or QLinearMatMul."),
    click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="By GGUF name; first match wins."),
    click.option("--output-tensor-type", metavar="TYPE"),
    click.option("--token-embedding-type", metavar="TYPE"),
    click.option("--pure", is_flag=True, help="One type for all tensors."),
    click.option("--leave-output-tensor", is_flag=True, help="Do not quantize output.weight."),
    click.option("--fallback", type=click.Choice(["error", "warn", "allow"]), default="warn", show_default=True,
                  help="Where rows do not divide into the type's blocks."),
    click.option("--target-size", metavar="SIZE", help="A type for each weight, the best that fit: 1.5g, 800m."),
    click.option("--target-bpw", type=float, metavar="BITS", help="The same by bits per weight of all files together: 4.2."),
)  # fmt: skip
CALIBRATION: tuple[Decorator, ...] = (
    click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE|DIR",
                  help="Text that the model is run on: what each weight multiplies there decides how it is rounded (gguf), "
                  "or its fixed ranges (w8a8)."),
    click.option("--calibrate-tokens", type=click.IntRange(min=1), metavar="N", help="Of it. Default 32768; ranges 4096."),
    click.option("--activation-range", metavar="RULE",
                 help="Of activations in fixed 8-bit integers: mse (default), minmax, percentile (99.99), percentile:99.9."),
    click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="llama-imatrix's, in place of text."),
    click.option("--statistics", type=click.Path(path_type=Path), metavar="FILE", help="Kept ones, in place of text."),
    click.option("--save-imatrix", type=click.Path(path_type=Path), metavar="FILE", help="For llama.cpp; .dat: the old form."),
    click.option("--save-statistics", type=click.Path(path_type=Path), metavar="FILE", help="Keep them for the next run."),
    click.option("--no-data", type=click.Choice(["search", "error"]), default="search", show_default=True,
                  help="Where the text reaches no weight of a tensor or expert: quantize as without text, or stop."),
)  # fmt: skip
QUALITY: tuple[Decorator, ...] = (
    click.option("--eval", type=click.Path(path_type=Path), metavar="FILE",
                  help="Text that quality is measured on. Default: one that ships with qconvert."),
    click.option("--eval-tokens", type=click.IntRange(min=0), help="Of it; 0: none. Default: 512 to 4096, by model size."),
    click.option("--no-check", is_flag=True, help="Skip the proof."),
)  # fmt: skip
GATES: tuple[Decorator, ...] = (
    click.option("--gate", is_flag=True,
                  help="Limits by the bits of the type, where no flag says one: KL, its tail, top-1, perplexity, and "
                  "--require-verified. They are those of models of some billion weights: small ones are worse."),
    click.option("--max-kl", type=float, help="Mean KL to the model as trained, nats: with a type exit 7 where it is more; "
                  "without, the smallest file that keeps it."),
    click.option("--p999-kl", type=float, help="Exit 7 where more than 1 token in 1000 has a larger KL."),
    click.option("--min-top1", type=float, help="Exit 7 where the top token is the same in fewer positions than this share."),
    click.option("--max-ppl-ratio", type=float, help="Exit 7 where the perplexity grows by more than this factor: 1.03."),
    click.option("--max-size", metavar="SIZE", help="Exit 7, before anything is written, where all files are larger: 800M."),
    click.option("--max-bpw", type=float, metavar="BITS", help="The same by bits per weight of the whole file."),
    click.option("--max-new-fallbacks", type=click.IntRange(min=0), metavar="N",
                  help="Exit 7 where more than N tensors did not get the type wanted; all count, but those of a --baseline."),
    click.option("--require-verified", is_flag=True, help="Exit 8 where the runtime could not prove the file."),
    click.option("--baseline", type=click.Path(path_type=Path), metavar="REPORT.json",
                  help="The last release's --json: exit 7 where anything is worse than it was, or is not checked any more."),
    click.option("--baseline-tolerance", type=float, default=0.05, show_default=True, metavar="SHARE",
                  help="By which KL, its tail, and the share of changed tokens may grow."),
)  # fmt: skip
OUTPUT: tuple[Decorator, ...] = (
    click.option("-o", "--output", metavar="PATH|URL", help="Default: a name made from the model's, here."),
    click.option("--certify", is_flag=True,
                  help="Put into the output what `verify FILE` needs to prove it anywhere without the model; about 0.2 MB."),
    click.option("--manifest", type=click.Path(path_type=Path), metavar="FILE",
                  help="Write inputs, recipe, versions, checks and every weight's sha256 there, and SHA256SUMS beside it."),
    click.option("--dry-run", is_flag=True, help="Show every tensor, type and byte of the output; write nothing."),
    click.option("--rehearse", is_flag=True,
                  help="Run all of it, checks too, on the first two layers (more where kinds of layers alternate) and little "
                  "text; keep nothing. Gates are not judged."),
    click.option("--force", is_flag=True, help="Overwrite an existing output."),
    click.option("--split-max-size", metavar="SIZE", help="Shards of at most this size: 2G, 500M."),
    click.option("--card", is_flag=True, help="Write a model card for the Hub: README.md in the output's folder."),
    click.option("--license", metavar="ID", help="The card's, where model and adapters do not say it, or do not agree."),
    click.option("--modelfile", is_flag=True, help="GGUF: write a Modelfile for Ollama beside it."),
    click.option("--layout", metavar="FOR", help="ONNX: folder for genai, or transformersjs. Default genai."),
    click.option("--weights-in", metavar="KIND", help="ONNX: weights in data, or safetensors. Default data."),
    click.option("--pre-tokenizer", metavar="NAME", help="Force llama.cpp's pre-tokenizer instead of finding it."),
    click.option("--target", metavar="NAME", help="Refuse what does not run there: sm_61, apple ...; see --list targets."),
)  # fmt: skip
METADATA_ELSEWHERE: tuple[Decorator, ...] = (
    click.option("--offload-meta", type=click.Choice(["cpu", "cpu-pinned", "cpu-mmap", "disk"]),
                  help="Scales and zero points in files of their own, to be copied to the GPU when needed."),
    click.option("--vram", metavar="SIZE", help="Offload no more than lets weights and staging fit: 6g. Default: all."),
    click.option("--prefetch", type=click.IntRange(min=0), help="Blocks of look-ahead of what is offloaded. Default 1."),
    click.option("--link-bandwidth", type=float, metavar="GB/S", help="To the GPU. Default 25 (mmap 12, disk 5)."),
    click.option("--memory-bandwidth", type=float, metavar="GB/S", help="Of the GPU. Default 1000."),
)  # fmt: skip
RUN: tuple[Decorator, ...] = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                  help="cuda: quantize on a GPU, to the same bytes; needs torch with CUDA or ROCm, and Triton."),
    click.option("--executor", type=click.Choice(["threads", "ray"]), default="threads", show_default=True,
                  help="ray: weights are tasks of a cluster (RAY_ADDRESS) over storage that its machines share; same bytes."),
    click.option("--passes", "passes", default="...", metavar="SPEC", help='Your passes: "...,my-pass{x=1}"; ... are our own.'),
    click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after every pass."),
    click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="YAML that says what flags can; flags win."),
    click.option("--save-config", type=click.Path(path_type=Path), metavar="FILE", help="Write what was asked as a recipe."),
    click.option("--list", "listing", type=click.Choice(LISTS), help="Names, and the packages that they come from."),
)  # fmt: skip
SECTIONS: Mapping[str, tuple[Decorator, ...]] = {
    "Input": INPUT, "Type": TYPE, "Calibration": CALIBRATION, "Quality": QUALITY, "Gates": GATES,
    "Output": OUTPUT, "Metadata elsewhere": METADATA_ELSEWHERE, "Run": RUN
}  # fmt: skip

REPORT: tuple[Decorator, ...] = (
    click.option("--threads", type=click.IntRange(min=1), help="Default: all cores that this process may use."),
    click.option("--sarif", metavar="FILE", expose_value=False, help="... as SARIF: what has a place, for code scanning."),
    click.option("--junit", metavar="FILE", expose_value=False, help="... as JUnit XML, a case for each check."),
    click.option("--markdown", metavar="FILE", expose_value=False, help="... as Markdown, for a job's summary."),
    click.option("--html", metavar="FILE", expose_value=False, help="... as one HTML page, with plots."),
    click.option("--json", metavar="FILE", expose_value=False, help="Write the report as JSON; - for standard output."),
    click.option("--reports", metavar="DIR", expose_value=False, help="Write the report in every form, also of a failure."),
    click.option("-v", "--verbose", is_flag=True, help="Say why, too: declined rewrites, chosen types."),
    click.option("-q", "--quiet", is_flag=True, help="Errors only."),
)


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of every command that makes a report."""
    return _with(REPORT, command)


def conversion_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of a conversion."""
    return _with([option for section in SECTIONS.values() for option in section][::-1], command)


def _with(options: Sequence[Decorator], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in options:
        command = option(command)
    return command


class Sectioned(click.Command):
    """A command whose --help has the flags under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        at = 0
        for name, section in SECTIONS.items():
            self._write(ctx, formatter, name, shown[at : at + len(section)])
            at += len(section)
        self._write(ctx, formatter, "Report", shown[at:])

    def _write(self, ctx: click.Context, formatter: click.HelpFormatter, name: str, params: list[click.Option]) -> None:
        with formatter.section(name):
            formatter.write_dl([record for p in params if (record := p.get_help_record(ctx))])
