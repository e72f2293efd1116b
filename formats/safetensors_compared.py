"""A folder's weights as another library gives them, against the graph's: each scheme and shape once; bytes hold the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qconvert.formats.safetensors_dialects import Written
from qconvert.reals import Reals
from qconvert.report import Row, judged
from qconvert.scheme import Array

Theirs = Callable[[str, str], Array]  # weight, its scheme -> f32[N,K]
Shape = Callable[[str], tuple[int, ...]]  # of the tensor of a weight's codes


def firsts(written: Written, shape: Shape) -> Iterator[tuple[str, str]]:
    """(weight, scheme) of every weight whose scheme and shape are new."""
    seen = set[tuple[str, tuple[int, ...]]]()
    for name, scheme in written.quantized.items():
        if (key := (scheme, tuple(shape(name)))) not in seen:
            seen.add(key)
            yield name, scheme


def exact_rows(what: str, written: Written, shape: Shape, theirs: Theirs, wanted: Callable[[str], Array]) -> list[Row]:
    found = list(firsts(written, shape))
    wrong = [name for name, scheme in found if not np.array_equal(theirs(name, scheme), wanted(name))]
    what = f"{what}: {len(found)} shapes"
    return [judged(what, "weights with another value", float(len(wrong)), 0.0, min(wrong, default=""))]


def close_rows(what: str, written: Written, shape: Shape, theirs: Theirs, reals: Reals, limit: float) -> list[Row]:
    """Where the library multiplies in another order."""
    worst, where, found = 0.0, "", list(firsts(written, shape))
    for name, scheme in found:
        want = reals.real(name)
        far = float(np.max(np.abs(theirs(name, scheme) - want)) / max(float(np.abs(want).max()), 1e-30))
        if far > worst:
            worst, where = far, name
    return [judged(f"{what}: {len(found)} shapes", "greatest error, of the greatest weight", worst, limit, where)]
