"""Which GPUs and runtimes run what: one table, asked by --target and printed by --list targets.

Every rule says which version of which runtime it holds for and where that is known from. What no rule speaks of is not known,
and is said to be so. Rules for NVIDIA GPUs go by compute capability (61 is 6.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qconvert.errors import UnsupportedError, UsageError

OLD_CUDA = "12.9"  # the last toolkit that compiles for Maxwell, Pascal and Volta; 13 begins at sm_75


class Target(NamedTuple):
    """A kind of processor. cc: compute capability, None where it is not NVIDIA's. None or "" elsewhere: not known."""

    name: str
    what: str
    cc: int | None = None
    dp4a: bool | None = None  # four products of bytes in one instruction
    tensor_cores: str = ""  # the types that they multiply
    halves: str = ""  # arithmetic in fp16 against f32
    shared_kib: int | None = None  # of one block at most
    cuda: str = ""  # the last toolkit that compiles for it; "" is any that does today


# CUDA programming guide, compute capabilities and arithmetic throughput; AMD GPU specifications; Transformer Engine, datatypes
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("sm_52", "Maxwell: GTX 9x0, M40", 52, False, "", "none", 48, OLD_CUDA),
        Target("sm_61", "Pascal: GTX 10x0, P40", 61, True, "", "1/64", 48, OLD_CUDA),
        Target("sm_70", "Volta: V100", 70, True, "fp16", "2", 96, OLD_CUDA),
        Target("sm_75", "Turing: RTX 20x0, T4", 75, True, "fp16 int8", "2", 64),
        Target("sm_80", "Ampere: A100", 80, True, "fp16 bf16 int8", "", 163),
        Target("sm_86", "Ampere: RTX 30x0, A10", 86, True, "fp16 bf16 int8", "", 99),
        Target("sm_89", "Ada: RTX 40x0, L4", 89, True, "fp16 bf16 int8 fp8", "", 99),
        Target("sm_90", "Hopper: H100, H200", 90, True, "fp16 bf16 int8 fp8", "", 227),
        Target("sm_100", "Blackwell: B200", 100, True, "fp16 bf16 int8 fp8 fp4", "", 227),
        Target("gfx942", "CDNA3: MI300", None, None, "fp16 bf16 int8 fp8", "", 64),
        Target("gfx1100", "RDNA3: RX 7900", None, None, "fp16 bf16 int8", "", 64),
        Target("apple", "Apple silicon"),
        Target("cpu", "x86-64 CPU"),
    )
}


class Rule(NamedTuple):
    """What a version of a runtime does with files of a format.

    quants: names, or * for all. min_cc: NVIDIA GPUs from it to max_cc run it and older ones do not, None: not known.
    others and never: more targets that run it, or do not because of `why`.
    dense: weights are expanded to 16 bits when they are loaded. how: {cuda} and {torch} say what the build must be.
    """

    format: str
    quants: str
    runtime: str
    version: str
    source: str
    min_cc: int | None = None
    max_cc: int = 999
    others: str = ""
    never: str = ""
    why: str = ""
    how: str = ""
    dense: bool = False


_GPTQ = "gptq gptq-v2 gptq-asym gptq-v2-asym"
_VLLM, _VLLM_MIN = "its documentation, supported hardware", "its documentation, installation"
_BNB = "its README and documentation, installation; run on a CPU"
_AMD, _NO_AMD = "gfx942 gfx1100", "has no kernel for AMD GPUs"
_CT, _CT_SOURCE = "5.23 with compressed-tensors 0.20", "its documentation; run on a CPU alone"
_NEWER = "after 0.15.1"  # the newest whose table of hardware was seen with its version
_FP8 = "fp8 fp8-tensor fp8-static fp8-block"
_FINE = "finegrained-fp8 finegrained-mxfp8"
_MX = "mxfp4 mxfp4a16 mxfp8 mxfp8a16"
_HQQ, _MLX = "hqq hqq-2bit hqq-8bit", "mlx-2bit mlx-3bit mlx-4bit mlx-5bit mlx-6bit mlx-8bit"
_OLD_TORCH, _DENSE = "torch 2.14 or older for CUDA 12.6", "expanding the weights to 16 bits"
_ONNX = "fp32 fp16 int4 int8 uint4 uint8"

