"""How fast each pair of a head turns with the position, and what the ways to stretch a context make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from qconvert.errors import GraphError
from qconvert.graph import Attr
from qconvert.scheme import Real

Scaling = Mapping[str, Attr]


def frequencies(
    head_dim: int, theta: float, scaling: Scaling | None, n_tokens: int, dtype: type[np.floating] = np.float32
) -> tuple[Real, float]:
    """Radians per position f[head_dim/2], and the factor on cos and sin, for a text of n_tokens.

    scaling: None, or {"type": one of ROPE_SCALINGS, "factor", "original_context", ...}.
    Source: transformers/modeling_rope_utils.py; the papers are linked there.
    """
    exponents: Real = np.arange(0, head_dim, 2).astype(dtype) / dtype(head_dim)
    if scaling is None:
        return 1.0 / theta**exponents, 1.0
    kind = scaling["type"]
    if kind not in ROPE_SCALINGS:
        raise GraphError(f"unknown rope scaling {kind!r}", hint=f"there are {', '.join(ROPE_SCALINGS)}")
    return ROPE_SCALINGS[str(kind)](exponents, theta, scaling, n_tokens)


def _of(scaling: Scaling, key: str, default: float = 0.0) -> float:
    value = scaling.get(key)
    assert value is None or isinstance(value, int | float)
    return default if value is None else value


def _rope_linear(exponents: Real, theta: float, scaling: Scaling, n_tokens: int) -> tuple[Real, float]:
    return 1.0 / theta**exponents / _of(scaling, "factor"), 1.0


def _rope_dynamic(exponents: Real, theta: float, scaling: Scaling, n_tokens: int) -> tuple[Real, float]:
    """NTK-aware: the base grows with the text once it is longer than the original context."""
    factor, context, dim = _of(scaling, "factor"), _of(scaling, "original_context"), 2 * len(exponents)
    stretch = factor * max(n_tokens, context) / context - (factor - 1)
    return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0


def _rope_yarn(exponents: Real, theta: float, scaling: Scaling, n_tokens: int) -> tuple[Real, float]:
    """Fast dimensions keep their frequency, slow ones are divided by factor, a linear ramp lies between."""
    factor, context, dim = _of(scaling, "factor"), _of(scaling, "original_context"), 2 * len(exponents)

    def dimension(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(_of(scaling, "beta_fast", 32)), dimension(_of(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    keep = 1 - np.clip((np.arange(dim // 2, dtype=exponents.dtype) - low) / (high - low), 0, 1)
    wavelength = theta**exponents
    return (1.0 / (factor * wavelength)) * (1 - keep) + (1.0 / wavelength) * keep, yarn_attention_factor(scaling)


def yarn_attention_factor(scaling: Scaling) -> float:
    """What yarn multiplies cos and sin by: as given, or from factor."""
    factor = _of(scaling, "factor")
    return _of(scaling, "attention_factor", 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0)


def _rope_llama3(exponents: Real, theta: float, scaling: Scaling, n_tokens: int) -> tuple[Real, float]:
    """Long waves are divided by factor, short ones kept, those between interpolated."""
    factor, context = _of(scaling, "factor"), _of(scaling, "original_context")
    low, high = _of(scaling, "low_freq_factor"), _of(scaling, "high_freq_factor")
    plain = 1.0 / theta**exponents
    turns = context / (2 * math.pi / plain)  # of each wave within the original context
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    return np.where(turns < low, plain / factor, np.where(turns > high, plain, between)), 1.0


ROPE_SCALINGS: dict[str, Callable[[Real, float, Scaling, int], tuple[Real, float]]] = {
    "linear": _rope_linear,
    "dynamic": _rope_dynamic,
    "yarn": _rope_yarn,
    "llama3": _rope_llama3,
}
