"""What onnxruntime computes slowly, and what the installed one cannot compute at all.

Slow paths are a table of measurements; missing kernels are found in its own registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qconvert.errors import UnsupportedError
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.scheme import Scheme, scheme_of

if TYPE_CHECKING:
    from qconvert.formats.onnx_proto import Model

PROVIDER = "CPUExecutionProvider"
MEASURED = "onnxruntime 1.31.1, one token, 2048 x 2048"


class Cliff(NamedTuple):
    """A path that takes `factor` times as long as that of `fast` at accuracy level 4; why, and the way round it."""

    factor: int
    fast: str
    why: str
    hint: str


def cliff(scheme: Scheme, level: int) -> Cliff | None:
    """Of a product with weights of this scheme at an accuracy level.

    Measured on one core (AVX2), ms per product: int4_g32 0.22, at level 0 0.84 (no cliff); nf4_g32 5.7, fp4_g32 4.2;
    uint4f_g32 13, uint2f_g32 5.2; int2_g32 0.157, g64 0.153, g128 0.113, but g16 27, g256 17, and at level 0 16 to 32;
    int8_g32 0.26, at level 0 26 (g16 30, g256 11). With AVX-512 the factors are 40 for nf4 and 100 to 500 for the others.
    """
    fast = f"int{scheme.bits}_g32"
    if scheme.table:
        return Cliff(20, fast, "MatMulBnb4 has no fast kernel", "--quant int4")
    if scheme.zero_point == "float":
        return Cliff(30 if scheme.bits == 2 else 60, fast, "float zero points have no fast kernel", "--zero-point int")
    if scheme.bits == 2 and scheme.block in (16, 256):
        return Cliff(100, fast, f"2 bits in groups of {scheme.block} have no fast kernel", "--group 32, 64 or 128")
    if scheme.bits != 4 and level != 4:
        return Cliff(100, fast, f"{scheme.bits} bits have a fast kernel at accuracy level 4 alone", "--accuracy-level 4")
    return None


def slow_paths(names: Iterable[str], level: int) -> tuple[str, ...]:
    """What to tell of the schemes that linears have, one line a cliff."""
    said = {}
    for name in sorted(set(names)):
        scheme = scheme_of(name)
        if scheme is not None and (found := cliff(scheme, level)):
            slower = f"about {found.factor} times the time of {found.fast} at level 4 ({MEASURED})"
            said[found] = f"{name} is slow: {found.why}; {slower}; {found.hint} is fast"
    return tuple(said.values())


# kernels that there are ---------------------------------------------------------------------------


def refuse_missing(model: Model) -> None:
    """UnsupportedError for a node that the installed onnxruntime has no CPU kernel for. Without onnxruntime: nothing.

    Only its own nodes: a standard op without a kernel is computed by its definition.
    """
    runtime = OnnxRuntime()
    if runtime.missing():
        return
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    from qconvert.formats.onnx_proto import CONTRIB, types_of

    schemas = {schema.name: schema for schema in state.get_all_operator_schema() if schema.domain == CONTRIB}
    kernels = [k for k in state.get_all_opkernel_def() if k.domain == CONTRIB and k.provider == PROVIDER]
    types = types_of(model)
    for node in model.nodes:
        given = {i: types[name] for i, name in enumerate(node.input) if name in types}
        if node.domain == CONTRIB and not has_kernel(node.op_type, given, schemas, kernels):
            kinds = ", ".join(sorted(set(given.values())))
            raise UnsupportedError(
                f"{node.name}: onnxruntime {runtime.version()} has no CPU kernel of {node.op_type} for {kinds}",
                hint="a newer onnxruntime may have it; --no-check writes the file all the same",
            )


def has_kernel(op: str, given: Mapping[int, str], schemas: Mapping[str, Any], kernels: Sequence[Any]) -> bool:
    """given: the type of each input by its place, as onnxruntime spells it."""
    if op not in schemas:
        return False
    formal = schemas[op].inputs
    letters = {formal[min(i, len(formal) - 1)].typeStr: kind for i, kind in given.items()}
    named = [k for k in kernels if k.op_name == op]
    return any(all(kind in k.type_constraints.get(t, (kind,)) for t, kind in letters.items()) for k in named)
