"""Rope scaling as GGUF stores it, back to the settings it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qconvert.errors import UnsupportedError
from qconvert.formats.gguf_arch import llama3_factors

FREQUENCIES = "rope_freqs.weight"
HIGH = 4.0  # Llama 3's own high_freq_factor


def yarn_scaling(kv: Mapping[str, object], context: int) -> dict[str, object]:
    """The inverse of gguf_arch.yarn_keys."""
    factor = kv.get("rope.scaling.factor", 1.0)
    original = kv.get("rope.scaling.original_context_length", context)
    out: dict[str, object] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    out |= {k: kv[f"rope.scaling.yarn_{k}"] for k in ("beta_fast", "beta_slow") if f"rope.scaling.yarn_{k}" in kv}
    relative = kv.get("rope.scaling.attn_factor")
    if isinstance(relative, float) and isinstance(factor, float):
        out["attention_factor"] = float(f"{relative * (0.1 * math.log(factor) + 1):.6g}")  # f32 has no more digits
    return out


def llama3_scaling(factors: list[float], theta: float, head_dim: int, where: str) -> dict[str, object] | None:
    """The llama3 settings that give these factors, with a low_freq_factor of 1 as every such model has it; None for ones.

    Frequencies above original / high are kept, those below original are divided by `factor`, and between them
    original / wavelength runs linearly with 1 / factor.  UnsupportedError for factors that come from no such settings.
    """
    if all(f == 1 for f in factors):
        return None
    factor = float(f"{max(factors):.6g}")
    waves = [2 * math.pi * theta ** (i / head_dim) for i in range(0, head_dim, 2)]
    shares = [(1 / f - 1 / factor) / (1 - 1 / factor) for f in factors]
    between = [(w, s) for w, s in zip(waves, shares, strict=False) if 1e-6 < s < 1 - 1e-6]
    for original, high in candidates(between, waves, factors):
        found: dict[str, object] = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high, "original_context": original}
        again = llama3_factors(scaling, theta, head_dim)
        if len(again) == len(factors) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(again, factors, strict=True)):
            return found
    raise UnsupportedError(f"{where}: {FREQUENCIES} divides frequencies as no llama3 scaling does, which is not read")


def candidates(between: list[tuple[float, float]], waves: list[float], factors: list[float]) -> list[tuple[int, float]]:
    """(original context, high_freq_factor): share = (original / wavelength - 1) / (high - 1)."""
    out = []
    if len(between) > 1:
        (w0, s0), (w1, s1) = between[0], between[-1]
        slope = (s0 - s1) / (1 / w0 - 1 / w1)  # original / (high - 1)
        high = 1 + 1 / (slope / w0 - s0)
        out.append((round(slope * (high - 1)), round(high, 3)))
    if between:
        wave, share = between[0]
        out.append((round((share * (HIGH - 1) + 1) * wave), HIGH))
    else:
        kept = [w for w, f in zip(waves, factors, strict=False) if f == 1]
        lowest = HIGH * max(kept, default=1.0)
        out.append((1 << math.ceil(math.log2(lowest)), HIGH))
    return out
