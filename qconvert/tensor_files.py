"""One file of tensors, read by rows: safetensors and GGUF by pread, PyTorch .bin by torch with weights_only."""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qconvert.byte_files import ByteFile, LocalFile, fill
from qconvert.dtypes import DTYPES, FROM_SAFETENSORS, FROM_TORCH
from qconvert.errors import InputError, Place, UnsupportedError, located
from qconvert.gguf_reader import GGML_TYPES, row_nbytes
from qconvert.gguf_reader import read_header as read_gguf_header
from qconvert.safetensors_header import DAMAGED, Entry, damaged, read_header
from qconvert.scheme import Array

if TYPE_CHECKING:
    import torch

SYSCALL_NBYTES = 1 << 15  # one call takes about 5 us, in which this much is read
BLOCK_NBYTES = 1 << 21


class TensorFile(Protocol):
    """Tensors of one file: (dtype, shape) by name; rows in the file's own dtype, bf16 as its bits (uint16).

    Quantized ones have a layout as dtype (gguf.q4_0) and the shape [N,K] of the weight; a row is its bytes, u8.
    """

    @property
    def types(self) -> Mapping[str, tuple[str, tuple[int, ...]]]: ...

    def read(self, name: str, begin: int, end: int) -> Array: ...

    def read_stacked(self, name: str, begin: int, end: int) -> Array: ...

    def read_columns(self, name: str, begin: int, end: int) -> Array: ...

    def close(self) -> None: ...


def open_tensors(path: Path) -> TensorFile:
    """By the file's ending: .safetensors, .gguf or .bin. InputError where it cannot be read."""
    with located(Place(str(path))):
        if path.suffix == ".gguf":
            return GGUFFile(path)
        return TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else SafetensorsFile(LocalFile(path))


