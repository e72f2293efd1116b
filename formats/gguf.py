"""GGUF: names, header and layouts of a graph for llama.cpp.

legalize (which passes make the graph sayable) -> passes -> plan (header bytes and entries) -> emit
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

from qconvert import __version__, gguf_reader
from qconvert.dtypes import FLOATS
from qconvert.emit import Entry, FilePlan, Plan
from qconvert.errors import GraphError, UnsupportedError, UsageError, uninterrupted
from qconvert.findings import Finding
from qconvert.formats import gguf_arch, gguf_general, gguf_header, gguf_menu, gguf_mix
from qconvert.formats.gguf_certificate import Certifier
from qconvert.formats.gguf_kv import KV
from qconvert.formats.gguf_mix_rules import FileType
from qconvert.formats.gguf_names import gguf_name, sort_key
from qconvert.formats.gguf_vocabulary import Vocabulary, vocabulary
from qconvert.gguf_reader import ALIGNMENT, row_nbytes
from qconvert.graph import Graph, Type
from qconvert.passes.pack import Pack
from qconvert.passes.permute_rope import PermuteRope
from qconvert.passes.quantize import Quantize
from qconvert.passes.rope_factors import RopeFactors
from qconvert.pipeline import Function, Pass
from qconvert.report import Report, Row
from qconvert.request import Request, parse_nbytes
from qconvert.target import Contents, Item, Legal, Lowered, Menu, Source
from qconvert.transcoded import notes
from qconvert.weights import Weights


@dataclass(frozen=True)
class Options:
    """What the user asked for. `mix` is what a usual name (Q4_K_M) stands for; tokenizer and general.* are made elsewhere."""

    mix: FileType
    choice: gguf_mix.Options
    general: tuple[KV, ...]
    vocabulary: Vocabulary
    split_max_nbytes: int | None = None


class GGUF:
    name: ClassVar[str] = "gguf"

    def options(self, request: Request, source: Source, graph: Graph) -> Options:
        """The user's words as this format's record. UsageError for types and sizes that do not exist."""
        if request.adapters_as == "swap":
            raise UnsupportedError("--adapters swap: GGUF output merges adapters", hint="--to onnx or safetensors")
        for flag in ("group", "zero_point", "accuracy_level"):
            if (value := getattr(request, flag)) is not None:
                said = f"--{flag.replace('_', '-')}"
                raise UnsupportedError(f"{said} {value}: GGUF's types fix their blocks", hint=f"--to onnx has {said}")
        for flag in ("operators", "activation_range"):
            if (value := getattr(request, flag)) is not None:
                why = f"--{flag.replace('_', '-')} {value}: GGUF has no ranges of activations"
                raise UnsupportedError(why, hint="--to onnx --quant w8a8 has")
        for value, flag in ((request.layout, "--layout"), (request.weights_in, "--weights-in")):
            if value is not None:
                raise UnsupportedError(f"{flag} {value}: a GGUF is one file", hint=f"--to onnx has {flag}")
        if request.offload_meta is not None:
            raise UnsupportedError(
                f"--offload-meta {request.offload_meta}: a GGUF keeps scales inside the blocks of codes, one behind another",
                hint="llama.cpp's -ot REGEX=CPU moves whole tensors; --to onnx and safetensors have --offload-meta",
            )
        if request.bits is not None and request.bits not in gguf_mix.BITS:
            raise UsageError(
                f"--bits {request.bits}: GGUF has {', '.join(map(str, gguf_mix.BITS))}",
                hint="or name a type: --quant Q4_K_M",
            )
        mix = gguf_mix.file_type(request.quant or gguf_mix.BITS[request.bits or 4])
        choice = gguf_mix.Options(
            pure=request.pure,
            leave_output_tensor=request.leave_output_tensor,
            output_tensor_type=request.output_tensor_type and gguf_mix.tensor_type(request.output_tensor_type),
            token_embedding_type=request.token_embedding_type and gguf_mix.tensor_type(request.token_embedding_type),
            tensor_types=tuple(map(gguf_mix.parse_tensor_type, request.tensor_types)),
            fallback=request.fallback,
            unquantized=stored_dtype(graph),
        )
        limit = parse_nbytes(request.split_max_size) if request.split_max_size else None
        return Options(mix, choice, gguf_general.describe(source, graph), vocabulary(source, graph, request), limit)

    def default_path(self, source: Source, graph: Graph, options: Options) -> Path:
        return Path(gguf_general.file_name(source, graph, options.mix.name))

    def legalize(self, graph: Graph, options: Options) -> Legal:
        """Decide, from shapes alone, how this graph becomes GGUF. UnsupportedError where llama.cpp cannot run it."""
        arch = gguf_arch.describe(graph)
        names = {gguf_name(graph, p): p for p in graph.parameters()}
        shapes = [gguf_mix.TensorShape(n, graph.nodes[p].type.dims) for n, p in names.items()]
        choices = gguf_mix.choose(shapes, options.mix, arch.hyper, weighted(graph, options.choice))
        types = {names[c.name]: c.got for c in choices}
        passes: list[Pass | Function] = [PermuteRope()] if arch.permuted else []
        passes += [RopeFactors(arch.rope_factors)] if arch.rope_factors else []
        passes += [Quantize(options.mix.name, types=types), Pack("gguf")]
        fallbacks = tuple({"tensor": c.name, "wanted": c.wanted, "got": c.got, "reason": c.reason} for c in choices if c.reason)
        told = (*arch.notes, *options.vocabulary.notes, *notes(graph, types))
        return Legal(tuple(passes), options.mix.name, fallbacks, told, (*arch.kvs, *imatrix_kvs(graph)))

    def menu(self, graph: Graph, options: Options) -> Menu:
        """Every type that a row divides into, for every weight; those of codebooks where its importance is known."""
        tensors = {p: gguf_mix.TensorShape(gguf_name(graph, p), graph.nodes[p].type.dims) for p in graph.parameters()}
        return gguf_menu.menu(tensors, options.mix, gguf_arch.describe(graph).hyper, weighted(graph, options.choice))

    def with_types(self, graph: Graph, options: Options, types: Mapping[str, str]) -> Options:
        mix, choice = gguf_menu.with_types({p: gguf_name(graph, p) for p in types}, options.mix, options.choice, types)
        return replace(options, mix=mix, choice=choice)

    def plan(self, graph: Graph, options: Options, legal: Legal, path: Path) -> Plan:
        """Header bytes and entries of every file, from types alone."""
        tensors = [(gguf_name(graph, p), p, graph.nodes[p].type) for p in graph.parameters()]
        tensors.sort(key=lambda t: sort_key(t[0]))
        if len({t[0] for t in tensors}) != len(tensors):
            raise GraphError("two weights have one GGUF name")
        kvs = self.header_kvs(options, legal)
        shards = split([(n, v, t, nbytes_of(t)) for n, v, t in tensors], options.split_max_nbytes)
        if len(shards) == 1:
            return Plan((file_plan(path, kvs, shards[0]),))
        files = []
        for i, shard in enumerate(shards):
            position = [
                KV("split.no", "u16", i),
                KV("split.count", "u16", len(shards)),
                KV("split.tensors.count", "i32", len(tensors)),
            ]
            files.append(file_plan(shard_path(path, i, len(shards)), [*(kvs if i == 0 else []), *position], shard))
        return Plan(tuple(files))

    def prove(
        self, source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]:
        """Every check there is for a GGUF file; see gguf_check."""
        with uninterrupted():
            from qconvert.formats import gguf_check  # loads torch

        return gguf_check.prove(source, lowered, weights, parts, threads)

    def find(self, path: Path) -> Path | None:
        """A GGUF file is known by its name or its first bytes."""
        return path if path.is_file() and (path.suffix == ".gguf" or gguf_reader.begins_as_gguf(path)) else None

    def certifier(self) -> Certifier:
        return Certifier()

    def inspect(self, path: Path) -> Contents:
        header = gguf_reader.read_header(path)
        items = [Item(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors]
        return Contents("gguf", items, header.file_nbytes, header.kv)

    def diagnose(self, path: Path, values: bool) -> list[Finding]:
        """What is wrong with a file by itself; see gguf_doctor."""
        from qconvert.formats import gguf_doctor

        return gguf_doctor.diagnose(path, values)

    def verify(self, path: Path, source: Source, merged: Graph, threads: int) -> Report:
        """Every check that a file made elsewhere can be put to; see gguf_verify."""
        with uninterrupted():
            from qconvert.formats import gguf_verify  # loads torch

        return gguf_verify.verify(path, source, merged, threads)

    def header_kvs(self, options: Options, legal: Legal) -> list[KV]:
        return [
            legal.header[0],
            KV("general.type", "str", "model"),
            *options.general,
            *legal.header[1:],
            KV("general.file_type", "u32", options.mix.id),
            KV("general.quantization_version", "u32", 2),
            KV("qconvert.version", "str", __version__),
            *options.vocabulary.kvs,
        ]


def weighted(graph: Graph, choice: gguf_mix.Options) -> gguf_mix.Options:
    """The options with the tensors of whose inputs statistics lie in the graph."""
    if "statistics" not in graph.meta:
        return choice
    names = frozenset(gguf_name(graph, p) for p in graph.parameters() if f"{p}~moments" in graph.nodes)
    return replace(choice, imatrix=names)


def imatrix_kvs(graph: Graph) -> list[KV]:
    """What llama-quantize says of the importance matrix that a file was made with; texts as long as it has room for."""
    about = graph.meta.get("statistics")
    if not isinstance(about, dict):
        return []
    short = {k: str(about[k]).encode()[:127].decode("utf-8", "ignore") for k in ("file", "text")}
    texts = [KV(f"quantize.imatrix.{key}", "str", short[k]) for key, k in (("file", "file"), ("dataset", "text"))]
    counts = [KV(f"quantize.imatrix.{k}_count", "u32", cast(int, about[k])) for k in ("entries", "chunks")]
    return [kv for kv in (*texts, *counts) if kv.value]


def stored_dtype(graph: Graph) -> str:
    """The plain dtype that most of the checkpoint's matrices have: what is left alone is kept in it."""
    dtypes = Counter(graph.root(p).type.dtype for p in graph.parameters() if len(graph.nodes[p].type.shape) > 1)
    return next((dtype for dtype, _ in dtypes.most_common() if dtype in FLOATS), "f16")


