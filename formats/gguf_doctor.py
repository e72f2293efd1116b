"""What is wrong with a GGUF that somebody made, from the file alone.

Source of the rules: llama.cpp's gguf.cpp, llama-model.cpp and llama-vocab.cpp (what they refuse or assume).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from qconvert.byte_files import LocalFile, fill
from qconvert.dtypes import DTYPES
from qconvert.findings import UNREAD, Finding, Places, Vocabulary, n_not_finite, not_finite, of_vocabulary
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.formats.gguf_mix import TensorShape, quantizable, role_of
from qconvert.formats.gguf_mix_rules import FILE_TYPES
from qconvert.formats.gguf_tokenizer import ENDS_BY_TEXT, TOKEN_TYPES
from qconvert.gguf_reader import ALIGNMENT, GGML_TYPES, Header, Info, read_header
from qconvert.scheme import Array
from qconvert.sources import gguf_files

KV = Mapping[str, object]
GGML = "tokenizer.ggml."
NONE = 0xFFFFFFFF  # how writers of u32 say -1
BLOCK_NBYTES = 1 << 24
MARKED = TOKEN_TYPES["control"], TOKEN_TYPES["user"]
MIXES = {f.id: f for f in FILE_TYPES.values()}
MEND_STOPS = f"set {GGML}eos_token_id or eot_token_id, or give the program a stop word"
PLACES = Places(f"{GGML}tokens", f"{GGML}eos_token_id", "tokenizer.chat_template", f"{GGML}token_type", MEND_STOPS)
ENCODERS = ("bert", "nomic-bert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "t5encoder")


class Parts(NamedTuple):
    """A GGUF of one or more files; kv is the first's."""

    paths: list[Path]
    headers: list[Header]

    @property
    def kv(self) -> KV:
        return self.headers[0].kv

    @property
    def tensors(self) -> list[Info]:
        return [t for header in self.headers for t in header.tensors]


def diagnose(path: Path, values: bool) -> list[Finding]:
    paths = gguf_files(path)
    parts = Parts(paths, [read_header(p) for p in paths])
    found = placed(parts) + labelled(path, parts)
    if parts.kv.get("general.type", "model") == "model" and parts.kv.get("general.architecture") != "clip":
        found += settings(parts) + rope(parts) + tokenizer(parts)
    return found + heads(parts, values) + (numbers(parts) if values else [])


# the container ------------------------------------------------------------------------------------


def placed(parts: Parts) -> list[Finding]:
    """llama.cpp reads a file only where each tensor begins where the one listed before it ends."""
    found = []
    for path, header in zip(parts.paths, parts.headers, strict=True):
        alignment, at = cast(int, header.kv.get("general.alignment", ALIGNMENT)), header.data_offset
        for t in header.tensors:
            if t.offset != at:
                what = f"begins at byte {t.offset}; behind the tensor before it is byte {at}"
                found.append(Finding("error", t.name, what, "llama.cpp refuses the file; convert it again", "damaged-file"))
                break
            if t.dtype not in GGML_TYPES:
                break  # how long it is, is not known here
            at = t.offset + t.nbytes + -t.nbytes % alignment
        if at > header.file_nbytes + alignment:
            found.append(Finding("error", path.name, "is cut short", "fetch it again", "damaged-file"))
    return found


