"""Names to objects: the built-in tables plus entry points of installed packages, imported on use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import NamedTuple

from qconvert import __version__
from qconvert.errors import QConvertError, UnsupportedError

OWN = f"qconvert {__version__}"
CT_FLOATS = (
    "w8a8", "w8a8-static", "fp8", "fp8-tensor", "fp8-static", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8",
    "mxfp8a16",
)  # fmt: skip
BUILTIN: Mapping[str, Mapping[str, str]] = {
    "passes": {
        "attach-adapter": "qconvert.passes.attach_adapter:AttachAdapter",
        "adapter-slots": "qconvert.passes.adapter_slots:AdapterSlots",
        "merge-adapters": "qconvert.passes.merge_adapters:MergeAdapters",
        "inline-shift": "qconvert.passes.inline_shift:InlineShift",
        "refit-adapter": "qconvert.passes.refit_adapter:RefitAdapter",
        "round-base": "qconvert.passes.round_base:RoundBase",
        "untie-head": "qconvert.passes.untie_head:UntieHead",
        "interleave-experts": "qconvert.passes.interleave_experts:InterleaveExperts",
        "flatten-experts": "qconvert.passes.flatten_experts:FlattenExperts",
        "calibrate": "qconvert.passes.calibrate:Calibrate",
        "permute-rope": "qconvert.passes.permute_rope:PermuteRope",
        "rope-factors": "qconvert.passes.rope_factors:RopeFactors",
        "order-columns": "qconvert.passes.order_columns:OrderColumns",
        "quantize": "qconvert.passes.quantize:Quantize",
        "pack": "qconvert.passes.pack:Pack",
        "fold-rows": "qconvert.passes.fold_rows:FoldRows",
        "incoherence": "qconvert.passes.incoherence:Incoherence",
        "tile-lattice": "qconvert.passes.tile_lattice:TileLattice",
        "nest-scales": "qconvert.passes.nest_scales:NestScales",
        "second-level": "qconvert.passes.second_level:SecondLevel",
        "split-metadata": "qconvert.passes.split_metadata:SplitMetadata",
        "quantize-activations": "qconvert.passes.quantize_activations:QuantizeActivations",
    },
    "formats": {
        "gguf": "qconvert.formats.gguf:GGUF",
        "onnx": "qconvert.formats.onnx:ONNX",
        "safetensors": "qconvert.formats.safetensors:Safetensors",
    },
    "usages": {name: f"qconvert.formats.{name}_usage:usage" for name in ("gguf", "onnx", "safetensors")},
    "families": {
        **{name.lower(): f"qconvert.families:{name}" for name in ("LLAMA", "MISTRAL", "QWEN2", "QWEN3", "GPT2", "PHI3")},
        **{name.lower(): f"qconvert.families_gemma:{name}" for name in ("GEMMA2", "GEMMA3")},
        "mixtral": "qconvert.families_moe:MIXTRAL",
        "qwen3-moe": "qconvert.families_moe:QWEN3_MOE",
        "bert": "qconvert.families_encoder:BERT",
    },
    "runtimes": {
        "llama.cpp": "qconvert.formats.llama_cpp:LlamaCpp",
        "onnxruntime": "qconvert.formats.onnx_runtime:OnnxRuntime",
    },
    "solvers": {
        **{name: f"qconvert.own_solvers:{name.upper()}" for name in
           ("search", "mse", "absmax", "mlx", "absmean", "nearest", "ldlq")},
        **{name: f"qconvert.solving:{name.capitalize()}" for name in ("rtn", "lsq", "gptq", "hqq", "recover")},
    },
    "schemes": {},  # qconvert's own are tables and a grammar: scheme.scheme_of
    "dialects": {
        **{name: f"qconvert.formats.safetensors_dialects:{name.upper()}" for name in ("fp32", "fp16", "bf16")},
        "w4a16": "qconvert.formats.safetensors_ct:W4A16",
        "w4a16-asym": "qconvert.formats.safetensors_ct:W4A16_ASYM",
        "w8a16": "qconvert.formats.safetensors_ct:W8A16",
        "gptq": "qconvert.formats.safetensors_gptq:GPTQ",
        "gptq-asym": "qconvert.formats.safetensors_gptq:GPTQ_ASYM",
        "gptq-v2": "qconvert.formats.safetensors_gptq:GPTQ_V2",
        "gptq-v2-asym": "qconvert.formats.safetensors_gptq:GPTQ_V2_ASYM",
        "awq": "qconvert.formats.safetensors_gptq:AWQ",
        **{name: f"qconvert.formats.safetensors_ct_floats:{name.upper().replace('-', '_')}" for name in CT_FLOATS},
        "mlx-2bit": "qconvert.formats.safetensors_mlx:TWO",
        "mlx-3bit": "qconvert.formats.safetensors_mlx:THREE",
        "mlx-4bit": "qconvert.formats.safetensors_mlx:FOUR",
        "mlx-5bit": "qconvert.formats.safetensors_mlx:FIVE",
        "mlx-6bit": "qconvert.formats.safetensors_mlx:SIX",
        "mlx-8bit": "qconvert.formats.safetensors_mlx:EIGHT",
        "bitnet": "qconvert.formats.safetensors_bitnet:BITNET",
        "hqq": "qconvert.formats.safetensors_hqq:FOUR",
        "hqq-2bit": "qconvert.formats.safetensors_hqq:TWO",
        "hqq-8bit": "qconvert.formats.safetensors_hqq:EIGHT",
        "torchao-int4": "qconvert.formats.safetensors_torchao:INT4",
        "quip": "qconvert.formats.safetensors_quip:QUIP",
        "nf4": "qconvert.formats.safetensors_bnb:NF4",
        "nf4-single": "qconvert.formats.safetensors_bnb:NF4_SINGLE",
        "fp4": "qconvert.formats.safetensors_bnb:FP4",
        "fp4-single": "qconvert.formats.safetensors_bnb:FP4_SINGLE",
        "int8-bnb": "qconvert.formats.safetensors_bnb:INT8",
        "finegrained-fp8": "qconvert.formats.safetensors_fp8:FINEGRAINED_FP8",
        "finegrained-mxfp8": "qconvert.formats.safetensors_fp8:FINEGRAINED_MXFP8",
    },
    "stored": {
        "gptq": "qconvert.stored_forms:read_gptq",
        "compressed-tensors": "qconvert.formats.safetensors_ct_read:read",
        "awq": "qconvert.formats.safetensors_gptq_read:read_awq",
        "mlx": "qconvert.formats.safetensors_mlx_read:read",
        "bitnet": "qconvert.formats.safetensors_bitnet:read",
        "hqq": "qconvert.formats.safetensors_hqq:read",
        "quip": "qconvert.formats.safetensors_quip:read",
        "torchao": "qconvert.formats.safetensors_torchao:read",
        "bitsandbytes": "qconvert.formats.safetensors_bnb_read:read",
        "fp8": "qconvert.formats.safetensors_fp8:read",
        "mxfp8": "qconvert.formats.safetensors_fp8:read",
    },
    "layouts": {
        "gguf": "qconvert.formats.gguf_layouts:LAYOUTS",
        "onnx": "qconvert.formats.onnx_layouts:LAYOUTS",
        "onnx_kn": "qconvert.formats.onnx_columns:LAYOUTS",
        "ct": "qconvert.formats.safetensors_ct:LAYOUTS",
        "gptq": "qconvert.formats.safetensors_gptq:V1",
        "gptq_v2": "qconvert.formats.safetensors_gptq:V2",
        "awq": "qconvert.formats.safetensors_gptq:GEMM",
        "ct_naive": "qconvert.formats.safetensors_ct_floats:NAIVE",
        "fp8": "qconvert.formats.safetensors_fp8:LAYOUTS",
        "ct_fp4": "qconvert.formats.safetensors_ct_floats:PACKED",
        "onnx_f16": "qconvert.formats.onnx_foreign_layouts:LAYOUTS",
        **{f"bnb_{kind}": f"qconvert.formats.safetensors_bnb:SINGLE_{kind.upper()}" for kind in ("f32", "f16", "bf16")},
        **{f"bnb_nested_{kind}": f"qconvert.formats.safetensors_bnb:NESTED_{kind.upper()}" for kind in ("f32", "f16", "bf16")},
        "mlx": "qconvert.formats.safetensors_mlx:LAYOUTS",
        "bitnet": "qconvert.formats.safetensors_bitnet:LAYOUTS",
        "hqq": "qconvert.formats.safetensors_hqq:LAYOUTS",
        "quip": "qconvert.formats.safetensors_quip:LAYOUTS",
        "torchao": "qconvert.formats.safetensors_torchao:LAYOUTS",
        "bnb_int8": "qconvert.formats.safetensors_bnb:ROWS",
    },
}


class Entry(NamedTuple):
    """target: module:object. origin: the package that defines it, and its version."""

    target: str
    origin: str


@cache
def entries(group: str) -> Mapping[str, Entry]:
    """The names of one group. A name that two packages define is an error naming both."""
    found = {name: Entry(target, OWN) for name, target in BUILTIN[group].items()}
    if os.environ.get("QCONVERT_PLUGINS") == "off":
        return found
    from importlib.metadata import entry_points

    for point in entry_points(group=f"qconvert.{group}"):
        entry = Entry(point.value, f"{point.dist.name} {point.dist.version}" if point.dist else "?")
        if found.get(point.name, entry) != entry:
            raise clash(group, point.name, found[point.name].origin, entry.origin)
        found[point.name] = entry
    return found


def clash(group: str, name: str, *origins: str) -> QConvertError:
    told = f"{group}: {name!r} is defined by {' and by '.join(origins)}"
    return QConvertError(told, hint="uninstall one, or set QCONVERT_PLUGINS=off")


def unknown(group: str, name: str, known: Iterable[str]) -> UnsupportedError:
    """With the nearest name, where one is near."""
    near = get_close_matches(name, known := sorted(known), n=1)
    told = f"no {group.removesuffix('s')} is called {name!r}; there are {', '.join(known)}"
    return UnsupportedError(told, hint=f"did you mean {near[0]!r}?" if near else None)


def find(group: str, name: str) -> object:
    """The object called `name`; UnsupportedError with the nearest name where there is none."""
    table = entries(group)
    if name not in table:
        raise unknown(group, name, table)
    target, origin = table[name]
    module, _, attribute = target.partition(":")
    try:
        value: object = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        if origin == OWN:
            raise
        told = f"{group}: {name!r} of {origin} cannot be loaded: {e}"
        raise QConvertError(told, hint="mend that package, or set QCONVERT_PLUGINS=off") from e
    return value
