"""Which type each tensor of a GGUF file gets: the mixes of llama-quantize, by their usual names.

Source: llama.cpp src/llama-quant.cpp (type selection and fallbacks), conversion/base.py (F32, F16, BF16 files).
Oracle: cyllama's model_quantize. Four things differ on purpose, all of them in what the user asked for by name:
- a --tensor-type pattern is searched as it was written (llama-quantize lower-cases it, so that `\\D` becomes `\\d`);
- one that matches nothing is an error, and one is obeyed in F32, F16 and BF16 files too (there it is ignored);
- --output-tensor-type reaches a tied head under --pure and in F32, F16 and BF16 files too (there it is ignored);
- explicit types fall back like chosen ones where the row does not divide (there the process aborts).
Families that have rules of their own in llama.cpp (falcon, glm5-next, the recurrent ones) are not covered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NamedTuple

from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.gguf_mix_rules import (
    ATTN_OUTPUT,
    ATTN_OUTPUT_OF_8_EXPERTS,
    ATTN_QK,
    ATTN_V,
    FFN_DOWN,
    FFN_UP,
    FILE_TYPES,
    LOW,
    NEED_IMATRIX,
    NEED_IMATRIX_ANYWHERE,
    OUTPUT,
    TOKEN_EMBD,
    FileType,
    Place,
    Rule,
)
from qconvert.scheme import CODEBOOKS, GGML_SCHEMES

Role = Literal["token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_down", "ffn_up", "other"]


class TensorShape(NamedTuple):
    """name: as in the GGUF file (blk.0.attn_v.weight); shape: [N,K], or [E,N,K] for stacked experts."""

    name: str
    shape: tuple[int, ...]


class Hyper(NamedTuple):
    """What the mixes look at beside names and shapes. arch is GGUF's: mistral and mixtral are "llama"."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0  # 0: a dense model


class Choice(NamedTuple):
    """One tensor's type. reason says why `got` is not what was `wanted`; None where it is."""

    name: str
    wanted: str
    got: str
    reason: str | None = None


@dataclass(frozen=True)
class Options:
    """What the user may ask for. Types are qconvert's names ("q4_k"); of tensor_types the first match wins."""

    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()  # (regex searched in the GGUF name, type)
    fallback: Literal["error", "warn", "allow"] = "warn"  # warn and allow choose alike: the caller does the warning
    unquantized: str = "f16"  # the type of an output tensor that is left alone
    imatrix: frozenset[str] | None = None  # names that it has entries for; None: there is none


ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
BITS = {8: "Q8_0", 6: "Q6_K", 5: "Q5_K_M", 4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}
PLAIN = ("f32", "f16", "bf16")
# A row that is no multiple of 256 gets a type of blocks of 32. Where that does not divide either, or none is here: f16.
FALLBACK = {**dict.fromkeys((*CODEBOOKS, "iq4_xs"), "iq4_nl"), "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
            **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0", "q2_0"), "q4_0")}  # fmt: skip
NEVER_QUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "attn_rel_b.weight", ".position_embd")


def file_type(name: str) -> FileType:
    """The mix of that name in any case ("q4_k_m", "Q4_K"). UsageError with the nearest name where there is none."""
    upper = name.upper()
    found = FILE_TYPES.get(ALIASES.get(upper, upper))
    if found is None:
        near = get_close_matches(upper, [*FILE_TYPES, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FILE_TYPES)}"
        raise UsageError(f"no quantization is called {name!r}", hint=hint)
    return found


def tensor_type(name: str) -> str:
    """qconvert's name of a GGUF tensor type given in any case: "Q6_K" -> "q6_k". UsageError with the nearest name."""
    lower = name.lower()
    if lower in GGML_SCHEMES or lower in PLAIN:
        return lower
    near = get_close_matches(lower, [*GGML_SCHEMES, *PLAIN], n=1, cutoff=0.5)
    mix = file_type(name).default if name.upper() in {*FILE_TYPES, *ALIASES} else near[0] if near else None
    raise UsageError(f"no tensor type is called {name!r}", hint=f"did you mean {mix}?" if mix else None)


