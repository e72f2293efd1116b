"""AWQ folders as input. GPTQ's are read by qconvert/stored_forms.py, which also knows columns in another order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.safetensors_ct_read import assembled
from qconvert.formats.safetensors_gptq import GEMM
from qconvert.graph import Attr
from qconvert.scheme import affine_name
from qconvert.sources import TensorInfo
from qconvert.stored_forms import Nodes, Tensors
from qconvert.tensor_layouts import Tensors as Layout


@dataclass(frozen=True)
class AWQ:
    group: int | None
    kind: str
    where: str

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        module = name.removesuffix(".weight")
        if not tensors.has(f"{module}.qweight"):
            return None
        layout = GEMM.get(f"awq.{affine_name(self.kind, self.group, tensors.find(f'{module}.scales').dtype)}")
        if not isinstance(layout, Layout):
            raise UnsupportedError(f"{self.where}: {module}.scales: only f16 is read")
        return assembled(name, shape, attrs, tensors, layout)

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return "all zeros, which AWQ's tools add" if info.ref.endswith(".bias") and tensors.is_zero(info) else None


def read_awq(settings: Mapping[str, object], where: str) -> AWQ:
    """UnsupportedError for versions that lie otherwise."""
    version, bits, group = settings.get("version", "gemm"), settings.get("bits", 4), settings.get("group_size", 128)
    if str(version).lower() != "gemm" or bits != 4:
        raise UnsupportedError(f"{where}: AWQ version {version!r} of {bits} bits", hint="gemm of 4 bits is read")
    if not isinstance(group, int) or group < -1 or group == 0:
        raise InputError(f"{where}: quantization_config.group_size = {group!r}; a whole number was wanted")
    # without zero points all of them are stored as the middle, so they are read as what is stored
    return AWQ(None if group == -1 else group, "uint4", where)
