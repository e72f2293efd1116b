"""What an operand means, in numpy and float64, bit by bit: nothing of it is shared with the kernels that it judges."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qconvert.kernels.gpu.operand import Codes, Metadata, Operand, Part, real
from qconvert.scheme import Array

F64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the row of a word's nibble i


def code_at(codes: Codes, r: Index, c: Index) -> Index:
    """The codes of rows r and columns c, which broadcast."""
    words, bits, word = codes.words, codes.bits, codes.word
    if bits == word:
        return words[r, c].astype(np.int64)
    r, c = np.broadcast_arrays(r, c)
    out = np.zeros(r.shape, np.int64)
    for i in range(bits):
        row, column = r, c
        if codes.order.startswith("parts"):
            part, row = np.divmod(r, len(words))
            bit = (word // bits - 1 - part if codes.order == "parts-high" else part) * bits + i
        elif codes.order == "rows-awq":
            row, bit = r // 8, np.argsort(AWQ)[r % 8] * 4 + i
        elif codes.order == "rows":
            row, bit = np.divmod(r * bits + i, word)
        elif codes.order == "columns":
            column, bit = np.divmod(c * bits + i, word)
        else:
            column, first = np.divmod(c * bits, word)
            bit = word - bits - first + i
        out += (words[row, column].astype(np.int64) >> bit & 1) << i
    return (out + codes.add) % (1 << bits)


def number_at(m: Metadata, r: Index, c: Index) -> F64:
    """The metadata of blocks r, c."""
    n_rows, n_columns = (m.data.words if isinstance(m.data, Codes) else m.data).shape
    r, c = (r if n_rows > 1 else r * 0), (c if n_columns > 1 else c * 0)
    data = code_at(m.data, r, c) if isinstance(m.data, Codes) else m.data[r, c]
    value = (data if m.kind == "int" else real(data, m.kind)).astype(np.float64)
    if m.second is not None:
        s, j = m.second, (r * n_columns + c) // m.second.group % m.second.scale.size
        value = value if s.table is None else s.table.reshape(-1)[data].astype(np.float64)
        value = value if s.zero is None else value - s.zero.reshape(-1)[j]
        value = value * s.scale.reshape(-1)[j] + s.offset
    return value / m.divisor


def codes(w: Operand, part: Part | None = None) -> Array:
    """i64[n,k]: codes; of small floats their bits as they are stored."""
    r, c = _places(w, part)
    return code_at(w.codes, r, c) if isinstance(w.codes, Codes) else w.codes[r, c]


def dense(w: Operand, part: Part | None = None) -> F64:
    """f64[n,k], without the low-rank part."""
    q, (r, c) = codes(w, part), _places(w, part)
    value = np.asarray(w.table)[q] if w.table else q if isinstance(w.codes, Codes) else real(q, w.kind)
    out = value.astype(np.float64) - w.centre
    rows, columns = w.block
    block = r // rows, c // columns if columns else c * 0
    if w.g_idx is not None:
        block = block[0], w.g_idx[c].astype(np.int64)
    if isinstance(w.zero, Metadata):
        out = out - number_at(w.zero, *block)
    if w.scale is not None:
        out = out * number_at(w.scale, *block)
    return out if w.offset is None else out + number_at(w.offset, *block)


def product(x: Array, w: Operand, part: Part | None = None) -> F64:
    """f64[M,n]: x [M,k] by the weight, with its low-rank part."""
    first, last, k = part or w.whole
    x64 = x.astype(np.float64)
    y = x64 @ dense(w, part).T
    if w.low_rank is not None:
        a, b = (real(factor, w.low_rank.kind).astype(np.float64) for factor in (w.low_rank.a, w.low_rank.b))
        y = y + w.low_rank.scale * (x64 @ a[:, :k].T @ b[first:last].T)
    return y


def _places(w: Operand, part: Part | None) -> tuple[Index, Index]:
    """Row and column, in the matrix that was quantized, of each weight."""
    first, last, k = part or w.whole
    n = np.arange(first, last)[:, None]
    if w.width is None:
        return n, np.arange(k)[None, :]
    r, c = np.divmod(n * w.shape[1] + np.arange(k), w.width)
    return r, c
