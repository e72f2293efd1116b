"""A folder's weights as the Triton kernels see them, and each distinct layout and shape of them multiplied by these kernels.

On a GPU where there is one, else by Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from qconvert.formats.safetensors_apart_operands import apart_operand
from qconvert.formats.safetensors_files import opened_tensors
from qconvert.graph import Graph
from qconvert.layouts import layout_of
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.scheme import Array
from qconvert.tensor_layouts import Part, Tensors

if TYPE_CHECKING:
    from qconvert.kernels.gpu.operand import Codes, Grid, Kind, Metadata, Operand

CLOSE = 2.0**-20  # a weight of the kernel against the graph's, in parts of the greatest: roundings of f32
INTERPRETED = 1 << 22  # weights that the interpreter dequantizes in about a minute


def kernel_rows(folder: Path, graph: Graph, reals: Reals) -> list[Row]:
    """A row for each layout and shape; skipped where there is no Triton, or no kernel."""
    packed: dict[tuple[str, tuple[int, ...]], str] = {}
    for name in graph.parameters():
        if (layout := layout_name(graph, name)) is not None:
            packed.setdefault((layout, graph.nodes[name].type.dims), name)
    if not packed:
        return []
    if find_spec("triton") is None:
        return [Row("kernels of Triton", "not run", None, None, "skip", "triton is not installed")]
    from qconvert.kernels.gpu.check import product_error
    from qconvert.kernels.gpu.launch import dequantize
    from qconvert.kernels.gpu.operand import Part as Rows

    rows = []
    for (dtype, dims), name in packed.items():
        what = f"kernel {dtype.partition('.')[2]} {dims[0]} x {dims[1]}"
        found = operand(folder, name, cast(Tensors, layout_of(dtype)), dims[0], dims[1])
        if found is None:
            rows.append(Row(what, "not run", None, None, "skip", f"no kernel reads the tensors of {dtype.partition('.')[0]}"))
            continue
        some = Rows(max(0, dims[0] - 16), dims[0], min(dims[1], 512))
        want = reals.real(name, some.first, some.last)[:, : some.columns]
        off = float(np.abs(dequantize(found, some) - want).max() / (np.abs(want).max() or 1.0))
        error = product_error(found)
        if off > CLOSE or error.n_wrong or error.weights > CLOSE:
            rows.append(judged(what, "weights, relative", max(off, error.weights, float(error.n_wrong)), CLOSE, name))
        else:
            rows.append(judged(f"{what}, {error.contract}", "product, relative", error.product, error.bound))
    return rows


def operand(folder: Path, name: str, layout: Tensors, n: int, k: int) -> Operand | None:
    """None where a layout keeps what no kernel takes."""
    module, scheme = name.removesuffix(".weight"), layout.scheme
    with opened_tensors(folder) as tensors:
        if layout.beside or scheme.name == "int8_scb":
            keys = [key for key in tensors if key.startswith(f"{module}.")]
            own = {key.removeprefix(f"{module}."): array(tensors.tensor(key)) for key in keys}
            return apart_operand(name, layout, own, n, k)
        data = {part.name: array(tensors.tensor(f"{module}.{part.name}")) for part in layout.parts}
    from qconvert.kernels.gpu.operand import Operand

    parts = {None if part.level is None or part.fixed else part.level: part for part in layout.parts if not part.fixed}
    found = codes(parts[None], data, layout, n)
    if found is None:
        return None
    by_role = {level.role: i for i, level in enumerate(scheme.levels)}
    divisor = float(data[parts[by_role["divisor"]].name].reshape(-1)[0]) if "divisor" in by_role else 1.0
    scale = scheme.levels[by_role["scale"]]
    block = (n if scale.rows is None else scale.rows, scale.group)
    levels = {role: metadata(parts[i], data, n) for role, i in by_role.items() if role not in ("divisor", "zero")}
    of_scale = levels["scale"]
    if divisor != 1.0:
        of_scale = replace(of_scale, divisor=divisor)
    stored = parts[None]
    unsigned = stored.kind in ("low", "high") or scheme.bits < 8 or (stored.plus + scheme.centre) % 256 == 128
    added = 0 if stored.kind == "low" else stored.plus  # which codes take off again
    zero: Metadata | float = float((scheme.centre + added) % 256 if unsigned and not scheme.table else 0)
    if "zero" in by_role:
        zero = metadata(parts[by_role["zero"]], data, n, scheme.bits)
    if len(scheme.table) == 256:  # small floats, as they are
        values = data[stored.name].reshape(n, k)
        return Operand(name, (n, k), values, "float", "e4m3", of_scale, 0.0, None, block) if is_e4m3(stored) else None
    grid: Grid = "ternary" if scheme.name.startswith("ternary") else "table" if scheme.table else "affine"
    return Operand(
        name, (n, k), found, grid, scale=of_scale, zero=zero, offset=levels.get("offset"), block=block,
        table=scheme.table if grid == "table" else (),
    )  # fmt: skip


def is_e4m3(part: Part) -> bool:
    return part.dtype == "F8_E4M3"


def array(tensor: object) -> Array:
    """A torch tensor's bytes; bf16 and small floats as their bits."""
    import torch

    assert isinstance(tensor, torch.Tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    if tensor.dtype.is_floating_point and tensor.itemsize == 1:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.numpy()


def codes(part: Part, data: Mapping[str, Array], layout: Tensors, n: int) -> Codes | None:
    from qconvert.kernels.gpu.operand import Codes

    words, bits = data[part.name], layout.scheme.bits
    match part.kind, part.bits, part.word, bool(part.order):
        case "low", None, None, False:
            return Codes(words.view(np.uint8) if part.plus else words, bits, "columns", -part.plus)
        case "low", 32, None, False:
            return Codes(words.T, bits, "columns")
        case "high", None, None, False:
            return Codes(words.reshape(n, -1), bits, "columns-high")
        case "u1", None, None, False if bits == 8:
            return Codes(words, 8)
        case "u1", _, None, True:
            return Codes(words.T, bits, "rows-awq")
        case "u1", int(), None, False:
            return Codes(words.T, bits, "rows")
        case "u1", int(), int(), False:
            return Codes(words, bits, "rows")
    return None


def metadata(part: Part, data: Mapping[str, Array], n: int, bits: int = 8) -> Metadata:
    from qconvert.kernels.gpu.operand import Metadata

    value = data[part.name]
    if part.kind in ("u1", "low"):
        held = codes_of_zeros(part, value, bits)
        return Metadata(held, "int")
    kind = cast("Kind", "e4m3" if part.kind == "f8_e4m3" else part.kind)
    if part.bits is not None:
        return Metadata(value.T, kind)
    lines = 1 if part.rows is None else -(-n // part.rows)
    return Metadata(value.reshape(lines, -1), kind)


def codes_of_zeros(part: Part, value: Array, bits: int) -> Codes:
    from qconvert.kernels.gpu.operand import Codes

    if part.word is not None:
        return Codes(value, bits, "rows", -part.plus)
    return Codes(value.T, bits, "rows-awq" if part.order else "rows", -part.plus)


class Dequantized:
    """Weights as the kernel dequantizes them, whole; others as `reals` has them."""

    def __init__(self, folder: Path, graph: Graph, reals: Reals) -> None:
        self.folder, self.graph, self.reals = folder, graph, reals

    def real(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        kind, layout, found = self.graph.nodes[name].type, layout_name(self.graph, name), None
        if layout is not None:
            n, k = kind.dims
            found = operand(self.folder, name, cast(Tensors, layout_of(layout)), n, k)
        if found is None:
            return self.reals.real(name, begin, end)
        from qconvert.kernels.gpu.launch import dequantize
        from qconvert.kernels.gpu.operand import Part as Rows

        return dequantize(found, Rows(begin, kind.dims[0] if end is None else end, kind.dims[1]))


def why_not_whole(graph: Graph) -> str | None:
    """Why the interpreter does not run the whole model, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    packed = [name for name in graph.parameters() if layout_name(graph, name) is not None]
    n = sum(int(np.prod(graph.nodes[name].type.dims)) for name in packed)
    if not packed:
        return "no kernel reads its tensors"
    return None if n <= INTERPRETED else f"{n:,} weights are too many for Triton's interpreter"


def layout_name(graph: Graph, name: str) -> str | None:
    """Of a weight that is packed, or that a folder holds packed; None for lattices, which no kernel here reads."""
    node = graph.nodes[name]
    layout = str(node.attrs["layout"]) if node.op == "assemble" else node.type.dtype
    return layout if "." in layout and not layout_of(layout).scheme.lattice else None