RULES: tuple[Rule, ...] = (
    Rule("gguf", "*", "llama.cpp", "0.5.0-dev", "ggml/src/ggml-cuda", min_cc=50, how="built with {cuda}"),
    Rule("gguf", "*", "llama.cpp", "0.5.0-dev", "ggml/src/ggml-cuda/vendors/hip.h", others=_AMD, how="built with HIP"),
    Rule("gguf", "*", "llama.cpp", "b11413", "docs/build.md", others="apple", how="with Metal, its default there"),
    Rule("gguf", "*", "llama.cpp", "2026.10.11549", "each conversion is proven in it (xllamacpp)", others="cpu"),
    Rule("gguf", "*", "vLLM", "0.14.0", _VLLM, min_cc=70, others="gfx942", how="experimental; newer versions by a plugin"),
    Rule("onnx", "*", "onnxruntime", "1.31.1", "each conversion is proven in it", others="cpu"),
    Rule("onnx", _ONNX, "onnxruntime-gpu", "1.22.0", "microsoft/onnxruntime#24582, #26516: what packages are compiled for",
         min_cc=52, how="a package for {cuda}; not run"),
    Rule("safetensors", "w4a16 w4a16-asym w8a16", "vLLM", "0.15.1", f"{_VLLM}: Marlin", min_cc=80),
    Rule("safetensors", "w4a16 w4a16-asym w8a16", "vLLM", _NEWER, f"{_VLLM}: Marlin", min_cc=75, max_cc=79),
    Rule("safetensors", "w4a16 w4a16-asym", "vLLM", _NEWER, "its sources: CPUWNA16", others="cpu"),
    Rule("safetensors", "w8a8 w8a8-static", "vLLM", "0.15.1", f"{_VLLM}, INT8 W8A8", min_cc=75, max_cc=99, others="cpu",
         never=f"sm_100 {_AMD}", why="has INT8 kernels for sm_75 to sm_90 and CPUs alone"),
    Rule("safetensors", f"{_FP8} finegrained-fp8", "vLLM", "0.15.1", f"{_VLLM}, FP8 W8A8", min_cc=89, others="gfx942",
         never="cpu", why="multiplies FP8 on GPUs alone"),
    Rule("safetensors", _FP8, "vLLM", _NEWER, "its documentation, FP8 W8A8", min_cc=75, max_cc=88, how="weights alone are FP8"),
    Rule("safetensors", "nvfp4 nvfp4a16", "vLLM", _NEWER, f"{_VLLM}: Marlin", min_cc=75, max_cc=99,
         how="weights alone are FP4"),
    Rule("safetensors", "nvfp4 nvfp4a16", "vLLM", _NEWER, "compressed_tensors_w4a4_nvfp4.py", min_cc=100),
    Rule("safetensors", "mxfp4 mxfp4a16", "vLLM", _NEWER, f"{_VLLM}: Marlin, not on Turing", min_cc=80),
    Rule("safetensors", "gptq", "vLLM", "0.14.0", f"{_VLLM}, installation", min_cc=70, max_cc=74, how="0.21.0 needs 7.5"),
    Rule("safetensors", "gptq", "vLLM", "0.15.1", _VLLM, min_cc=75, others="cpu", never=_AMD, why=_NO_AMD,
         how="4 or 8 bits without zero points"),
    Rule("safetensors", "gptq", "exllamav2", "any", "its README; on which GPUs is not known"),
    Rule("safetensors", "awq", "vLLM", "0.15.1", _VLLM, min_cc=75, others="cpu", never=_AMD, why=_NO_AMD),
    Rule("safetensors", f"{_GPTQ} awq", "transformers", "5.23 with gptqmodel 7.7", "run on a CPU", others="cpu",
         how="no mixtures of experts: it leaves them random, in silence"),
    Rule("safetensors", "nf4 nf4-single fp4 fp4-single", "transformers", "5.23 with bitsandbytes 0.50", _BNB, min_cc=60,
         others=f"{_AMD} apple cpu", how="{torch}"),
    Rule("safetensors", "int8-bnb", "transformers", "5.23 with bitsandbytes 0.50", _BNB, min_cc=75, others=f"{_AMD} apple cpu"),
    Rule("safetensors", "nf4 nf4-single fp4 fp4-single", "vLLM", "0.14.0", _VLLM, min_cc=70, never=f"{_AMD} cpu",
         why="reads bitsandbytes on NVIDIA GPUs alone", how="newer versions by a plugin"),
    Rule("safetensors", _HQQ, "hqq", "0.2.8", "run on a CPU; text-generation-webui#5665", others="cpu", never="sm_52 sm_61",
         why="needs Triton kernels (GemLite) that fail there", how="linear by linear; transformers 5.23 has none"),
    Rule("safetensors", "torchao-int4", "transformers", "5.23 with torchao 0.18", "run: int4 needs mslk, CUDA or XPU",
         never="cpu", why="has no 4-bit kernel for CPUs"),
    Rule("safetensors", _MLX, "mlx", "0.32", "its documentation, build and install; run on a CPU", min_cc=75,
         others="apple cpu", never=_AMD, why="has backends for Metal, CUDA and CPUs alone"),
    Rule("safetensors", "bitnet", "transformers", "5.23", "run on a CPU", others="cpu"),
    Rule("safetensors", "fp16", "vLLM", "0.14.0", _VLLM_MIN, min_cc=70, max_cc=74, how="0.21.0 needs 7.5"),
    Rule("safetensors", "fp16", "vLLM", "0.21.0", _VLLM_MIN, min_cc=75, others=_AMD),
    Rule("safetensors", "bf16", "vLLM", "0.21.0", f"{_VLLM_MIN}; platforms/cuda.py", min_cc=80, others=_AMD),
    Rule("safetensors", "fp32 bf16 fp16", "transformers", "5.23", "pytorch#172352, #190385: what wheels are compiled for",
         min_cc=50, others="cpu", how="{torch}"),
    Rule("safetensors", f"w4a16 w8a16 w8a8 w8a8-static {_FP8} {_MX}", "transformers", _CT, _CT_SOURCE,
         min_cc=50, others="cpu", how="{torch}", dense=True),
    Rule("safetensors", _FINE, "transformers", "5.23", "run on a CPU", others="cpu", dense=True),
    Rule("safetensors", "w4a16-asym", "transformers", _CT, _CT_SOURCE, min_cc=50, others="cpu", dense=True,
         how="no mixtures of experts, CompressedTensorsConfig(dequantize=True) for the rest; {torch}"),
    Rule("safetensors", "nvfp4 nvfp4a16", "transformers", _CT, _CT_SOURCE, min_cc=50, others="cpu", dense=True,
         how="no mixtures of experts: it computes them wrongly, in silence; {torch}"),
)
# (targets, format, how names begin, what to know)
ADVICE = (
    ("sm_52 sm_61", "gguf", "iq", "IQ types look each weight up in a table, which is slow there; K-quants, Q4_0, Q8_0 do not"),
    ("sm_52", "gguf", "", "without dp4a, llama.cpp emulates products of bytes; Q4_0 and Q8_0 suffer least"),
    ("sm_52 sm_61", "onnx", "", "newer versions may not: 1.25.1 failed to compile for 6.0 (cms-sw/cmsdist#10516)"),
    ("sm_61", "safetensors", "fp16", "arithmetic in fp16 runs at 1/64 there: let the runtime compute in float32"),
)
BITS: Mapping[str, int] = {
    **dict.fromkeys(f"w4a16 nf4 nf4-single w4a16-asym {_GPTQ} awq fp4 fp4-single torchao-int4".split(), 4),
    **dict.fromkeys(("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"), 4),
    **dict.fromkeys(f"w8a16 w8a8 w8a8-static {_FP8} {_FINE} mxfp8 mxfp8a16 int8-bnb".split(), 8),
    **dict.fromkeys(("fp16", "bf16"), 16),
    **{f"mlx-{bits}bit": bits for bits in (2, 3, 4, 5, 6, 8)},
    "hqq": 4,
    "hqq-2bit": 2,
    "hqq-8bit": 8,
    "bitnet": 2,
    "quip": 2,
    "fp32": 32,
}


