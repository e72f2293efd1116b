"""The file of weights as safetensors, read by the safetensors library: it has every tensor that model.onnx points to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from qconvert.report import Row, judged
from qconvert.weights import rows_per_block


class Range(Protocol):
    """Where an initializer's bytes lie."""

    @property
    def file(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def safetensors_rows(initializers: Mapping[str, Range]) -> list[Row]:
    """Each tensor as the library reads it is, bit for bit, the initializer of its name; nothing where there is no such file."""
    files = sorted({place.file for place in initializers.values() if place.file.suffix == ".safetensors"})
    if not files:
        return []
    from safetensors import SafetensorError, safe_open

    wrong, n, found = [], 0, set[tuple[Path, int]]()
    for path in files:
        try:
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    n += 1
                    place = initializers.get(name)
                    if place is None or place.file != path or not equal(opened.get_slice(name), place):
                        wrong.append(name)
                    else:
                        found.add((path, place.offset))
        except SafetensorError as e:
            wrong.append(f"{path.name}: {e}")
    wrong += [name for name, place in initializers.items() if place.file in files and (place.file, place.offset) not in found]
    return [judged("file read by safetensors", f"of {n} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))]


def equal(tensor: object, place: Range) -> bool:
    """Whether the library's values are the bytes there, a block of rows at a time."""
    shape, at = tensor.get_shape(), place.offset  # type: ignore[attr-defined]
    step = rows_per_block(int(np.prod(shape[1:], dtype=np.int64)))
    for begin in range(0, shape[0], step):
        values = np.ascontiguousarray(tensor[begin : min(shape[0], begin + step)])  # type: ignore[index]
        if not np.array_equal(values.reshape(-1).view(np.uint8), np.fromfile(place.file, np.uint8, values.nbytes, offset=at)):
            return False
        at += values.nbytes
    return at == place.offset + place.nbytes
