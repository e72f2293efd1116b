"""Inputs on which two ONNX models are compared: the user's own, or random ones that the model accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from qconvert.errors import InputError
from qconvert.formats.onnx_foreign_sites import standard, tensors_of
from qconvert.scheme import Array

LENGTHS = (8, 16, 64, 256, 512, 1024)  # of dimensions without a number, until the model runs
HIGHS = (8, 2)  # of integers that no table bounds
NUMPY: Mapping[int, Any] = {
    TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64, TensorProto.BOOL: np.bool_,
    TensorProto.INT64: np.int64, TensorProto.INT32: np.int32, TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8,
}  # fmt: skip
Feeds = dict[str, Array]


def given(path: Path, came: Any) -> Feeds:
    """The user's own inputs, arrays by name in a .npz file, which the model accepts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            feeds = {name: file[name] for name in file.files}
        came.run(None, feeds)
    except Exception as e:
        hint = "arrays by the inputs' names, as np.savez writes them"
        raise InputError(f"{path}: the model does not run on these inputs: {e}", hint=hint) from e
    return feeds


def found(model: ModelProto, came: Any) -> list[Feeds] | str:
    """Draws of random inputs that the model accepts, or why there are none."""
    why = ""
    for feeds in tried(model):
        if isinstance(feeds, str):
            return feeds
        try:
            came.run(None, feeds)
            return [feeds, *varied(feeds)]
        except Exception as e:  # onnxruntime's exceptions have no common class; other lengths may fit
            why = why or str(e).splitlines()[0]
    return f"it runs on no random inputs that were tried ({why[:160]}); --inputs gives others"


def varied(feeds: Feeds) -> Iterator[Feeds]:
    """Quieter, as loud noise saturates gates; with the other truth values, so that both branches of a condition run."""
    real = {n: np.asarray(v * v.dtype.type(0.1)) for n, v in feeds.items() if np.issubdtype(v.dtype, np.floating)}
    truths = {n: np.asarray(~v) for n, v in feeds.items() if v.dtype == np.bool_}
    yield from (feeds | other for other in (real, truths) if other)


def tried(model: ModelProto) -> Iterator[Feeds | str]:
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    for i in inputs:
        if i.type.tensor_type.elem_type not in NUMPY:
            yield f"its input {i.name} is of a type that is not made up here; --inputs gives it"
            return
    rows = table_rows(model)
    for length, high in product(LENGTHS, HIGHS):
        rng = np.random.default_rng(0)
        yield {i.name: random_array(i, length, rows.get(i.name, high), rng) for i in inputs}


def table_rows(model: ModelProto) -> dict[str, int]:
    """Input -> rows of the smallest table that it is an index of."""
    found: dict[str, int] = {}
    for tensor in tensors_of(model):
        for use in tensor.uses:
            if use.node is not None and standard(use.node) == "Gather" and use.number == 0 and tensor.dims:
                name = use.node.input[1]
                found[name] = min(found.get(name, tensor.dims[0]), tensor.dims[0])
    return found


def random_array(value: Any, length: int, high: int, rng: np.random.Generator) -> Array:
    """Normal, or integers below `high`; masks are ones."""
    kind = value.type.tensor_type
    shape, dtype = [d.dim_value or named_length(d.dim_param, length) for d in kind.shape.dim], NUMPY[kind.elem_type]
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    low, high = (1, 2) if "mask" in value.name else (0, 2 if dtype is np.bool_ else high)
    made: Array = rng.integers(low, high, shape).astype(dtype)
    return made


def named_length(name: str, length: int) -> int:
    """What exporters call dimensions: one text, nothing in the cache."""
    return 1 if "batch" in name else 0 if "past" in name and "+" not in name else length
