"""Every weight-only scheme from checkpoint and adapter to a file that onnxruntime proves; what is slow or missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qconvert import convert
from qconvert.errors import QConvertError, UnsupportedError, UsageError
from qconvert.formats.onnx_cliffs import cliff, slow_paths
from qconvert.scheme import AFFINE, TABLES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT / 'golden' / 'tiny'}+{ROOT / 'golden' / 'tiny-lora'}"


class Case(NamedTuple):
    options: dict[str, Any]
    scheme: str  # of the linears
    gathered: str  # of the embedding
    slow: str = ""  # what a note says of it


CASES = [
    Case({"bits": 2, "group": 64}, "int2_g64", "int2_g64"),
    Case({"quant": "int2", "group": 16}, "int2_g16", "int2_g16", "int2_g16 is slow: 2 bits in groups of 16"),
    Case({"quant": "uint2"}, "uint2_g32", "uint2_g32"),
    Case({"bits": 2, "zero_point": "float", "group": 128}, "uint2f_g128", "uint2_g128", "uint2f_g128 is slow: float zero"),
    Case({"quant": "int4", "group": 256}, "int4_g256", "int4_g256"),
    Case({"bits": 4, "zero_point": "int", "group": 16}, "uint4_g16", "uint4_g16"),
    Case({"quant": "uint4", "zero_point": "float"}, "uint4f_g32", "uint4_g32", "uint4f_g32 is slow: float zero"),
    Case({"quant": "int4", "accuracy_level": 0}, "int4_g32", "int4_g32"),
    Case({"quant": "int8", "group": 128}, "int8_g128", "int8_g128"),
    Case({"quant": "uint8", "accuracy_level": 0}, "uint8_g32", "uint8_g32", "uint8_g32 is slow: 8 bits have a fast kernel at"),
    Case({"quant": "nf4", "group": 64}, "nf4_g64", "int8_g64", "nf4_g64 is slow: MatMulBnb4"),
    Case({"quant": "fp4", "group": 16}, "fp4_g16", "int8_g16", "fp4_g16 is slow: MatMulBnb4"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.scheme}{'-exact' if 'accuracy_level' in c.options else ''}")
def test_a_scheme_is_proven_in_onnxruntime(tmp_path: Path, case: Case) -> None:
    result = convert(MODEL, to="onnx", output=tmp_path / "out", threads=1, **case.options)
    report = result.report
    assert result.verified and report.quant == case.scheme, report.checks
    rows = {r.what: r for r in report.checks}
    wanted = (f"kernel {case.scheme} x 256", f"kernel gather {case.gathered} x 256", "onnx.reference",
              "runtime onnxruntime, 8 cached steps")  # fmt: skip
    assert {w: rows[w].verdict for w in wanted} == dict.fromkeys(wanted, "pass")
    assert [f["got"] for f in report.fallbacks] == ([case.gathered] if case.gathered != case.scheme else [])
    slow = [note for note in report.notes if "slow" in note]
    assert len(slow) == bool(case.slow) and case.slow in "".join(slow)
    level = case.options.get("accuracy_level", 4)
    assert attributes(tmp_path / "out") == expected_attributes(case.scheme, level) | expected_attributes(case.gathered, level)


def attributes(folder: Path) -> set[tuple[str, int, int, int | None]]:
    """(op, block, bits, accuracy level) of the products; MatMulBnb4 says neither bits nor level."""
    found = set()
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        a = {x.name: x.i for x in node.attribute}
        if node.op_type in ("MatMulNBits", "MatMulBnb4"):
            found.add((node.op_type, a["block_size"], a.get("bits", 4), a.get("accuracy_level")))
    return found


def expected_attributes(name: str, level: int) -> set[tuple[str, int, int, int | None]]:
    """The model's head is its embedding."""
    scheme = (AFFINE | TABLES)[name]
    return {("MatMulBnb4" if scheme.table else "MatMulNBits", scheme.block, scheme.bits, None if scheme.table else level)}


@pytest.mark.parametrize("name", ["int2_g16", "uint2_g256", "uint4f_g32", "uint2f_g64", "nf4_g64"])
def test_slow_kernels_do_not_round_activations_and_fast_ones_do(name: str) -> None:
    """Else the check would hold onnxruntime to roundings that it does not make."""
    from qconvert.formats.onnx_kernels import Quantized, product_error
    from qconvert.formats.onnx_layouts import LAYOUTS
    from qconvert.kernels import affine, table_codes

    def error(name: str) -> tuple[float, bool]:
        layout = LAYOUTS[f"onnx.{name}"]
        s, x = layout.scheme, np.random.default_rng(0).normal(size=(32, 512)).astype(np.float32)
        found = table_codes(x, s.block, s.table) if s.table else affine(x, s.block, s.bits, s.zero_point)
        assert layout.join is not None
        rows = layout.join(found.packed, (found.scales, found.zeros)[: len(s.levels)])
        return product_error(Quantized("w", layout, rows, "linear"), 4), layout.rounds

    slow, fast = error(name), error(f"int4_g{(AFFINE | TABLES)[name].block}")
    assert slow[0] < 1e-6 and not slow[1]
    assert fast[0] > 1e-3 and fast[1]


