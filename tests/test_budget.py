"""Types by size or by KL: the frontier against brute force, exact bytes, better than llama-quantize's mixes, refusals."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from qconvert import convert
from qconvert.budget import frontier, swaps, undominated
from qconvert.calibration import own_text
from qconvert.conversion import Result
from qconvert.errors import GateError, UnsupportedError, UsageError
from qconvert.facts import Facts
from qconvert.formats import gguf_menu, gguf_mix
from qconvert.gguf_reader import read_header
from qconvert.html_report import html_page
from qconvert.scheme import CODEBOOKS
from qconvert.sensitivity import along, spread

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
STOCK = "Q3_K_M"


def random_menu(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    rng = random.Random(seed)
    sizes, cost = {}, {}
    for w in range(5):
        n = [32 * k for k in sorted(rng.sample(range(1, 40), 4))]
        sizes[f"w{w}"] = {f"t{i}": size for i, size in enumerate(n)}
        cost[f"w{w}"] = {f"t{i}": c for i, c in enumerate(sorted((rng.random() for _ in n), reverse=True))}
    return sizes, cost


@pytest.mark.parametrize("seed", range(6))
def test_the_frontier_is_the_best_of_all_mixtures(seed: int) -> None:
    sizes, cost = random_menu(seed)
    front = frontier(sizes, cost, fixed=100)
    mixtures = [dict(zip(sizes, types, strict=True)) for types in itertools.product(*sizes.values())]
    for nbytes in range(front.least, front.most + 1, 331):
        best = min(front.predicted(m) for m in mixtures if front.nbytes(m) <= nbytes)
        found = front.mixture(nbytes)
        assert front.nbytes(found) <= nbytes
        assert front.predicted(found) == pytest.approx(best)


def test_rounded_bytes_never_exceed_the_target() -> None:
    sizes = {f"w{i}": {"small": 10_000_001 + i, "large": 30_000_007 + 13 * i} for i in range(40)}
    cost = {w: {"small": 1.0 + i, "large": 0.1} for i, w in enumerate(sizes)}
    front = frontier(sizes, cost, fixed=12345)
    assert front.unit > 32
    for nbytes in range(front.least, front.most, 97_000_003):
        types = front.mixture(nbytes)
        assert front.nbytes(types) <= nbytes
        assert nbytes - front.nbytes(types) < 20_000_700  # no room is left for another large one


def test_a_swap_keeps_the_bytes_and_changes_two_weights_at_most() -> None:
    sizes, cost = random_menu(7)
    front = frontier(sizes, cost, 0)
    limit = (front.least + front.most) // 2
    types = front.mixture(limit)
    found = swaps(front, types, limit, 20)
    assert found
    for other in found:
        assert front.nbytes(other) <= limit
        assert 1 <= sum(other[w] != types[w] for w in types) <= 2


def test_types_that_another_beats_are_not_tried() -> None:
    sizes = {"q2": 100, "q4_0": 200, "iq4": 200, "q4_1": 220, "q8": 400}
    assert list(undominated(sizes, {"q2": 1.0, "q4_0": 0.3, "iq4": 0.2, "q4_1": 0.25, "q8": 0.01})) == ["q2", "iq4", "q8"]


def test_costs_between_measured_ones_follow_a_power_law() -> None:
    points = [(0.01, 0.001), (0.1, 0.02)]
    assert along(points, 0.01) == pytest.approx(0.001)
    assert along(points, 0.1) == pytest.approx(0.02)
    assert 0.001 < along(points, 0.03) < 0.02 < along(points, 0.3)
    assert along([(0.1, 0.02)], 0.05) == pytest.approx(0.01)
    assert spread(["a", "b", "c", "d", "e"], 2) == ["a", "c"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("stock")
    return convert(TINY, adapters=[str(LORA)], to=f"gguf:{STOCK}", output=folder / "stock.gguf", eval_tokens=768)


@pytest.fixture(scope="module")
def chosen(stock: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    size = str(stock.outputs[0].stat().st_size)
    options: dict[str, Any] = {"target_size": size, "eval_tokens": 768}
    return convert(TINY, adapters=[str(LORA)], to="gguf", output=tmp_path_factory.mktemp("best") / "best.gguf", **options)


@pytest.mark.peer
def test_the_file_has_the_predicted_bytes_and_no_more_than_the_target(stock: Result, chosen: Result) -> None:
    on_disk, limit = (r.outputs[0].stat().st_size for r in (chosen, stock))
    assert on_disk == chosen.report.budget["nbytes"] <= limit
    assert on_disk > 0.97 * limit  # and uses them
    types = {t.name: t.dtype.rpartition(".")[2] for t in read_header(chosen.outputs[0]).tensors if len(t.shape) > 1}
    assert sorted(types.values()) == sorted(chosen.report.budget["types"].values())
    assert len(set(types.values())) > 2


@pytest.mark.peer
def test_it_is_nearer_to_what_was_trained_than_the_usual_mix_of_its_size(stock: Result, chosen: Result) -> None:
    assert chosen.verified
    assert chosen.report.quality["mean_kl"] < 0.9 * stock.report.quality["mean_kl"]


@pytest.mark.peer
def test_the_report_has_the_curve(chosen: Result) -> None:
    budget = chosen.report.budget
    sizes = [p["nbytes"] for p in budget["curve"]]
    assert sizes == sorted(sizes) and len(sizes) > 8
    predicted = [p["predicted"] for p in budget["curve"]]
    assert all(a >= b for a, b in itertools.pairwise(predicted))
    measured = [p["measured"] for p in budget["curve"] if p["measured"] is not None]
    assert measured[0] > 10 * measured[-1]
    named = {p["name"]: p for p in budget["stock"]}
    assert named[STOCK]["measured"] > budget["measured"]
    page = html_page([Facts(chosen.report.data())])
    assert "KL by bytes" in page and STOCK in page


def test_the_page_loads_nothing_and_holds_what_is_in_it_as_text(stock: Result) -> None:
    page = html_page([Facts(stock.report.data())])
    assert "http" not in page and "<script" not in page and "url(" not in page
    assert page.count("<svg") == 4
    assert "prefers-color-scheme:dark" in page
    assert "<img" not in html_page([Facts({**stock.report.data(), "notes": ["<img src=x onerror=alert(1)>"]})])


def test_types_of_codebooks_are_for_weights_whose_importance_is_known() -> None:
    widths = {"ffn_up": 256, "ffn_down": 288, "attn_q": 256}
    tensors = {n: gguf_mix.TensorShape(f"blk.0.{n}.weight", (64, k)) for n, k in widths.items()}
    known = gguf_mix.Options(imatrix=frozenset({"blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}))
    hyper = gguf_mix.Hyper("llama", 1, 4, 2)
    sizes = gguf_menu.menu(tensors, gguf_mix.file_type("Q4_K_M"), hyper, known).sizes
    assert CODEBOOKS.keys() <= sizes["ffn_up"].keys()
    assert not CODEBOOKS.keys() & (sizes["attn_q"].keys() | sizes["ffn_down"].keys())  # whose rows do not divide
    assert {"iq4_xs", "iq4_nl"} <= sizes["attn_q"].keys()
    assert sizes["ffn_up"]["iq1_s"] == 64 * 50 and sizes["ffn_up"]["iq2_xxs"] == 64 * 66  # ggml-common.h


@pytest.mark.peer
def test_with_importance_a_small_file_has_types_of_codebooks_and_beats_the_mixes_of_its_size(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(own_text()[:20_000], encoding="utf-8")
    options: dict[str, Any] = {"target_size": "681k", "calibrate": text, "eval_tokens": 768}
    made = convert(TINY, adapters=[str(LORA)], output=tmp_path / "out.gguf", **options)
    budget, codebooks = made.report.budget, CODEBOOKS.keys() & made.report.budget["types"].values()
    assert made.verified and made.outputs[0].stat().st_size == budget["nbytes"] <= 681_000
    assert len(codebooks) > 2
    named = {p["name"]: p for p in budget["stock"]}
    assert named["IQ2_XXS"]["nbytes"] > 0.99 * budget["nbytes"]
    assert budget["measured"] < 0.9 * named["IQ2_XXS"]["measured"]


def test_a_size_below_the_smallest_file_names_that(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="--target-size 100k: the smallest file is") as caught:
        convert(TINY, output=tmp_path / "out.gguf", target_size="100k", check=False)
    assert caught.value.exit_code == 7
    assert caught.value.hint is not None and caught.value.hint.startswith("--target-size ")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_size": "1m", "target_bpw": 4.0}, UsageError, "both say the size"),
        ({"target_size": "1m", "bits": 4}, UsageError, "types are chosen by the size"),
        ({"target_bpw": 4.0, "pure": True}, UsageError, "--pure"),
        ({"target_bpw": 40.0}, UsageError, "bits per weight"),
        ({"max_kl": 0.1, "dry_run": True}, UsageError, "--dry-run with --max-kl"),
        ({"target_size": "1m", "to": "safetensors:gptq"}, UnsupportedError, "gptq has one scheme for all weights"),
        ({"target_bpw": 4.0, "to": "safetensors:awq"}, UnsupportedError, "awq has one scheme for all weights"),
        ({"target_size": "1m", "to": "safetensors:w4a16"}, UsageError, "types are chosen by the size"),
        ({"max_kl": 0.1, "to": "safetensors", "zero_point": "int"}, UnsupportedError, "zero points of one group size only"),
        ({"target_size": "1m", "to": "onnx", "layout": "transformersjs"}, UnsupportedError, "no name for a mix"),
        ({"target_size": "1m", "to": "onnx:w8a8"}, UsageError, "types are chosen by the size"),
    ],
)
def test_wishes_that_cannot_be(options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        convert(TINY, output=tmp_path / "out.gguf", **options)


@pytest.mark.peer
def test_the_smallest_file_below_a_kl(tmp_path: Path) -> None:
    kls, sizes = [], []
    for i, limit in enumerate((0.05, 0.01)):
        result = convert(TINY, output=tmp_path / f"{i}.gguf", max_kl=limit, eval_tokens=768)
        kls.append(result.report.quality["mean_kl"])
        sizes.append(result.outputs[0].stat().st_size)
    assert kls[0] <= 0.05 and kls[1] <= 0.01
    assert kls[1] > 0.005  # no bits are wasted
    assert sizes[0] < sizes[1]


@pytest.mark.peer
def test_the_same_wish_gives_the_same_bytes(tmp_path: Path) -> None:
    both = [convert(TINY, output=tmp_path / f"{i}.gguf", target_bpw=4.0, check=False).outputs[0].read_bytes() for i in range(2)]
    assert both[0] == both[1]


@pytest.mark.peer
def test_no_mixture_reaches_a_kl_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="the largest file"):
        convert(TINY, output=tmp_path / "out.gguf", max_kl=1e-16)
