"""compressed-tensors' weights in numbers of 8 bits and in small floats: W8A8, FP8, NVFP4, MXFP4 and MXFP8.

int-, float- and mxfp8-quantized: weight i8 or f8_e4m3 [N,K]; weight_scale [N,1], [1] or [ceil(N/128), K/128] in the model's
dtype, of mxfp8 u8[N, K/32] (e8m0).
nvfp4-pack-quantized: weight_packed u8[N,K/2], the first of two codes in the low half; weight_scale f8_e4m3[N,K/16];
weight_global_scale f32[1], which scales are divided by. mxfp4-pack-quantized: weight_scale u8[N,K/32] (e8m0) instead.
Source: compressed_tensors/compressors of version 0.20 (naive_quantized, nvfp4, mxfp4, mxfp8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.errors import UsageError
from qconvert.float_weights import E4M3_STEPS, INT8_STEPS, divisor_of
from qconvert.formats.safetensors_ct import DEQUANTIZE, KINDS, SAFETENSORS, quantization_config, weights_args
from qconvert.formats.safetensors_ct_check import decompressed_rows
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.graph import Attr
from qconvert.kernels import scales_of
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import MINIFLOATS, Scheme, scheme_of
from qconvert.tensor_layouts import Made, Part, Tensors, tensors

SMALL = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
RANGES = ("input_scale", "input_global_scale")
SIGNED = -128  # what is added to unsigned codes of 8 bits
SUFFIX = {"f32": "", "f16": "_f16", "bf16": "_bf16"}  # of a scheme's name


def naive(scheme: Scheme) -> Tensors | None:
    """The layout of codes that are numbers of 8 bits."""
    level = scheme.levels[0]
    if scheme.bits != 8 or (scheme.name not in MINIFLOATS and (scheme.zero_point != "none" or level.group is not None)):
        return None
    codes = Part("weight", "F8_E4M3", "u1") if scheme.table else Part("weight", "I8", "u1", plus=SIGNED)
    if level.dtype == "e8m0":
        return tensors(f"ct_naive.{scheme.name}", scheme, [codes, Part("weight_scale", "U8", "e8m0", 0)])
    whole = (lambda n, k: (1,)) if level.rows is None else None
    scale = Part("weight_scale", SAFETENSORS[level.dtype], KINDS[level.dtype], 0, rows=level.rows, dims=whole)
    return tensors(f"ct_naive.{scheme.name}", scheme, [codes, scale])


def fp4(scheme: Scheme) -> Tensors | None:
    """The layout of e2m1 codes, two in a byte."""
    if scheme.name not in ("nvfp4", "mxfp4"):
        return None
    parts = [Part("weight_packed", "U8", "low")]
    if scheme.name == "mxfp4":
        parts.append(Part("weight_scale", "U8", "e8m0", 0))
    else:
        parts.append(Part("weight_global_scale", "F32", "f32", 0, rows=None, dims=lambda n, k: (1,)))
        parts.append(Part("weight_scale", "F8_E4M3", "f8_e4m3", 1))
    return tensors(f"ct_fp4.{scheme.name}", scheme, parts)


NAIVE = Made("ct_naive", naive, ["int8_row_bf16", "e4m3_row_bf16", "e4m3_tensor_bf16", "e4m3_b128_bf16", "mxfp8"])
PACKED = Made("ct_fp4", fp4, ["nvfp4", "mxfp4"])


@dataclass(frozen=True)
class Numbers:
    """kind: of a scheme's name, before the dtype of scales; form: compressed-tensors' name of the layout.

    inputs: QuantizationArgs of activations; None: they stay as they are. fixed: their kind, where ranges are taken beforehand.
    """

    name: str
    form: str
    kind: str
    inputs: Mapping[str, object] | None = None
    layouts: str = "ct_naive"
    fixed: str | None = None

    @property
    def solver(self) -> str:
        """A search gains nothing but for nvfp4; see kernels/float_quants.py."""
        return "mse" if self.kind == "nvfp4" else "rtn"

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """None where rows do not divide into the scheme's groups."""
        if wanted.group is not None:
            raise UsageError(f"--group {wanted.group}: {self.name} has no choice of groups", hint="--bits 4 has")
        name = self.kind if self.kind in MINIFLOATS and not self.kind.startswith("e4m3") else self.kind + SUFFIX[wanted.dtype]
        return None if k % scheme_named(name).block else name

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        """Codes whose scales have the model's dtype: transformers rounds others to it as it loads them."""
        return stored.name if stored.name == self.scheme(n, k, wanted) else None

    def config(self, written: Written) -> Mapping[str, object]:
        return {"quantization_config": quantization_config(written, self.form, weights, self.inputs)}

    def range_of(self, low: float, high: float, wanted: Wanted) -> dict[str, Attr]:
        """input_scale, in the model's dtype; of nvfp4 input_global_scale, which its scales are divided by."""
        peak = max(abs(low), abs(high))
        if self.fixed == "nvfp4":
            return {"name": "input_global_scale", "dtype": "f32", "value": float(divisor_of(peak))}
        steps = INT8_STEPS if self.fixed == "int8" else E4M3_STEPS
        scale = scales_of(np.array([peak], np.float32), steps, wanted.dtype)
        return {"name": "input_scale", "dtype": wanted.dtype, "value": float(scale[0])}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return decompressed_rows(folder, reals, written, self.form, self.rounded(written))

    def loading(self, written: Written) -> Loading:
        return replace(self.rounding(written), arguments={"dequantize": DEQUANTIZE}, unused=RANGES)

    def rounding(self, written: Written) -> Loading:
        """By default activations are rounded as a runtime would, and weights are what they are."""
        rounded = self.rounded(written)
        return Loading({}, written.wanted.dtype if rounded == "f32" else rounded)

    def rounded(self, written: Written) -> str:
        """What compressed-tensors rounds dequantized weights to: the dtype of scales, where these are small floats bf16."""
        dtypes = {level.dtype for name in written.quantized.values() for level in scheme_named(name).levels[-1:]}
        return dtypes.pop() if dtypes < set(SUFFIX) else "bf16"


