"""The quality report: its numbers against transformers' own on the same tokens, the fine-tune's share, gates, overlap."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert import convert
from qconvert.conversion import Result
from qconvert.errors import GateError, InputError, UsageError
from qconvert.evaluation import LEAST, MOST, SHIPPED, affordable, cut, overlap
from qconvert.graph import Graph, Node, Type
from qconvert.printing import report_text
from qconvert.quality import Answers, share, summary

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("quality")
    return convert(TINY, adapters=[str(LORA)], to="safetensors:bf16", output=folder / "out", eval_tokens=512)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("coarse")
    options: dict[str, Any] = {"to": "gguf:Q2_K", "output": folder / "out.gguf", "eval_tokens": 1024}
    return convert(TINY, adapters=[str(LORA)], **options)


def test_numbers_are_those_of_transformers_and_peft(tuned: Result) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from qconvert.tokenizer import read_tokenizer

    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    written = transformers.AutoModelForCausalLM.from_pretrained(tuned.outputs[0], dtype=torch.float32).eval()
    tokenizer = read_tokenizer(TINY, 1024)
    ids = tokenizer.reference()((ROOT / "qconvert" / "evaluation.txt").read_text("utf-8"))
    sequences = torch.tensor(cut(ids, tokenizer.around, 256, 512, SHIPPED))
    with torch.no_grad():
        before, after = (torch.log_softmax(m(sequences).logits.double(), -1) for m in (base, written))
        trained = torch.log_softmax(peft.PeftModel.from_pretrained(base, LORA).eval()(sequences).logits.double(), -1)
    kl = (trained.exp() * (trained - after)).sum(-1).flatten().numpy()
    quality = tuned.report.quality
    assert quality["n_tokens"] == kl.size == 512
    assert quality["mean_kl"] == pytest.approx(kl.mean(), rel=1e-3)  # f32 logits against f64
    assert quality["p99_kl"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-2)
    base_kl = (trained.exp() * (trained - before)).sum(-1).mean().item()
    assert quality["fine_tune"]["kl_base"] == pytest.approx(base_kl, rel=1e-5)
    nll = [-x[:, :-1].gather(-1, sequences[:, 1:, None]).mean().item() for x in (after, trained)]
    assert quality["perplexity_ratio"] == pytest.approx(math.exp(nll[0] - nll[1]), rel=1e-5)
    assert quality["top1"] == pytest.approx((trained.argmax(-1) == after.argmax(-1)).double().mean().item(), abs=2e-3)


def test_fewer_bits_cost_more_everywhere(tuned: Result, coarse: Result) -> None:
    fine, worse = tuned.report.quality, coarse.report.quality
    assert worse["mean_kl"] > 100 * fine["mean_kl"]
    assert fine["mean_kl"] < fine["p99_kl"] <= fine["p999_kl"] <= fine["max_kl"]
    assert worse["fine_tune"]["share"] < fine["fine_tune"]["share"] < 1
    assert [row["layer"] for row in worse["layers"]] == [0, 1, 2]
    pairs = zip(worse["layers"], fine["layers"], strict=True)
    assert all(a["relative_error"] > 10 * b["relative_error"] for a, b in pairs)
    assert sum(worse["histogram"]) == worse["n_tokens"]


def test_errors_by_tensor_are_those_of_the_types(coarse: Result) -> None:
    rows = {row["tensor"]: row for row in coarse.report.quality["tensors"]}
    assert len(rows) == 22
    down, gate = (rows[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("down", "gate"))
    assert (down["type"], gate["type"]) == ("q3_k", "q2_k")
    assert 0.01 < down["error"] < 0.04 < gate["error"] < 0.15  # of normal weights: 3.4 and 2.6 bits
    assert all(row["weighted"] is not None for name, row in rows.items() if "layers" in name)


def test_the_table_says_it(coarse: Result) -> None:
    text = report_text(coarse.report)
    assert "of the fine-tune survives" in text
    assert f"1024 tokens of {SHIPPED}" in text


def test_a_gate_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="--max-kl 1.0e-05: mean_kl is") as caught:
        convert(TINY, to="gguf:Q4_0", output=tmp_path / "out.gguf", max_kl=1e-5)
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []
    convert(TINY, to="gguf:Q8_0", output=tmp_path / "out.gguf", max_kl=0.1, min_top1=0.8)


def test_a_gate_on_what_is_not_measured_fails(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="not measured: --eval-tokens 0"):
        convert(TINY, to="gguf:Q8_0", output=tmp_path / "out.gguf", min_top1=0.5, eval_tokens=0)


def test_a_text_of_the_user_is_measured_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 40)
    quality = convert(TINY, to="gguf:Q8_0", output=tmp_path / "out.gguf", eval=text, eval_tokens=256).report.quality
    assert (quality["text"], quality["n_tokens"]) == (str(text), 256)
    with pytest.raises(UsageError, match="--eval"):
        convert(TINY, to="gguf:Q8_0", output=tmp_path / "b.gguf", eval=tmp_path / "missing.txt")
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        convert(TINY, to="gguf:Q8_0", output=tmp_path / "b.gguf", eval=text)


def test_the_share_of_a_fine_tune_can_be_negative() -> None:
    assert share(0.01, 1.0) == pytest.approx(0.99)
    assert share(2.0, 1.0) == -1.0
    assert share(0.1, 0.0) is None


def test_a_hopeless_model_has_a_finite_report() -> None:
    one = np.ones(4, np.float32)
    found = summary(Answers(one, one, 1e4 * one, one))
    assert math.isfinite(found["perplexity_ratio"])


def test_texts_that_share_a_passage_overlap() -> None:
    a, b = list(range(100)), list(range(1000, 1100))
    assert overlap([a], [b]) == 0
    assert overlap([a], [a[20:60]]) == 1
    assert overlap([a], [[*b[:50], *a[:40]]]) == pytest.approx(25 / 75)


@pytest.mark.parametrize(("n", "tokens"), [(1e6, MOST), (1.25e8, 2000), (7e9, LEAST)])
def test_a_large_model_is_measured_on_fewer_tokens(n: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCONVERT_EVAL_TOKENS", raising=False)
    weight = Node("load", (), Type("f32", (int(n) // 1000, 1000)))
    graph = Graph({"tokens": Node("input", (), Type("i64", ("B", "T"))), "w": weight,
                   "h": Node("embed", ("tokens", "w"), Type("f32", ("B", "T", 1000)))}, ("h",))  # fmt: skip
    assert affordable(graph, 2) == tokens
