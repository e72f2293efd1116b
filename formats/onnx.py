"""ONNX: a folder that onnxruntime and onnxruntime-genai run: model.onnx, its weights beside it, tokenizer, configuration.

legalize (types of the weights) -> passes -> plan (protobuf, places in the data file) -> emit
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from qconvert.emit import Entry, FilePlan, Plan
from qconvert.errors import UnsupportedError, UsageError, require, uninterrupted
from qconvert.findings import Finding
from qconvert.formats.onnx_arch import FORMS, Form, check_supported, context_length, fused_attention, is_encoder
from qconvert.formats.onnx_certificate import Certifier
from qconvert.formats.onnx_cliffs import slow_paths
from qconvert.formats.onnx_columns import LAYOUTS as COLUMNS
from qconvert.formats.onnx_int8_plan import QUANTS as INTEGER_QUANTS
from qconvert.formats.onnx_int8_plan import integer_of, passes_of, refuse_group
from qconvert.formats.onnx_int8_plan import types_of as integer_types_of
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_menu import menu, with_types
from qconvert.formats.onnx_mixtures import mixture_notes, oldest_runtime, running_in
from qconvert.formats.onnx_schemes import accuracy_level, integers_only, not_portable, with_zero_point
from qconvert.formats.onnx_storage import placing, storage
from qconvert.formats.onnx_swap import adapter_plans
from qconvert.formats.onnx_types import PLAIN, Options, first_passes, row_planes, types_of
from qconvert.graph import Graph, n_rows
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass
from qconvert.placement import placement_of
from qconvert.planes import Plane
from qconvert.provenance import names_of, provenance
from qconvert.report import Report, Row
from qconvert.request import Request
from qconvert.scheme import GROUPS
from qconvert.sources import Store
from qconvert.swapped import notes_of_swapped
from qconvert.target import Contents, Legal, Lowered, Menu, Source
from qconvert.transcoded import notes
from qconvert.weights import Weights

if TYPE_CHECKING:
    from qconvert.formats.onnx_foreign_job import Rewritten

QUANTS = (*PLAIN, "int2", "int4", "int8", "uint2", "uint4", "uint8", "nf4", "fp4", *INTEGER_QUANTS)
BITS = {2: "int2", 4: "int4", 8: "int8"}
GROUP = 32
FLAGS_OF_GGUF = {
    "tensor_types": "--tensor-type", "output_tensor_type": "--output-tensor-type", "pure": "--pure",
    "token_embedding_type": "--token-embedding-type", "leave_output_tensor": "--leave-output-tensor",
    "pre_tokenizer": "--pre-tokenizer",
}  # fmt: skip


class ONNX:
    name: ClassVar[str] = "onnx"

    def rewrite(self, request: Request, store: Store) -> Rewritten:
        """The same for an ONNX model as input: its weights are quantized, its graph is kept."""
        require("onnx", "a .onnx file as input", '"qconvert[onnx]"')
        from qconvert.formats.onnx_foreign import rewrite

        for field, flag in FLAGS_OF_GGUF.items():
            if getattr(request, field):
                raise UnsupportedError(f"{flag}: ONNX output has no such choice")
        for flag, value in placing(request):
            if value is not None:
                raise UnsupportedError(f"{flag} {value}: a model that is ONNX already keeps its layout")
        for flag, size in (("--target-size", request.target_size), ("--target-bpw", request.target_bpw)):
            if size is not None:
                raise UnsupportedError(f"{flag} {size}: an ONNX model gets one type for all weights", hint="--bits 4")
        quant, group = chosen(request)
        if group is None:
            raise UnsupportedError(f"--quant {quant}: an ONNX model is only quantized here", hint="--bits 4")
        integers_only(request, quant)
        return rewrite(request, quant, group, store)

    def prove_rewritten(
        self, job: Rewritten, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]:
        """Every check there is for it; see onnx_foreign_check."""
        with uninterrupted():
            from qconvert.formats import onnx_foreign_check

        return onnx_foreign_check.prove(job, weights, parts, threads)

    def options(self, request: Request, source: Source, graph: Graph) -> Options:
        """The user's words as this format's record. UsageError for types that do not exist."""
        require("onnx", "--to onnx", '"qconvert[onnx]"')
        for field, flag in FLAGS_OF_GGUF.items():
            if getattr(request, field):
                raise UnsupportedError(f"{flag}: ONNX output has no such choice", hint="--to gguf has it")
        if request.chooses_types and request.layout == "transformersjs":
            why = "--layout transformersjs: it has no name for a mix of types, which a size or --max-kl chooses"
            raise UnsupportedError(why, hint="--layout genai, or a type: --bits 4")
        form, (quant, group) = form_of(request), chosen(request)
        level, kept = accuracy_level(request, form, quant), storage(request, quant)
        from qconvert.companions import tokenizer_of
        from qconvert.formats import onnx_transformersjs
        from qconvert.formats.onnx_genai import companions

        check_supported(graph, form)
        tokenizer = tokenizer_of(source, graph)
        if source.swap and is_encoder(graph):
            raise UnsupportedError("--adapters swap: this model is an encoder", hint="--adapters merge")
        if kept.browser_dtype:
            files = onnx_transformersjs.companions(source, tokenizer)
        else:
            files = companions(source, graph, context_length(graph)[0], tokenizer, shares_cache(graph, form))
        name = " + ".join(names_of(source, graph))
        facts = provenance(source, graph, "mixed" if request.chooses_types else quant)
        integer, config = integer_of(request, quant, source.store, tokenizer), onnx_transformersjs.config_of(source, graph)
        checked, told = request.check and not request.dry_run, notes_of_swapped(source, graph)
        return Options(
            form, quant, group, level, checked, request.fallback, name, tokenizer, files, kept, config, facts, integer, told,
            any_quant=request.quant is None and request.zero_point is None, any_group=request.group is None,
        )  # fmt: skip

    def legalize(self, graph: Graph, options: Options) -> Legal:
        """Types from shapes alone. UnsupportedError where rows do not divide into groups and --fallback error asked for it."""
        check_supported(graph, options.form)
        first = first_passes(graph, options)
        for each in first:
            graph = each(graph)
        types, columns, fallbacks = integer_types_of(graph) if options.integer else types_of(graph, options)
        if fallbacks and options.fallback == "error":
            f = fallbacks[0]
            raise UnsupportedError(f"{f['tensor']}: {f['reason']}", hint="--fallback warn takes what divides")
        solver = "mse" if options.group else "search"
        passes: tuple[Pass, ...] = (*first, Quantize(options.quant, solver, types), Pack("onnx", columns))
        shown = fallbacks if options.fallback == "warn" else ()
        linears = {types[n.inputs[1]] for n in graph.nodes.values() if n.op == "linear"}
        told = (*context_length(graph)[1], *slow_paths(linears, options.accuracy_level), *notes(graph, types))
        told = (*told, *mixture_notes(graph, experts_need(graph, options)))
        if options.integer:
            integers, more = passes_of(graph, options.quant, options.integer, types, columns)
            passes, told = (*first, *integers), (*told, *more)
        label = options.label if options.group is None or options.types else f"{options.quant}_g{options.group}"
        return Legal(passes, label, tuple(shown), (*told, *options.notes))

    def menu(self, graph: Graph, options: Options) -> Menu:
        """Groups of 2, 4 and 8 bits, or plain, for every weight that is multiplied or gathered; see onnx_menu."""
        return menu(graph, options)

    def with_types(self, graph: Graph, options: Options, types: Mapping[str, str]) -> Options:
        return with_types(graph, options, types)

    def default_path(self, source: Source, graph: Graph, options: Options) -> Path:
        return Path("-".join([*names_of(source, graph), options.label, *(["swap"] if source.swap else []), "onnx"]))

    def plan(self, graph: Graph, options: Options, legal: Legal, path: Path) -> Plan:
        """The protobuf, and a place in a file for every weight."""
        from qconvert.formats import onnx_transformersjs
        from qconvert.formats.onnx_cliffs import refuse_missing
        from qconvert.formats.onnx_files import INDEX, data_files, index_of
        from qconvert.formats.onnx_forms import serialized
        from qconvert.formats.onnx_proto import Model

        entries, storage, model = places(graph), options.storage, Model()
        for entry in entries:
            add_weight(model, graph, entry)
        shards, files = data_files(model, entries, storage, options.metadata, placement_of(graph)), dict(options.files)
        if storage.safetensors and len(shards) > 1:
            files[INDEX] = index_of(shards)
        context, level, in_browsers = context_length(graph)[0], options.accuracy_level, storage.browser_dtype is not None
        form = running_in(options.form, experts_need(graph, options))
        proto = serialized(graph, model, form, context, level, options.name, options.metadata, in_browsers)
        if options.checked:
            refuse_missing(model)
        if storage.browser_dtype:
            files["config.json"] = onnx_transformersjs.config_json(options.config, storage, len(shards), model.inputs)
        at = path / storage.model
        plans = [FilePlan(at, proto, (), len(proto))]
        plans += [FilePlan(at.with_name(f.name), f.header, f.entries, f.nbytes) for f in shards]
        plans += [FilePlan(path / name, data, (), len(data)) for name, data in files.items()]
        return Plan((*plans, *adapter_plans(graph, at.parent)), path)

    def prove(
        self, source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]:
        """Every check there is for an ONNX folder; see onnx_check."""
        with uninterrupted():
            from qconvert.formats import onnx_check, onnx_encoder_check  # load torch

        prove = onnx_encoder_check.prove if is_encoder(lowered.graph) else onnx_check.prove
        return prove(source, lowered, weights, parts, threads)

    def find(self, path: Path) -> Path | None:
        """A .onnx file, or that of a folder which is no checkpoint; see onnx_inspect."""
        from qconvert.formats.onnx_inspect import model_file

        return model_file(path)

    def certifier(self) -> Certifier:
        return Certifier()

    def inspect(self, path: Path) -> Contents:
        """Tensors and nodes from the protobuf alone; see onnx_inspect."""
        require("onnx", f"reading {path}", '"qconvert[onnx]"')
        from qconvert.formats.onnx_inspect import contents

        return contents(path)

    def diagnose(self, path: Path, values: bool) -> list[Finding]:
        """What is wrong with a file by itself; see onnx_doctor."""
        from qconvert.formats import onnx_doctor

        return onnx_doctor.diagnose(path, values)

    def verify(self, path: Path, source: Source, merged: Graph, threads: int) -> Report:
        """Every check that a decoder made elsewhere can be put to; see onnx_verify."""
        require("onnx", f"reading {path}", '"qconvert[onnx]"')
        with uninterrupted():
            from qconvert.formats import onnx_verify  # loads torch

        return onnx_verify.verify(path, source, merged, threads, places)


def form_of(request: Request) -> Form:
    if request.form not in FORMS:
        raise UsageError(f"--form {request.form}: there are {', '.join(FORMS)}")
    return FORMS[request.form]


def experts_need(graph: Graph, options: Options) -> str | None:
    return oldest_runtime(graph, options.form, options.quant, options.group, options.accuracy_level)


def shares_cache(graph: Graph, form: Form) -> bool:
    """Past and present may be one buffer: only GroupQueryAttention writes into what it reads."""
    return fused_attention(graph, form) == {n for n, node in graph.nodes.items() if node.op == "attention"}


def chosen(request: Request) -> tuple[str, int | None]:
    """Type and group that were asked for; 4 bits in groups of 32 by default."""
    if request.bits is not None and request.bits not in BITS:
        raise UsageError(f"--bits {request.bits}: ONNX has {', '.join(map(str, BITS))}", hint="or --quant fp16, fp32")
    quant = (request.quant or BITS[request.bits or 4]).lower()
    if quant not in QUANTS:
        near = get_close_matches(quant, QUANTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(QUANTS)}"
        raise UsageError(f"--quant {request.quant}: ONNX has no such type", hint=hint)
    if quant in INTEGER_QUANTS:
        refuse_group(request, quant)
        with_zero_point(quant, request.zero_point)
        return quant, None
    if quant in PLAIN:
        for flag, value in (("--group", request.group), ("--zero-point", request.zero_point)):
            if value is not None:
                raise UsageError(f"{flag} {value}: {quant} has no {flag[2:].replace('-', ' ')}s")
        return quant, None
    quant = with_zero_point(quant, request.zero_point)
    if form_of(request).name == "portable" and (why := not_portable(quant)):
        raise UnsupportedError(f"--form portable: no standard node has {quant}: {why}", hint="--form ort")
    group = GROUP if request.group is None else request.group
    if group not in GROUPS:
        raise UsageError(f"--group {group}: MatMulNBits has {', '.join(map(str, GROUPS))}")
    return quant, group


# the weights --------------------------------------------------------------------------------------


def places(graph: Graph) -> list[Entry]:
    """An entry for every weight, one behind another; see onnx_files for the files that they go to."""
    entries, at = [], 0
    for name in graph.parameters():
        kind = graph.nodes[name].type
        planes = []
        for nbytes, bits in row_planes(kind):
            planes.append(Plane(at, nbytes, bits))
            at += planes[-1].file_nbytes(kind.rows)
        total = sum(plane.file_nbytes(kind.rows) for plane in planes)
        entries.append(Entry(name, name, kind.dtype, kind.dims, total, planes[0].offset, tuple(planes)))
    return entries


def add_weight(model: object, graph: Graph, entry: Entry) -> None:
    """Its initializers: one, or codes, scales and zero points; the codes also as rows where they are gathered."""
    from qconvert.formats.onnx_lowering import part_names, rows_name
    from qconvert.formats.onnx_proto import Model

    m, n, k = cast(Model, model), n_rows(entry.shape), entry.shape[-1]
    if entry.dtype in COLUMNS:
        layout, names = COLUMNS[entry.dtype], part_names(entry.name)
        dims = layout.dims(n, k)
        for name, dtype, shape, plane in zip(names, layout.dtypes, dims, entry.planes, strict=False):
            m.external(name, dtype, shape, plane.offset, plane.file_nbytes(n))
        return
    if entry.dtype not in LAYOUTS:
        m.external(entry.name, entry.dtype, entry.shape, entry.offset, entry.nbytes)
        return
    outer = entry.shape[:-1]
    readers = {node.op for node in graph.nodes.values() if entry.value in node.inputs}
    parts = LAYOUTS[entry.dtype].parts(n, k)
    for i, (name, part, plane) in enumerate(zip(part_names(entry.name), parts, entry.planes, strict=False)):
        shape = part.dims if len(outer) == 1 else (*outer, plane.nbytes // (4 if part.dtype == "f32" else 1))
        if i or readers & {"linear", "experts"}:
            m.external(name, part.dtype, shape, plane.offset, plane.file_nbytes(n))
    if "embed" in readers:
        codes = entry.planes[0]
        m.external(rows_name(entry.name), "u8", (n, codes.nbytes), codes.offset, codes.file_nbytes(n))
