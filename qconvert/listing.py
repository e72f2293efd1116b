"""What --list prints: names with their origin."""

from __future__ import annotations

from qconvert import registry
from qconvert.report import table


def lines(group: str) -> list[str]:
    if group == "types":
        return types()
    if group == "targets":
        return targets()
    return table(
        [(name, target, origin) for name, (target, origin) in sorted(registry.entries(group).items())], ""
    ).splitlines()


def types() -> list[str]:
    """Usual names of the mixes, and the tensor types with their bits per weight."""
    from qconvert.formats.gguf_mix import BITS
    from qconvert.formats.gguf_mix_rules import FILE_TYPES
    from qconvert.formats.onnx import QUANTS
    from qconvert.scheme import GGML_SCHEMES

    by_bits = {name: f"--bits {bits}" for bits, name in BITS.items()}
    mixes = [(name, f"mostly {t.default}", by_bits.get(name, "")) for name, t in FILE_TYPES.items()]
    tensors = [
        (s.name, f"{s.code_bits:g} bits, {s.bits_per_weight:g} with metadata", f"blocks of {s.block}")
        for s in GGML_SCHEMES.values()
    ]
    dialects = table([(name,) for name in registry.entries("dialects")]).splitlines()
    return ["mixes (--quant)", *table(mixes).splitlines(), "tensor types (--tensor-type)", *table(tensors).splitlines(),
            "ONNX (--to onnx --quant)", *table([(name,) for name in QUANTS]).splitlines(),
            "safetensors (--to safetensors --quant)", *dialects]  # fmt: skip


def targets() -> list[str]:
    """What each target has, what runs there, and where that is known from."""
    from qconvert.targets import LEGEND, facts, matrix, rule_lines

    return [*table(facts(), "").splitlines(), "", LEGEND, *table(matrix(), "").splitlines(), "", *rule_lines()]
