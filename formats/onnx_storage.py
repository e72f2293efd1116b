"""What the user says of an ONNX folder's files: for whom they are laid out, where the weights lie, how large a file may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from qconvert.errors import UnsupportedError, UsageError
from qconvert.request import Request, parse_nbytes

LAYOUTS = ("genai", "transformersjs")
WEIGHTS_IN = ("data", "safetensors")
BROWSER_MAX_NBYTES = 1_900_000_000  # WebAssembly takes less than 2 GiB in one piece
# quant -> transformers.js' dtype, and what it appends to the file's name: src/utils/dtypes.js of its 4.3.2
DTYPES: Mapping[str, str] = {
    "fp32": "fp32", "fp16": "fp16", "int8": "int8", "uint8": "uint8", "int8-dynamic": "q8", "w8a8": "q8", "int4": "q4",
    "uint4": "q4", "uint4f": "q4", "int2": "q2", "uint2": "q2", "uint2f": "q2", "nf4": "bnb4", "fp4": "bnb4",
}  # fmt: skip
SUFFIXES: Mapping[str, str] = {"fp32": "", "q8": "_quantized"}


@dataclass(frozen=True)
class Storage:
    """model: the protobuf's path in the folder; max_nbytes: of a file of weights, None for no limit.

    browser_dtype: what transformers.js calls the weights' type, in a folder laid out for it.
    """

    model: str = "model.onnx"
    browser_dtype: str | None = None
    safetensors: bool = False
    max_nbytes: int | None = None

    def data_name(self, i: int, n: int, kind: str = "") -> str:
        """The file of weights i of n, beside the protobuf; kind: the class of those that are offloaded."""
        kind = {"meta1": "meta"}.get(kind, kind)
        if self.safetensors:
            stem = f"model-{kind}" if kind else "model"
            return f"{stem}.safetensors" if n == 1 else f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors"
        joint = "_data" if self.browser_dtype else f".{kind}.data" if kind else ".data"
        return PurePosixPath(self.model).name + joint + (f"_{i}" if i else "")


def placing(request: Request) -> tuple[tuple[str, str | None], ...]:
    """Flags that say where things lie, and what was asked for."""
    return (
        ("--layout", request.layout), ("--weights-in", request.weights_in), ("--split-max-size", request.split_max_size),
        ("--offload-meta", request.offload_meta),
    )  # fmt: skip


def storage(request: Request, quant: str) -> Storage:
    """UsageError for names that do not exist; UnsupportedError for what transformers.js cannot load."""
    layout, weights_in = request.layout or LAYOUTS[0], request.weights_in or WEIGHTS_IN[0]
    for flag, value, known in (("--layout", layout, LAYOUTS), ("--weights-in", weights_in, WEIGHTS_IN)):
        if value not in known:
            raise UsageError(f"{flag} {value}: there are {', '.join(known)}")
    limit = parse_nbytes(request.split_max_size) if request.split_max_size else None
    safetensors = weights_in == "safetensors"
    if layout == "genai":
        return Storage(safetensors=safetensors, max_nbytes=limit)
    if request.adapters_as == "swap":
        raise UnsupportedError("--layout transformersjs: it has no adapters to swap", hint="--adapters merge")
    if request.offload_meta:
        raise UnsupportedError("--layout transformersjs: it loads weights from .onnx_data alone", hint="--layout genai")
    if safetensors:
        raise UnsupportedError("--layout transformersjs: it loads weights from .onnx_data alone", hint="--weights-in data")
    if quant not in DTYPES:
        raise UnsupportedError(f"--layout transformersjs: it has no name for {quant}", hint=f"it has {', '.join(DTYPES)}")
    limit = BROWSER_MAX_NBYTES if limit is None else limit
    if limit > BROWSER_MAX_NBYTES:
        raise UsageError(f"--split-max-size {request.split_max_size}: a browser takes less than 2 GiB at once", hint="1.9G")
    dtype = DTYPES[quant]
    return Storage(f"onnx/model{SUFFIXES.get(dtype, f'_{dtype}')}.onnx", dtype, max_nbytes=limit)
