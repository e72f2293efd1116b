"""safetensors: a folder that transformers and vLLM load: weights in a dialect, config.json that says which, the tokenizer.

legalize (schemes of the weights) -> passes -> plan (shards, config.json) -> emit
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

from qconvert.calibration import Calibration, calibration_of, spreads_of
from qconvert.companions import carried, sentence_files, tokenizer_of
from qconvert.dtypes import FLOATS
from qconvert.emit import FilePlan, Plan
from qconvert.errors import UnsupportedError, UsageError, uninterrupted
from qconvert.findings import Finding
from qconvert.formats.safetensors_certificate import Certifier
from qconvert.formats.safetensors_config import config_of
from qconvert.formats.safetensors_dialects import (
    PLAIN,
    Describing,
    Dialect,
    FixedRanges,
    OfBits,
    OwnConfig,
    Wanted,
    dialect_of,
    passes_of,
)
from qconvert.formats.safetensors_experts import SplitExperts, expert_matrices, expert_scheme, refuse_mixture
from qconvert.formats.safetensors_files import INDEX, MAX_NBYTES, file_plan, index, shards
from qconvert.formats.safetensors_menu import MIXED, menu, of_matrices
from qconvert.formats.safetensors_names import KeepOffset, family_of, linears, offset_norms, stored_transposed
from qconvert.formats.safetensors_split import split_plans
from qconvert.formats.safetensors_swap import adapter_plans, refuse_swapping
from qconvert.formats.safetensors_verify import checkpoint_folder, contents, verify
from qconvert.formats.safetensors_written import all_stored, written
from qconvert.graph import Attr, Graph
from qconvert.histograms import MINMAX, Grid, Histogram, Rule, chosen_ranges, rule_of
from qconvert.layouts import layout_of
from qconvert.passes.quantize_activations import QuantizeActivations
from qconvert.passes.untie_head import has_head
from qconvert.pipeline import Pass
from qconvert.placement import placement_of
from qconvert.provenance import names_of, provenance
from qconvert.report import Report, Row
from qconvert.request import Fallback, Request, parse_nbytes
from qconvert.scheme import scheme_of
from qconvert.solver_spec import reads_statistics
from qconvert.swapped import notes_of_swapped
from qconvert.target import Contents, Legal, Lowered, Menu, Source
from qconvert.tokenizer import Tokenizer
from qconvert.transcoded import notes, stored_dtype
from qconvert.weights import Weights

BITS = {4: "w4a16", 8: "w8a16", 16: "bf16"}
ASYMMETRIC = {"w4a16": "w4a16-asym", "gptq": "gptq-asym", "gptq-v2": "gptq-v2-asym"}
NO_POOLER = "pooler.dense is not written: AutoModel.from_pretrained(folder, add_pooling_layer=False) makes no random one"
READ_TOO = (".safetensors", ".safetensors.index.json", "adapter_config.json")  # names that end so
# fields of a request that mean nothing here
NOT_HERE = {
    "tensor_types": "--tensor-type", "output_tensor_type": "--output-tensor-type", "pure": "--pure",
    "token_embedding_type": "--token-embedding-type", "leave_output_tensor": "--leave-output-tensor",
    "pre_tokenizer": "--pre-tokenizer", "accuracy_level": "--accuracy-level", "layout": "--layout",
    "weights_in": "--weights-in", "operators": "--operators",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """wanted.dtype: of all weights that are not quantized, as config.json will say."""

    dialect: Dialect
    wanted: Wanted
    fallback: Fallback
    max_nbytes: int
    tokenizer: Tokenizer | None
    files: Mapping[str, bytes]
    config: Mapping[str, object]
    metadata: Mapping[str, str]
    calibration: Calibration | None  # where ranges of activations are fixed; None in a dry run, which reads no weight
    told: tuple[str, ...] = ()
    rule: Rule = MINMAX
    types: Mapping[str, str] = field(default_factory=dict)  # of weights for which one was chosen each


class Safetensors:
    name: ClassVar[str] = "safetensors"

    def options(self, request: Request, source: Source, graph: Graph) -> Options:
        """The user's words as this format's record. UsageError for types that do not exist."""
        for name, flag in NOT_HERE.items():
            if getattr(request, name):
                raise UnsupportedError(f"{flag}: --to safetensors has no such choice")
        refuse_own_folder(request, source)
        dialect = mixed(request) if request.chooses_types else chosen(request)
        dtype = PLAIN.get(dialect.name) or plain_dtype(graph)
        if dialect.name in PLAIN and request.group is not None:
            raise UsageError(f"--group {request.group}: {dialect.name} has no groups")
        limit = parse_nbytes(request.split_max_size) if request.split_max_size else MAX_NBYTES
        form = dialect.metadata if isinstance(dialect, OwnConfig) else "pt"
        metadata = {"format": form, **provenance(source, graph, dialect.name)}
        any_kind = request.zero_point is None and not request.quant and dialect is not MIXED
        wanted = Wanted(request.group, dtype, any_kind, request.bits)
        if source.swap:
            refuse_swapping(graph, dialect)
        tokenizer, calibration = tokenizer_of(source, graph), None
        rule = rule_of(request.activation_range)
        if not (isinstance(dialect, FixedRanges) and dialect.fixed == "int8"):
            rule = MINMAX
        if request.activation_range not in (None, "minmax") and rule is MINMAX:
            why = f"--activation-range {request.activation_range}: {dialect.name} has no fixed ranges of integers"
            raise UsageError(why, hint="--quant w8a8-static")
        if fixes_ranges(dialect):
            calibration = calibration_of(request, source.store, tokenizer)
        elif request.calibrate and not reads_statistics(request.solver):
            why = f"--calibrate {request.calibrate}: {dialect.name} has no fixed ranges of activations"
            raise UsageError(why, hint="--quant w8a8-static")
        return Options(
            dialect, wanted, request.fallback, limit, tokenizer,
            {**carried(source), **sentence_files(source.checkpoint.folder)}, config_of(source, graph, dtype), metadata,
            None if request.dry_run else calibration, notes_of_swapped(source, graph), rule,
        )  # fmt: skip

    def legalize(self, graph: Graph, options: Options) -> Legal:
        """Schemes from shapes alone. UnsupportedError where one does not fit and --fallback error asked for it."""
        refuse_mixture(graph, options.dialect, options.wanted)
        by, split = family_of(graph).norm_offset, SplitExperts()
        first: tuple[Pass, ...] = (KeepOffset(by, options.wanted.dtype),) if by else ()
        if (apart := split(graph)) != graph:
            graph, first = apart, (*first, split)
        types, fallbacks = types_of(graph, options)
        if fallbacks and options.fallback == "error":
            first_left = fallbacks[0]
            raise UnsupportedError(f"{first_left['tensor']}: {first_left['reason']}", hint="--fallback warn takes what fits")
        name = options.dialect.name
        if options.dialect.layouts and not options.types and not any(map(scheme_of, types.values())):
            why = f"first {fallbacks[0]['tensor']}: {fallbacks[0]['reason']}" if fallbacks else "there are no linear maps"
            raise UnsupportedError(f"{name}: no weight can be quantized so; {why}", hint="--quant bf16, or --to gguf or onnx")
        own = passes_of(options.dialect, types, options.wanted, together(graph, types))
        ranges, told = fixed_ranges(graph, options, types)
        passes: tuple[Pass, ...] = (*first, *own, *([QuantizeActivations(name, ranges)] if ranges else []))
        shown = fallbacks if options.fallback == "warn" else []
        told = (*told, *(() if has_head(graph) else (NO_POOLER,)))
        return Legal(passes, name, tuple(shown), (*notes(graph, types), *told, *options.told))

    def menu(self, graph: Graph, options: Options) -> Menu:
        """Groups of 4 and 8 bits, or plain, for every linear map; see safetensors_menu."""
        return menu(graph, options.dialect, options.wanted)

    def with_types(self, graph: Graph, options: Options, types: Mapping[str, str]) -> Options:
        return replace(options, types=of_matrices(graph, types))

    def default_path(self, source: Source, graph: Graph, options: Options) -> Path:
        return Path("-".join([*names_of(source, graph), options.dialect.name, *(["swap"] if source.swap else [])]))

    def plan(self, graph: Graph, options: Options, legal: Legal, path: Path) -> Plan:
        """config.json, shards with their index, and what lies beside them."""
        said = written(graph, options.wanted)
        config = {**options.config, **(options.dialect.config(said) if said.quantized or not options.types else {})}
        config = options.dialect.restated(config) if isinstance(options.dialect, OwnConfig) else config
        files = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), **options.files}
        placed, every, metadata = placement_of(graph), all_stored(graph), dict(options.metadata)
        if isinstance(options.dialect, Describing):
            shapes = {s.entry.name: s.entry.shape for s in every}
            metadata |= options.dialect.described(shapes, said)
        if placed.away:
            plans, files[INDEX] = split_plans(path, every, placed, options.max_nbytes, metadata)
        else:
            split = shards(every, options.max_nbytes)
            if len(split) > 1:
                files[INDEX] = index(split)
            plans = [file_plan(path, shard, metadata) for shard in split]
        plans += [FilePlan(path / name, data, (), len(data)) for name, data in files.items()]
        refuse_others(path, {plan.path.name for plan in plans})
        return Plan((*plans, *adapter_plans(graph, path)), path)

    def prove(
        self, source: Source, lowered: Lowered, weights: Weights, parts: tuple[Path, ...], threads: int
    ) -> tuple[list[Row], dict[str, str] | None]:
        """Every check there is for such a folder; see safetensors_check."""
        with uninterrupted():
            from qconvert.formats import safetensors_check  # loads torch

        return safetensors_check.prove(source, lowered, weights, parts, threads)

    def find(self, path: Path) -> Path | None:
        """A model's folder of safetensors; see safetensors_verify."""
        return checkpoint_folder(path)

    def certifier(self) -> Certifier:
        return Certifier()

    def inspect(self, path: Path) -> Contents:
        return contents(path)

    def diagnose(self, path: Path, values: bool) -> list[Finding]:
        """What is wrong with a file by itself; see safetensors_doctor."""
        from qconvert.formats import safetensors_doctor

        return safetensors_doctor.diagnose(path, values)

    def verify(self, path: Path, source: Source, merged: Graph, threads: int) -> Report:
        """Every check that a folder made elsewhere can be put to."""
        with uninterrupted():
            return verify(path, source, merged, threads)


