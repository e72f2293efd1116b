"""Statistics of activations: of what transformers' modules are given, layer by layer; another model's are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file

from qconvert import convert
from qconvert.build import build
from qconvert.calibration import Calibration, cut
from qconvert.errors import InputError, UsageError
from qconvert.graph import Graph, Type
from qconvert.layerwise import run_layerwise, segments
from qconvert.observers import SiteWatcher
from qconvert.passes.calibrate import Calibrate
from qconvert.passes.untie_head import UntieHead
from qconvert.pipeline import Pipeline
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.statistics import ALIAS, FILE, KINDS, Facts, Found, Site, StatisticsFile, sites_of
from qconvert.text import format, parse
from qconvert.tokenizer import read_tokenizer
from qconvert.weights import Weights

TINY = Path("golden/tiny")
LORA = Path("golden/tiny-lora")
TEXT = "The gate was shut, so we walked round by the river and counted the boats: one, two, seven.\n" * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    opened = Store()
    yield opened
    opened.close()


def gathered(graph: Any, store: Store, texts: list[list[int]], hessians: bool = False, **how: Any) -> dict[str, Found]:
    """What is found of each weight."""
    found: dict[str, Found] = {}
    sites = sites_of(graph)

    def done(site: Site, what: Found) -> None:
        found.update(dict.fromkeys(site.weights, what))

    run_layerwise(graph, Weights(graph, store), texts, SiteWatcher(sites, KINDS if hessians else (), done), **how)
    return found


def hooked(model: torch.nn.Module, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """What each nn.Linear of a transformers model is given, f64[n,K] by its weight's name."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(f"{name}.weight", []).append(x[0].double()))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    return {name: torch.cat([x.flatten(0, -2) for x in parts]) for name, parts in seen.items()}


# against transformers -----------------------------------------------------------------------------


def test_moments_and_hessians_are_those_of_what_transformers_gives_its_linears(store: Store) -> None:
    import transformers

    graph = build(read_checkpoint(TINY, store))
    texts = np.random.default_rng(0).integers(0, 1024, (6, 50)).tolist()
    found = gathered(graph, store, texts, hessians=True)
    seen = hooked(transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), texts)
    seen["model.embed_tokens.weight"] = seen.pop("lm_head.weight")  # tied
    assert found.keys() == seen.keys() and len(found) == 22
    for name, x in seen.items():
        counts, moments, hessian, peaks, *_ = found[name]
        assert counts.tolist() == [300]
        assert peaks is not None and peaks[0] == pytest.approx(x.abs().amax(0).numpy(), rel=2e-4)
        assert moments[0] == pytest.approx(x.square().mean(0).numpy(), rel=2e-4)  # f32 activations, summed in another order
        want = (x.T @ x / len(x)).numpy()
        assert hessian is not None and np.linalg.norm(hessian[0] - want) < 1e-5 * np.linalg.norm(want)


