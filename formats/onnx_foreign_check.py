"""Prove a foreign model that was quantized: its bytes, its kernels, its outputs.

Outputs are held against the model as it came with the weights' dequantized values in their old places, so only the nodes
that were changed are judged. What the bits cost is told apart. Bytes are found by the onnx package, in input and output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo

from qconvert.check import LIMITS
from qconvert.emit import encoded_rows, entry_ranges
from qconvert.errors import VerificationError
from qconvert.formats.onnx_check import Place, checker_row, read_rows
from qconvert.formats.onnx_exact import without_levels
from qconvert.formats.onnx_foreign_inputs import NUMPY, Feeds, found, given
from qconvert.formats.onnx_foreign_job import Rewritten
from qconvert.formats.onnx_foreign_layouts import PREFIX as HALF
from qconvert.formats.onnx_foreign_layouts import widened
from qconvert.formats.onnx_foreign_nodes import Quantized, set_external, set_inline
from qconvert.formats.onnx_foreign_sites import Tensor, standard, tensors_of
from qconvert.formats.onnx_foreign_tensors import bytes_at, place_of, read
from qconvert.formats.onnx_kernels import ROWS, kernel_rows
from qconvert.formats.onnx_kernels import Quantized as FirstRows
from qconvert.formats.onnx_layouts import LAYOUTS
from qconvert.formats.onnx_proto import DATA_FILE, bits_of
from qconvert.formats.onnx_runtime import EXTERNAL_FOLDER, FUSED_ACCURACY, OnnxRuntime
from qconvert.layouts import layout_of
from qconvert.parallel import in_parallel
from qconvert.report import Row, judged
from qconvert.scheme import Array
from qconvert.weights import Weights

RUNTIME = "runtime onnxruntime"
REFERENCE = "reference.data"  # beside the output until it is proven
BLOCK_NBYTES = 1 << 24
# f16 is rounded after every node, at other places in the two models: measured 3e-4 for one product, 8e-4 for eight
HALF_LIMIT = 5e-3


def prove(job: Rewritten, weights: Weights, parts: tuple[Path, ...], threads: int) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks, and the runtime that ran (None where there is none)."""
    path, runtime = parts[0], OnnxRuntime()
    after = tensors_of(onnx.load(path, load_external_data=False))
    places = {t.name: place for t in after if (place := placed(t.proto, path)) is not None}
    rows = [form_row(job.path, path), bytes_row(job, places, weights, threads), carried_row(job, path, after)]
    if any(r.verdict == "fail" for r in rows):
        return rows, None
    if reason := runtime.missing():
        return [*rows, Row(RUNTIME, "not verified", None, None, "skip", reason)], None
    rows += kernel_rows(first_rows(job, places))
    rows += output_rows(job, path, places, threads)
    ran = any(r.what.startswith(RUNTIME) and r.verdict != "skip" for r in rows)
    return rows, {"name": runtime.name, "version": runtime.version()} if ran else None


def form_row(before: Path, after: Path) -> Row:
    """onnx's checker has nothing against the output, where it had nothing against the input."""
    came = checker_row(before)
    if came.verdict == "fail":
        return came._replace(value=None, limit=None, verdict="skip", reason=f"nor does the input pass: {came.reason}")
    return checker_row(after)


# bytes --------------------------------------------------------------------------------------------