def parse_tensor_type(text: str) -> tuple[str, str]:
    """`REGEX=TYPE` of --tensor-type as an entry of Options.tensor_types. UsageError for a bad regex or type."""
    pattern, equals, type_ = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--tensor-type {text!r} is not REGEX=TYPE", hint=r"--tensor-type 'ffn_down=q6_k'")
    return _regex(pattern).pattern, tensor_type(type_)


def choose(
    tensors: Iterable[TensorShape], file: FileType, hyper: Hyper, options: Options | None = None
) -> list[Choice]:
    """The type of every tensor, in llama-quantize's order: globals by name, then layer by layer.

    Errors: UnsupportedError for a fallback under fallback="error", and for types too small to do without importance where no
    imatrix says anything of the tensor; UsageError for a pattern that matches no tensor that can be quantized.
    """
    options = options or Options()
    ordered = sorted(tensors, key=lambda t: (layer_of(t.name), t.name))
    mix = Mix(file, hyper, options, ordered)
    choices = [fitting(t, mix.wanted(t)) for t in ordered]
    mix.refuse_unused_patterns()
    for choice, tensor in zip(choices, ordered, strict=True):
        if options.fallback == "error" and choice.reason:
            raise UnsupportedError(
                f"{choice.name}: {choice.reason}: wanted {choice.wanted}, got {choice.got}",
                hint="--fallback warn takes the type that fits",
            )
        if choice.name not in (options.imatrix or ()) and needs_imatrix(role_of(tensor.name), choice.got, file):
            what = "none was given" if options.imatrix is None else "it has no entry there"
            where = f"{choice.name}: {choice.got}" + (" in a Q2_K_S file" if choice.got == "q2_k" else "")
            hint = "Q2_K is the nearest that needs none" if choice.got == "q2_k" else "IQ3_S and Q3_K_S need none"
            raise UnsupportedError(f"{where} needs an imatrix, and {what}", hint=f"--calibrate FILE or --imatrix FILE; {hint}")
    return choices


def needs_imatrix(role: Role, type_: str, file: FileType) -> bool:
    if role in ("token_embd", "output"):
        return type_ in NEED_IMATRIX_ANYWHERE
    return type_ in NEED_IMATRIX or (type_ == "q2_k" and file.name == "Q2_K_S")


def layer_of(name: str) -> int:
    """3 for blk.3.attn_v.weight, -1 for a tensor of no layer."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def role_of(name: str) -> Role:
    """What the mixes tell apart. A fused qkv counts as attn_v, a gate as ffn_up."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    if re.search(r"attn_(v|qkv|kv_b)\.weight", name):
        return "attn_v"
    if found := re.search(r"attn_(q|k|output)\.weight", name):
        role: dict[str, Role] = {"q": "attn_q", "k": "attn_k", "output": "attn_output"}
        return role[found[1]]
    if "ffn_up" in name or "ffn_gate" in name:
        return "ffn_up"
    return "ffn_down" if "ffn_down" in name else "other"


def quantizable(tensor: TensorShape) -> bool:
    """Whether a mix may quantize it: a weight of two dimensions or more (leading ones do not count), no tiny helper."""
    dims = len(tensor.shape)
    while dims > 1 and tensor.shape[len(tensor.shape) - dims] == 1:
        dims -= 1
    name = tensor.name
    if dims < 2 or not name.endswith("weight") or name in ("position_embd.weight", "token_types.weight"):
        return False
    return not any(part in name for part in NEVER_QUANTIZED)


