"""A checkpoint of which only config.json is there: its tensors' names and shapes, from the family's tables.

A dry run needs no more: every type and byte of a model that nobody has downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from qconvert.dtypes import DTYPES, FLOATS
from qconvert.errors import InputError, UnsupportedError
from qconvert.families import Family, family_of
from qconvert.settings import Settings, read_settings
from qconvert.shapes import FUSED_EXPERTS, SHAPES, product
from qconvert.sources import Checkpoint, Store, TensorInfo, inside, read_json, weights_files

FILE = "config.json"


def shapes_alone(folder: Path) -> bool:
    """Whether a folder has a config.json, and no weights."""
    return (folder / FILE).is_file() and not weights_files(folder)


def shape_checkpoint(folder: Path, store: Store, alias: str = "base") -> Checkpoint:
    """What read_checkpoint would give, were the weights there: one tensor for each parameter.

    UnsupportedError where the config says that they are quantized: how those are stored, only their files say.
    """
    where, config = str(folder / FILE), read_json(inside(folder, FILE))
    if quantized := next((k for k in ("quantization_config", "quantization") if config.get(k)), None):
        raise UnsupportedError(f"{where} has {quantized}, and there are no weights beside it", hint="fetch their files too")
    family = family_of(config, where)
    settings = read_settings(family, config, where)
    dtype = stated_dtype(config)
    shapes = {name: (dtype, shape) for name, shape in parameters(family, settings)}
    store.add(alias, folder)
    store.adopt(alias, FILE, Shapes(where, shapes), alone=True)
    tensors = {name: TensorInfo(f"{alias}/{FILE}#{name}", *kind) for name, kind in shapes.items()}
    return Checkpoint(folder, config, {}, tensors, None)


def stated_dtype(config: Mapping[str, object]) -> str:
    """bf16 where config.json says none."""
    spelled = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return next((name for name in FLOATS if DTYPES[name].torch == spelled), "bf16")


def parameters(family: Family, settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape as stored of every weight and bias of a model."""
    sizes = {k: v for k, v in vars(settings).items() if isinstance(v, int)}
    experts = settings.experts
    if experts:
        sizes |= {"experts": experts.n, "expert_ffn": experts.ffn}
    for role, module in family.names.items():
        if role == "output" and settings.tied:
            continue
        shape = tuple(product(dim, sizes) for dim in SHAPES[role])
        turned = shape[::-1] if role in family.stored_transposed else shape
        has = family.biases.get(role, False)
        biased = settings.flags[has] if isinstance(has, str) else has
        for layer in range(settings.layers) if "{i}" in module else [None]:
            if not read_in(role, layer, settings):
                continue
            for e in range(experts.n) if experts and "{e}" in module else [0]:
                name = module.format(i=layer, e=e)
                yield f"{name}.weight", turned
                if biased:
                    yield f"{name}.bias", shape[:1]


def read_in(role: str, layer: int | None, settings: Settings) -> bool:
    """Whether that layer has it: a layer of experts has no feed-forward of its own, and the other way round."""
    mixture = role in FUSED_EXPERTS or role == "ffn_gate_inp"
    if layer is None or not (mixture or role in ("ffn_gate", "ffn_up", "ffn_down")):
        return True
    return mixture == (settings.experts is not None and layer in settings.experts.layers)


class Shapes(NamedTuple):
    """A file of tensors that is not there."""

    where: str
    types: Mapping[str, tuple[str, tuple[int, ...]]]

    def read(self, name: str, begin: int, end: int) -> NoReturn:
        raise InputError(f"{self.where}: no weights beside it, so {name} cannot be read", hint="--dry-run reads none")

    def read_stacked(self, name: str, begin: int, end: int) -> NoReturn:
        self.read(name, begin, end)

    def read_columns(self, name: str, begin: int, end: int) -> NoReturn:
        self.read(name, begin, end)

    def close(self) -> None:
        pass