class Answer(NamedTuple):
    """What rules say of a quant on a target: runs by each, or the reason of each that does not."""

    runs: tuple[Rule, ...]
    not_: tuple[str, ...]


def find_target(name: str) -> Target:
    """sm_61, SM61 or 6.1; UsageError with what there is."""
    m = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", name.lower())
    found = f"sm_{m[1]}{m[2]}" if m else name.lower()
    if found not in TARGETS:
        raise UsageError(f"--target {name}: not in the table", hint=f"there are {', '.join(TARGETS)}; see --list targets")
    return TARGETS[found]


def rules_of(format: str, quant: str) -> Iterator[Rule]:
    return (r for r in RULES if r.format == format and (r.quants == "*" or quant.lower() in r.quants.split()))


def answer(target: Target, format: str, quant: str) -> Answer:
    runs: list[Rule] = []
    reasons: dict[str, str] = {}
    for rule in sorted(rules_of(format, quant), key=lambda r: r.min_cc or 0):  # a runtime's least need is the one to tell
        named = f"{rule.runtime} {rule.version}"
        if target.name in rule.others.split() or (target.cc and rule.min_cc and rule.min_cc <= target.cc <= rule.max_cc):
            runs.append(rule)
        elif target.name in rule.never.split():
            reasons.setdefault(rule.runtime, f"{named} {rule.why}")
        elif target.cc and rule.min_cc and target.cc < rule.min_cc:
            reasons.setdefault(rule.runtime, f"{named} needs compute capability {rule.min_cc // 10}.{rule.min_cc % 10}")
    return Answer(tuple(r for r in RULES if r in runs), tuple(reasons.values()))