def refuse_own_folder(request: Request, source: Source) -> None:
    """An output in the place of an input is one that cannot be made again."""
    mine = {root.resolve() for root in source.store.roots.values()}
    if request.output is not None and Path(request.output).resolve() in mine:
        raise UsageError(f"{request.output} is the folder that is read", hint="-o another one")


def refuse_others(folder: Path, names: set[str]) -> None:
    """Files that --force would leave there, and that loaders read instead of what is written or with it."""
    found = sorted(p.name for p in folder.glob("*") if p.name.endswith(READ_TOO)) if folder.is_dir() else []
    if left := [name for name in found if name not in names]:
        raise UsageError(f"{folder / left[0]} would be read with the new files", hint="remove it, or -o another folder")


def chosen(request: Request) -> Dialect:
    """4 bits in compressed-tensors by default."""
    if not request.quant and request.bits is not None and request.bits not in BITS:
        raise UsageError(f"--bits {request.bits}: there are {', '.join(map(str, BITS))}", hint="or --quant, see --list types")
    name = request.quant or BITS[request.bits or 4]
    if request.zero_point == "int":
        if name not in (*ASYMMETRIC, *ASYMMETRIC.values()):
            raise UsageError(f"--zero-point int: {name} has no choice of zero points", hint="--bits 4")
        name = ASYMMETRIC.get(name, name)
    elif request.zero_point == "float":
        raise UnsupportedError("--zero-point float: compressed-tensors has integer ones", hint="--quant hqq, or --to onnx")
    dialect = dialect_of(name)
    if request.quant and request.bits is not None and not isinstance(dialect, OfBits) and BITS.get(request.bits) != name:
        raise UsageError(f"--quant {request.quant} and --bits {request.bits}: the type says its bits", hint="say the type once")
    return dialect


