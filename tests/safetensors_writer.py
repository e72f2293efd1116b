"""Safetensors files written by hand, so that tests can also write wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int64": "I64"}
WEIGHTS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones((2, 4), np.float16)}


def entries(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, object]]:
    """The header of the tensors laid one after the other; arrays of uint16 are bf16."""
    out: dict[str, dict[str, object]] = {}
    at = 0
    for name, t in tensors.items():
        out[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    return out


def write_raw(path: Path, header: object, data: bytes) -> None:
    """`header` is bytes as they are, or anything that JSON can say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_raw(path, entries(tensors), b"".join(t.tobytes() for t in tensors.values()))


def write_model(folder: Path, tensors: dict[str, np.ndarray] = WEIGHTS) -> Path:
    """A folder with config.json and model.safetensors; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write(folder / "model.safetensors", tensors)
    return folder / "model.safetensors"


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    """The same in two shards with an index; returns the index."""
    write_model(folder).unlink()
    for number, (name, t) in enumerate(WEIGHTS.items(), 1):
        write(folder / f"model-0000{number}-of-00002.safetensors", {name: t})
    names = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(WEIGHTS, 1)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**names, **(weight_map or {})}}))
    return index
