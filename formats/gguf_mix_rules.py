"""The rules of llama-quantize's mixes: which types the tensors of a file get that are not of its default.

Source: llama.cpp src/llama-quant.cpp, llama_ftype_get_default_type, llama_tensor_get_type_impl and tensor_requires_imatrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class FileType(NamedTuple):
    """A mix: its usual name, the value of general.file_type, and the type of a tensor that no rule names."""

    name: str
    id: int
    default: str


FILE_TYPES: Mapping[str, FileType] = {
    name: FileType(name, id_, default)
    for name, id_, default in (
        ("F32", 0, "f32"),
        ("F16", 1, "f16"),
        ("BF16", 32, "bf16"),
        ("Q8_0", 7, "q8_0"),
        ("Q4_0", 2, "q4_0"),
        ("Q4_1", 3, "q4_1"),
        ("Q5_0", 8, "q5_0"),
        ("Q5_1", 9, "q5_1"),
        ("Q2_K", 10, "q2_k"),
        ("Q2_K_S", 21, "q2_k"),
        ("Q3_K_S", 11, "q3_k"),
        ("Q3_K_M", 12, "q3_k"),
        ("Q3_K_L", 13, "q3_k"),
        ("Q4_K_S", 14, "q4_k"),
        ("Q4_K_M", 15, "q4_k"),
        ("Q5_K_S", 16, "q5_k"),
        ("Q5_K_M", 17, "q5_k"),
        ("Q6_K", 18, "q6_k"),
        ("TQ1_0", 36, "tq1_0"),
        ("TQ2_0", 37, "tq2_0"),
        ("MXFP4_MOE", 38, "mxfp4"),
        ("Q1_0", 40, "q1_0"),
        ("Q2_0", 41, "q2_0"),
        ("IQ1_S", 24, "iq1_s"),
        ("IQ1_M", 31, "iq1_m"),
        ("IQ2_XXS", 19, "iq2_xxs"),
        ("IQ2_XS", 20, "iq2_xs"),
        ("IQ2_S", 28, "iq2_xs"),
        ("IQ2_M", 29, "iq2_s"),
        ("IQ3_XXS", 23, "iq3_xxs"),
        ("IQ3_XS", 22, "iq3_s"),
        ("IQ3_S", 26, "iq3_s"),
        ("IQ3_M", 27, "iq3_s"),
        ("IQ4_NL", 25, "iq4_nl"),
        ("IQ4_XS", 30, "iq4_xs"),
    )
}


class Place(NamedTuple):
    """Where a tensor stands among its kind: the i-th of n, in a model whose key heads serve `gqa` query heads each."""

    i: int
    n: int
    gqa: int
    experts: int
    imatrix: bool  # there is one

    @property
    def first_eighth(self) -> bool:
        """Of the layers."""
        return self.i < self.n // 8

    @property
    def more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        return self.first_eighth or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2


Rule = Callable[[Place], str | None]  # None: the file's default type

LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # they have rules of their own


def _raised(name: str) -> str:
    """What tensors that matter most have in a file of LOW."""
    return "iq3_s" if name in ("IQ2_S", "IQ2_M") else "q2_k"


def _low_attn_v(name: str) -> Rule:
    return lambda p: "q4_k" if p.gqa >= 4 or p.experts >= 4 else _raised(name)


def _low_ffn_down(name: str) -> Rule:
    return lambda p: _raised(name) if p.first_eighth else None


ATTN_V: Mapping[str, Rule] = {
    "Q2_K": lambda p: "q4_k" if p.gqa >= 4 else "q3_k",
    "Q2_K_S": lambda p: "q4_k" if p.gqa >= 4 else None,
    "Q3_K_M": lambda p: "q5_k" if p.i < 2 else "q4_k",
    "Q3_K_L": lambda p: "q5_k",
    "Q4_K_S": lambda p: "q5_k" if p.i < 4 else None,
    "Q4_K_M": lambda p: "q6_k" if p.more_bits else None,
    "Q5_K_M": lambda p: "q6_k" if p.more_bits else None,
    "IQ3_XXS": lambda p: "q4_k" if p.gqa >= 4 else None if p.imatrix else "iq3_s",
    "IQ3_XS": lambda p: "q4_k" if p.gqa >= 4 else None,
    "IQ3_S": lambda p: "q4_k" if p.gqa >= 4 else None,
    "IQ3_M": lambda p: "q4_k",
    "IQ4_NL": lambda p: "q5_k" if p.gqa >= 4 else None,
    "IQ4_XS": lambda p: "q5_k" if p.gqa >= 4 else None,
    **{name: _low_attn_v(name) for name in LOW},
}
FFN_DOWN: Mapping[str, Rule] = {
    "Q2_K": lambda p: "q3_k",
    "Q2_K_S": lambda p: "q4_k" if p.first_eighth else None,
    "Q3_K_M": lambda p: "q5_k" if p.i < p.n // 16 else "q4_k",
    "Q3_K_L": lambda p: "q5_k",
    "Q4_K_S": lambda p: "q5_k" if p.first_eighth else None,
    "Q4_K_M": lambda p: "q6_k" if p.more_bits else None,
    "Q5_K_M": lambda p: "q6_k" if p.more_bits else None,
    "Q4_0": lambda p: "q4_1" if p.first_eighth and p.imatrix else None,
    "Q5_0": lambda p: "q5_1" if p.first_eighth and p.imatrix else None,
    "IQ3_XXS": lambda p: None if p.imatrix else "q4_k" if p.first_eighth else "q3_k",
    "IQ3_M": lambda p: "q4_k" if p.first_eighth or (p.experts == 8 and p.more_bits) else None,
    "IQ4_NL": lambda p: "q5_k" if p.first_eighth and not p.imatrix else None,
    "IQ4_XS": lambda p: "q5_k" if p.first_eighth and not p.imatrix else None,
    **{name: _low_ffn_down(name) for name in LOW},
}
FFN_UP: Mapping[str, Rule] = {"IQ3_XS": lambda p: "iq3_xxs" if p.n // 8 <= p.i < 7 * p.n // 8 else None}  # and gate
ATTN_QK = {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}
ATTN_OUTPUT = {
    "Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_XXS": "iq3_s", "IQ3_M": "q4_k", "IQ2_S": "iq3_s",
    "IQ2_M": "iq3_s", "IQ1_S": "iq2_xxs", "IQ1_M": "iq2_xxs",
}  # fmt: skip
ATTN_OUTPUT_OF_8_EXPERTS = dict.fromkeys(
    ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", *LOW), "q5_k"
)
TOKEN_EMBD = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "q2_k"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "iq3_s"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "q4_k"),
}
OUTPUT = {"Q8_0": "q8_0", **dict.fromkeys((*LOW, "IQ3_XXS"), "q5_k")}  # others q6_k
# Types that are garbage without importance: llama-quantize stops. Of embeddings and head it has none and stops only where
# ggml itself does.
NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
NEED_IMATRIX_ANYWHERE = ("iq1_s", "iq2_xxs", "iq2_xs")