@dataclass
class Mix:
    """The types of one file's tensors, asked for in order: the rules count the attn_v and ffn_down tensors they see.

    A tensor that the user typed by name is not counted, so the ones after it move up: llama-quantize does that too.
    """

    file: FileType
    hyper: Hyper
    options: Options
    tensors: Sequence[TensorShape]
    seen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [t.name for t in self.tensors]
        self.tied = "output.weight" not in names
        self.n_attn_v = sum(role_of(name) == "attn_v" for name in names)
        self.patterns = [(_regex(pattern), type_) for pattern, type_ in self.options.tensor_types]

    def wanted(self, tensor: TensorShape) -> str:
        """The type before its row is looked at."""
        if not quantizable(tensor):
            return "f32"
        if tensor.name == "output.weight" and self.options.leave_output_tensor:
            return self.options.unquantized
        explicit = self.explicit(tensor.name)
        if explicit:
            return explicit
        if self.options.pure or self.file.default in PLAIN:
            return self.file.default
        if self.file.name == "MXFP4_MOE":  # experts alone
            return "mxfp4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "q8_0"
        return self.by_rule(tensor) or self.file.default

    def explicit(self, name: str) -> str | None:
        """What the user asked for, or None."""
        role = role_of(name)
        if role == "token_embd" and self.options.token_embedding_type:
            return self.options.token_embedding_type
        if role == "output" and self.options.output_tensor_type:
            return self.options.output_tensor_type
        for pattern, type_ in self.patterns:
            if pattern.search(name):
                return type_
        return self.options.output_tensor_type if role == "token_embd" and self.tied else None

    def by_rule(self, tensor: TensorShape) -> str | None:
        role, file, eight = role_of(tensor.name), self.file.name, self.hyper.experts == 8
        if role == "output" or (role == "token_embd" and self.tied):
            type_ = OUTPUT.get(file, "q6_k")
            return "q6_k" if type_ == "q5_k" and tensor.shape[-1] % 256 else type_  # of which q8_0 is what fits
        if role == "token_embd":
            return TOKEN_EMBD.get(file)
        if role == "attn_v":
            raised = self._at(ATTN_V, self._count(role), self.n_attn_v)
            if file in LOW:
                return raised
            if self._is_70b() and (raised or self.file.default) in ("q3_k", "q4_k"):
                raised = "q5_k"  # eight query heads share it, so its size hardly matters
            return "q8_0" if eight else raised
        if role == "attn_k" and eight:
            return "q4_k" if file in LOW else "q8_0"
        if role in ("attn_q", "attn_k"):
            return ATTN_QK.get(file)
        if role == "ffn_down":
            i = self._count(role)
            by_layer = self.hyper.experts > 1 and file not in LOW
            return self._at(FFN_DOWN, layer_of(tensor.name) if by_layer else i, self.hyper.layers)
        if role == "ffn_up":
            i = self._count("ffn_gate" if "ffn_gate" in tensor.name else role)
            return self._at(FFN_UP, layer_of(tensor.name) if self.hyper.experts > 1 else i, self.hyper.layers)
        if role == "attn_output":
            return (ATTN_OUTPUT_OF_8_EXPERTS if eight else ATTN_OUTPUT).get(file)
        return None

    def _at(self, rules: Mapping[str, Rule], i: int, n: int) -> str | None:
        rule = rules.get(self.file.name)
        gqa = self.hyper.heads // self.hyper.kv_heads if self.hyper.kv_heads else 0
        return rule(Place(i, n, gqa, self.hyper.experts, self.options.imatrix is not None)) if rule else None

    def _count(self, role: str) -> int:
        self.seen[role] = self.seen.get(role, 0) + 1
        return self.seen[role] - 1

    def _is_70b(self) -> bool:
        """How llama.cpp knows a 70B model: its arch and 80 layers."""
        if self.hyper.layers != 80 or self.hyper.experts == 8:
            return False
        return self.hyper.arch == "qwen2" or (self.hyper.arch == "llama" and self.hyper.heads != self.hyper.kv_heads)

    def refuse_unused_patterns(self) -> None:
        for pattern, type_ in self.patterns:
            if not any(quantizable(t) and pattern.search(t.name) for t in self.tensors):
                raise UsageError(
                    f"--tensor-type {pattern.pattern}={type_} matches no tensor that can be quantized",
                    hint="patterns are searched in GGUF names, as blk.0.ffn_down.weight",
                )


def fitting(tensor: TensorShape, wanted: str) -> Choice:
    """The wanted type, or the one that fits the tensor's row."""
    k = tensor.shape[-1] if tensor.shape else 1
    if k % _block(wanted) == 0:
        return Choice(tensor.name, wanted, wanted)
    got = FALLBACK.get(wanted, "f16")
    reason = f"row of {k} is no multiple of {_block(wanted)}"
    if k % _block(got):
        got, reason = "f16", f"row of {k} is no multiple of {_block(got)}"
    return Choice(tensor.name, wanted, got, reason)


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UsageError(f"--tensor-type: {pattern!r} is no regular expression: {e}") from e


def _block(type_: str) -> int:
    return GGML_SCHEMES[type_].block if type_ in GGML_SCHEMES else 1