def labelled(path: Path, parts: Parts) -> list[Finding]:
    """The type that the file says it has, by general.file_type and by its name, against that of its matrices."""
    counts, nbytes = Counter[str](), 0
    for t in parts.tensors:
        if quantizable(TensorShape(t.name, t.shape)) and role_of(t.name) not in ("token_embd", "output"):
            counts[t.dtype] += math.prod(t.shape)
            nbytes += t.nbytes
    if not counts:
        return []
    total = sum(counts.values())
    main, n = counts.most_common(1)[0]
    truth = f"{n / total:.0%} of its matrices' weights are {main}" + (f", {8 * nbytes / total:.2f} bits each" if nbytes else "")
    found = []
    said = parts.kv.get("general.file_type")
    mix = MIXES.get(said & 1023) if isinstance(said, int) else None
    if mix is not None and main in GGML_TYPES and mix.default != main:
        what = f"{said} ({mix.name}: mostly {mix.default}), but {truth}"
        found.append(
            Finding("warning", "general.file_type", what, "programs show it: correct it, or make the file anew", "wrong-type")
        )
    name = name_in(path.name)
    if name and main in GGML_TYPES and FILE_TYPES[name].default != main:
        found.append(Finding("warning", path.name, f"named {name}, but {truth}", "name it after what it is", "wrong-type"))
    return found


def name_in(file: str) -> str | None:
    words = re.split(r"[-.]", file.upper().replace("Q3_K.", "Q3_K_M."))
    return next((w for w in reversed(words) if w in FILE_TYPES), None)


# the architecture -----------------------------------------------------------------------------------


def settings(parts: Parts) -> list[Finding]:
    kv, arch = parts.kv, parts.kv.get("general.architecture")
    if not isinstance(arch, str):
        return [
            Finding("error", "general.architecture", "is missing", "llama.cpp needs it; convert the file again", "missing-key")
        ]
    found = []
    context = kv.get(f"{arch}.context_length")
    if not isinstance(context, int) or context < 1:
        what = f"is {context}" if context is not None else "is missing"
        found.append(
            Finding("error", f"{arch}.context_length", what, "set the length that the model was trained for", "missing-key")
        )
    heads, kv_heads = (per_layer(kv.get(f"{arch}.attention.{k}")) for k in ("head_count", "head_count_kv"))
    width = kv.get(f"{arch}.embedding_length")
    for n in heads:
        if n and isinstance(width, int) and width % n and f"{arch}.attention.key_length" not in kv:
            what = f"{n} heads do not divide {arch}.embedding_length of {width}, and there is no key_length"
            found.append(Finding("error", f"{arch}.attention.head_count", what, "correct it", "wrong-key"))
            break
    n_layers = max(len(heads), len(kv_heads))
    for n, m in zip(*(h * n_layers if len(h) == 1 else h for h in (heads, kv_heads)), strict=False):
        if n and m and n % m:
            what = f"{m} heads of keys do not divide {n} heads of queries"
            found.append(Finding("error", f"{arch}.attention.head_count_kv", what, "correct it", "wrong-key"))
            break
    return found + layers(parts, arch) + widths(parts, arch)


def per_layer(value: object) -> list[int]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]


def layers(parts: Parts, arch: str) -> list[Finding]:
    there = {int(m[1]) for t in parts.tensors if (m := re.match(r"blk\.(\d+)\.", t.name))}
    said = parts.kv.get(f"{arch}.block_count")
    if not there or not isinstance(said, int):
        return []
    missing, more = sorted(set(range(said)) - there), sorted(n for n in there if n >= said)
    if missing:
        what = f"{said}, and there is no tensor of blk.{missing[0]}"
        return [Finding("error", f"{arch}.block_count", what, "convert it again: layers are missing", "wrong-key")]
    if more:
        return [
            Finding("error", f"{arch}.block_count", f"{said}, and there is blk.{more[-1]}", "correct the count", "wrong-key")
        ]
    return []


def widths(parts: Parts, arch: str) -> list[Finding]:
    embedding = next((t for t in parts.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), None)
    width = parts.kv.get(f"{arch}.embedding_length")
    if embedding is None or not isinstance(width, int) or embedding.shape[1] == width:
        return []
    what = f"is {width}, and token_embd.weight has rows of {embedding.shape[1]}"
    return [Finding("error", f"{arch}.embedding_length", what, "correct it", "wrong-key")]


