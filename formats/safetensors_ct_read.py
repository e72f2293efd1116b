"""compressed-tensors' folders as input: which scheme a module has, and its tensors as nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.safetensors_ct import LAYOUTS, SHAPE
from qconvert.formats.safetensors_ct_check import matches
from qconvert.formats.safetensors_ct_floats import RANGES, SMALL, number_layout
from qconvert.graph import Attr, Node, Type
from qconvert.scheme import affine_name
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Tensors as Layout

STRATEGIES = ("group", "channel", "tensor", "block", "tensor_group")
READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", *SMALL)


@dataclass(frozen=True)
class CompressedTensors:
    """groups: (targets, QuantizationArgs of the weights) in order; the first whose targets fit a module is its own."""

    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        module = name.removesuffix(".weight")
        if not tensors.has(f"{module}.weight_scale"):
            return None
        scales = tensors.find(f"{module}.weight_scale")
        args = self.args_of(module)
        if not tensors.has(f"{module}.weight_packed") or args["type"] == "float":
            return self.numbers(name, shape, attrs, tensors, args, scales)
        group = args["group_size"] if args["strategy"] == "group" else None
        kind = f"{'int' if args['symmetric'] else 'uint'}{args['num_bits']}"
        layout = LAYOUTS.get(f"ct.{affine_name(kind, group, scales.dtype)}")
        if not isinstance(layout, Layout):
            raise UnsupportedError(f"{self.where}: {module} has {args['num_bits']} bits, strategy {args['strategy']}: not read")
        return assembled(name, shape, attrs, tensors, layout)

    def numbers(
        self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors, args: Mapping[str, Any],
        scales: TensorInfo,
    ) -> Nodes:  # fmt: skip
        """Codes that are numbers of 8 bits, or small floats. Scales may be wider than the model."""
        layout = number_layout(args, scales.dtype)
        if layout is None:
            told = f"{args['type']}{args['num_bits']}, strategy {args['strategy']}, scales in {scales.dtype}"
            raise UnsupportedError(f"{self.where}: {name} has {told}: not read")
        return assembled(name, shape, attrs, tensors, layout)

    def args_of(self, module: str) -> Mapping[str, Any]:
        for targets, args in self.groups:
            if any(matches(target, module) for target in targets):
                return args
        raise InputError(f"{self.where}: no config_group has {module}, whose weight is packed")

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        """Ranges of activations belong to the quantized model alone."""
        if info.ref.endswith(".weight_shape"):
            return "says the weight's shape"
        return "the range of what a quantized linear reads" if info.ref.rpartition(".")[2] in RANGES else None


def read(settings: Mapping[str, object], where: str) -> CompressedTensors:
    """UnsupportedError for forms that would be read wrongly; InputError for settings that are no such configuration."""
    groups, found = settings.get("config_groups"), []
    if not isinstance(groups, dict):
        raise InputError(f"{where}: quantization_config.config_groups = {groups!r}; an object was wanted")
    for name, group in groups.items():
        form = group.get("format") or settings.get("format")
        if form not in READ:
            raise UnsupportedError(f"{where}: {name} has the format {form}", hint=f"{', '.join(READ)} is read")
        args = group.get("weights")
        if not isinstance(args, dict) or not isinstance(group.get("targets"), list):
            raise InputError(f"{where}: config_groups.{name} has no weights or targets")
        shifted = not args.get("symmetric", True) and form != "pack-quantized"
        if args.get("strategy") not in STRATEGIES or shifted:
            raise UnsupportedError(f"{where}: {name}: weights of type {args.get('type')}, strategy {args.get('strategy')}")
        found.append((tuple(map(str, group["targets"])), args))
    if settings.get("quantization_status") not in (None, "compressed"):
        raise UnsupportedError(f"{where}: quantization_status {settings['quantization_status']!r}; compressed is read")
    return CompressedTensors(tuple(sorted(found, key=lambda g: "Linear" in g[0])), where)


def assembled(
    name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors, layout: Layout
) -> Nodes:
    """The tensors of a layout, and the weight that they are. InputError for shapes or dtypes that are not those of `shape`."""
    module, (n, k), nodes = name.removesuffix(".weight"), shape, dict[str, Node]()
    for part in layout.parts:
        info, want = tensors.find(f"{module}.{part.name}"), part.shape(layout.scheme, n, k)
        check_part(info, part.dtype, want)
        nodes[f"{name}~{part.name}"] = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})
    for constant in layout.constants:
        if constant is not SHAPE and tensors.has(f"{module}.{constant.name}"):
            tensors.find(f"{module}.{constant.name}")
    return {**nodes, name: Node("assemble", tuple(nodes), Type(layout.scheme.name, shape), {"layout": layout.name})}


def check_part(info: TensorInfo, dtype: str, shape: Sequence[int]) -> None:
    if info.shape != tuple(shape) or info.dtype != dtype.lower():
        raise InputError(
            f"{info.ref}: {info.dtype}{list(info.shape)}, but config.json says {dtype.lower()}{list(shape)}",
            hint="do config.json and the weights belong together?",
        )
