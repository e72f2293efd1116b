"""Products of integers, checked: activations rounded in the graph as the nodes round them, and each kernel by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

import numpy as np
import torch

from qconvert.check import LIMITS
from qconvert.formats.onnx_columns import LAYOUTS, MIDDLE, PREFIX
from qconvert.formats.onnx_int8_plan import SCHEME
from qconvert.formats.onnx_kernels import N_INPUTS, ROWS, distance, run_nodes
from qconvert.graph import Attr, Graph, Node
from qconvert.passes.quantize_activations import DYNAMIC
from qconvert.report import Row, judged
from qconvert.run import RoundInput
from qconvert.scheme import Array

INTEGER = f"{PREFIX}.{SCHEME}"
Grid = tuple[float, int]  # scale and zero point


class Hooks(TypedDict):
    """Arguments of run()."""

    round_input: RoundInput
    round_output: RoundInput


def is_integer(graph: Graph) -> bool:
    """Whether the graph rounds activations itself, so that no session option makes its products exact."""
    return any("round_input" in node.attrs for node in graph.nodes.values())


def hooks(first: int | None, other: RoundInput) -> Hooks:
    """Round as the nodes do; `other`: how linears round that say nothing.

    first: None for tokens all at once, else how many are; each of the rest is a call of its own, with its own range.
    """

    def round_input(node: Node, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, node.attrs["round_input"], first) if "round_input" in node.attrs else other(node, x)

    def round_output(node: Node, y: torch.Tensor) -> torch.Tensor:
        return rounded(y, node.attrs["round_output"], first) if "round_output" in node.attrs else y

    return {"round_input": round_input, "round_output": round_output}


def rounded(x: torch.Tensor, grid: Attr, first: int | None) -> torch.Tensor:
    """x f32[B,T,...] on 256 codes: of a fixed grid, or of the range of each text's tokens that come together.

    Source: DynamicQuantizeLinear-11, QuantizeLinear-10; onnxruntime 1.31 computes the same bits.
    """
    scale: torch.Tensor
    if grid == DYNAMIC:
        low, high = spans(x, first)
        scale = (high - low) / 255
        scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.round(-low / scale).clamp(0, 255)
    else:
        fixed = cast(Mapping[str, float], grid)
        scale, zero = torch.tensor(fixed["scale"], dtype=x.dtype), torch.tensor(fixed["zero"], dtype=x.dtype)
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return (codes - zero) * scale


def spans(x: torch.Tensor, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Least (at most 0) and largest (at least 0) value of what each value of x is rounded with."""
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    low, high = flat.amin(-1).clamp(max=0), flat.amax(-1).clamp(min=0)
    n = low.shape[1] if first is None else first
    for bound, of in ((low, torch.amin), (high, torch.amax)):
        bound[:, :n] = of(bound[:, :n], dim=1, keepdim=True)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    return low.reshape(shape), high.reshape(shape)


# kernels ------------------------------------------------------------------------------------------


def kernel_rows(graph: Graph, read: Callable[[str, int], Array]) -> list[Row]:
    """A row for each distinct kind and row length; read(weight, n): its first n rows, packed."""
    rows, seen = [], set()
    for node in graph.nodes.values():
        if "round_input" not in node.attrs:
            continue
        weight = node.inputs[1]
        n, k = graph.nodes[weight].type.dims
        kind = "dynamic" if node.attrs["round_input"] == DYNAMIC else "qlinear" if "round_output" in node.attrs else "static"
        if (kind, k) not in seen:
            seen.add((kind, k))
            rows.append(kernel_row(kind, weight, read(weight, min(n, ROWS))))
    return rows


def kernel_row(kind: str, weight: str, packed: Array) -> Row:
    """Codes from end to end of their range, so that sums which saturate are seen, against sums in 64 bits."""
    q = LAYOUTS[INTEGER].unpack(packed)
    codes, scales = q.codes.astype(np.int64), q.levels[0].reshape(-1).astype(np.float64)
    k = codes.shape[1]
    rng = np.random.default_rng(0)
    zero, scale = 117, np.float32(0.03)
    x_codes = rng.integers(0, 256, (N_INPUTS, k))
    x_codes[:, :2] = 0, 255
    want = (x_codes - zero) @ codes.T * (np.float64(scale) * scales)
    x = ((x_codes - zero) * scale).astype(np.float32)
    grid = (float(np.abs(want).max() / 127), 128)
    got = run_kernel(kind, x, (scale, zero), codes, scales, grid)
    row = f"kernel {kind} {SCHEME} x {k}"
    limit, _ = LIMITS["kernel"]
    reason = f"on {weight}"
    if kind == "qlinear":
        steps = (np.clip(np.round(want / grid[0]), -128, 127) * grid[0] - got) / grid[0]
        apart = float(np.mean(np.abs(steps) > 0.5))
        found = judged(row, "codes that differ", apart, LIMITS["kernel, rounded"][0], reason)
    else:
        found = judged(row, "relative error", distance(got, want), limit, reason)
    return found if found.verdict == "fail" else found._replace(reason="")


def run_kernel(kind: str, x: Array, x_grid: tuple[Any, int], codes: Array, scales: Array, grid: Grid) -> Array:
    """The nodes of onnx_int8 by themselves in onnxruntime; y f32[M,N]."""
    from onnx import helper, numpy_helper

    n = len(codes)
    values = {
        "w": (codes.T + MIDDLE).astype(np.uint8), "s": scales.astype(np.float32), "z": np.array(MIDDLE, np.uint8),
        "zs": np.full(n, MIDDLE, np.uint8), "xs": np.array(x_grid[0], np.float32), "xz": np.array(x_grid[1], np.uint8),
        "ys": np.array(grid[0], np.float32), "yz": np.array(grid[1], np.uint8),
    }  # fmt: skip
    lines = {
        "dynamic": ["DynamicQuantizeLinear x a as az", "MatMulInteger a w az z sums", "Cast sums real", "Mul as s factors",
                    "Mul real factors y"],
        "static": ["QuantizeLinear x xs xz a", "DequantizeLinear a xs xz rounded", "DequantizeLinear w s zs weight",
                   "MatMul rounded weight y"],
        "qlinear": ["QuantizeLinear x xs xz a", "QLinearMatMul a xs xz w s zs ys yz b", "DequantizeLinear b ys yz y"],
    }[kind]  # fmt: skip
    nodes = []
    for op, *names in map(str.split, lines):
        n_out = 3 if op == "DynamicQuantizeLinear" else 1
        attrs: dict[str, int] = {"to": 1} if op == "Cast" else {"axis": 1} if names[0] == "w" else {}
        nodes.append(helper.make_node(op, names[:-n_out], names[-n_out:], **attrs))
    read = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(a, name) for name, a in values.items() if name in read]
    return run_nodes(nodes, {"x": x}, constants, (len(x), n))