def scheme_named(name: str) -> Scheme:
    found = scheme_of(name)
    assert found is not None
    return found


def weights(scheme: Scheme) -> dict[str, object]:
    """compressed-tensors' QuantizationArgs of a scheme."""
    level, kind = scheme.levels[-1], "float" if scheme.table else "int"
    if len(scheme.levels) > 1:
        return {**weights_args(4, kind, "tensor_group", 16), "scale_dtype": E4M3}
    if level.dtype == "e8m0":
        return {**weights_args(scheme.bits, kind, "group", 32), "scale_dtype": E8M0}
    if level.group is not None:
        return {**weights_args(8, kind, "block", None), "block_structure": [level.rows, level.group]}
    return weights_args(8, kind, "tensor" if level.rows is None else "channel", None)


def number_layout(args: Mapping[str, Any], scales: str) -> Tensors | None:
    """The layout that QuantizationArgs and the dtype of weight_scale mean; None where it is none of these."""
    bits, strategy = args["num_bits"], args["strategy"]
    name = {("u8", 4): "mxfp4", ("u8", 8): "mxfp8", ("f8_e4m3", 4): "nvfp4"}.get((scales, bits))
    if name is None and bits == 8 and scales in SUFFIX and args.get("block_structure") in (None, [128, 128], "128x128"):
        kind = {"channel": "row", "tensor": "tensor", "block": "b128"}.get(strategy)
        name = f"{'int8' if args['type'] == 'int' else 'e4m3'}_{kind}{SUFFIX[scales]}"
    found = NAIVE.get(f"ct_naive.{name}") or PACKED.get(f"ct_fp4.{name}")
    return found if isinstance(found, Tensors) else None


E4M3, E8M0 = "torch.float8_e4m3fn", "torch.uint8"
PER_TOKEN = {kind: {**weights_args(8, kind, "token", None), "dynamic": True} for kind in ("int", "float")}
PER_BLOCK = {**weights_args(8, "float", "group", 128), "dynamic": True}
MX = {bits: {**weights_args(bits, "float", "group", 32), "dynamic": True, "scale_dtype": E8M0} for bits in (4, 8)}
LOCAL = {**weights_args(4, "float", "tensor_group", 16), "dynamic": "local", "scale_dtype": E4M3}

W8A8 = Numbers("w8a8", "int-quantized", "int8_row", PER_TOKEN["int"])
W8A8_STATIC = Numbers("w8a8-static", "int-quantized", "int8_row", weights_args(8, "int", "tensor", None), fixed="int8")
FP8 = Numbers("fp8", "float-quantized", "e4m3_row", PER_TOKEN["float"])
FP8_TENSOR = Numbers("fp8-tensor", "float-quantized", "e4m3_tensor", PER_TOKEN["float"])
FP8_STATIC = Numbers("fp8-static", "float-quantized", "e4m3_tensor", weights_args(8, "float", "tensor", None), fixed="e4m3")
FP8_BLOCK = Numbers("fp8-block", "float-quantized", "e4m3_b128", PER_BLOCK)
MXFP8 = Numbers("mxfp8", "mxfp8-quantized", "mxfp8", MX[8])
MXFP8A16 = Numbers("mxfp8a16", "mxfp8-quantized", "mxfp8")
NVFP4 = Numbers("nvfp4", "nvfp4-pack-quantized", "nvfp4", LOCAL, "ct_fp4", "nvfp4")
NVFP4A16 = Numbers("nvfp4a16", "nvfp4-pack-quantized", "nvfp4", layouts="ct_fp4")
MXFP4 = Numbers("mxfp4", "mxfp4-pack-quantized", "mxfp4", MX[4], "ct_fp4")
MXFP4A16 = Numbers("mxfp4a16", "mxfp4-pack-quantized", "mxfp4", layouts="ct_fp4")
