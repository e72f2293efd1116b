"""A folder in MLX: its weights as mx.dequantize gives them, and mlx-lm's answers, on the CPU, in f32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from qconvert.formats.safetensors_compared import close_rows
from qconvert.formats.safetensors_dialects import Loading, Written
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Array, scheme_of

WHAT = "mx.dequantize"


def dequantized_rows(folder: Path, reals: Reals, written: Written) -> list[Row]:
    """Every weight whose scheme and shape are new, in f32; mlx multiplies and adds with one rounding where the CPU has it."""
    if find_spec("mlx") is None:
        return [Row(WHAT, "not run", None, None, "skip", 'mlx is not installed: pip install "mlx[cpu]"')]
    import mlx.core as mx

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= cast(dict[str, Any], mx.load(str(path)))

    def theirs(name: str, scheme: str) -> Array:
        found, module = scheme_of(scheme), name.removesuffix(".weight")
        assert found is not None
        scales, biases = (tensors[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        return np.array(mx.dequantize(tensors[name], scales, biases, found.block, found.bits))

    return close_rows(WHAT, written, lambda name: tensors[name].shape, theirs, reals, 3e-7)


def unavailable(folder: Path) -> str | None:
    """Why mlx-lm cannot run the folder here, or None."""
    from qconvert.formats.safetensors_transformers import short_of_memory

    missing = [package for package in ("mlx", "mlx_lm") if find_spec(package) is None]
    return f'{missing[0]} is not installed: pip install "mlx[cpu]" mlx-lm' if missing else short_of_memory(folder)


def load(folder: Path, loading: Loading) -> Model:
    return Model(folder)


class Model:
    """complaints: keys that were missing or unexpected, which mlx-lm refuses."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.about = {"name": "mlx-lm", "version": version("mlx-lm")}
        self.complaints: Sequence[str] = ()
        mx.set_default_device(mx.cpu)
        try:
            self.model, _ = load_model(folder)
        except (ValueError, TypeError) as e:  # keys of the files, keys of config.json
            self.complaints = [str(e).splitlines()[0]]
            return
        self.model.set_dtype(mx.float32)  # products of bf16 are far off on a CPU

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """f32[T,V]"""
        import mlx.core as mx

        return np.array(self.model(mx.array([list(tokens)]))[0].astype(mx.float32))


def version(package: str) -> str:
    from importlib.metadata import version as found

    return str(found(package))
