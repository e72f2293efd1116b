"""GPTQ's and AWQ's tensors as other libraries unpack them, against the graph's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.formats.safetensors_compared import exact_rows
from qconvert.formats.safetensors_dialects import Written
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Array, scheme_of

Dequantize = Callable[[Mapping[str, Any], str], Array]  # a module's tensors, its scheme -> f32[N,K]


def compared(what: str, folder: Path, reals: Reals, written: Written, dequantize: Dequantize) -> list[Row]:
    """Every weight whose scheme and shape are new, exactly."""
    with opened_tensors(folder) as tensors:

        def theirs(name: str, scheme: str) -> Array:
            module = name.removesuffix("weight")
            parts = {t.removeprefix(module): tensors.tensor(t) for t in tensors if t.startswith(module)}
            return dequantize(parts, scheme)

        shape = lambda name: tensors.shape(f"{name.removesuffix('weight')}qweight")  # noqa: E731
        return exact_rows(what, written, shape, theirs, reals.real)


def awq_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """By compressed-tensors' converter of AutoAWQ's folders, which unpacks them."""
    what = "compressed-tensors' AutoAWQ converter"
    if find_spec("compressed_tensors") is None:
        why = 'compressed-tensors is not installed: pip install "qconvert[safetensors]"'
        return [Row(what, "not run", None, None, "skip", why)]
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    def dequantize(parts: Mapping[str, Any], scheme: str) -> Array:
        found = AutoAWQConverter.unpack_awq(parts["qweight"], parts["qzeros"], 4)
        codes, zeros = AutoAWQConverter.reverse_awq_order(*found, 4)
        group = int(re.findall(r"_g(\d+)", scheme)[0])
        return by_columns((codes & 15).numpy(), (zeros & 15).numpy(), parts["scales"].numpy(), group)

    return compared(what, folder, reals, written, dequantize)


def gptq_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """By GPTQModel's unpacking, where it is installed."""
    what = "GPTQModel's unpacking"
    if find_spec("gptqmodel") is None:
        return [Row(what, "not run", None, None, "skip", "gptqmodel is not installed")]
    import json

    from gptqmodel.utils.model_dequant import unpack_cols, unpack_rows

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    less = 1 if config["checkpoint_format"] == "gptq" else 0

    def dequantize(parts: Mapping[str, Any], scheme: str) -> Array:
        found = scheme_of(scheme)
        assert found is not None
        codes, zeros = unpack_rows(parts["qweight"], found.bits).numpy(), unpack_cols(parts["qzeros"], found.bits).numpy()
        zeros = (zeros + less) & ((1 << found.bits) - 1)
        at = parts["g_idx"].numpy()
        value: Array = (codes - zeros[at]).astype(np.float32) * parts["scales"].numpy().astype(np.float32)[at]
        return value.T

    return compared(what, folder, reals, written, dequantize)


def by_columns(codes: Array, zeros: Array, scales: Array, group: int) -> Array:
    """[K,N], [G,N], [G,N] -> f32[N,K]"""
    less, times = np.repeat(zeros.astype(np.int16), group, axis=0), np.repeat(scales.astype(np.float32), group, axis=0)
    value: Array = (codes.astype(np.int16) - less).astype(np.float32) * times
    return value.T