def nbytes_of(kind: Type) -> int:
    *lead, k = kind.dims
    return math.prod(lead) * row_nbytes(kind.dtype.removeprefix("gguf."), k)


Tensor = tuple[str, str, Type, int]


def split(tensors: list[Tensor], max_nbytes: int | None) -> list[list[Tensor]]:
    """Shards of at most max_nbytes of data, in order; a tensor larger than that has a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    room = max_nbytes or 0
    for tensor in tensors:
        padded = tensor[3] + -tensor[3] % ALIGNMENT
        if max_nbytes and shards[-1] and room < padded:
            shards.append([])
            room = max_nbytes
        shards[-1].append(tensor)
        room -= padded
    return shards


def shard_path(path: Path, i: int, n: int) -> Path:
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{i + 1:05d}-of-{n:05d}.gguf")


def file_plan(path: Path, kvs: list[KV], tensors: list[Tensor]) -> FilePlan:
    infos, at = [], 0
    for name, _, kind, nbytes in tensors:
        infos.append((name, kind.dtype.removeprefix("gguf."), kind.dims, at))
        at += nbytes + -nbytes % ALIGNMENT
    header = gguf_header.encode(kvs, infos)
    entries = tuple(
        Entry(name, value, kind.dtype, shape, nbytes, len(header) + offset)
        for (name, value, kind, nbytes), (_, _, shape, offset) in zip(tensors, infos, strict=True)
    )
    return FilePlan(path, header, entries, len(header) + at)