class SafetensorsFile:
    """Header checked on opening; values by pread, so that nothing read stays resident. Threads may read at once."""

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        try:
            self.entries = read_header(file)
        except InputError:
            file.close()
            raise
        self.types = {n: (FROM_SAFETENSORS.get(e.dtype, e.dtype.lower()), e.shape) for n, e in self.entries.items()}

    def read(self, name: str, begin: int, end: int) -> Array:
        entry, dtype = self.entries[name], self._numpy(name)
        if not entry.shape:
            return self._fill(np.empty((), dtype), entry, 0, name)
        out = np.empty((end - begin, *entry.shape[1:]), dtype)
        return self._fill(out, entry, begin * _row_nbytes(entry), name)

    def read_stacked(self, name: str, begin: int, end: int) -> Array:
        entry = self.entries[name]
        out = np.empty((end - begin, entry.shape[-1]), self._numpy(name))
        return self._fill(out, entry, begin * entry.shape[-1] * out.itemsize, name)

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        entry, dtype = self.entries[name], self._numpy(name)
        n_rows, row = entry.shape[0], _row_nbytes(entry)
        out = np.empty((n_rows, end - begin), dtype)
        if row - out.itemsize * (end - begin) > SYSCALL_NBYTES:
            for i in range(n_rows):
                self._fill(out[i], entry, i * row + begin * out.itemsize, name)
            return out
        step = max(1, BLOCK_NBYTES // max(1, row))
        for i in range(0, n_rows, step):
            j = min(n_rows, i + step)
            out[i:j] = self.read(name, i, j)[:, begin:end]
        return out

    def close(self) -> None:
        self.file.close()

    def _numpy(self, name: str) -> str:
        return _numpy_dtype(self.file.name, name, self.types[name][0])

    def _fill(self, out: Array, entry: Entry, at: int, name: str) -> Array:
        return fill(self.file, out, entry.begin + at, name, entry.begin + entry.nbytes)


class GGUFFile:
    """A GGUF's tensors, by pread as above; its key/values are gguf_reader's."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self.infos = {t.name: t for t in read_gguf_header(path).tensors}
        packed = GGML_TYPES.keys() - DTYPES.keys()
        self.types = {n: (f"gguf.{t.dtype}" if t.dtype in packed else t.dtype, t.shape) for n, t in self.infos.items()}
        self.file = LocalFile(path)

    def read(self, name: str, begin: int, end: int) -> Array:
        return self.read_stacked(name, begin, end) if len(self.infos[name].shape) > 1 else self._vector(name)[begin:end]

    def read_stacked(self, name: str, begin: int, end: int) -> Array:
        info = self.infos[name]
        width = row_nbytes(self._readable(name), info.shape[-1])
        out = np.empty((end - begin, width), np.uint8)
        return self._typed(name, fill(self.file, out, info.offset + begin * width, name))

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        if self.infos[name].dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}: {name} is {self.infos[name].dtype}, which is read by rows alone")
        return np.ascontiguousarray(self.read(name, 0, self.infos[name].shape[0])[:, begin:end])

    def close(self) -> None:
        self.file.close()

    def _vector(self, name: str) -> Array:
        info, dtype = self.infos[name], self._readable(name)
        out = np.empty(math.prod(info.shape) * GGML_TYPES[dtype].nbytes // GGML_TYPES[dtype].block, np.uint8)
        return self._typed(name, fill(self.file, out, info.offset, name))

    def _typed(self, name: str, data: Array) -> Array:
        dtype = self.infos[name].dtype
        return data.view(DTYPES[dtype].numpy) if dtype in DTYPES else data

    def _readable(self, name: str) -> str:
        dtype = self.infos[name].dtype
        if dtype not in GGML_TYPES:
            raise UnsupportedError(
                f"{self.path}: {name} is of ggml's {dtype}; read are {', '.join(GGML_TYPES)}",
                hint="make the file anew with one of these, or give the checkpoint that it was made from",
            )
        return dtype


class TorchFile:
    """A state dict that torch.save wrote. Its pickle may name tensors only: code in it is refused, never executed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _load_state_dict(path)
        self.types = {n: (_dtype_of(t), tuple(t.shape)) for n, t in self.tensors.items()}

    def read(self, name: str, begin: int, end: int) -> Array:
        self._readable(name)
        t = self.tensors[name]
        return self._numpy(t[begin:end] if t.ndim else t)

    def read_stacked(self, name: str, begin: int, end: int) -> Array:
        self._readable(name)
        return self._numpy(self.tensors[name].flatten(0, -2)[begin:end])

    def read_columns(self, name: str, begin: int, end: int) -> Array:
        self._readable(name)
        return self._numpy(self.tensors[name][:, begin:end])

    def close(self) -> None:
        self.tensors = {}

    def _readable(self, name: str) -> None:
        _numpy_dtype(self.path, name, self.types[name][0])

    @staticmethod
    def _numpy(t: torch.Tensor) -> Array:
        import torch

        t = t.detach().contiguous()
        array: Array = t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()
        return array.copy()  # the tensor is mapped from the file


def _dtype_of(t: torch.Tensor) -> str:
    name = str(t.dtype).removeprefix("torch.")
    return FROM_TORCH.get(name, name)


def _row_nbytes(entry: Entry) -> int:
    return entry.nbytes // entry.shape[0] if entry.shape[0] else 0


def _numpy_dtype(path: Path | str, name: str, dtype: str) -> str:
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{path}: {name} is {dtype}; weights are read as {', '.join(DTYPES)}",
            hint="give the checkpoint before it was quantized",
        )
    return DTYPES[dtype].numpy


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        # only zip archives can be mapped; the format before torch 1.6 is read whole
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters becomes an error below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise _refused(path, str(e)) from e
    except Exception as e:  # damaged bytes surface as whatever torch's readers happen to raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise damaged(path, f"torch cannot read it: {reason[:200]}") from e
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}; a state dict of plain tensors was wanted")
    return state


def _refused(path: Path, reason: str) -> InputError:
    wants = re.search(r"GLOBAL (\S+)", reason)
    if wants is None:
        return InputError(f"{path}: not a pickle of tensors alone; it was not executed", hint=DAMAGED)
    return InputError(
        f"{path}: the pickle calls {wants[1]}; it was not executed",
        hint="only tensors are read from .bin files; ask for this model as safetensors",
    )


