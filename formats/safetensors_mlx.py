"""MLX: groups of 32, 64 or 128 weights on a line, of 2 to 8 bits, which mlx-lm runs.

weight u32[N, K*b/32], codes one behind another along rows, the first in the low bits; scales and biases [N,G] in the dtype of
plain weights: a weight is code * scale + bias. config.json says it twice, as quantization and as quantization_config.
Source: mlx 0.32 (nn.QuantizedLinear), mlx-lm 0.32 (utils.quantize_model, utils.load_model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qconvert.errors import UsageError
from qconvert.formats.safetensors_dialects import Loading, Wanted, Written
from qconvert.formats.safetensors_mlx_check import dequantized_rows
from qconvert.moves import moved_offsets
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme, affine_name, scheme_of
from qconvert.tensor_layouts import Kind, Made, Part, Tensors, tensors

GROUPS = (64, 32, 128)  # the default, and what mlx has kernels for
STORED: Mapping[str, tuple[str, Kind]] = {"f32": ("F32", "f32"), "f16": ("F16", "f16"), "bf16": ("BF16", "bf16")}


def lines(scheme: Scheme) -> Tensors | None:
    """The layout of codes from 0 on with a scale and an offset for each group."""
    if not scheme.unsigned or [level.role for level in scheme.levels] != ["scale", "offset"] or scheme.block not in GROUPS:
        return None
    dtype, kind = STORED[scheme.levels[0].dtype]
    parts = [
        Part("weight", "U32", "low", dims=lambda n, k: (n, k * scheme.bits // 32)),
        Part("scales", dtype, kind, 0), Part("biases", dtype, kind, 1),
    ]  # fmt: skip
    return tensors(f"mlx.{scheme.name}", scheme, parts)


LAYOUTS = Made("mlx", lines, [f"uint{bits}o_g64_bf16" for bits in (2, 3, 4, 5, 6, 8)])


@dataclass(frozen=True)
class MLX:
    bits: int
    solver: str = "mlx"
    layouts: str = "mlx"
    metadata: str = "mlx"

    @property
    def name(self) -> str:
        return f"mlx-{self.bits}bit"

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """Groups of 64; where rows do not divide, of 32; None where not even these do."""
        group = wanted.group or GROUPS[0]
        if group not in GROUPS:
            raise UsageError(f"--group {group}: mlx has groups of {', '.join(map(str, sorted(GROUPS)))}")
        fits = next((g for g in (group, *(g for g in GROUPS[:2] if g < group)) if k % g == 0), None)
        return affine_name(f"uint{self.bits}o", fits, wanted.dtype) if fits else None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        same = stored.unsigned and stored.bits == self.bits and stored.levels[0].dtype == wanted.dtype
        name = stored.name if same else moved_offsets(stored, affine_name(f"uint{self.bits}o", stored.block, wanted.dtype))
        return name if wanted.group in (None, stored.block) and (same or stored.block in GROUPS) else None

    def config(self, written: Written) -> Mapping[str, object]:
        """Modules whose groups are others than most are named, beside what is said of all."""
        groups = {name.removesuffix(".weight"): found.block for name, s in written.quantized.items() if (found := scheme_of(s))}
        most = max(groups.values(), key=list(groups.values()).count, default=GROUPS[0])
        others = {module: self.settings(group) for module, group in groups.items() if group != most}
        settings = {**self.settings(most), **others}
        return {"quantization": settings, "quantization_config": settings}

    def settings(self, group: int) -> dict[str, object]:
        return {"group_size": group, "bits": self.bits, "mode": "affine"}

    def restated(self, config: Mapping[str, object]) -> dict[str, object]:
        return spelled_as_before(config)

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return dequantized_rows(folder, reals, written)

    def loading(self, written: Written) -> Loading:
        return Loading({}, runtime="mlx-lm", kind="runtime mlx-lm")


TWO, THREE, FOUR, FIVE, SIX, EIGHT = map(MLX, (2, 3, 4, 5, 6, 8))


def spelled_as_before(config: Mapping[str, object]) -> dict[str, object]:
    """What transformers 5 spells otherwise than mlx-lm reads it: most of its models silently take their defaults else."""
    out, rope = dict(config), config.get("rope_parameters")
    if config.get("model_type") == "gpt2":
        out.setdefault("n_ctx", config.get("n_positions"))
    if not isinstance(rope, dict):
        return out
    whole = rope.get("full_attention", rope)
    local = rope.get("sliding_attention")
    for key in {"rope_theta", "partial_rotary_factor"} & whole.keys():
        out.setdefault(key, whole[key])
    if isinstance(local, dict) and "rope_theta" in local:
        out.setdefault("rope_local_base_freq", local["rope_theta"])
    kinds = config.get("layer_types")
    if isinstance(local, dict) and isinstance(kinds, list) and "full_attention" in kinds:
        out.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)
    if whole.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
        out.setdefault("rope_scaling", {**scaling, "type": whole["rope_type"]})
    return out
