"""Layouts against gguf-py, ggml's bytes and blocks worked out by hand."""

from __future__ import annotations

import ggml_oracle
import gguf
import numpy as np
import pytest

from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.formats.gguf_values import dequantized
from qconvert.gguf_reader import GGML_TYPES
from qconvert.scheme import CODEBOOKS, F32, SCHEMES, QTensor

NAMES, BOOKS = sorted(SCHEMES), sorted(CODEBOOKS)
needs_ggml = pytest.mark.skipif(ggml_oracle.library() is None, reason="xllamacpp is not installed")


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def random_bytes(name: str, n: int = 5, blocks: int = 3) -> np.ndarray:
    """Any bytes are valid blocks once their f16 fields are finite."""
    layout = LAYOUTS[f"gguf.{name}"]
    rng = np.random.default_rng(list(name.encode()))
    b = rng.integers(0, 256, (n, blocks * layout.block.itemsize), np.uint8).view(layout.block)
    for field in {"d", "m", "dmin"} & set(layout.block.names or ()):
        b[field] = rng.standard_normal(b.shape)
    if name == "mxfp4":
        b["e"] %= 255  # the last stands for no number
    if name == "iq1_m":
        b["scales"][..., 3] &= 0x3FFF  # the exponent of an f16
    if name == "tq1_0":  # 243 of 256 bytes stand for five trits
        trits = rng.integers(0, 3, (n, blocks * 256)).astype(np.uint8)
        return layout.pack(QTensor(layout.scheme, trits, (b["d"].astype(np.float32),)))
    return b.view(np.uint8)


def size_of(name: str) -> tuple[int, int]:
    """Weights of a block and their bytes, by gguf-py; it does not know q2_0."""
    return (64, 18) if name == "q2_0" else gguf.GGML_QUANT_SIZES[gguf_type(name)]


@pytest.mark.parametrize("name", [*NAMES, *BOOKS])
def test_sizes_and_ids_are_those_of_ggml(name: str) -> None:
    assert (GGML_TYPES[name].block, GGML_TYPES[name].nbytes) == size_of(name)
    assert GGML_TYPES[name].id == ggml_oracle.IDS[name]
    layout = LAYOUTS[f"gguf.{name}"]
    assert layout.row_nbytes(512) * 8 == layout.scheme.bits_per_weight * 512


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_types_are_those_of_ggml(name: str) -> None:
    assert (GGML_TYPES[name].block, GGML_TYPES[name].nbytes) == gguf.GGML_QUANT_SIZES[gguf_type(name)]
    assert GGML_TYPES[name].id == gguf_type(name).value


@pytest.mark.parametrize("name", [*NAMES, *BOOKS])
def test_any_bytes_dequantize_to_the_bits_of_gguf_py(name: str) -> None:
    packed = random_bytes(name)
    wanted: F32 = dequantized(packed, name.upper())
    got = LAYOUTS[f"gguf.{name}"].unpack(packed).dequantize()
    if name == "mxfp4":
        got += 0  # it has two zeros, and gguf-py one
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("name", [*NAMES, *BOOKS])
def test_packing_what_was_unpacked_gives_the_same_bytes(name: str) -> None:
    layout, packed = LAYOUTS[f"gguf.{name}"], random_bytes(name)
    assert np.array_equal(layout.pack(layout.unpack(packed)), packed)


