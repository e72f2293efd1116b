"""The graph, its text, its verifier, and how passes are named and run."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from qconvert import registry
from qconvert.errors import GraphError, QConvertError, UnsupportedError, UsageError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.ops import OPS, infer, verify
from qconvert.pipeline import Pipeline, flatten, name_of, parse_passes, spec_of
from qconvert.text import format, format_node, parse

DUMP = """\
meta {"family": "llama", "config": {"eps": 1e-05, "tied": true}}
%tokens : i64[B,T] = input()
%embed.weight : f32[32,8] = load() {"role": "token_embd", "tensor": "base/model.safetensors#embed.weight"}
%l0.h : f32[B,T,8] = embed(%tokens, %embed.weight)
%q.weight~base : bf16[8,8] = load() {"layer": 0, "role": "attn_q", "tensor": "base/model.safetensors#q.weight"}
%q.A : f32[2,8] = load() {"tensor": "adapter0/adapter_model.safetensors#q.lora_A.weight"}
%q.B : f32[8,2] = load() {"tensor": "adapter0/adapter_model.safetensors#q.lora_B.weight"}
%q.weight : f32[8,8] = merge(%q.weight~base, %q.A, %q.B) {"scale": 0.5}
%l0.q : f32[B,T,8] = linear(%l0.h, %q.weight)
%logits : f32[B,T,32] = linear(%l0.q, %embed.weight)
return %logits
"""




@pytest.fixture
def graph() -> Graph:
    return parse(DUMP)


# text -------------------------------------------------------------------------------------------


def test_dump_parses_and_prints_back_unchanged(graph: Graph) -> None:
    assert parse(format(graph)) == graph
    assert parse(DUMP) == parse("// a comment\n\n  " + DUMP.replace("\n", "\n  // between\n"))
    verify(graph)


def random_attr(rng: random.Random, depth: int = 3) -> Attr:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_attr(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {random_text(rng): random_attr(rng, depth - 1) for _ in range(rng.randrange(4))}
    numbers: list[Attr] = [rng.randrange(-(2**40), 2**40), rng.gauss(0, 1e9), rng.random() * 1e-300]
    return [None, rng.random() < 0.5, *numbers, random_text(rng)][kind]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(string.printable + '"\\{}()%,:éß語🙂\0', k=rng.randrange(12)))


def random_graph(seed: int) -> Graph:
    rng = random.Random(seed)
    nodes: dict[str, Node] = {}
    for i in range(rng.randrange(1, 20)):
        dims = tuple(rng.choice(["B", "T", 0, 1, 4096]) for _ in range(rng.randrange(4)))
        inputs = tuple(rng.choices(list(nodes), k=rng.randrange(4))) if nodes else ()
        attrs = {random_text(rng): random_attr(rng) for _ in range(rng.randrange(3))}
        name = f"l{i}." + "".join(rng.choices(string.ascii_letters + string.digits + "._~-/é", k=6))
        nodes[name] = Node(rng.choice(list(OPS)), inputs, Type(rng.choice(["f32", "q4_k", "gguf.q4_k"]), dims), attrs)
    outputs = tuple(rng.sample(list(nodes), k=rng.randrange(1, len(nodes) + 1)))
    return Graph(nodes, outputs, {random_text(rng): random_attr(rng) for _ in range(rng.randrange(3))})


@pytest.mark.parametrize("block", range(8))
def test_any_graph_survives_printing_and_parsing(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        g = random_graph(seed)
        back = parse(format(g))
        assert back == g, seed
        assert list(back.nodes) == list(g.nodes), seed  # the order is the order of evaluation
        assert format(back) == format(g), seed


@pytest.mark.parametrize("separator", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x1c"], ids=ascii)
def test_line_separator_within_an_attribute_survives(separator: str) -> None:
    g = Graph({"x": Node("constant", (), Type.parse("f32[1]"), {"note": f"a{separator}b"})}, ("x",))
    assert parse(format(g)) == g


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%a : f32[2] = load(", "cannot parse"),
        ("%a f32[2] = load()", "cannot parse"),
        ("hello", "cannot parse"),
        ("%a : f32[2] = load() {tensor: 1}", "attributes"),
        ("%q.A : f32[2,8] = load()", "%q.A is defined twice"),
    ],
)
def test_line_that_is_no_node_is_named(line: str, says: str) -> None:
    with pytest.raises(GraphError, match=f"line 11: {says}"):
        parse(DUMP.replace("return", f"{line}\nreturn"))


# graph ------------------------------------------------------------------------------------------


def test_type_prints_and_parses_symbolic_and_empty_shapes() -> None:
    for text in ("f32[]", "f32[8]", "f32[B,T,8]", "gguf.q4_k[2,144]"):
        assert str(Type.parse(text)) == text


def test_dims_of_an_activation_are_refused() -> None:
    with pytest.raises(GraphError, match="symbolic"):
        Type.parse("f32[B,8]").dims  # noqa: B018


def test_users_count_every_read(graph: Graph) -> None:
    twice = replace(graph, nodes={**graph.nodes, "sum": Node("add", ("l0.q", "l0.q"), Type.parse("f32[B,T,8]"))})
    assert twice.users()["l0.q"] == ["logits", "sum", "sum"]
    assert twice.users()["embed.weight"] == ["l0.h", "logits"]
    assert twice.users()["logits"] == []


def test_parameters_are_the_weights_that_activations_read(graph: Graph) -> None:
    assert graph.parameters() == ["embed.weight", "q.weight"]
    assert graph.constants() == {"embed.weight", "q.weight~base", "q.A", "q.B", "q.weight"}


def test_weight_knows_its_root_and_all_loads_it_is_made_from(graph: Graph) -> None:
    assert graph.root("q.weight").attrs["role"] == "attn_q"
    assert graph.sources("q.weight") == ["q.weight~base", "q.A", "q.B"]


def test_rewrite_moves_a_weight_beneath_its_name_and_rewires_no_reader(graph: Graph) -> None:
    def double(name: str, node: Node) -> Mapping[str, Node] | None:
        if name != "q.weight":
            return None
        return {"q.weight~once": node, name: Node("scaled", ("q.weight~once",), node.type, {"scale": 2.0})}

    new = graph.rewrite(double)
    verify(new)
    assert new.nodes["l0.q"] == graph.nodes["l0.q"]
    assert list(new.nodes).index("q.weight~once") + 1 == list(new.nodes).index("q.weight")


def test_rewrite_drops_what_nothing_uses_any_more(graph: Graph) -> None:
    new = graph.rewrite(lambda n, v: {n: replace(graph.nodes["q.weight~base"])} if n == "q.weight" else None)
    assert "q.A" not in new.nodes and "q.B" not in new.nodes and "q.weight~base" not in new.nodes


def test_rewrite_that_defines_a_value_twice_is_refused(graph: Graph) -> None:
    def clash(name: str, node: Node) -> Mapping[str, Node] | None:
        return {name: node, "q.A": graph.nodes["q.B"]} if name == "q.B" else None

    with pytest.raises(GraphError, match=r"%q\.A would be defined twice"):
        graph.rewrite(clash)


def test_rewrite_may_repeat_the_same_node(graph: Graph) -> None:
    same = graph.rewrite(lambda n, v: {"q.A": graph.nodes["q.A"], n: v} if n == "q.B" else None)
    assert same == graph


def test_rewrite_leaves_the_graph_it_was_given_unchanged(graph: Graph) -> None:
    graph.rewrite(lambda n, v: {n: replace(v, attrs={"scale": 9.0})} if v.op == "merge" else None)
    assert graph == parse(DUMP)


def test_prune_keeps_inputs_that_nothing_reads(graph: Graph) -> None:
    only = replace(graph, outputs=("embed.weight",)).prune()
    assert list(only.nodes) == ["tokens", "embed.weight"]


# verifier ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("linear(%l0.h, %q.weight)", "linear(%l0.x, %q.weight)", "%l0.q uses %l0.x, which is not defined before it"),
        ("linear(%l0.h, %q.weight)", "linear(%logits, %q.weight)", "%l0.q uses %logits, which is not defined"),
        ("%l0.q : f32[B,T,8] = linear", "%l0.q : f32[B,T,8] = linaer", "%l0.q: unknown op 'linaer'"),
        ("%l0.q : f32[B,T,8]", "%l0.q : f32[B,T,9]", "linear gives f32[B,T,8], but the graph says f32[B,T,9]"),
        ("%l0.q : f32[B,T,8]", "%l0.q : q4_9[B,T,8]", "q4_9 is no dtype"),
        ("%q.B : f32[8,2]", "%q.B : f32[8,3]", "%q.weight: A f32[2,8] and B f32[8,3] do not fit a weight bf16[8,8]"),
        ("%l0.h : f32[B,T,8] = embed", "%l0.h : f32[B,T,8] = silu", "silu gives i64[B,T], but the graph says"),
        ("(%l0.q, %embed.weight)", "(%l0.q, %q.A~x)", "%logits uses %q.A~x"),
        ("%q.weight : f32[8,8] = merge", "%q.weight : f32[8,8] = quantize", "f32 is no scheme"),
        ("%q.weight : f32[8,8] = merge", "%q.weight : f32[8,8] = pack", "pack gives a layout"),
        ("linear(%l0.h, %q.weight)", "linear(%l0.h)", "wrong inputs or attributes for linear"),
        ("linear(%l0.h, %q.weight)", "slice(%l0.h)", "wrong inputs or attributes for slice"),
        ("linear(%l0.h, %q.weight)", 'slice(%l0.h) {"begin": "0", "end": 8}', "wrong inputs or attributes for slice"),
        ("return %logits", "return %logit", "output %logit is not defined"),
    ],
)
def test_tampered_dump_is_refused_with_the_line_that_is_wrong(old: str, new: str, says: str) -> None:
    assert old in DUMP
    with pytest.raises(GraphError) as caught:
        verify(parse(DUMP.replace(old, new)))
    assert says in caught.value.message


def test_type_of_an_op_is_inferred_from_its_inputs() -> None:
    x, w = Type.parse("f32[B,T,8]"), Type.parse("f32[4,8]")
    assert str(infer("linear", (x, w))) == "f32[B,T,4]"
    assert str(infer("slice", (x,), begin=2, end=5)) == "f32[B,T,3]"
    assert str(infer("transpose", (w,))) == "f32[8,4]"
    with pytest.raises(GraphError, match="declare"):
        infer("load", ())


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_says_what_it_means(op: str) -> None:
    assert OPS[op].doc


# passes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubled:
    name: ClassVar[str] = "doubled"
    times: int = 1
    scale: float = 2.0
    where: str = ""
    dry: bool = False

    def __call__(self, graph: Graph) -> Graph:
        return graph


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> type[Doubled]:
    monkeypatch.setitem(registry.entries("passes"), "doubled", (f"{__name__}:Doubled", "test"))  # type: ignore[arg-type]
    return Doubled


@pytest.mark.parametrize(
    "spec",
    ["doubled", "doubled{times=3}", "doubled{times=3 scale=0.5 where=attn dry=True}", "doubled,doubled{scale=1e-05}"],
)
def test_pass_spec_prints_back_as_it_was_read(spec: str, doubled: type[Doubled]) -> None:
    passes = parse_passes(spec)
    assert str(Pipeline(passes)) == spec
    assert parse_passes(str(Pipeline(passes))) == passes


def test_pass_options_have_the_types_of_their_fields(doubled: type[Doubled]) -> None:
    assert parse_passes("doubled{times=3 scale=1 dry=yes}") == (Doubled(3, 1.0, "", True),)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("doubled{tines=3}", UsageError, "no option 'tines=3'; it has times, scale, where, dry"),
        ("doubled{times}", UsageError, "no option 'times'"),
        ("dou bled", UsageError, "cannot read 'dou bled'"),
        ("doubledd", UnsupportedError, "no passe? is called 'doubledd'"),
    ],
)
def test_wrong_pass_spec_is_named(spec: str, error: type[QConvertError], says: str, doubled: type[Doubled]) -> None:
    with pytest.raises(error, match=says):
        parse_passes(spec)


def test_option_of_the_wrong_type_is_a_usage_error(doubled: type[Doubled]) -> None:
    with pytest.raises(UsageError, match="times"):
        parse_passes("doubled{times=many}")


def test_plain_function_is_a_pass_and_strings_are_parsed(graph: Graph, doubled: type[Doubled]) -> None:
    def nothing(g: Graph) -> Graph:
        return g

    passes = flatten([nothing, "doubled{times=2}", Doubled()])
    assert [name_of(p) for p in passes] == ["nothing", "doubled", "doubled"]
    assert [spec_of(p) for p in passes] == ["nothing", "doubled{times=2}", "doubled"]
    assert Pipeline(passes).run(graph) == graph


def test_pass_that_leaves_an_invalid_graph_is_named(graph: Graph) -> None:
    def breaks(g: Graph) -> Graph:
        return replace(g, nodes={n: v for n, v in g.nodes.items() if n != "q.A"})

    with pytest.raises(GraphError, match=r"breaks left an invalid graph: %q\.weight uses %q\.A"):
        Pipeline((breaks,)).run(graph)


def test_pass_that_returns_no_graph_is_named(graph: Graph) -> None:
    with pytest.raises(GraphError, match="nothing returned NoneType, not a Graph"):
        Pipeline((nothing_at_all,)).run(graph)


def nothing_at_all(g: Graph) -> Graph:
    return None  # type: ignore[return-value]


nothing_at_all.__name__ = "nothing"


def test_each_pass_is_logged_and_dumped(graph: Graph, tmp_path: Path) -> None:
    lines: list[str] = []
    Pipeline((Doubled(),)).run(graph, dump=tmp_path / "ir", log=lines.append)
    assert len(lines) == 1 and lines[0].startswith("doubled ") and "nodes 9 -> 9" in lines[0]
    assert sorted(p.name for p in (tmp_path / "ir").iterdir()) == ["00-input.ir", "01-doubled.ir"]
    assert parse((tmp_path / "ir" / "01-doubled.ir").read_text(encoding="utf-8")) == graph


def test_format_node_is_one_line_whatever_its_attributes() -> None:
    node = Node("constant", (), Type.parse("f32[1]"), {"values": [1.0], "note": "two\nlines"})
    assert "\n" not in format_node("x", node)
