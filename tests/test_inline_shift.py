"""Zero points as a path beside the weight: exact as sums of groups, as one more rank only where each row has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_gptq_input import TOKENS, Kind, made

from qconvert import convert
from qconvert.build import build
from qconvert.errors import UnsupportedError, UsageError
from qconvert.graph import Graph
from qconvert.passes.inline_shift import InlineShift
from qconvert.pipeline import Pipeline
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.text import format, parse
from qconvert.weights import Weights


def model(folder: Path, kind: Kind) -> tuple[Graph, Store]:
    store = Store()
    return build(read_checkpoint(made(folder, kind).folder, store)), store


def logits(graph: Graph, store: Store) -> torch.Tensor:
    return run(graph, Weights(graph, store, np.float64), TOKENS, dtype=torch.float64)["logits"]


@pytest.mark.parametrize(("group", "form"), [(32, "auto"), (32, "pooled"), (-1, "lora"), (-1, "auto")])
def test_the_function_stays(group: int, form: str, tmp_path: Path) -> None:
    graph, store = model(tmp_path, Kind(sym=False, group=group))
    new = Pipeline((InlineShift(form, store=store),)).run(graph)
    ops = {node.op for node in new.nodes.values()}
    assert "unshifted" in ops and ("lora" if form == "lora" else "shift_path" if group == 32 else "unshifted") in ops
    want = logits(graph, store)
    assert (logits(new, store) - want).norm() <= 1e-6 * want.norm()  # shifts are f32
    name = "model.layers.0.mlp.up_proj.weight"
    w = Weights(new, store)
    before, after = w.rows(f"{name}~shifted", 0, 96), w.rows(name, 0, 96)
    np.testing.assert_array_equal(after.codes, before.codes.astype(int) - 8)  # type: ignore[union-attr]
    assert parse(format(new)).nodes == new.nodes


def test_what_it_costs_is_counted(tmp_path: Path) -> None:
    graph, store = model(tmp_path, Kind(sym=False))
    rows = InlineShift("pooled", store=store)(graph).meta["inline_shift"]
    assert isinstance(rows, list) and len(rows) == 14
    for row in rows:
        assert isinstance(row, dict)
        n, k = graph.nodes[str(row["weight"])].type.dims
        assert row["macs"] == n * k / 32 and row["dense"] == n * k and row["form"] == "sums of 32"
        assert row["rank"] == k // 32  # zero points of groups are as many ranks


def test_factors_of_too_few_ranks_are_refused_with_the_rank_needed(tmp_path: Path) -> None:
    graph, store = model(tmp_path, Kind(sym=False))
    with pytest.raises(UnsupportedError, match="q_proj.weight needs rank 2, 1 is allowed") as e:
        InlineShift("lora", store=store)(graph)
    assert e.value.hint is not None and "form=pooled" in e.value.hint
    exact = Pipeline((InlineShift("lora", rank=3, store=store),)).run(graph)
    want = logits(graph, store)
    assert (logits(exact, store) - want).norm() <= 1e-5 * want.norm()
    with pytest.raises(UsageError, match="auto, lora or pooled"):
        InlineShift("rank1")(graph)


@pytest.mark.parametrize("kind", [Kind(), Kind(sym=False, desc_act=True)])
def test_weights_without_a_shift_or_in_no_order_are_left_alone(kind: Kind, tmp_path: Path) -> None:
    graph, store = model(tmp_path, kind)
    assert InlineShift(store=store)(graph) == graph


def test_onnx_runs_codes_without_zero_points_and_sums_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    folder = made(tmp_path, Kind(sym=False)).folder
    options = {"to": "onnx", "bits": 4, "accuracy_level": 0, "threads": 1}
    result = convert(folder, passes=(..., "inline-shift{form=pooled}"), output=tmp_path / "out", **options)
    assert not result.report.failed and len(result.report.accounting["inline_shift"]) == 14
    assert any("14 weights keep their codes" in n and "int4_g32_f16 -> int4_g32" in n for n in result.report.notes)
