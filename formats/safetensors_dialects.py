"""The ways to say quantized weights in a folder of safetensors: what each promises, and their names.

A dialect is a scheme for each weight, a layout (which tensors hold it, see tensor_layouts.py), what config.json says of it,
and the library that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

from qconvert import registry
from qconvert.errors import UsageError
from qconvert.graph import Attr, Node
from qconvert.moves import moves
from qconvert.passes.pack import Pack
from qconvert.passes.quantize import Quantize
from qconvert.pipeline import Pass
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.scheme import Scheme, scheme_of


class Wanted(NamedTuple):
    """What is known where a weight's scheme is chosen: group and bits that were asked for, and the dtype of plain weights.

    any_kind: zero points were not spoken of, so codes that a source has are kept with and without.
    """

    group: int | None
    dtype: str
    any_kind: bool = True
    bits: int | None = None


class Written(NamedTuple):
    """What is in a folder. quantized: weight -> scheme; left: modules of linear maps whose weights are plain."""

    quantized: Mapping[str, str]
    left: tuple[str, ...]
    wanted: Wanted


class Dialect(Protocol):
    """name: as --quant has it; layouts: the prefix of its layouts, a table of the registry; solver: of its codes."""

    @property
    def name(self) -> str: ...
    @property
    def solver(self) -> str: ...
    @property
    def layouts(self) -> str: ...

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        """For a weight [n, k]; None where it cannot be said: it stays plain. UsageError for a group that none has."""
        ...

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        """The scheme in which codes of a source keep their values; None where there is none, or another was asked for."""
        ...

    def config(self, written: Written) -> Mapping[str, object]:
        """Keys for config.json."""
        ...

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        """The weights as the dialect's own library reads them, against the graph's."""
        ...

    def loading(self, written: Written) -> Loading:
        """How transformers runs it."""
        ...


@runtime_checkable
class OwnPasses(Protocol):
    """A dialect whose weights are quantized otherwise than to the least squared error, or have more than codes and levels."""

    def passes(self, types: Mapping[str, str], wanted: Wanted) -> tuple[Pass, ...]: ...


@runtime_checkable
class OfBits(Protocol):
    """A dialect whose codes have the bits that the user says, of these."""

    @property
    def allowed(self) -> tuple[int, ...]: ...


@runtime_checkable
class FixedRanges(Protocol):
    """A dialect that has activations of ranges taken beforehand from a text, where `fixed` says of what kind."""

    @property
    def fixed(self) -> str | None: ...

    def range_of(self, low: float, high: float, wanted: Wanted) -> dict[str, Attr]:
        """{name, dtype, value} of the tensor [1] beside the weight of a linear that reads values from low to high."""
        ...


@runtime_checkable
class RoundsActivations(Protocol):
    """A dialect whose runtime rounds what linears read, where `inputs` says how: compressed-tensors' QuantizationArgs."""

    @property
    def inputs(self) -> Mapping[str, object] | None: ...

    def rounding(self, written: Written) -> Loading:
        """How transformers runs it with activations rounded."""
        ...


@runtime_checkable
class OwnConfig(Protocol):
    """A dialect whose reader wants other keys of config.json than transformers, and says so in the files' metadata."""

    @property
    def metadata(self) -> str: ...

    def restated(self, config: Mapping[str, object]) -> dict[str, object]: ...


@runtime_checkable
class Describing(Protocol):
    """A dialect whose reader finds in the files' metadata what the tensors are."""

    def described(self, shapes: Mapping[str, tuple[int, ...]], written: Written) -> dict[str, str]: ...


def passes_of(
    dialect: Dialect, types: Mapping[str, str], wanted: Wanted, together: Mapping[str, tuple[str, ...]]
) -> tuple[Pass, ...]:
    if isinstance(dialect, OwnPasses):
        return dialect.passes(types, wanted)
    return Quantize(dialect.name, dialect.solver, types, together), Pack(dialect.layouts)


@dataclass(frozen=True)
class Loading:
    """arguments: of from_pretrained, made where transformers is there; missing: why it cannot be run.

    rounded: dtype that dequantized weights are rounded to as they are loaded; then: the model's method that dequantizes it;
    unused: last names of tensors that this way of loading leaves out; runtime: what runs it; round_input: what its linears
    make of their activations; eager: nothing is compiled.
    """

    arguments: Mapping[str, Any]
    rounded: str | None = None
    missing: str | None = None
    kind: str = "runtime transformers"
    then: str | None = None
    unused: tuple[str, ...] = ()
    runtime: Literal["transformers", "mlx-lm", "hqq"] = "transformers"
    round_input: Callable[[Node, Any], Any] | None = None
    eager: bool = False


def first_that_holds(stored: Scheme, names: Iterable[str]) -> str | None:
    """Of schemes by name, the first in which every weight of `stored` keeps its value."""
    return next((name for name in names if (found := scheme_of(name)) and moves(stored, found)), None)


class Plain:
    """No quantized weights: what a merge alone gives."""

    layouts, solver = "", "mse"

    def __init__(self, dtype: str) -> None:
        self.name = dtype

    def scheme(self, n: int, k: int, wanted: Wanted) -> str | None:
        return None

    def carrying(self, stored: Scheme, n: int, k: int, wanted: Wanted) -> str | None:
        return None

    def config(self, written: Written) -> Mapping[str, object]:
        return {}

    def byte_rows(self, folder: Path, reals: Reals, written: Written) -> list[Row]:
        return []

    def loading(self, written: Written) -> Loading:
        return Loading({})


PLAIN = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


FP32, FP16, BF16 = map(Plain, PLAIN)


def dialect_of(name: str) -> Dialect:
    """UsageError with the names that there are."""
    known = registry.entries("dialects")
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"--quant {name}: safetensors has no such type here", hint=hint)
    return cast(Dialect, registry.find("dialects", name.lower()))
