"""MLX's folders as input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.safetensors_ct_read import assembled
from qconvert.formats.safetensors_mlx import LAYOUTS
from qconvert.graph import Attr
from qconvert.scheme import affine_name
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Tensors as Layout


@dataclass(frozen=True)
class MLX:
    """settings: what is said of all modules, and of some by their names."""

    settings: Mapping[str, object]
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        module = name.removesuffix(".weight")
        if not tensors.has(f"{module}.scales"):
            return None
        own = self.settings.get(module)
        settings = {**self.settings, **own} if isinstance(own, dict) else self.settings
        bits, group, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
        scales = tensors.find(f"{module}.scales").dtype
        known = isinstance(group, int) and mode == "affine"
        layout = LAYOUTS.get(f"mlx.{affine_name(f'uint{bits}o', group, scales)}") if known and isinstance(group, int) else None
        if not isinstance(layout, Layout):
            raise UnsupportedError(f"{self.where}: {module} has {bits} bits in groups of {group}, mode {mode}: not read")
        return assembled(name, shape, attrs, tensors, layout)

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return None


def read(settings: Mapping[str, object], where: str) -> MLX:
    for key in ("bits", "group_size"):
        if not isinstance(settings.get(key), int):
            raise InputError(f"{where}: quantization.{key} = {settings.get(key)!r}; a whole number was wanted")
    return MLX(settings, where)