def test_a_slow_path_is_told_once_with_its_factor_and_the_way_round_it() -> None:
    (said,) = slow_paths(["int8_g32", "int8_g64", "f32", "int4_g32"], 0)
    assert said.startswith("int8_g64 is slow") or said.startswith("int8_g32 is slow")
    assert "100 times the time of int8_g32 at level 4" in said and said.endswith("--accuracy-level 4 is fast")
    fast = [n for n, s in AFFINE.items() if s.zero_point != "float" and (s.bits != 2 or s.block in (32, 64, 128))]
    assert not any(cliff(AFFINE[name], 4) for name in fast) and len(fast) == 26


def test_zero_points_and_levels_reach_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qconvert.cli import cli

    words = ["convert", MODEL, "--to", "onnx", "--quant", "int2", "--zero-point", "float", "--accuracy-level", "0", "--dry-run"]
    done = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "uint2f_g32" in done.stdout and "note: uint2f_g32 is slow" in done.stdout


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"quant": "uint8", "zero_point": "float"}, UnsupportedError, "2 and 4 bits only"),
        ({"quant": "uint4", "zero_point": "none"}, UsageError, "--zero-point none: uint4 has integer zero points"),
        ({"quant": "int4", "zero_point": "half"}, UsageError, "there are none, int, float"),
        ({"quant": "nf4", "zero_point": "int"}, UsageError, "nf4 has no zero points"),
        ({"quant": "fp16", "zero_point": "int"}, UsageError, "fp16 has no zero points"),
        ({"quant": "int8-dynamic", "zero_point": "int"}, UsageError, "int8-dynamic has no zero points"),
        ({"quant": "int8-dynamic", "accuracy_level": 0}, UsageError, "products with int8-dynamic have none"),
        ({"quant": "int4", "accuracy_level": 2}, UsageError, "--accuracy-level 2: there are 0 and 4"),
        ({"quant": "nf4", "accuracy_level": 0}, UsageError, "products with nf4 have none"),
        ({"quant": "fp32", "accuracy_level": 4}, UsageError, "products with fp32 have none"),
        ({"quant": "int4", "accuracy_level": 0, "form": "portable"}, UnsupportedError, "standard nodes have none"),
        ({"quant": "int2", "form": "portable"}, UnsupportedError, "2 bits come with opset 25"),
        ({"quant": "fp4", "form": "portable"}, UnsupportedError, "its levels are a table"),
        ({"quant": "int4", "zero_point": "float", "form": "portable"}, UnsupportedError, "zero points are codes"),
        ({"quant": "nf4", "fallback": "error"}, UnsupportedError, "onnxruntime gathers no rows of nf4"),
        ({"to": "gguf", "zero_point": "int"}, UnsupportedError, "--zero-point int"),
        ({"to": "gguf", "accuracy_level": 0}, UnsupportedError, "--accuracy-level 0"),
    ],
)
def test_what_cannot_be_asked_for_is_named(options: dict[str, Any], kind: type[QConvertError], said: str) -> None:
    with pytest.raises(kind, match=said):
        convert(MODEL, dry_run=True, **{"to": "onnx", **options})


class Kernel(NamedTuple):
    """As onnxruntime's registry tells of one."""

    op_name: str
    type_constraints: dict[str, list[str]]
    domain: str = "com.microsoft"
    provider: str = "CPUExecutionProvider"


OLD_GATHER = Kernel("GatherBlockQuantized", {"T1": ["tensor(int4)", "tensor(uint4)"], "T2": ["tensor(float)"]})


@pytest.mark.parametrize(
    ("without", "instead", "said"),
    [
        ("MatMulNBits", [], "self_attn/q_proj/MatMulNBits: onnxruntime .* has no CPU kernel of MatMulNBits"),
        ("GatherBlockQuantized", [OLD_GATHER], "no CPU kernel of GatherBlockQuantized for .*tensor.uint8"),
    ],
)
def test_a_node_without_a_kernel_is_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, instead: list[Kernel], said: str
) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = [k for k in state.get_all_opkernel_def() if k.op_name != without]
    monkeypatch.setattr(state, "get_all_opkernel_def", lambda: [*kernels, *instead])
    with pytest.raises(UnsupportedError, match=said):
        convert(MODEL, to="onnx", bits=4, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    convert(MODEL, to="onnx", bits=4, output=tmp_path / "out", check=False)