def said(rule: Rule, target: Target) -> str:
    """A runtime with its version, and what it takes to run on the target."""
    old = target.cuda == OLD_CUDA
    how = rule.how.format(cuda="CUDA 12.x" if old else "CUDA", torch=_OLD_TORCH if old else "").removesuffix("; ")
    return ", ".join(filter(None, (f"{rule.runtime} {rule.version}", how, _DENSE if rule.dense else "")))


def quant_of(format: str, quant: str | None, bits: int | None) -> str:
    """The name to look up: what was given, or what --bits (4 where nothing is said) stands for."""
    if quant:
        return quant
    n = bits or 4
    names = {"safetensors": {4: "w4a16", 8: "w8a16", 16: "bf16"}, "onnx": {2: "int2", 4: "int4", 8: "int8"}}
    return names.get(format, {}).get(n, f"{n} bits")


def target_notes(name: str | None, format: str, quant: str | None, bits: int | None) -> list[str]:
    """What runs the chosen quant on a target; UnsupportedError with reasons and the nearest where nothing is known to."""
    if name is None:
        return []
    target, chosen = find_target(name), quant_of(format, quant, bits)
    runs, reasons = answer(target, format, chosen)
    if runs:
        notes = [f"{target.name} runs {chosen}: {said(r, target)} (known from: {r.source})" for r in runs]
        if all(r.dense for r in runs) and reasons:
            notes.append(f"{target.name}: {'; '.join(reasons)}. Nearest that stays packed: {nearest(target, format, chosen)}")
        for names, kind, begin, advice in ADVICE:
            if target.name in names.split() and kind == format and chosen.lower().startswith(begin):
                notes.append(f"{target.name}: {advice}")
        return notes
    if not reasons:
        return [f"{target.name}: whether anything runs {format} {chosen} there is not known"]
    raise UnsupportedError(
        f"no runtime is known to run {chosen} ({format}) on {target.name} ({target.what}): {'; '.join(reasons)}",
        hint=f"nearest that runs there: {nearest(target, format, chosen)}",
    )


