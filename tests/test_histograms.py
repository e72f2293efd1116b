"""Histograms of activations: numpy's in f64, whatever the batches; ranges that are the best of all that are tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.histograms import BINS, Grid, Histogram, Rule, candidates, chosen_range, rule_of, squared_error
from qconvert.observers import Range
from qconvert.passes.quantize_activations import grid_of

RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal(40000),
    "outliers": np.concatenate([RNG.standard_normal(40000), 40 * RNG.standard_normal(40)]),
    "one side": np.square(RNG.standard_normal(40000)),
    "far from 0": 100 + RNG.standard_normal(40000),
    "growing": RNG.standard_normal(40000) * np.geomspace(1e-20, 1e9, 40000),
    "zeros": np.zeros(100),
    "powers of two": np.repeat([-4.0, -2.0, 1.0, 2.0], 25),
}


def seen(x: np.ndarray, n: int) -> Histogram:
    """In n batches."""
    observer = Range(whole=True)
    for part in np.array_split(x.astype(np.float32), n):
        observer.seen(torch.from_numpy(part))
    return observer.found


@pytest.mark.parametrize("name", DATA)
def test_counts_are_those_of_numpy_in_f64(name: str) -> None:
    x = DATA[name].astype(np.float32)
    h = seen(x, 7)
    want, _ = np.histogram(x.astype(np.float64), h.edges)
    assert np.array_equal(h.counts, want) and h.counts.sum() == len(x)
    assert (h.low, h.high) == (x.min(), x.max())
    assert -h.edges[0] == h.edges[-1] == 2.0**h.exponent and h.edges.shape == (BINS + 1,)
    peak = np.abs(x).max()
    assert peak < h.edges[-1] and (2 * peak >= h.edges[-1] or peak == 0)  # as narrow as powers of two can be


@pytest.mark.parametrize("name", DATA)
def test_neither_batches_nor_their_order_matter_and_parts_add_up(name: str) -> None:
    x = DATA[name].astype(np.float32)
    whole = seen(x, 1)
    for other in (seen(x, 50), seen(x[::-1], 3), seen(x[:50], 2) + seen(x[50:], 2), seen(x[50:], 1) + seen(x[:50], 1)):
        assert np.array_equal(other.counts, whole.counts) and (other.low, other.high) == (whole.low, whole.high)
    assert np.array_equal((Histogram() + whole).counts, whole.counts)


def int8(low: float, high: float) -> Grid:
    return Grid(max(abs(low), abs(high)) / 127.5, -128, 127)


def uint8(low: float, high: float) -> Grid:
    grid = grid_of(low, high)
    return Grid(float(grid["scale"]), -int(grid["zero"]), 255 - int(grid["zero"]))  # type: ignore[arg-type]


def exact(x: np.ndarray, grid: Grid) -> float:
    """Of the values themselves, in f64."""
    x = x.astype(np.float64)
    return float(np.square(x - np.clip(np.rint(x / grid.step), grid.least, grid.most) * grid.step).mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["normal", "outliers", "one side", "far from 0"])
def test_the_range_of_least_error_is_the_best_of_all_candidates(name: str, symmetric: bool) -> None:
    x, grid = DATA[name].astype(np.float32), int8 if symmetric else uint8
    h = seen(x, 3)
    tried = candidates(h, symmetric)
    found = chosen_range(h, Rule("mse"), grid, symmetric)
    assert tried[0] == (h.low, h.high) and found in tried
    errors = [exact(x, grid(*r)) for r in tried[:: 1 if symmetric else 7]]
    assert exact(x, grid(*found)) <= 1.02 * min(errors)  # values are spread over a bin
    assert found == tried[int(np.argmin([squared_error(h, grid(*r)) for r in tried]))]
    if name == "outliers":
        assert exact(x, grid(*found)) < 0.95 * exact(x, grid(h.low, h.high))


def test_the_error_of_a_histogram_is_the_integral_over_its_bins() -> None:
    """Against many points of each bin; steps below, as, and above the bins."""
    h = seen(DATA["normal"], 1)
    points = (np.arange(200) + 0.5) / 200
    x = (h.edges[:-1, None] + h.width * points).ravel()
    for step in (0.3 * h.width, h.width, 7.3 * h.width):
        for grid in (Grid(step, -128, 127), Grid(step, 0, 255), Grid(step, -3, 2)):
            each = np.square(x - np.clip(np.rint(x / step), grid.least, grid.most) * step).reshape(BINS, -1).mean(1)
            assert squared_error(h, grid) == pytest.approx(h.counts @ each / h.counts.sum(), rel=2e-3)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentiles_are_numpys_within_a_bin(percent: float) -> None:
    x = DATA["normal"].astype(np.float32)
    h = seen(x, 4)
    low, high = chosen_range(h, Rule("percentile", percent), int8, True)
    assert abs(low - np.percentile(x, 100 - percent)) <= 2 * h.width
    assert abs(high - np.percentile(x, percent)) <= 2 * h.width
    assert chosen_range(h, Rule("percentile", 100), int8, True) == (h.low, h.high)


def test_what_was_not_finite_stays_so() -> None:
    observer = Range(whole=True)
    for x in ([1.0, 2.0], [float("nan"), 1.0], [3.0, -1.0]):
        observer.seen(torch.tensor(x))
    assert observer.found.high == float("inf")


@pytest.mark.parametrize("text", ["max", "percentile:", "percentile:40", "percentile:nan", "mse:3", "percentile:101", ""])
def test_rules_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="there is no such choice"):
        rule_of(text)


def test_rules_by_their_words() -> None:
    assert [rule_of(t) for t in ("minmax", "mse", "percentile", "percentile:99.5")] == [
        Rule("minmax"), Rule("mse"), Rule("percentile", 99.99), Rule("percentile", 99.5)
    ]  # fmt: skip


# in a conversion ----------------------------------------------------------------------------------

TINY = Path(__file__).parents[1] / "golden" / "tiny"
TEXT = "The gate was shut, so we walked round by the river and counted the boats: one, two, seven.\n" * 40


def static(out: Path, **options: Any) -> Any:
    given = {"to": "safetensors", "quant": "w8a8-static", "check": False, "threads": 1, "calibrate_tokens": 512}
    return convert(TINY, output=out, **{**given, **options})


def scales(out: Path) -> dict[str, float]:
    with safe_open(out / "model.safetensors", "pt") as file:
        return {k: float(file.get_tensor(k)) for k in file.keys() if k.endswith("input_scale")}  # noqa: SIM118


def read_by_linears(ids: list[list[int]]) -> dict[str, np.ndarray]:
    """What transformers' linears are given."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            part.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].numpy().ravel()))
    with torch.no_grad():
        for each in ids:
            model(torch.tensor([each]))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def test_the_file_has_numpys_histograms_of_what_transformers_linears_read_and_ranges_come_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes as compressed-tensors has them: the scale is bf16, of the least error of all that are tried."""
    from qconvert import calibrated

    texts: list[list[list[int]]] = []
    true = calibrated.cut
    monkeypatch.setattr(calibrated, "cut", lambda *a: texts.append(true(*a)) or texts[-1])
    (tmp_path / "text").write_text(TEXT)
    kept = tmp_path / "kept.safetensors"
    how: dict[str, Any] = {"activation_range": "mse", "save_statistics": kept, "calibrate": tmp_path / "text"}
    result = static(tmp_path / "out", **how)
    assert "ranges of activations are those of least squared error" in result.report.notes
    seen, found = read_by_linears(texts[0]), load_file(kept)
    for module, key in (("layers.0.self_attn.q_proj", "l0.attn_norm"), ("layers.2.mlp.down_proj", "l2.gated")):
        x = seen[f"model.{module}"]
        h = Histogram(*map(float, found[f"{key}.extremes"]), found[f"{key}.histogram"])
        want, _ = np.histogram(x.astype(np.float64), h.edges)
        assert h.counts.sum() == x.size and np.abs(np.cumsum(h.counts - want)).max() <= 1e-4 * x.size  # f32 in another order
        tried = [Grid(float(torch.tensor(np.abs(r).max() / 127.5).bfloat16()), -128, 127) for r in candidates(h, True)]
        step = scales(tmp_path / "out")[f"model.{module}.input_scale"]
        assert step in [g.step for g in tried]
        assert exact(x, Grid(step, -128, 127)) <= 1.005 * min(exact(x, g) for g in tried)
    static(tmp_path / "again", activation_range="mse", statistics=kept, calibrate_tokens=None)
    static(tmp_path / "usual", calibrate=tmp_path / "text")
    same = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "usual")}
    assert len(same) == 1


def test_ranges_of_folded_weights_are_not_those_of_the_file(tmp_path: Path) -> None:
    """smoothquant divides what linears read."""
    out = {rule: tmp_path / str(rule) for rule in (None, "mse")}
    for rule, path in out.items():
        static(path, activation_range=rule, solver="smoothquant")
    plain, folded = static(tmp_path / "plain"), scales(out["mse"])
    assert plain.outputs and folded == scales(out[None]) and folded != scales(tmp_path / "plain")


def test_onnx_has_ranges_of_the_same_rule_of_what_linears_read_and_all_of_what_they_give(tmp_path: Path) -> None:
    """Measured on novels-13m: clipped outputs of linears make KL 2.8 times larger, clipped inputs 0.7 times."""
    onnx = pytest.importorskip("onnx")
    found = {}
    for rule in ("minmax", "mse", "percentile:99"):
        how: dict[str, Any] = {"to": "onnx", "quant": "w8a8", "operators": "qoperator", "activation_range": rule}
        static(tmp_path / rule, **how)
        graph = onnx.load(tmp_path / rule / "model.onnx", load_external_data=False).graph
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if not t.external_data}
        found[rule] = {name: float(t) for name, t in tensors.items() if name.endswith(".scale") and t.ndim == 0}
    given = {name for name in found["minmax"] if name.endswith("product.scale")}
    read = found["minmax"].keys() - given
    assert len(given) == 22 and len(read) == 13
    assert all(found[rule][name] == found["minmax"][name] for rule in found for name in given)
    assert all(found["percentile:99"][name] < found["minmax"][name] for name in read)
    assert all(found["mse"][name] <= found["minmax"][name] * 1.001 for name in read) and found["mse"] != found["minmax"]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"quant": "fp8-static", "activation_range": "mse"}, UsageError, "fp8-static has no fixed ranges of integers"),
        ({"to": "onnx", "quant": "int4", "activation_range": "mse"}, UsageError, "int4 has no fixed ranges"),
        ({"to": "gguf", "quant": "Q8_0", "activation_range": "mse"}, UnsupportedError, "GGUF has no ranges of activations"),
        ({"activation_range": "most"}, UsageError, "--activation-range most: there is no such choice"),
    ],
)
def test_what_cannot_be_asked_for_is_named(tmp_path: Path, options: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        static(tmp_path / "out", dry_run=True, calibrate_tokens=None, **options)


def test_statistics_without_histograms_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    static(tmp_path / "one", solver="gptq", save_statistics=kept)
    with pytest.raises(InputError, match=r"l0\.attn_norm\.histogram \[2048\] is not there"):
        static(tmp_path / "two", activation_range="mse", statistics=kept, calibrate_tokens=None)
