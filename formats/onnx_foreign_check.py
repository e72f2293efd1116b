"""Prove a foreign model that was quantized: its bytes, its kernels, its outputs.

Outputs are held against the model as it came with the weights' dequantized values in their old places, so only the nodes
that were changed are judged. What the bits cost is told apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from qconvert.check import LIMITS
from qconvert.emit import Entry, encoded_rows, entry_ranges, in_parallel
from qconvert.errors import InputError, VerificationError
from qconvert.formats.onnx_check import checker_row, read_initializers, read_rows
from qconvert.formats.onnx_exact import without_levels
from qconvert.formats.onnx_kernels import Quantized, kernel_rows
from qconvert.formats.onnx_layouts import MatMulNBits
from qconvert.formats.onnx_lowering import part_names, rows_name
from qconvert.formats.onnx_runtime import EXTERNAL_FOLDER, FUSED_ACCURACY, OnnxRuntime
from qconvert.layouts import layout_of
from qconvert.report import Row, judged
from qconvert.scheme import Array
from qconvert.weights import Weights

if TYPE_CHECKING:
    from qconvert.formats.onnx_check import Place
    from qconvert.formats.onnx_foreign_job import Rewritten

RUNTIME = "runtime onnxruntime"
MOST_NBYTES = 1 << 30  # of weights: the model that is compared with holds all of them as f32
LENGTHS = (8, 16, 64, 256, 512, 1024)  # of dimensions without a number, until the model runs
ROWS = 64
NUMPY = {1: np.float32, 10: np.float16, 11: np.float64, 7: np.int64, 6: np.int32, 9: np.bool_, 2: np.uint8, 3: np.int8}


def prove(
    job: Rewritten, weights: Weights, parts: tuple[Path, ...], threads: int
) -> tuple[list[Row], dict[str, str] | None]:
    """Rows of all checks, and the runtime that ran (None where there is none)."""
    path, initializers = parts[0], read_initializers(parts[0])
    rows = [bytes_row(job, initializers, weights, threads)]
    if checker_row(job.path).verdict == "pass":
        rows.insert(0, checker_row(path))
    runtime = OnnxRuntime()
    if rows[-1].verdict == "fail":
        return rows, None
    if reason := runtime.missing():
        return [*rows, Row(RUNTIME, "not verified", None, None, "skip", reason)], None
    rows += kernel_rows(dict(kernels(job, initializers)))
    nbytes = sum(job.graph.nodes[n].type.rows * job.graph.nodes[n].type.dims[-1] for n in job.graph.outputs) * 4
    if nbytes > MOST_NBYTES:
        return [*rows, Row(RUNTIME, "not verified", None, None, "skip", f"{nbytes >> 20} MB as f32 are too much")], None
    rows += output_rows(job, path, initializers, threads)
    ran = any(r.what.startswith(RUNTIME) and r.verdict != "skip" for r in rows)
    return rows, {"name": runtime.name, "version": runtime.version()} if ran else None


# bytes and kernels --------------------------------------------------------------------------------


def pieces_of(job: Rewritten, entry: Entry, initializers: Mapping[str, Place]) -> list[Place]:
    names = [*part_names(entry.name)[: len(entry.planes)]] if entry.name in job.sites else [entry.name]
    if names[0] not in initializers:
        names[0] = rows_name(entry.name)
    if missing := [n for n in names if n not in initializers]:
        raise VerificationError(f"{missing[0]} is missing from the file")
    return [initializers[n] for n in names]


def bytes_row(job: Rewritten, initializers: Mapping[str, Place], weights: Weights, threads: int) -> Row:
    """Every tensor that the onnx package finds in the output: the solver's codes, or the input's own bytes."""
    wrong, entries = list[str](), job.plan.entries

    def compare(entry: Entry) -> None:
        pieces, n = pieces_of(job, entry, initializers), entry.shape[0]
        for begin, end in entry_ranges(entry):
            if not np.array_equal(read_rows(pieces, n, begin, end), encoded_rows(weights, entry, begin, end)):
                wrong.append(f"{entry.name}, rows {begin}..{end}")

    in_parallel(entries, compare, threads)
    return judged("file bytes", f"of {len(entries)} tensors differ", float(len(wrong)), 0.0, min(wrong, default=""))


def kernels(job: Rewritten, initializers: Mapping[str, Place]) -> Iterator[tuple[tuple[str, int, str], Quantized]]:
    """Of each distinct (scheme, K, op) one weight's first rows."""
    entries = {e.name: e for e in job.plan.entries}
    for name, site in job.sites.items():
        if not site.dequantized:
            entry = entries[name]
            rows = read_rows(pieces_of(job, entry, initializers), site.n, 0, min(site.n, ROWS))
            layout = cast(MatMulNBits, layout_of(entry.dtype))
            for op in ("embed",) * ("rows" in site.kinds) + ("linear",) * ("product" in site.kinds):
                yield (layout.scheme.name, site.k, op), Quantized(name, layout, rows, op)


# outputs ------------------------------------------------------------------------------------------