def mixed(request: Request) -> Dialect:
    """The dialect in which each weight has a type of its own. UnsupportedError for words that no such mix keeps."""
    flag = next((f"--{f.replace('_', '-')}" for f in ("target_size", "target_bpw") if getattr(request, f)), "--max-kl")
    if request.quant and dialect_of(request.quant).name not in ("w4a16", "w8a16", *PLAIN):
        why = f"{flag}: {request.quant} has one scheme for all weights of a folder"
        raise UnsupportedError(why, hint="without --quant each weight gets w4a16, w8a16 or none; --to gguf and onnx mix too")
    if request.zero_point not in (None, "none"):
        why = f"{flag} with --zero-point {request.zero_point}: transformers loads zero points of one group size only"
        raise UnsupportedError(why, hint="leave it out, or --to onnx")
    return MIXED


def plain_dtype(graph: Graph) -> str:
    """What most matrices came in; a GGUF's quantized ones count by their scales, and its vectors are always f32."""
    counts: dict[str, int] = {}
    for name in (n for n in graph.parameters() if len(graph.nodes[n].type.shape) > 1):
        dtype = graph.root(name).type.dtype
        dtype = layout_of(dtype).scheme.levels[0].dtype if "." in dtype else dtype
        if dtype in FLOATS:
            counts[dtype] = counts.get(dtype, 0) + 1
    most = max(counts, key=counts.__getitem__, default="bf16")
    return most if most in PLAIN.values() else "f32"