def nearest(target: Target, format: str, quant: str) -> str:
    """GGUF of as many bits, and the first quant of the format with as many that stays packed; each with its runtime."""
    bits = BITS.get(quant.lower(), 4)
    near: list[tuple[str, str]] = []
    for kind, flags, name in (
        ("gguf", f"--to gguf --bits {bits}" if bits in range(2, 9) else "--to gguf --quant F16", "*"),
        *((format, f"--to {format} --quant {q}", q) for q in BITS if BITS[q] == bits and q != quant.lower()),
    ):
        packed = [r for r in answer(target, kind, name).runs if not r.dense]
        if packed and all(kind != k for k, _ in near):
            near.append((kind, f"{flags} ({said(packed[0], target)})"))
    return ", or ".join(text for _, text in near)


# ---- --list targets

LETTERS = {"llama.cpp": "L", "onnxruntime": "O", "onnxruntime-gpu": "O", "vLLM": "V", "transformers": "T",
           "mlx": "M", "hqq": "H"}
LEGEND = "L llama.cpp, O onnxruntime, V vLLM, T transformers (t: expanded to 16 bits), M mlx, H hqq, - none, ? not known"
SHOWN = (("gguf", "any"), *(("onnx", q) for q in (*_ONNX.split(), "int2", "nf4")), *(("safetensors", q) for q in BITS))


def facts() -> list[tuple[str, ...]]:
    """A row of each target: what it is and what it has."""
    yes = {True: "yes", False: "no", None: ""}
    head = ("target", "", "dp4a", "tensor cores", "fp16 rate", "shared KiB", "last CUDA")
    rows = [(t.name, t.what, yes[t.dp4a], t.tensor_cores, t.halves, str(t.shared_kib or ""), t.cuda) for t in TARGETS.values()]
    return [head, *rows]


def matrix() -> list[tuple[str, ...]]:
    """A row of each quant, a column of each target, in letters of LEGEND."""
    return [("", "", *TARGETS), *((f, q, *(cell(t, f, q) for t in TARGETS.values())) for f, q in SHOWN)]


def cell(target: Target, format: str, quant: str) -> str:
    runs, reasons = answer(target, format, quant)
    letters = dict.fromkeys(LETTERS[r.runtime].lower() if r.dense else LETTERS[r.runtime] for r in runs)
    return "".join(letters) or ("-" if reasons else "?")


def rule_lines() -> Iterator[str]:
    """Two lines of each rule: what it is about; where it runs and what that is known from."""
    for r in RULES:
        yield f"{r.runtime} {r.version}: {r.format}, {'all types' if r.quants == '*' else r.quants}"
        newest = max(t.cc for t in TARGETS.values() if t.cc and t.cc <= r.max_cc)
        upwards = " and newer" if r.max_cc == 999 else f" to sm_{newest}" if newest != r.min_cc else ""
        runs = ", ".join((*((f"sm_{r.min_cc}{upwards}",) if r.min_cc else ()), *r.others.split())) or "where is not known"
        never = f"not on {r.never}: it {r.why}" if r.never else ""
        how = r.how.format(cuda="CUDA (12.x before sm_75)", torch=f"{_OLD_TORCH} before sm_75")
        told = "; ".join(filter(None, (runs, never, how, _DENSE if r.dense else "")))
        yield f"    {told}. Known from: {r.source}"