def rope(parts: Parts) -> list[Finding]:
    kv, arch, found = parts.kv, str(parts.kv.get("general.architecture")), list[Finding]()
    scaling = {k.partition(".rope.scaling.")[2]: v for k, v in kv.items() if k.startswith(f"{arch}.rope.scaling.")}
    key, kind, factor = f"{arch}.rope.scaling.", scaling.get("type"), scaling.get("factor")
    if kind in ("linear", "yarn") and not (isinstance(factor, int | float) and factor > 0):
        found.append(
            Finding("error", f"{key}factor", f"is {factor}, and the type is {kind}", "set it, or the type none", "rope")
        )
    original, context = scaling.get("original_context_length"), kv.get(f"{arch}.context_length")
    if kind == "yarn" and original is None:
        what = "is missing: llama.cpp takes the whole context_length for it"
        found.append(
            Finding("warning", f"{key}original_context_length", what, "set the length before it was stretched", "rope")
        )
    if isinstance(original, int) and isinstance(context, int) and 0 < context < original:
        what = f"is {context}, less than the {original} before it was stretched"
        found.append(Finding("warning", f"{arch}.context_length", what, "one of the two is stale", "rope"))
    if kind in (None, "none") and isinstance(factor, int | float) and factor not in (0, 1):
        what = f"is {factor:g} without a type: " + ("linear is assumed" if kind is None else "it has no effect")
        found.append(Finding("warning", f"{key}factor", what, "set the type, or remove the factor", "rope"))
    if f"{arch}.rope.scale_linear" in kv and scaling:
        what = f"stands beside {key}*, which replaced it"
        found.append(Finding("warning", f"{arch}.rope.scale_linear", what, "remove the older key", "rope"))
    base = kv.get(f"{arch}.rope.freq_base")
    if base is not None and not (isinstance(base, int | float) and 0 < base < math.inf):
        found.append(
            Finding("error", f"{arch}.rope.freq_base", f"is {base}", "set the base that the model was trained with", "rope")
        )
    dims = kv.get(f"{arch}.rope.dimension_count")
    frequencies = next((t for t in parts.tensors if t.name == "rope_freqs.weight"), None)
    if frequencies is not None and isinstance(dims, int) and math.prod(frequencies.shape) != dims // 2:
        what = f"{math.prod(frequencies.shape)} factors, and {dims // 2} pairs rotate"
        found.append(Finding("error", "rope_freqs.weight", what, "convert it again", "rope"))
    return found


# the tokenizer --------------------------------------------------------------------------------------


