"""The reference evaluator: its ops against torch, transformers and PEFT, and what it keeps in memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qconvert import run as module
from qconvert.errors import GraphError
from qconvert.graph import Graph, Node
from qconvert.ops import OPS, verify
from qconvert.run import rope_frequencies, run
from qconvert.text import parse


class Arrays(dict[str, npt.NDArray[Any]]):
    """Weights in memory; remembers which rows were asked for."""

    def __init__(self, **arrays: npt.NDArray[Any]) -> None:
        super().__init__(arrays)
        self.reads: list[tuple[str, int, int]] = []

    def real(self, name: str, begin: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        self.reads.append((name, begin, len(self[name]) if end is None else end))
        return self[name][begin:end]


def random(*shape: int, seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(*shape: int, n: int) -> Tensor:
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(0))


EMBED_AND_LINEAR = """
%tokens : i64[B,T] = input()
%E : f32[100,8] = load() {"tensor": "E"}
%h : f32[B,T,8] = embed(%tokens, %E)
%W : f32[50,8] = load() {"tensor": "W"}
%b : f32[50] = load() {"tensor": "b"}
%y : f32[B,T,50] = linear(%h, %W, %b)
return %y
"""


@pytest.fixture
def model() -> tuple[Graph, Arrays]:
    return parse(EMBED_AND_LINEAR), Arrays(E=random(100, 8), W=random(50, 8, seed=1), b=random(50, seed=2))


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)


# what is evaluated --------------------------------------------------------------------------------


def test_every_activation_op_can_be_evaluated() -> None:
    assert set(module.OPS) == {name for name, op in OPS.items() if not op.constant}


def test_outputs_are_given_by_default(model: tuple[Graph, Arrays]) -> None:
    graph, weights = model
    tokens = ids(2, 3, n=100)
    got = run(graph, weights, tokens)
    table, w, b = (torch.tensor(weights[name]) for name in "EWb")
    want = nn.functional.linear(table[tokens], w, b)
    assert list(got) == ["y"]
    torch.testing.assert_close(got["y"], want)


def test_only_what_is_wanted_is_evaluated(model: tuple[Graph, Arrays]) -> None:
    graph, weights = model
    got = run(graph, weights, np.array([[1, 2]]), want=["h", "b"])
    assert list(got) == ["h", "b"]
    assert {name for name, *_ in weights.reads} == {"E", "b"}


def test_an_unknown_name_is_refused(model: tuple[Graph, Arrays]) -> None:
    with pytest.raises(GraphError, match="no value is called %nope"):
        run(*model, [[0]], want=["nope"])


def test_a_token_beyond_the_table_is_refused(model: tuple[Graph, Arrays]) -> None:
    with pytest.raises(GraphError, match="%E has 100 rows; row 100 was wanted"):
        run(*model, [[0, 100]])


def test_an_op_on_weights_is_not_run_on_activations() -> None:
    graph = parse("%t : i64[B,T] = input()\n%x : i64[T,B] = transpose(%t)\nreturn %x")
    with pytest.raises(GraphError, match="%x: transpose is not an op on activations"):
        run(graph, Arrays(), [[0]])


def test_f64_gives_f64(model: tuple[Graph, Arrays]) -> None:
    assert run(*model, [[0]], dtype=torch.float64)["y"].dtype == torch.float64


def test_observers_see_the_activations_that_each_op_reads(model: tuple[Graph, Arrays]) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}

    def observe(name: str, node: Node, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = [tuple(x.shape) for x in inputs]

    run(*model, [[0, 1, 2]], observe=observe)
    assert seen == {"tokens": [], "h": [(1, 3)], "y": [(1, 3, 8)]}


# memory -------------------------------------------------------------------------------------------


def test_weights_are_read_when_they_are_used_and_not_before(model: tuple[Graph, Arrays]) -> None:
    graph, weights = model
    reads_before: dict[str, int] = {}
    run(graph, weights, [[0]], observe=lambda name, *_: reads_before.update({name: len(weights.reads)}))
    assert reads_before == {"tokens": 0, "h": 0, "y": 1}


def test_values_are_freed_after_their_last_reader() -> None:
    lines = ["%tokens : i64[B,T] = input()", "%E : f32[9,4] = load()", "%x0 : f32[B,T,4] = embed(%tokens, %E)"]
    lines += [f"%x{i + 1} : f32[B,T,4] = add(%x{i}, %x{i})" for i in range(20)]
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def observe(name: str, node: Node, inputs: tuple[Tensor, ...]) -> None:
        nonlocal most
        alive.extend(weakref.ref(x) for x in inputs if x.is_floating_point())
        most = max(most, len({id(r()) for r in alive if r() is not None}))

    run(parse("\n".join([*lines, "return %x20"])), Arrays(E=random(9, 4)), [[0, 1]], observe=observe)
    assert most == 1


def test_a_large_weight_is_read_in_blocks_of_rows(model: tuple[Graph, Arrays], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = model
    whole = run(graph, weights, [[5, 6]])["y"]
    small_blocks(monkeypatch)
    weights.reads.clear()
    torch.testing.assert_close(run(graph, weights, [[5, 6]])["y"], whole)
    assert max(end - begin for name, begin, end in weights.reads if name == "W") == 8


def test_of_a_large_table_only_the_rows_of_the_tokens_are_read(
    model: tuple[Graph, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, weights = model
    small_blocks(monkeypatch)
    h = run(graph, weights, [[7, 3, 7]], want=["h"])["h"]
    assert weights.reads == [("E", 3, 4), ("E", 7, 8)]
    torch.testing.assert_close(h, torch.tensor(weights["E"])[[7, 3, 7]][None])


# ops ----------------------------------------------------------------------------------------------


def evaluate(op: str, weights: Arrays, tokens: Tensor, attrs: str = "{}", width: int = 8) -> Tensor:
    """The op applied to embedded tokens %h (or to the ids, where the op embeds) and all weights but E."""
    first = "tokens" if "embed" in op else "h"
    lines = ["%tokens : i64[B,T] = input()"]
    lines += [f'%{n} : f32[{",".join(map(str, w.shape))}] = load() {{"tensor": "{n}"}}' for n, w in weights.items()]
    lines += [f"%h : f32[B,T,{weights['E'].shape[1]}] = embed(%tokens, %E)"]
    args = ", ".join(f"%{n}" for n in (first, *weights) if n != "E")
    lines += [f"%y : f32[B,T,{width}] = {op}({args}) {attrs}", "return %y"]
    graph = parse("\n".join(lines))
    verify(graph)
    return run(graph, weights, tokens)["y"]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.map = nn.Linear(8, 6)


def adapted(target: str, **options: object) -> Any:
    """PEFT's own layer over a random Linear or Embedding, with a random adapter of scale 2."""
    torch.manual_seed(0)
    made = peft.get_peft_model(Toy(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target], **options))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p).abs() if p.dim() == 1 else torch.randn_like(p))
    return getattr(made.base_model.model, target)