def types_of(graph: Graph, options: Options) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Weight -> scheme or dtype, and what did not get what was asked for."""
    types, fallbacks, norms, turned = {}, [], offset_norms(graph), stored_transposed(graph)
    matrices = linears(graph) | turned
    experts, one = expert_matrices(graph), expert_scheme(graph, options.dialect, options.wanted)
    for name in [n for n in graph.apart() if n not in norms]:
        kind = graph.nodes[name].type
        types[name] = options.types.get(name, options.wanted.dtype)
        if name not in matrices or name in options.types:
            continue
        if name in turned and options.dialect.layouts:
            why = f"stored as [in, out] (Conv1D), which {options.dialect.name} has no name for"
            fallbacks.append({"tensor": name, "wanted": options.dialect.name, "got": options.wanted.dtype, "reason": why})
            continue
        n, k = kind.dims
        stored = scheme_of(stored_dtype(graph, name))
        carried = stored and options.dialect.carrying(stored, n, k, options.wanted)
        scheme = one if name in experts else carried or options.dialect.scheme(n, k, options.wanted)
        if scheme is None and options.dialect.layouts:
            why = f"{options.dialect.name} cannot hold [{kind.dims[0]}, {kind.dims[1]}]"
            fallbacks.append({"tensor": name, "wanted": options.dialect.name, "got": options.wanted.dtype, "reason": why})
        elif scheme is not None:
            types[name] = scheme
            group, wanted = scheme_of(scheme).levels[0].group, options.wanted.group  # type: ignore[union-attr]
            if wanted is not None and group != wanted:
                why = f"rows of {kind.dims[1]} do not divide into groups of {wanted}"
                fallbacks.append({"tensor": name, "wanted": f"groups of {wanted}", "got": f"of {group}", "reason": why})
    return types, fallbacks


def fixes_ranges(dialect: Dialect) -> bool:
    return isinstance(dialect, FixedRanges) and dialect.fixed is not None


def fixed_ranges(
    graph: Graph, options: Options, types: Mapping[str, str]
) -> tuple[dict[str, Mapping[str, Attr]], tuple[str, ...]]:
    """Linear -> attributes of quantize-activations, and a note that says whose ranges they are."""
    dialect = options.dialect
    if not isinstance(dialect, FixedRanges) or dialect.fixed is None:
        return {}, ()
    attrs = partial(dialect.range_of, wanted=options.wanted)

    def codes(low: float, high: float) -> Grid:
        return Grid(cast(float, attrs(low, high)["value"]), -128, 127)

    found, told = spreads_of(graph, options.calibration, False, options.rule) if options.calibration else ({}, ())
    linears = [n for n, node in graph.nodes.items() if node.op == "linear" and scheme_of(types.get(node.inputs[1], ""))]
    spreads = {n: found[n]["round_input"] if found else Histogram(0, 0) for n in linears}
    ranges = chosen_ranges(spreads, options.rule, codes, True)
    return {n: {"round_input": attrs(*r)} for n, r in ranges.items()}, told


def together(graph: Graph, types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Weights that share what a tensor shares, since runtimes multiply them as one: q, k and v; gate and up, of experts too."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in graph.nodes.values():
        if node.op == "linear" and (found := scheme_of(types.get(node.inputs[1], ""))) and found.of_tensors:
            groups.setdefault((node.inputs[0], found.name), []).append(node.inputs[1])
        for gate, up in zip(*(graph.nodes[w].inputs for w in node.inputs[2:4]), strict=True) if node.op == "experts" else ():
            if (found := scheme_of(types.get(gate, ""))) and found.of_tensors:
                groups[gate, found.name] = [gate, up]
    return {name: tuple(members) for members in groups.values() for name in members}