@needs_ggml
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.peer) for name in BOOKS)])
def test_bytes_made_by_ggml_survive_unpack_and_pack(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((4, 512), np.float32)
    importance = np.ones(512, np.float32)
    packed, layout = ggml_oracle.quantize(name, x, importance=importance), LAYOUTS[f"gguf.{name}"]
    q = layout.unpack(packed)
    assert np.array_equal(layout.pack(q), packed)
    assert np.array_equal(q.dequantize(), dequantized(packed, name.upper()))


def one_block(name: str, codes: list[int], levels: list[list[float]]) -> QTensor:
    return QTensor(
        SCHEMES[name], np.array([codes], np.int8), tuple(np.array([level], np.float32) for level in levels)
    )


# 1.0 is 003c and 0.5 is 0038 in little-endian f16. The codes that are not zero stand first and last in a block
# and where a plane turns from one run to the next.
BY_HAND = {
    "q8_0": (one_block("q8_0", [1, -1] + [0] * 29 + [-128], [[1.0]]), "003c 01ff" + "00" * 29 + "80"),
    "q4_0": (one_block("q4_0", [-8] * 16 + [7] * 16, [[1.0]]), "003c" + "f0" * 16),
    "q4_1": (
        one_block("q4_1", [*range(16), *range(16)], [[1.0], [0.5]]),
        "003c 0038" + "00112233445566778899aabbccddeeff",
    ),
    "q5_0": (one_block("q5_0", [0] + [-16] * 30 + [15], [[1.0]]), "003c 01000080" + "00" * 15 + "f0"),
    "q5_1": (
        one_block("q5_1", [31] + [0] * 15 + [1] + [0] * 15, [[1.0], [0.5]]),
        "003c 0038 01000000" + "1f" + "00" * 15,
    ),
    "q2_k": (
        one_block("q2_k", [1] * 32 + [3] * 32 + [0] * 64 + [2] * 128, [[1.0], [*range(16)], [0.5], [15] * 16]),
        "".join(f"f{i}" for i in "0123456789abcdef") + "0d" * 32 + "aa" * 32 + "003c 0038",
    ),
    "q3_k": (
        one_block("q3_k", [3] * 32 + [-4] * 192 + [0] * 32, [[1.0], [31] + [-32] * 14 + [-1]]),
        "81" * 32 + "03" * 32 + "00" * 32 + "0f000000000000f0" + "03000040" + "003c",
    ),
    "q4_k": (
        one_block(
            "q4_k", [5] * 32 + [9] * 32 + [0] * 192,
            [[1.0], [63, 0, 0, 1, 42, 0, 0, 16], [0.5], [1, 2, 3, 4, 5, 6, 7, 48]],
        ),
        "003c 0038" + "bf000041" + "010203c4" + "5a607000" + "95" * 32 + "00" * 96,
    ),
    "q5_k": (
        one_block("q5_k", [21] * 32 + [9] * 32 + [0] * 160 + [31] * 32, [[1.0], [1] * 8, [0.5], [2] * 8]),
        "003c 0038" + "01" * 4 + "02" * 4 + "21" * 4 + "81" * 32 + "95" * 32 + "00" * 64 + "f0" * 32,
    ),
    "q6_k": (
        one_block(
            "q6_k", [-32] * 32 + [-31] * 32 + [31] * 32 + [0] * 32 + [-32] * 128,
            [[1.0], [-128, 127] + [1] * 14],
        ),
        "f0" * 32 + "01" * 32 + "00" * 64 + "b0" * 32 + "00" * 32 + "807f" + "01" * 14 + "003c",
    ),
    "tq1_0": (one_block("tq1_0", [2] + [1] * 255, [[1.0]]), "d5" + "80" * 47 + "7f" * 4 + "003c"),
    "tq2_0": (
        one_block("tq2_0", [0] * 32 + [1] * 32 + [2] * 32 + [3] * 32 + [0] * 128, [[1.0]]),
        "e4" * 32 + "00" * 32 + "003c",
    ),
    "q1_0": (one_block("q1_0", [1] + [0] * 6 + [1] + [0] * 112 + [1] * 8, [[1.0]]), "003c 81" + "00" * 14 + "ff"),
    "q2_0": (one_block("q2_0", [0, 1, 2, 3] + [0] * 56 + [3, 2, 1, 0], [[1.0]]), "003c e4" + "00" * 14 + "1b"),
    "mxfp4": (one_block("mxfp4", [*range(16), *range(15, -1, -1)], [[1.0]]), "7f f0e1d2c3b4a5968778695a4b3c2d1e0f"),
    "iq4_nl": (one_block("iq4_nl", [*range(16), *range(15, -1, -1)], [[1.0]]), "003c f0e1d2c3b4a5968778695a4b3c2d1e0f"),
    "iq4_xs": (
        one_block("iq4_xs", [1] * 16 + [2] * 16 + [0] * 224, [[1.0], [31, -32, 0, -1, -32, -32, -32, -31]]),
        "003c" + "6300" + "0f f0 00 10" + "21" * 16 + "00" * 112,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_block_worked_out_by_hand(name: str) -> None:
    q, wanted = BY_HAND[name]
    layout = LAYOUTS[f"gguf.{name}"]
    assert layout.pack(q).tobytes().hex() == wanted.replace(" ", "")
    back = layout.unpack(layout.pack(q))
    assert np.array_equal(back.codes, q.codes)
    assert all(np.array_equal(a, b) for a, b in zip(back.levels, q.levels, strict=True))


@pytest.mark.parametrize("name", BOOKS)
def test_codes_that_no_entry_of_the_codebook_has_are_refused(name: str) -> None:
    layout = LAYOUTS[f"gguf.{name}"]
    q = layout.unpack(random_bytes(name, 1, 1))
    q.codes[0, 3] = 60 if q.codes[0, 3] > 0 else -60  # its sign stays
    with pytest.raises(UnsupportedError, match=f"codes that {name} has no entry for"):
        layout.pack(q)


@pytest.mark.parametrize("name", ["iq2_xxs", "iq2_xs", "iq3_xxs"])
def test_an_odd_number_of_signs_is_refused_where_only_seven_of_eight_are_kept(name: str) -> None:
    layout = LAYOUTS[f"gguf.{name}"]
    q = layout.unpack(random_bytes(name, 1, 1))
    q.codes[0, 255] *= -1
    with pytest.raises(UnsupportedError, match=f"an odd number of signs, which {name} cannot keep"):
        layout.pack(q)


def test_another_scheme_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"gguf.q4_1 holds q4_1, not q4_0"):
        LAYOUTS["gguf.q4_1"].pack(BY_HAND["q4_0"][0])


def test_half_a_block_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of the block's 18"):
        LAYOUTS["gguf.q4_0"].unpack(np.zeros((1, 20), np.uint8))
