"""The weights of a folder as bitsandbytes dequantizes them, against the graph's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qconvert.formats.safetensors_compared import close_rows
from qconvert.formats.safetensors_dialects import Written
from qconvert.formats.safetensors_files import Opened, opened_tensors
from qconvert.reals import Reals
from qconvert.report import Row

WHAT = "bitsandbytes' dequantization"


def dequantized_rows(folder: Path, reals: Reals, written: Written, exact: bool) -> list[Row]:
    """Every weight whose scheme and shape are new. exact: the products are the graph's; else of 8 bits, in another order."""
    if find_spec("bitsandbytes") is None:
        return [Row(WHAT, "not run", None, None, "skip", "bitsandbytes is not installed: pip install bitsandbytes")]
    with opened_tensors(folder) as tensors:
        theirs = lambda name, _: value(tensors, name)  # noqa: E731
        return close_rows(WHAT, written, tensors.shape, theirs, reals, 0.0 if exact else 3e-7)


def value(tensors: Opened, name: str) -> Any:
    """f32[N,K] of the weight `name`, by bitsandbytes."""
    import bitsandbytes.functional as bnb
    import torch

    parts = {key.removeprefix(f"{name}."): tensors.tensor(key) for key in tensors if key.startswith(f"{name}.")}
    if not parts:
        scales = tensors.tensor(f"{name.removesuffix('weight')}SCB")
        return bnb.int8_vectorwise_dequant(tensors.tensor(name), scales).float().numpy()
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.dequantize_4bit(tensors.tensor(name), state).numpy()