def test_each_expert_is_measured_on_the_tokens_that_reach_it(tmp_path: Path) -> None:
    """transformers' block is run by hand: its routed tokens, and act(gate) * up of them."""
    import transformers

    tiny_models.save_random(tmp_path, "Qwen3Moe", tiny_models.SMALL_QWEN3_MOE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with_store = Store()
    graph = build(read_checkpoint(tmp_path, with_store))
    texts = np.random.default_rng(1).integers(0, 61, (3, 20)).tolist()
    found = gathered(graph, with_store, texts, hessians=True)
    blocks = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeSparseMoeBlock"]
    given: list[list[torch.Tensor]] = [[] for _ in blocks]
    for block, into in zip(blocks, given, strict=True):
        block.register_forward_pre_hook(lambda _, x, into=into: into.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.tensor(texts))
    for layer, block in enumerate(blocks):
        x = given[layer][0]
        top = (x @ block.gate.weight.T).softmax(-1).topk(2, -1).indices
        gate, down = (next(n for n in found if f"layers.{layer}.mlp.experts" in n and role in n) for role in ("gate", "down"))
        for e in range(5):
            mine = x[(top == e).any(1)]
            g, u = (mine @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            inner = torch.nn.functional.silu(g) * u
            for name, values in ((gate, mine), (down, inner)):
                counts, moments, hessian, *_ = found[name]
                assert counts[e] == len(mine)
                assert hessian is not None
                if len(mine):
                    np.testing.assert_allclose(moments[e], values.square().mean(0).detach(), rtol=1e-3)
                    np.testing.assert_allclose(hessian[e].diagonal(), moments[e], rtol=1e-4)
                else:
                    assert (moments[e] == 1).all() and (hessian[e] == np.eye(len(moments[e]))).all()
        assert sum(found[gate].counts) == 2 * 60
    with_store.close()


# layer by layer -----------------------------------------------------------------------------------


def test_each_weight_is_evaluated_once_and_two_layers_never_together(store: Store) -> None:
    graph = build(read_checkpoint(TINY, store))
    read: list[str] = []

    class Counting(Weights):
        def real(self, name: str, begin: int = 0, end: int | None = None) -> Any:
            read.append(name)
            return super().real(name, begin, end)

    texts = np.random.default_rng(0).integers(0, 1024, (40, 200)).tolist()
    run_layerwise(graph, Counting(graph, store), texts, SiteWatcher(sites_of(graph), (), lambda *_: None))
    matrices = [n for n in read if n != "model.embed_tokens.weight"]
    assert len(matrices) == len(set(matrices)) and "model.layers.2.mlp.up_proj.weight" in matrices
    for part in segments(graph, [n for n in graph.nodes if n not in graph.constants() | {"tokens"}]):
        layers = {n.partition(".")[0] for n in part.names if n[0] == "l" and n[1].isdigit()}
        assert len(layers) <= 1 and len(part.after) <= 1


def test_what_lies_in_a_file_between_layers_is_what_lay_in_memory(store: Store) -> None:
    graph = build(read_checkpoint(TINY, store))
    texts = np.random.default_rng(0).integers(0, 1024, (3, 60)).tolist()
    here, there = (gathered(graph, store, texts, in_memory=limit) for limit in (1 << 30, 0))
    assert all(np.array_equal(here[name].moments, there[name].moments) for name in here)


@pytest.mark.parametrize("case", ["gemma2", "phi3", "gpt2", "qwen2 biases"])
def test_what_is_seen_is_what_the_evaluator_gives_at_once(case: str, tmp_path: Path) -> None:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "gemma2": ("Gemma2", tiny_models.SMALL_GEMMA2), "phi3": ("Phi3", tiny_models.SMALL),
        "gpt2": ("GPT2", tiny_models.SMALL_GPT2), "qwen2 biases": ("Qwen2", tiny_models.SMALL),
    }  # fmt: skip
    tiny_models.save_random(tmp_path, *kinds[case])
    opened = Store()
    graph = build(read_checkpoint(tmp_path, opened))
    texts = np.random.default_rng(0).integers(0, 61, (2, 30)).tolist()
    found = gathered(graph, opened, texts)
    values = {site.values[0] for site in sites_of(graph)}
    whole = run(graph, Weights(graph, opened), texts, want=values)
    for site in sites_of(graph):
        want = whole[site.values[0]].flatten(0, 1).square().mean(0)
        np.testing.assert_allclose(found[site.weights[0]].moments[0], want, rtol=1e-5)
    opened.close()


# the text -----------------------------------------------------------------------------------------


def test_a_text_is_cut_as_llama_imatrix_cuts_it(store: Store) -> None:
    graph = build(read_checkpoint(TINY, store))
    tokenizer = read_tokenizer(TINY, 1024)
    ids = [tokenizer.special["bos"], *tokenizer.reference()(TEXT)] if tokenizer.add_bos else tokenizer.reference()(TEXT)
    want = [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    want = [tokenizer.around(w[1:]) for w in want] if tokenizer.add_bos else want
    got = cut(Calibration(store, tokenizer, (TEXT,), "t", 1), graph, 10**6)
    assert got == want and len(got) > 2


def test_files_of_a_folder_are_taken_in_turn(store: Store) -> None:
    graph = build(read_checkpoint(TINY, store))
    tokenizer = read_tokenizer(TINY, 1024)
    other = TEXT.upper()
    alone = [cut(Calibration(store, tokenizer, (t,), "t", 1), graph, 512) for t in (TEXT, other)]
    both = cut(Calibration(store, tokenizer, (TEXT, other), "t", 1), graph, 512)
    assert both == [alone[0][0], alone[1][0]]


# conversions --------------------------------------------------------------------------------------


def test_statistics_are_kept_and_reused_for_this_model_only(text: Path, tmp_path: Path) -> None:
    kept, out = tmp_path / "kept.safetensors", tmp_path / "a.gguf"
    convert(TINY, quant="Q8_0", calibrate=text, save_statistics=kept, output=out, check=False)
    tensors = load_file(kept)
    assert tensors["l0.attn_norm.moments"].shape == (256,) and tensors["l2.gated.counts"].tolist() == [1536]
    again = convert(TINY, quant="Q8_0", statistics=kept, output=tmp_path / "b.gguf", check=False)
    assert out.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    weights = again.report.accounting["calibration"]["weights"]
    assert weights["model.layers.1.mlp.down_proj.weight"] == {"tokens": 1536, "idle_channels": 0}
    assert f"statistics of activations are of 1536 tokens of {text}" in again.report.notes
    with pytest.raises(InputError, match=r"kept\.safetensors: statistics of another model"):
        convert(TINY, adapters=[str(LORA)], quant="Q8_0", statistics=kept, dry_run=True)


def test_a_dry_run_knows_the_exact_bytes_and_reads_no_text(text: Path, tmp_path: Path) -> None:
    planned = convert(TINY, quant="Q8_0", calibrate=text, dry_run=True)
    made = convert(TINY, quant="Q8_0", calibrate=text, output=tmp_path / "a.gguf", check=False)
    assert planned.plan.nbytes == made.plan.nbytes == (tmp_path / "a.gguf").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": Path("a"), "imatrix": Path("b")}, "--calibrate and --imatrix: statistics come from one of them"),
        ({"statistics": Path("a"), "calibrate_tokens": 5}, "--calibrate-tokens 5: no text is read"),
        ({"statistics": Path("a"), "save_statistics": Path("b")}, "--save-statistics b: a has them"),
        ({"calibrate": Path("a"), "solver": "hqq"}, "--calibrate a: solver hqq reads no statistics"),
        ({"imatrix": Path("a"), "to": "onnx"}, "--imatrix a: the solver of --to onnx reads no statistics"),
        ({"statistics": TINY / "model.safetensors"}, r"model\.safetensors: not a file of statistics"),
        ({"statistics": TINY / "config.json"}, r"config\.json: cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, InputError), match=message):
        convert(TINY, dry_run=True, **options)


# beside the weights -------------------------------------------------------------------------------


def laid_beside(graph: Graph) -> Graph:
    sites = sites_of(graph)
    return Pipeline((Calibrate(sites=sites, kinds=frozenset(KINDS)),)).run(graph)


def test_statistics_stay_beside_a_weight_as_long_as_it_is_there(store: Store) -> None:
    graph = laid_beside(build(read_checkpoint(TINY, store)))
    q, k = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    assert graph.nodes[f"{q}~moments"] == graph.nodes[f"{k}~moments"]
    assert graph.nodes[f"{q}~moments"].attrs == {"tensor": "statistics/statistics.safetensors#l0.attn_norm.moments"}
    assert graph.nodes[f"{q}~hessian"].type == Type("f32", (256, 256))
    assert graph.prune() == graph and parse(format(graph)) == graph
    assert f"{q}~moments" not in Graph({n: v for n, v in graph.nodes.items() if n != q}, (k,)).prune().nodes


def test_an_untied_head_takes_what_it_reads_with_it(store: Store) -> None:
    graph = UntieHead()(laid_beside(build(read_checkpoint(TINY, store))))
    assert graph.nodes["lm_head.weight~moments"].attrs == {"tensor": "statistics/statistics.safetensors#norm.moments"}
    assert "lm_head.weight~hessian" in graph.nodes and "model.embed_tokens.weight~moments" not in graph.nodes


def test_each_matrix_of_split_experts_has_its_own_expert(tmp_path: Path) -> None:
    from qconvert.formats.safetensors_experts import SplitExperts, expert_matrices

    tiny_models.save_random(tmp_path, "Qwen3Moe", tiny_models.SMALL_QWEN3_MOE)
    opened = Store()
    graph = laid_beside(build(read_checkpoint(tmp_path, opened)))
    found: dict[str, Found] = {}
    with StatisticsFile(tmp_path / FILE, sites_of(graph), KINDS, Facts("t", 60, 20), "") as file:

        def done(site: Site, what: Found) -> None:
            file.write(site, what)
            found.update(dict.fromkeys(site.weights, what))

        texts = np.random.default_rng(1).integers(0, 61, (3, 20)).tolist()
        run_layerwise(graph, Weights(graph, opened), texts, SiteWatcher(sites_of(graph), KINDS, done))
    opened.add(ALIAS, tmp_path / FILE)
    split = Pipeline((SplitExperts(),)).run(graph)
    weights = Weights(split, opened)
    assert len(expert_matrices(split)) == 2 * 3 * 5
    for name in expert_matrices(split):
        e = int(name.split("experts.")[1].split(".")[0])
        stack = next(n for n, node in split.nodes.items() if node.op == "stack" and name in node.inputs)
        assert np.array_equal(weights.real(f"{name}~moments"), found[stack].moments[e])
        assert split.nodes[f"{name}~peaks"].type == Type("f32", (split.nodes[name].type.dims[1],))
        hessian = found[stack].hessian
        assert hessian is not None and np.array_equal(weights.real(f"{name}~hessian"), hessian[e])
    opened.close()


@pytest.mark.parametrize(("to", "quant"), [("gguf", "Q4_0"), ("onnx", "int4"), ("safetensors", "w4a16")])
def test_a_solver_of_every_format_reads_them(to: str, quant: str, text: Path, tmp_path: Path) -> None:
    """gptq wants Hessians; the bytes that it takes are known before they are there."""
    if to != "gguf":
        pytest.importorskip("onnx" if to == "onnx" else "compressed_tensors")
    made = convert(TINY, to=to, quant=quant, solver="gptq", calibrate=text, output=tmp_path / "out", check=False)
    assert any("statistics of activations are of 1536 tokens" in note for note in made.report.notes)
    planned = convert(TINY, to=to, quant=quant, solver="gptq", calibrate=text, dry_run=True)
    assert planned.plan.nbytes == made.plan.nbytes
