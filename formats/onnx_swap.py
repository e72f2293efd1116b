"""Adapters beside an ONNX model: a file for each, which onnxruntime and onnxruntime-genai put into the model's slots.

In the model a slot is a pair of optional inputs A[K,r] and B[r,N] with initializers of rank 0. A file has the factors of
the slots that its adapter fills, alpha/r and the user's weight multiplied into B. Only one adapter is active at a time:
of two that fill one slot onnxruntime takes the first, without a word.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from qconvert import kernels
from qconvert.adapters import Adapter
from qconvert.errors import UsageError, require
from qconvert.graph import Graph
from qconvert.passes.adapter_slots import filled, slot_names
from qconvert.scheme import F32
from qconvert.sources import Store, TensorInfo

SUFFIX = ".onnx_adapter"
VERSION = 1  # of adapter and model, which onnxruntime stores and does not compare


def adapter_files(adapters: Sequence[Adapter], graph: Graph, store: Store | None) -> dict[str, bytes]:
    """File name -> bytes. Without a store the factors are zeros: a dry run reads no weights and wants lengths alone."""
    require("onnxruntime", "--adapters swap", '"qconvert[onnx]"')
    files: dict[str, bytes] = {}
    for adapter in adapters:
        name = file_name(adapter)
        if name in files:
            raise UsageError(f"two adapters would be {name}", hint="rename the folder of one")
        files[name] = serialized(dict(parameters(adapter, graph, store)))
    return files


def file_name(adapter: Adapter) -> str:
    return PurePosixPath(adapter.name).name + SUFFIX


def parameters(adapter: Adapter, graph: Graph, store: Store | None) -> Iterator[tuple[str, F32]]:
    """The model's inputs that an adapter fills: A f32[K,r], B f32[r,N] with its scale."""
    for weight, f in filled(graph, adapter).items():
        a, b = slot_names(weight)
        yield a, np.ascontiguousarray(values(f.a, store).T)
        yield b, np.ascontiguousarray((np.float32(f.scale * adapter.weight) * values(f.b, store)).T)


def values(tensor: TensorInfo, store: Store | None) -> F32:
    if store is None:
        return np.zeros(tensor.shape, np.float32)
    raw = store.read(tensor.ref, 0, tensor.shape[0])
    real: F32 = kernels.widen_bf16(raw) if tensor.dtype == "bf16" else raw.astype(np.float32)
    return real


def serialized(inputs: Mapping[str, F32]) -> bytes:
    """As onnxruntime's own writer makes it, which writes to files alone."""
    from onnxruntime import AdapterFormat, OrtValue

    made = AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(VERSION)
    made.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        made.export_adapter(str(path))
        return path.read_bytes()


def read(path: Path) -> dict[str, F32]:
    """The factors in a file, by onnxruntime's own reader."""
    from onnxruntime import AdapterFormat

    return {name: value.numpy() for name, value in AdapterFormat.read_adapter(str(path)).get_parameters().items()}