def output_rows(job: Rewritten, path: Path, initializers: Mapping[str, Place], threads: int) -> list[Row]:
    """The same inputs through the model as it came, with dequantized weights, and quantized."""
    came = session(job.path, job.path.read_bytes(), threads)
    found = given(job.inputs, came) if job.inputs else feeds_for(job.source, came)
    if found is None:
        return [Row(RUNTIME, "not verified", None, None, "skip", "no inputs were found that the model accepts")]
    feeds, want = found
    real = session(path, dequantized(job, initializers).SerializeToString(), threads).run(None, feeds)
    levelled = without_levels(onnx.load(path, load_external_data=False)).SerializeToString()
    exact = session(path, levelled, threads).run(None, feeds)
    got = session(path, path.read_bytes(), threads).run(None, feeds)
    half = any(t.data_type == TensorProto.FLOAT16 for t in job.source.graph.initializer)
    limit = 5e-3 if half else LIMITS["runtime onnxruntime"][0]
    kind = "given" if job.inputs else "random"
    shapes = ", ".join(f"{n}{list(v.shape)}" for n, v in feeds.items())
    return [
        judged(f"{RUNTIME}, outputs", "relative error", distance(exact, real), limit, f"on {kind} {shapes}"),
        Row("price of the bits", "relative error", distance(real, want), None, "info", f"on {kind} inputs"),
        Row("price of 8-bit activations", "relative error", distance(got, exact), None, "info"),
    ]


def session(path: Path, proto: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    options.add_session_config_entry(EXTERNAL_FOLDER, os.fspath(path.parent))
    options.add_session_config_entry(FUSED_ACCURACY, "0")
    try:
        return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise VerificationError(f"{path}: onnxruntime does not load it: {e}") from e


def given(path: Path, came: Any) -> tuple[dict[str, Array], list[Array]]:
    """The user's own inputs, arrays by name in a .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            feeds = {name: file[name] for name in file.files}
        return feeds, came.run(None, feeds)
    except Exception as e:
        hint = "arrays by the inputs' names, as np.savez writes them"
        raise InputError(f"{path}: the model does not run on these inputs: {e}", hint=hint) from e


def feeds_for(model: ModelProto, came: Any) -> tuple[dict[str, Array], list[Array]] | None:
    """Random inputs that the model accepts, and what it makes of them."""
    for length in LENGTHS:
        feeds = feeds_of(model, length)
        if feeds is None:
            return None
        try:
            return feeds, came.run(None, feeds)
        except Exception:  # onnxruntime's exceptions have no common class; the next length may fit
            continue
    return None


def feeds_of(model: ModelProto, length: int) -> dict[str, Array] | None:
    """Numbers for every input; None where one is no tensor."""
    rng, feeds = np.random.default_rng(0), dict[str, Array]()
    given = {t.name for t in model.graph.initializer}
    for i in model.graph.input:
        kind = i.type.tensor_type
        if i.name in given:
            continue
        if kind.elem_type not in NUMPY:
            return None
        shape = [d.dim_value or named_length(d.dim_param, length) for d in kind.shape.dim]
        dtype = NUMPY[kind.elem_type]
        if np.issubdtype(dtype, np.floating):
            feeds[i.name] = rng.standard_normal(shape).astype(dtype)
        else:
            low = 1 if "mask" in i.name else 0
            high = 2 if low or "type" in i.name or dtype is np.bool_ else 8
            feeds[i.name] = rng.integers(low, high, shape).astype(dtype)
    return feeds


def named_length(name: str, length: int) -> int:
    """What exporters call dimensions: one text, nothing in the cache."""
    return 1 if "batch" in name else 0 if "past" in name and "+" not in name else length


def dequantized(job: Rewritten, initializers: Mapping[str, Place]) -> ModelProto:
    """The model as it came, but for the weights' values, which are those of the output's codes."""
    model = ModelProto()
    model.CopyFrom(job.source)
    onnx.load_external_data_for_model(model, os.fspath(job.path.parent))
    entries = {e.name: e for e in job.plan.entries}
    for name, tensor in floats(model):
        if (site := job.sites.get(name)) is not None:
            rows = read_rows(pieces_of(job, entries[name], initializers), site.n, 0, site.n)
            values = layout_of(entries[name].dtype).unpack(rows).dequantize()
            values = (values.T if site.turned else values).reshape(tensor.dims)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(NUMPY[tensor.data_type]), name))
    return model


def floats(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    yield from ((t.name, t) for t in model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.name == "value")


def distance(got: list[Array], want: list[Array]) -> float:
    """The largest |got - want| / |want| of the outputs that are real; NaN stays NaN, which fails."""
    pairs = [(g, w.astype(np.float64)) for g, w in zip(got, want, strict=True) if np.issubdtype(w.dtype, np.floating)]
    errors = [np.linalg.norm(g - w) / max(float(np.linalg.norm(w)), 1e-30) for g, w in pairs if w.size]
    return float(np.max(errors)) if errors else 0.0

