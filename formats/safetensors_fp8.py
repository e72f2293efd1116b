"""transformers' own fp8 (DeepSeek's blocks of 128 by 128) and mxfp8, written and read.

weight f8_e4m3[N,K]; weight_scale_inv, which codes are multiplied by: f32[ceil(N/128), K/128], of mxfp8 u8[N, K/32] (e8m0).
Source: transformers/integrations/finegrained_fp8.py of version 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.safetensors_compared import exact_rows
from qconvert.formats.safetensors_ct import KINDS, SAFETENSORS
from qconvert.formats.safetensors_ct_floats import SUFFIX
from qconvert.formats.safetensors_ct_read import assembled
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.graph import Attr
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import MINIFLOATS, Array, Scheme
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Made, Part, tensors
from qconvert.tensor_layouts import Tensors as Layout

BLOCK = 128
BLOCKS, MX = "e4m3_b128", "mxfp8"


def fine(scheme: Scheme) -> Layout | None:
    """The layout of e4m3 codes in blocks or in MX groups."""
    if scheme.name not in MINIFLOATS or not scheme.name.startswith((BLOCKS, MX)):
        return None
    level, codes = scheme.levels[0], Part("weight", "F8_E4M3", "u1")
    if level.dtype == "e8m0":
        return tensors(f"fp8.{scheme.name}", scheme, [codes, Part("weight_scale_inv", "U8", "e8m0", 0)])
    scale = Part("weight_scale_inv", SAFETENSORS[level.dtype], KINDS[level.dtype], 0, rows=level.rows)
    return tensors(f"fp8.{scheme.name}", scheme, [codes, scale])


LAYOUTS = Made("fp8", fine, [BLOCKS, MX])


@dataclass(frozen=True)
class Fine:
    """method: quant_method of config.json; kind: the scheme's name."""

    name: str
    method: str
    kind: str
    layouts: str = "fp8"
    solver: str = "rtn"

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """None where rows do not divide, or the blocks of transformers are not whole."""
        if wanted.group is not None:
            raise UsageError(f"--group {wanted.group}: {self.name} has no choice of groups", hint="--bits 4 has")
        whole = k % 32 == 0 if self.kind == MX else n % BLOCK == 0 and k % BLOCK == 0
        return self.kind if whole else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        """Codes of the same kind, whatever dtype their scales have."""
        same = stored.name in (self.kind, *(self.kind + suffix for suffix in SUFFIX.values()))
        return stored.name if same and self.scheme(n, k, wanted) else None

    def config(self, written: Written) -> Mapping[str, object]:
        block = [1, 32] if self.kind == MX else [BLOCK, BLOCK]
        config: dict[str, object] = {"quant_method": self.method, "activation_scheme": "dynamic", "weight_block_size": block}
        if self.kind == MX:
            config["scale_fmt"] = "ue8m0"
        return {"quantization_config": {**config, "modules_to_not_convert": list(written.left)}}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return dequantized_rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        missing = None if find_spec("accelerate") else "accelerate is not installed, which transformers wants for fp8"
        return Loading({"dequantize": "FineGrainedFP8Config"}, written.wanted.dtype, missing)


FINEGRAINED_FP8 = Fine("finegrained-fp8", "fp8", BLOCKS)
FINEGRAINED_MXFP8 = Fine("finegrained-mxfp8", "mxfp8", MX)


def dequantized_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """Every weight whose shape is new, exactly as transformers dequantizes it."""
    what = "transformers' dequantization"
    if find_spec("transformers") is None:
        return [Row(what, "not run", None, None, "skip", 'transformers is not installed: pip install "qconvert[safetensors]"')]
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    with opened_tensors(folder) as found:

        def theirs(name: str, _: str) -> Array:
            value: Array = Fp8Dequantize(None)._dequantize_one(
                found.tensor(name), found.tensor(f"{name}_scale_inv"), torch.float32
            ).numpy()
            return value

        return exact_rows(what, written, found.shape, theirs, reals.real)


# as input -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """kind: the scheme of all quantized weights, but for the dtype of its scales."""

    kind: str
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        if not tensors.has(f"{name}_scale_inv"):
            return None
        scales = tensors.find(f"{name}_scale_inv").dtype
        layout = LAYOUTS.get(f"fp8.{self.kind if scales == 'u8' else self.kind + SUFFIX.get(scales, '?')}")
        if not isinstance(layout, Layout):
            raise UnsupportedError(f"{self.where}: {name}_scale_inv is {scales}: not read")
        return assembled(name, shape, attrs, tensors, layout)

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        found = info.ref.rpartition(".")[2] == "activation_scale"
        return "the range of what a quantized linear reads" if found else None


def read(settings: Mapping[str, object], where: str) -> Stored:
    """UnsupportedError for blocks of another shape."""
    block, experts = settings.get("weight_block_size"), settings.get("expert_dtype", "fp8")
    kinds = {(BLOCK, BLOCK): BLOCKS, (1, 32): MX}
    kind = kinds.get(tuple(block)) if isinstance(block, list) else None
    if kind is None or experts != "fp8":
        raise UnsupportedError(
            f"{where}: fp8 with weight_block_size {block}, experts in {experts}", hint="blocks [128, 128] and [1, 32] are read"
        )
    return Stored(kind, where)
