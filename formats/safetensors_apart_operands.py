"""Weights whose layout leaves tensors to other values of the graph, and bitsandbytes' rows, as the Triton kernels see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qconvert.scheme import Array
from qconvert.tensor_layouts import Tensors

if TYPE_CHECKING:
    from qconvert.kernels.gpu.operand import Operand


def apart_operand(name: str, layout: Tensors, data: Mapping[str, Array], n: int, k: int) -> Operand | None:
    """data: the module's tensors by their names behind it, bf16 as its bits. None for layouts that no kernel reads."""
    make = {"hqq": hqq, "bitnet": bitnet, "bnb_int8": rows_of_8}.get(layout.name.partition(".")[0])
    if layout.name.startswith("bnb_nested_"):
        make = nested
    return make(name, layout, data, n, k) if make else None


def nested(name: str, layout: Tensors, data: Mapping[str, Array], n: int, k: int) -> Operand:
    """Blocks are of the flattened weight, and so are those of the second level."""
    from qconvert.kernels.gpu.operand import Codes, Metadata, Operand, Second

    scheme = layout.scheme
    state = next(value for key, value in data.items() if "quant_state" in key)
    second = Second(
        data["weight.nested_absmax"], 256, offset=float(json.loads(state.tobytes())["nested_offset"]),
        table=data["weight.nested_quant_map"],
    )  # fmt: skip
    scale = Metadata(data["weight.absmax"].reshape(1, -1), "int", second)
    codes = Codes(data["weight"].reshape(1, -1), 4, "columns-high")
    return Operand(name, (n, k), codes, "table", scale=scale, block=(1, scheme.block), width=n * k, table=scheme.table)


def hqq(name: str, layout: Tensors, data: Mapping[str, Array], n: int, k: int) -> Operand:
    from qconvert.kernels.gpu.operand import Codes, Metadata, Operand

    group, kind = layout.scheme.block, layout.scheme.levels[0].dtype
    scale, zero = (Metadata(data[part], kind) for part in ("scale", "zero"))  # type: ignore[arg-type]
    codes = Codes(data["W_q"], layout.scheme.bits, "parts-high")
    return Operand(name, (n, k), codes, "affine", scale=scale, zero=zero, block=(1, None), width=group)


def bitnet(name: str, layout: Tensors, data: Mapping[str, Array], n: int, k: int) -> Operand:
    from qconvert.kernels.gpu.operand import Codes, Metadata, Operand

    scale = Metadata(data["weight_scale"].reshape(1, 1), layout.scheme.levels[0].dtype)  # type: ignore[arg-type]
    return Operand(name, (n, k), Codes(data["weight"], 2, "parts"), "ternary", scale=scale, block=(n, None))


def rows_of_8(name: str, layout: Tensors, data: Mapping[str, Array], n: int, k: int) -> Operand:
    from qconvert.kernels.gpu.operand import Codes, Metadata, Operand

    return Operand(name, (n, k), Codes(data["weight"], 8), scale=Metadata(data["SCB"][:, None], divisor=127.0))
