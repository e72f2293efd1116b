"""The weights of a folder as compressed-tensors decompresses them, against the graph's."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from qconvert.dtypes import DTYPES
from qconvert.formats.safetensors_compared import exact_rows
from qconvert.formats.safetensors_dialects import Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Array


def decompressed_rows(folder: Path, reals: Reals, written: Written, form: str, dtype: str | None = None) -> list[Row]:
    """Every weight whose scheme and shape are new, exact but for the rounding to `dtype`, usually that of the scales."""
    what = "compressed-tensors' decompressor"
    if find_spec("compressed_tensors") is None:
        why = 'compressed-tensors is not installed: pip install "qconvert[safetensors]"'
        return [Row(what, "not run", None, None, "skip", why)]
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    schemes = {m: QuantizationScheme.model_validate(g) for g in config["config_groups"].values() for m in g["targets"]}
    compressor = BaseCompressor.get_value_from_registry(form)
    with opened_tensors(folder) as tensors:
        of_module: dict[str, dict[str, str]] = {}
        for tensor in tensors:
            of_module.setdefault(tensor.rpartition(".")[0], {})[tensor.rpartition(".")[2]] = tensor

        def shape(name: str) -> tuple[int, ...]:
            parts = of_module[name.removesuffix(".weight")]
            return tensors.shape(parts.get("weight_packed") or parts["weight"])

        def theirs(name: str, _: str) -> Array:
            module = name.removesuffix(".weight")
            found = {part: tensors.tensor(tensor) for part, tensor in of_module[module].items()}
            settings = next(s for target, s in schemes.items() if matches(target, module))
            value: Array = compressor.decompress(found, settings)["weight"].float().numpy()
            return value

        def wanted(name: str) -> Array:
            scales = of_module[name.removesuffix(".weight")]["weight_scale"]
            rounded = tensors.tensor(scales).dtype if dtype is None else getattr(torch, DTYPES[dtype].torch)
            out: Array = torch.from_numpy(reals.real(name)).to(rounded).float().numpy()
            return out

        return exact_rows(what, written, shape, theirs, wanted)


def matches(target: str, module: str) -> bool:
    """Whether a target of a config group is a Linear called `module`."""
    return target == "Linear" or target == module or (target.startswith("re:") and bool(re.match(target[3:], module)))
