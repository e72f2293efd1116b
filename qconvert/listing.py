"""What --list prints: names, what they are, and the package that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from qconvert import registry
from qconvert.report import table
from qconvert.scheme import GGML_SCHEMES, Layout, Scheme
from qconvert.solver_spec import FOLDS


def lines(group: str) -> list[str]:
    made = {"types": types, "targets": targets, "layouts": layouts}.get(group)
    if made is not None:
        return made()
    found = [(name, *entry) for name, entry in sorted(registry.entries(group).items())]
    if group == "solvers":
        found += [(name, "a fold before a solver: awq+gptq", registry.OWN) for name in FOLDS]
        found.append(("auto", "the nearest of several on text held out", registry.OWN))
    return table(found, "").splitlines()


def layouts() -> list[str]:
    """Each with its scheme's bits per weight. Layouts that are made from a scheme's name are shown for usual ones."""
    found = []
    for name, entry in sorted(registry.entries("layouts").items()):
        known = cast(Mapping[str, Layout], registry.find("layouts", name))
        found += [(each, f"{known[each].scheme.bits_per_weight:g} bits", entry.origin) for each in known]
    return table(found, "").splitlines()


def types() -> list[str]:
    """Usual names of the mixes, and the tensor types with their bits per weight."""
    from qconvert.formats.gguf_mix import BITS
    from qconvert.formats.gguf_mix_rules import FILE_TYPES
    from qconvert.formats.onnx import QUANTS

    by_bits = {name: f"--bits {bits}" for bits, name in BITS.items()}
    mixes = [(name, f"mostly {t.default}", by_bits.get(name, "")) for name, t in FILE_TYPES.items()]
    own = [(s.name, *described(s), registry.OWN) for s in GGML_SCHEMES.values()]
    foreign = registry.entries("schemes").items()
    others = [(name, *described(cast(Scheme, registry.find("schemes", name))), entry.origin) for name, entry in foreign]
    dialects = [(name, entry.origin) for name, entry in registry.entries("dialects").items()]
    parts: dict[str, Sequence[Sequence[str]]] = {
        "mixes (--quant)": mixes, "tensor types (--tensor-type)": own, "schemes of other packages": others,
        "ONNX (--to onnx --quant)": [(name,) for name in QUANTS], "safetensors (--to safetensors --quant)": dialects,
    }  # fmt: skip
    return [line for title, rows in parts.items() if rows for line in (title, *table(rows).splitlines())]


def described(s: Scheme) -> tuple[str, str]:
    return f"{s.code_bits:g} bits, {s.bits_per_weight:g} with metadata", f"blocks of {s.block}"


def targets() -> list[str]:
    """What each target has, what runs there, and where that is known from."""
    from qconvert.targets import LEGEND, facts, matrix, rule_lines

    return [*table(facts(), "").splitlines(), "", LEGEND, *table(matrix(), "").splitlines(), "", *rule_lines()]