def placed(tensor: TensorProto, path: Path) -> Place | None:
    """Where the onnx package finds a tensor outside of the protobuf of `path`."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    said = ExternalDataInfo(tensor)
    nbytes = said.length if said.length is not None else (path.parent / said.location).stat().st_size - (said.offset or 0)
    return Place(path.parent / said.location, said.offset or 0, nbytes, tuple(tensor.dims))


def pieces_of(q: Quantized, places: Mapping[str, Place]) -> list[Place]:
    """Codes, scales and zero points. VerificationError for one that is missing, or codes that lie in two places."""
    if missing := [p.name for p in q.initializers if p.name not in places]:
        raise VerificationError(f"{missing[0]} is missing from the file")
    codes = [places[p.name] for p in (q.parts[0], q.rows) if p is not None and p.name in places]
    if len({(c.offset, c.nbytes) for c in codes}) != 1:
        raise VerificationError(f"{q.tensor.key}: its codes lie in two places")
    return [codes[0], *(places[p.name] for p in q.parts[1:])]


def bytes_row(job: Rewritten, places: Mapping[str, Place], weights: Weights, threads: int) -> Row:
    """Codes, scales and zero points in the file are the solver's."""
    wrong = list[str]()

    def compare(q: Quantized) -> None:
        pieces, n = pieces_of(q, places), q.entry.shape[0]
        for begin, end in entry_ranges(q.entry):
            if not np.array_equal(read_rows(pieces, n, begin, end), encoded_rows(weights, q.entry, begin, end)):
                wrong.append(f"{q.tensor.key}, rows {begin}..{end}")

    in_parallel(job.changed, compare, threads)
    return judged("file bytes", f"of {len(job.changed)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def carried_row(job: Rewritten, path: Path, after: list[Tensor]) -> Row:
    """All other constants are the input's, type, shape and bytes."""
    changed, theirs = {q.tensor.key for q in job.changed}, dict[str, list[TensorProto]]()
    for t in after:
        theirs.setdefault(t.name, []).append(t.proto)
    wrong, n = list[str](), 0
    for t in tensors_of(onnx.load(job.path, load_external_data=False)):
        if t.key not in changed:
            n += 1
            same = bool(theirs.get(t.name)) and equal(t.proto, job.path, theirs[t.name].pop(0), path)
            wrong += [] if same else [t.key]
    return judged("carried bytes", f"of {n} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def equal(a: TensorProto, path_a: Path, b: TensorProto, path_b: Path) -> bool:
    if (a.data_type, a.dims) != (b.data_type, b.dims):
        return False
    if a.data_type == TensorProto.STRING:
        return list(a.string_data) == list(b.string_data)
    if bits_of(a.data_type) < 8:  # values share bytes, which onnx writes in several ways
        values = (onnx.numpy_helper.to_array(t, os.fspath(path.parent)) for t, path in ((a, path_a), (b, path_b)))
        return np.array_equal(*values)
    left, right = content(a, path_a), content(b, path_b)
    steps = range(0, len(left), BLOCK_NBYTES)
    return len(left) == len(right) and all(
        np.array_equal(left[i : i + BLOCK_NBYTES], right[i : i + BLOCK_NBYTES]) for i in steps
    )


def content(tensor: TensorProto, path: Path) -> Array:
    """A tensor's bytes, mapped where they lie outside."""
    place = placed(tensor, path)
    if place is not None:
        return np.memmap(place.file, np.uint8, "r", place.offset, (place.nbytes,)) if place.nbytes else np.empty(0, np.uint8)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, np.uint8)
    return np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)


# kernels ------------------------------------------------------------------------------------------


def first_rows(job: Rewritten, places: Mapping[str, Place]) -> dict[tuple[str, int, str], FirstRows]:
    """Of each distinct (scheme, K, op) one weight's first rows; scales in f16 are widened, outputs prove those kernels."""
    kinds: dict[tuple[str, int, str], FirstRows] = {}
    for q in job.changed:
        if q.wish.kind == "channels":
            continue
        n, k = q.entry.shape
        layout = LAYOUTS[f"onnx.{layout_of(q.entry.dtype).scheme.name}"]
        ops = sorted({"embed" if u.node is not None and standard(u.node) == "Gather" else "linear" for u in q.tensor.uses})
        wanted = [op for op in ops if (layout.scheme.name, k, op) not in kinds]
        rows = read_rows(pieces_of(q, places), n, 0, min(n, ROWS)) if wanted else None
        for op in wanted:
            wide = widened(q.entry.dtype, cast(Array, rows)) if q.entry.dtype.startswith(HALF) else cast(Array, rows)
            kinds[layout.scheme.name, k, op] = FirstRows(q.tensor.key, layout, wide, op)
    return kinds


# outputs ------------------------------------------------------------------------------------------


def output_rows(job: Rewritten, path: Path, places: Mapping[str, Place], threads: int) -> list[Row]:
    """The same inputs through the model as it came, with dequantized weights, and quantized."""
    model = read(job.path)
    if reason := no_room(model):
        return [skipped(reason)]
    came = session(job.path, None, threads)
    half = any(q.tensor.proto.data_type == TensorProto.FLOAT16 for q in job.changed)
    limit = HALF_LIMIT if half else LIMITS[RUNTIME][0]
    tried = given(job.inputs, came) if job.inputs else found(model, came)
    if isinstance(tried, str):
        return [skipped(tried)]
    draws = tried if isinstance(tried, list) else [tried]
    want = answers(came, draws)
    again = worst(answers(came, draws), want)
    if math.isnan(again) or again > limit:
        return [skipped("it gives two answers to the same inputs, or none that is a finite real number")]
    del came
    with reference(job, model, path, places) as proto:
        real = answers(session(path, proto, threads), draws)
    price = worst(pooled(real), pooled(want))
    if price == 0:
        return [skipped("its outputs do not depend on the weights that changed, on these inputs; --inputs gives others")]
    levelled = without_levels(onnx.load(path, load_external_data=False)).SerializeToString()
    exact = answers(session(path, levelled, threads), draws)
    got = answers(session(path, path.read_bytes(), threads), draws)
    kind = "given" if job.inputs else "random"
    shapes = ", ".join(f"{n}{list(v.shape)}" for n, v in draws[0].items())
    return [
        judged(f"{RUNTIME}, outputs", "relative error", worst(exact, real), limit, f"on {kind} {shapes}"),
        Row("price of the bits", "relative error", price, None, "info", f"on {kind} inputs"),
        Row("price of 8-bit activations", "relative error", worst(pooled(got), pooled(exact)), None, "info"),
    ]


