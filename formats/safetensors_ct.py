"""compressed-tensors' pack-quantized: codes of 4 or 8 bits in words along rows; what vLLM and transformers load by default.

weight_packed i32[N, ceil(K*b/32)], the first code in the low bits, codes offset by 2^(b-1); weight_scale [N,G] in the model's
dtype; weight_shape i64[2]; with zero points weight_zero_point i32[ceil(N*b/32), G], packed along N.
Source: compressed_tensors/compressors of version 0.20 (pack_quantized).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert.errors import UsageError
from qconvert.formats.safetensors_ct_check import decompressed_rows
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written, first_that_holds
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme, affine_name, scheme_of
from qconvert.tensor_layouts import Constant, Kind, Made, Part, Tensors, tensors

SAFETENSORS: Mapping[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
KINDS: Mapping[str, Kind] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}
SHAPE = Constant("weight_shape", "I64", lambda n, k: (2,), lambda n, k: np.array([n, k], "<i8").tobytes())
DEQUANTIZE = "CompressedTensorsConfig"  # transformers' settings that do it as weights are loaded
GROUP, GROUPS = 128, (128, 64, 32)  # the default, and what is tried where rows do not divide; vLLM's kernels take these


def packed(scheme: Scheme) -> Tensors | None:
    """The layout of an affine scheme with one scale a group, and zero points that are codes."""
    if scheme.table or scheme.zero_point == "float" or scheme.levels[0].role != "scale":
        return None
    scale = scheme.levels[0].dtype
    parts = [
        Part("weight_packed", "I32", "low", dims=lambda n, k: (n, -(-k * scheme.bits // 32))),
        Part("weight_scale", SAFETENSORS[scale], KINDS[scale], 0),
    ]
    if scheme.zero_point == "int":
        parts.append(Part("weight_zero_point", "I32", "u1", 1, bits=scheme.bits, word=32))
    return tensors(f"ct.{scheme.name}", scheme, parts, [SHAPE])


LAYOUTS = Made("ct", packed, [f"{kind}_g{g}_bf16" for kind in ("int4", "uint4", "int8") for g in GROUPS])


@dataclass(frozen=True)
class PackQuantized:
    """kind: int4, uint4 (with zero points) or int8, of a scheme's name."""

    name: str
    kind: str
    bits: int
    layouts: str = "ct"
    solver: str = "mse"

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """Groups of 128; where rows do not divide, of 64 or 32; None where not even these do."""
        group = GROUP if wanted.group is None else wanted.group
        if group < 8 or group * self.bits % 32:
            raise UsageError(f"--group {group}: a group must fill words of 32 bits", hint="--group 128")
        if k * self.bits % 32 or (self.kind == "uint4" and n % 8):
            return None
        for g in (group, *(g for g in GROUPS if g < group)):
            if k % g == 0:
                return affine_name(self.kind, g, wanted.dtype)
        return None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        kinds = (self.kind, *({f"int{self.bits}", f"uint{self.bits}"} - {self.kind} if wanted.any_kind else ()))
        kinds = tuple(kind for kind in kinds if kind in ("int4", "uint4", "int8") and (kind != "uint4" or n % 8 == 0))
        groups = sorted({stored.block, *GROUPS}, reverse=True) if wanted.group is None else [wanted.group]
        fit = [g for g in groups if k % g == 0 and g * self.bits % 32 == 0]
        return first_that_holds(stored, [affine_name(kind, g, wanted.dtype) for g in fit for kind in kinds])

    def config(self, written: Written) -> Mapping[str, object]:
        return {"quantization_config": quantization_config(written, "pack-quantized", self.weights)}

    def weights(self, scheme: Scheme) -> dict[str, object]:
        return weights_args(scheme.bits, "int", "group", scheme.levels[0].group, scheme.zero_point == "none")

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return decompressed_rows(folder, reals, written, "pack-quantized")

    def loading(self, written: Written) -> Loading:
        """Weights are dequantized at the first call; transformers loads zero points only where it does so as it loads."""
        schemes = set(written.quantized.values())
        asymmetric, several = any(name.startswith("uint") for name in schemes), len(schemes) > 1
        if asymmetric and several:
            return Loading({}, missing="transformers 5.23 loads zero points of one group size only")
        return Loading({"dequantize": DEQUANTIZE} if asymmetric else {}, written.wanted.dtype)


W4A16 = PackQuantized("w4a16", "int4", 4)
W4A16_ASYM = PackQuantized("w4a16-asym", "uint4", 4)
W8A16 = PackQuantized("w8a16", "int8", 8)


# quantization_config ------------------------------------------------------------------------------


def weights_args(bits: int, kind: str, strategy: str, group: int | None, symmetric: bool = True) -> dict[str, object]:
    """compressed-tensors' QuantizationArgs, which refuse keys that they do not know."""
    return {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group, "dynamic": False,
    }  # fmt: skip


EXPERTS = re.compile(r".*\.experts\.\d+\..*")


def targets(modules: Sequence[str]) -> list[str]:
    """Names, but for experts, all of which have one scheme: transformers finds theirs by this expression."""
    names = [module for module in modules if not EXPERTS.fullmatch(module)]
    return names if len(names) == len(modules) else [*names, f"re:{EXPERTS.pattern}"]


def quantization_config(
    written: Written, form: str, weights: Callable[[Scheme], dict[str, object]], inputs: Mapping[str, object] | None = None
) -> dict[str, object]:
    """One group of modules for each scheme; of a single scheme it is every Linear but those that are left."""
    modules: dict[str, list[str]] = {}
    for name, scheme in written.quantized.items():
        modules.setdefault(scheme, []).append(name.removesuffix(".weight"))
    groups = {}
    for i, (name, members) in enumerate(modules.items()):
        found = scheme_of(name)
        assert found is not None
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(modules) == 1 else targets(members), "weights": weights(found),
            "input_activations": inputs, "output_activations": None, "format": form,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "config_groups": groups,
        "ignore": list(written.left), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