def arrays(**tensors: Tensor) -> Arrays:
    return Arrays(**{name: t.detach().numpy() for name, t in tensors.items()})


@pytest.mark.parametrize("bias", [False, True])
def test_lora_equals_peft(bias: bool) -> None:
    layer = adapted("map", lora_bias=bias)
    a, b = layer.lora_A.default, layer.lora_B.default
    tokens, table = ids(2, 5, n=11), torch.randn(11, 8)
    x = table[tokens]
    weights = arrays(E=table, A=a.weight, B=b.weight, **({"bias": b.bias} if bias else {}))
    path = evaluate("lora", weights, tokens, '{"scale": 2.0}', width=6)
    torch.testing.assert_close(path, layer(x) - layer.base_layer(x), rtol=1e-4, atol=1e-5)


def test_lora_of_an_embedding_equals_peft() -> None:
    layer = adapted("table")
    tokens = ids(2, 5, n=11)
    weights = arrays(E=torch.randn(11, 8), A=layer.lora_embedding_A.default, B=layer.lora_embedding_B.default)
    path = evaluate("lora_embed", weights, tokens, '{"scale": 2.0}')
    torch.testing.assert_close(path, layer(tokens) - layer.base_layer(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [8, 1 << 23])
def test_dora_equals_peft(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    layer = adapted("map", use_dora=True)
    tokens, table = ids(2, 5, n=11), torch.randn(11, 8)
    weights = arrays(
        E=table, W=layer.base_layer.weight, A=layer.lora_A.default.weight, B=layer.lora_B.default.weight,
        m=layer.lora_magnitude_vector.default.weight,
    )  # fmt: skip
    path = evaluate("dora_path", weights, tokens, '{"scale": 2.0, "weight": 0.5}', width=6)  # the bias is not scaled
    x = table[tokens]
    torch.testing.assert_close(2 * path, layer(x) - layer.base_layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [8, 1 << 23])
def test_dora_of_an_embedding_equals_peft(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    layer = adapted("table", use_dora=True)
    tokens = ids(2, 5, n=11)
    weights = arrays(
        E=torch.randn(11, 8), W=layer.base_layer.weight, A=layer.lora_embedding_A.default,
        B=layer.lora_embedding_B.default, m=layer.lora_magnitude_vector.default.weight,
    )  # fmt: skip
    path = evaluate("dora_embed", weights, tokens, '{"scale": 2.0, "weight": 0.5}')
    torch.testing.assert_close(2 * path, layer(tokens) - layer.base_layer(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("used", "normalize"), [(1, False), (2, True), (4, True), (4, False)])
def test_a_token_takes_its_most_probable_experts(used: int, normalize: bool) -> None:
    text = f"""
    %t : i64[B,T] = input()
    %E : f32[11,4] = load()
    %h : f32[B,T,4] = embed(%t, %E)
    %y : f32[B,T,4] = route(%h) {{"used": {used}, "normalize": {str(normalize).lower()}}}
    return %y
    """
    weights, tokens = Arrays(E=random(11, 4)), ids(1, 5, n=11)
    for got, x in zip(run(parse(text), weights, tokens)["y"][0], weights["E"][tokens[0]], strict=True):
        share = np.exp(x) / np.exp(x).sum()
        share[np.argsort(share)[: 4 - used]] = 0
        np.testing.assert_allclose(got, share / share.sum() if normalize else share, rtol=1e-6)


def test_activations_are_rounded_before_each_product_of_an_expert() -> None:
    text = """
    %t : i64[B,T] = input()
    %E : f32[11,4] = load()
    %h : f32[B,T,4] = embed(%t, %E)
    %gate : f32[4,6,4] = load()
    %up : f32[4,6,4] = load()
    %down : f32[4,4,6] = load()
    %r : f32[B,T,4] = route(%h) {"used": 1, "normalize": true}
    %y : f32[B,T,4] = experts(%h, %r, %gate, %up, %down) {"act": "silu"}
    return %y
    """
    graph = parse(text)
    verify(graph)
    w = Arrays(E=random(11, 4), gate=random(24, 4, seed=1), up=random(24, 4, seed=2), down=random(16, 6, seed=3))
    seen: list[tuple[str, int]] = []

    def rounded(node: Node, x: Tensor) -> Tensor:
        seen.append((node.inputs[1], x.shape[-1]))
        return x.round()

    got = run(graph, w, [[3]], round_input=rounded)["y"][0, 0]
    assert seen == [("gate", 4), ("up", 4), ("down", 6)]
    x, e = torch.tensor(w["E"][3]), int(w["E"][3].argmax())
    gate, up, down = (torch.tensor(w[n]).unflatten(0, (4, -1))[e] for n in ("gate", "up", "down"))
    want = down @ (nn.functional.silu(gate @ x.round()) * (up @ x.round())).round()
    torch.testing.assert_close(got, want)


def test_rms_norm_works_on_each_chunk_as_wide_as_its_weight() -> None:
    weights = Arrays(E=random(11, 8), w=random(4, seed=1))
    tokens = ids(1, 5, n=11)
    x = torch.tensor(weights["E"])[tokens].reshape(1, 5, 2, 4)
    want = nn.functional.rms_norm(x, (4,), torch.tensor(weights["w"]), 1e-5).reshape(1, 5, 8)
    torch.testing.assert_close(evaluate("rms_norm", weights, tokens, '{"eps": 1e-05}'), want)


def test_attention_without_a_window_in_reach_is_plain_causal_attention() -> None:
    text = "%t : i64[B,T] = input()\n%E : f32[11,8] = load()\n%h : f32[B,T,8] = embed(%t, %E)\n"
    attrs = '{"heads": 2, "kv_heads": 2, "scale": 0.5, "window": 5}'
    graph = parse(f"{text}%y : f32[B,T,8] = attention(%h, %h, %h) {attrs}\nreturn %y")
    weights, tokens = Arrays(E=random(11, 8)), ids(1, 5, n=11)
    h = torch.tensor(weights["E"])[tokens].reshape(1, 5, 2, 4).transpose(1, 2)
    scores = (0.5 * h @ h.transpose(2, 3)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    want = (scores.softmax(-1) @ h).transpose(1, 2).reshape(1, 5, 8)
    torch.testing.assert_close(run(graph, weights, tokens)["y"], want)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("n_tokens", [100, 40000])
def test_rope_frequencies_of_large_heads_equal_those_of_transformers(kind: str, n_tokens: int) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=32768, rope_parameters=parameters
    )
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=n_tokens)
    original = SCALINGS[kind].get("original_max_position_embeddings", 32768)
    scaling = {"type": kind, **SCALINGS[kind], "original_context": original}
    got, own_factor = rope_frequencies(128, 10000.0, scaling, n_tokens)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert own_factor == pytest.approx(factor, rel=1e-12)


def test_an_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(GraphError, match="unknown rope scaling 'longrope'"):
        rope_frequencies(8, 10000.0, {"type": "longrope"}, 10)


def test_frequency_factors_as_an_input_divide_the_frequencies() -> None:
    """GGUF holds llama3's scaling as a tensor; the rotation must be the one of the attribute."""
    text = "%t : i64[B,T] = input()\n%E : f32[11,8] = load()\n%f : f32[2] = load()\n%h : f32[B,T,8] = embed(%t, %E)\n"
    text += '%a : f32[B,T,8] = rope(%h, %f) {"head_dim": 4, "theta": 100.0}\n'
    text += '%b : f32[B,T,8] = rope(%h) {"head_dim": 4, "theta": 100.0, "scaling": {"type": "linear", "factor": 4.0}}\n'
    weights, tokens = Arrays(E=random(11, 8), f=np.full(2, 4, np.float32)), ids(1, 9, n=11)
    got = run(parse(text + "return %a, %b"), weights, tokens)
    torch.testing.assert_close(got["a"], got["b"])