Outputs = list[list[Any]]  # of each draw


def answers(session: Any, draws: Sequence[Feeds]) -> Outputs:
    return [session.run(None, feeds) for feeds in draws]


def pooled(outputs: Outputs) -> Outputs:
    """All draws as one: the answers to each output end to end, those that are real."""
    each = [[v.astype(np.float64).ravel() for v in out if is_real(v)] for out in zip(*outputs, strict=True)]
    return [[np.concatenate(values) for values in each if values]]


def is_real(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def skipped(reason: str) -> Row:
    return Row(RUNTIME, "not verified", None, None, "skip", reason)


def no_room(model: ModelProto) -> str | None:
    """Why the input, which onnxruntime holds whole and packs anew, does not fit into memory; None where it does."""
    needed = 2 * sum(int(np.prod(t.dims)) * 4 for t in tensors_of(model))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), needed)
    return f"running the input takes {needed >> 20} MB of memory, {free >> 20} MB are free" if needed > free else None


def session(path: Path, proto: bytes | None, threads: int) -> Any:
    """A model in onnxruntime: the file, or a protobuf whose data lie beside it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    options.add_session_config_entry(FUSED_ACCURACY, "0")
    if proto is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, os.fspath(path.parent))
    try:
        return onnxruntime.InferenceSession(proto or os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise VerificationError(f"{path}: onnxruntime does not load it: {e}") from e


@contextmanager
def reference(job: Rewritten, model: ModelProto, path: Path, places: Mapping[str, Place]) -> Iterator[bytes]:
    """The model as it came, but for the weights' values, which are those of the output's codes; on disk, not in memory."""
    file, at = path.with_name(REFERENCE), 0
    changed, entries = {q.tensor.key: q for q in job.changed}, {e.name: e for e in job.plan.entries}
    try:
        for t in tensors_of(model):
            if (q := changed.get(t.key)) is not None:
                nbytes = write_real(q, t, file, at, places)
                set_external(t.proto, REFERENCE, at, nbytes)
                at += nbytes + -nbytes % 64
            elif (entry := entries.get(t.key)) is not None:
                set_external(t.proto, DATA_FILE, entry.offset, entry.nbytes)
            elif t.proto.external_data:
                set_inline(t.proto, bytes_at(job.path, place_of(job.path, t.proto)))
        yield without_levels(model).SerializeToString()
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def write_real(q: Quantized, tensor: Tensor, file: Path, at: int, places: Mapping[str, Place]) -> int:
    """A weight's dequantized values in its own type and order at `at`; their nbytes."""
    n, k = q.entry.shape
    dtype = np.dtype(NUMPY[tensor.proto.data_type])
    with file.open("ab") as f:
        f.truncate(at + n * k * dtype.itemsize)
    array = np.memmap(file, dtype, "r+", at, (k, n) if q.wish.transposed else (n, k))
    rows = array.T if q.wish.transposed else array
    pieces, layout = pieces_of(q, places), layout_of(q.entry.dtype)
    for begin, end in entry_ranges(q.entry):
        rows[begin:end] = layout.unpack(read_rows(pieces, n, begin, end)).dequantize()
    array.flush()
    return int(array.nbytes)


def worst(got: Outputs, want: Outputs) -> float:
    """The largest |got - want| / |want| of an output that is real; infinite where not both are finite; NaN for none."""
    errors = []
    for g, w in zip(chain(*got), chain(*want), strict=True):
        if not is_real(w) or not np.isfinite(w).any():
            continue
        finite = np.isfinite(w)
        if not np.array_equal(finite, np.isfinite(g)):
            return math.inf
        a, b = g[finite].astype(np.float64), w[finite].astype(np.float64)
        errors.append(float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)))
    return max(errors, default=math.nan)