def tokenizer(parts: Parts) -> list[Finding]:
    kv = parts.kv
    tokens, model = kv.get(f"{GGML}tokens"), kv.get(f"{GGML}model")
    if model in ("none", "no_vocab"):
        return []
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        what = "is missing" if tokens is None else "is no list of texts"
        return [Finding("error", f"{GGML}tokens", what, "convert it again, with the model's tokenizer beside it", "vocabulary")]
    found, n = [], len(tokens)
    for name in ("scores", "token_type"):
        values = kv.get(f"{GGML}{name}")
        if isinstance(values, list) and len(values) != n:
            found.append(
                Finding("error", f"{GGML}{name}", f"has {len(values)} entries for {n} tokens", "convert it again", "vocabulary")
            )
    types = kv.get(f"{GGML}token_type")
    if types is None:
        what = "is missing: every token is taken for plain text, control tokens too"
        found.append(Finding("warning", f"{GGML}token_type", what, "convert it again", "vocabulary"))
    if model == "gpt2" and not kv.get(f"{GGML}merges"):
        found.append(Finding("error", f"{GGML}merges", "is missing", "it cuts by its merges; convert it again", "vocabulary"))
    if model == "gpt2" and f"{GGML}pre" not in kv:
        what = "is missing: llama.cpp takes its default, which cuts numbers and spaces in its own way"
        found.append(Finding("note", f"{GGML}pre", what, "set the pre-tokenizer's name", "vocabulary"))
    marked = {i for i, t in enumerate(types) if t in MARKED} if isinstance(types, list) else range(n)
    arch = str(kv.get("general.architecture"))
    embedding = next((t for t in parts.tensors if t.name == "token_embd.weight" and t.shape), None)
    if embedding is not None and embedding.shape[0] > n:
        what = f"{n} tokens, and the embedding has {embedding.shape[0]} rows"
        found.append(
            Finding(
                "error", f"{GGML}tokens", what, "llama.cpp wants a text for each row: fill up with unused ones", "vocabulary"
            )
        )
    ids = {m[1]: v for k, v in kv.items() if (m := re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", k))}
    special = {k: v for k, v in ids.items() if isinstance(v, int) and v not in (NONE, -1)}
    template = kv.get("tokenizer.chat_template")
    vocabulary = Vocabulary(
        tokens, marked, [special[k] for k in ("eos", "eot", "eom") if k in special],
        template if isinstance(template, str) else None, special, ENDS_BY_TEXT, embedding.shape[0] if embedding else None,
    )  # fmt: skip
    causal = arch not in ENCODERS and kv.get(f"{arch}.attention.causal", True) is not False
    return found + of_vocabulary(vocabulary, PLACES, causal)


# the numbers ----------------------------------------------------------------------------------------


def heads(parts: Parts, values: bool) -> list[Finding]:
    """An output that repeats the embedding; what is tied and should not be, a file cannot tell."""
    by_name = {t.name: (path, t) for path, h in zip(parts.paths, parts.headers, strict=True) for t in h.tensors}
    if not values or not {"output.weight", "token_embd.weight"} <= by_name.keys():
        return []
    (path, a), (other, b) = by_name["output.weight"], by_name["token_embd.weight"]
    if a.nbytes == 0 or (a.dtype, a.shape) != (b.dtype, b.shape):
        return []
    same = all(np.array_equal(x, y) for x, y in zip(blocks(path, a), blocks(other, b), strict=True))
    what = f"repeats token_embd.weight, {a.nbytes:,} bytes"
    return [Finding("note", "output.weight", what, "a tied head may be left out", "tied-head")] if same else []


def numbers(parts: Parts) -> list[Finding]:
    """NaN and infinity in weights, and in the scales of every block of quantized ones."""
    found, unread = [], Counter[str]()
    for path, header in zip(parts.paths, parts.headers, strict=True):
        for t in header.tensors:
            if t.dtype not in GGML_TYPES:
                unread[t.dtype] += 1
                continue
            bad, n, what = scan(path, t)
            if bad:
                found.append(not_finite(t.name, bad, what, n))
    if unread:
        what = ", ".join(f"{n} of ggml's {kind}" for kind, n in unread.items())
        found.append(Finding("note", "tensors", f"not looked into: {what}", "these types are not read here", UNREAD))
    return found


def scan(path: Path, t: Info) -> tuple[int, int, str]:
    """(how many are not finite, of how many, what they are)"""
    bad = n = 0
    for data in blocks(path, t):
        if t.dtype in DTYPES:
            values = data.view(DTYPES[t.dtype].numpy)
            if t.dtype == "bf16":
                bad, n = bad + int(np.count_nonzero((values & 0x7F80) == 0x7F80)), n + values.size
            else:
                bad, n = bad + n_not_finite(values), n + values.size
            continue
        structs = data.view(LAYOUTS[f"gguf.{t.dtype}"].block)
        for field in structs.dtype.names or ():
            if structs.dtype[field].base.kind == "f":
                bad, n = bad + n_not_finite(structs[field]), n + structs[field].size
    return bad, n, "values" if t.dtype in DTYPES else "scales"


def blocks(path: Path, t: Info) -> Iterator[Array]:
    """The tensor's bytes, whole blocks at a time."""
    unit = GGML_TYPES[t.dtype].nbytes
    step = BLOCK_NBYTES // unit * unit
    with closing(LocalFile(path)) as opened:
        for at in range(0, t.nbytes, step):
            yield fill(opened, np.empty(min(step, t.nbytes - at), np.uint8), t.offset + at, t.name)
