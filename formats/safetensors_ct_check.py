"""The weights of a folder as compressed-tensors decompresses them, against the graph's."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qconvert.dtypes import DTYPES
from qconvert.formats.safetensors_dialects import Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.scheme import scheme_of

CHECKED = 1 << 24  # weights that are decompressed of one layout and shape; the others are held by their bytes


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
    wrong, seen = [], set[tuple[str, tuple[int, ...]]]()
    with opened_tensors(folder) as tensors:
        of_module: dict[str, dict[str, str]] = {}
        for tensor in tensors:
            of_module.setdefault(tensor.rpartition(".")[0], {})[tensor.rpartition(".")[2]] = tensor
        for name, scheme in written.quantized.items():
            module = name.removesuffix(".weight")
            parts = of_module[module]
            key = (scheme, tuple(tensors.shape(parts.get("weight_packed") or parts["weight"])))
            if key in seen:
                continue
            seen.add(key)
            found = {part: tensors.tensor(tensor) for part, tensor in parts.items()}
            settings = next(s for target, s in schemes.items() if matches(target, module))
            value = compressor.decompress(found, settings)["weight"].float().numpy()
            rounded = found["weight_scale"].dtype if dtype is None else getattr(torch, DTYPES[dtype].torch)
            want = torch.from_numpy(reals.real(name)).to(rounded).float().numpy()
            if scheme_of(scheme) is None or not np.array_equal(value, want):
                wrong.append(name)
    return [judged(f"{what}: {len(seen)} shapes", "weights with another value", float(len(wrong)), 0.0, min(wrong, default=""))]


def matches(target: str, module: str) -> bool:
    """Whether a target of a config group is a Linear called `module`."""
    return target == "Linear" or target == module or (target.startswith("re:") and bool(re.match(target[3:], module)))
