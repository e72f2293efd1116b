"""MatMulNBits' layout with scales in f16, the type that they must have beside f16 activations.

onnx_f16.SCHEME is onnx.SCHEME with half the bytes of its second plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.onnx_layouts import LAYOUTS as WIDE
from qconvert.formats.onnx_layouts import Part
from qconvert.scheme import Bytes, Layout, QTensor, Scheme

PREFIX = "onnx_f16"


@dataclass(frozen=True)
class HalfScales(Layout):
    """See MatMulNBits; `block` is what one group takes, but for its zero point."""

    def planes(self, k: int) -> tuple[int, ...]:
        codes, scales, *zeros = WIDE[f"onnx.{self.scheme.name}"].planes(k)
        return (codes, scales // 2, *zeros)

    def parts(self, n: int, k: int) -> tuple[Part, ...]:
        """See MatMulNBits.parts."""
        codes, scales, *zeros = WIDE[f"onnx.{self.scheme.name}"].parts(n, k)
        return (codes, scales._replace(dtype="f16"), *zeros)

    def row_nbytes(self, k: int) -> int:
        return sum(self.planes(k))

    def row_weights(self, nbytes: int) -> int:
        """The inverse of row_nbytes. InputError where no row has that many bytes."""
        bits = 8 * self.block.itemsize + sum(level.bits for level in self.scheme.levels if level.role == "zero")
        k = 8 * nbytes // bits * self.scheme.block
        if self.row_nbytes(k) != nbytes:
            raise InputError(f"{self.name}: no row takes {nbytes} bytes")
        return k


def cut(rows: Bytes, widths: tuple[int, ...]) -> list[Bytes]:
    return [np.ascontiguousarray(p) for p in np.split(rows, np.cumsum(widths)[:-1], axis=1)]


def widened(name: str, packed: Bytes) -> Bytes:
    """Rows of onnx_f16 as those of onnx: the scales in f32, of the same value."""
    layout = LAYOUTS[name]
    codes, scales, *zeros = cut(packed, layout.planes(layout.row_weights(packed.shape[1])))
    return np.concatenate([codes, scales.view("<f2").astype("<f4").view(np.uint8), *zeros], axis=1)


def _pack_half(name: str, q: QTensor) -> Bytes:
    if (why := LAYOUTS[name].accepts(q.scheme)) is not None:
        raise UnsupportedError(why)
    wide = WIDE[f"onnx.{q.scheme.name}"]
    codes, scales, *zeros = cut(wide.pack(q), wide.planes(q.codes.shape[1]))
    return np.concatenate([codes, scales.view("<f4").astype("<f2").view(np.uint8), *zeros], axis=1)


def _unpack_half(name: str, packed: Bytes) -> QTensor:
    return WIDE[f"onnx.{LAYOUTS[name].scheme.name}"].unpack(widened(name, packed))


def _half(scheme: Scheme) -> HalfScales:
    name = f"{PREFIX}.{scheme.name}"
    block = np.dtype([("codes", "u1", scheme.block * scheme.bits // 8), ("scale", "<f2")])
    return HalfScales(name, scheme, block, partial(_pack_half, name), partial(_unpack_half, name))


def whole_zeros(scheme: Scheme) -> bool:
    """No zero points, or such that are codes."""
    return not scheme.table and scheme.zero_point != "float"


LAYOUTS: dict[str, HalfScales] = {
    layout.name: layout for layout in (_half(wide.scheme) for wide in WIDE.values() if whole_zeros(wide.scheme))
}
