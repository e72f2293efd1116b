"""Every parser on anything: a value or a named error, soon, and never another exception. See fuzzing.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from fuzzing import HUGE, SCALAR, SETTINGS, TEXT, WORDS, ends, json_object, json_value, u32, u64, written
from hypothesis import example, given
from hypothesis import strategies as st
from test_layout_round_trips import NAMES, within

from qconvert import adapter_config, gguf_reader, licenses, recipe, request, safetensors_header, text, tokenizer_json
from qconvert.baseline import read_baseline
from qconvert.byte_files import LocalFile
from qconvert.certificate import FIELDS, Certificate, read_certificate, seal
from qconvert.errors import InputError
from qconvert.families import LLAMA
from qconvert.families_gemma import GEMMA3
from qconvert.families_moe import QWEN3_MOE
from qconvert.formats import gguf_imatrix
from qconvert.formats.gguf_kv import STRUCTS
from qconvert.formats.gguf_ollama import go_template
from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.patterns import matcher
from qconvert.pipeline import Pipeline, parse_passes
from qconvert.probes import probes_of
from qconvert.report import Report
from qconvert.safetensors_header import BITS
from qconvert.sentencepiece_model import as_tokenizer_json, read_sentencepiece
from qconvert.settings import read_settings
from qconvert.solver_spec import Solving
from qconvert.sources import Store, read_json
from qconvert.tokenizer import read_tokenizer

TINY = Path("golden/tiny")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# files of tensors ------------------------------------------------------------------------------------

ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from([*BITS, "f32"]) | SCALAR,
    "shape": st.lists(st.integers(0, 5) | HUGE, max_size=4) | SCALAR,
    "data_offsets": st.lists(st.integers(0, 200) | HUGE, max_size=3) | SCALAR,
})  # fmt: skip
HEADER = st.dictionaries(TEXT | st.just("__metadata__"), ENTRY | json_value(TEXT), max_size=4)


@SETTINGS
@given(HEADER.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=60), st.none() | HUGE, st.binary(max_size=40))
@example(b"[" * 100_000, None, b"")
def test_safetensors_header(place: Path, header: bytes, n: int | None, data: bytes) -> None:
    path = written(place, "x.safetensors", u64(len(header) if n is None else n) + header + data)
    file = LocalFile(path)
    try:
        found = ends(lambda: safetensors_header.read_header(file))
    finally:
        file.close()
    for entry in (found or {}).values():
        assert entry.begin >= 8 and entry.begin + entry.nbytes <= path.stat().st_size


STRING = st.binary(max_size=20).map(lambda b: u64(len(b)) + b) | st.tuples(HUGE, st.binary(max_size=8)).map(
    lambda t: u64(t[0]) + t[1]
)
ARRAY = st.tuples(st.integers(0, 13), HUGE | st.integers(0, 9), st.binary(max_size=40)).map(
    lambda t: u32(t[0]) + u64(t[1]) + t[2]
)
VALUE = st.tuples(st.integers(0, 14) | HUGE, STRING | ARRAY | st.binary(max_size=9)).map(lambda t: u32(t[0]) + t[1])
KEYS = st.sampled_from([b"general.alignment", b"general.architecture", b"general.type", b"imatrix.datasets"]).map(
    lambda b: u64(len(b)) + b
)
INFO = st.tuples(STRING, st.integers(0, 5) | HUGE, st.lists(HUGE, max_size=4), st.integers(0, 45) | HUGE, HUGE).map(
    lambda t: t[0] + u32(t[1]) + b"".join(map(u64, t[2])) + u32(t[3]) + u64(t[4])
)
GGUF = st.tuples(
    st.sampled_from([b"GGUF"]) | st.binary(max_size=4), st.sampled_from([2, 3, 3]) | HUGE, st.none() | HUGE, st.none() | HUGE,
    st.lists(st.tuples(KEYS | STRING, VALUE).map(b"".join), max_size=4), st.lists(INFO, max_size=3), st.binary(max_size=64),
).map(lambda t: t[0] + u32(t[1]) + u64(len(t[5]) if t[2] is None else t[2]) + u64(len(t[4]) if t[3] is None else t[3])
      + b"".join(t[4]) + b"".join(t[5]) + t[6])  # fmt: skip


@SETTINGS
@given(GGUF | st.binary(max_size=80))
def test_gguf_header(place: Path, data: bytes) -> None:
    path = written(place, "x.gguf", data)
    if found := ends(lambda: gguf_reader.read_header(path)):
        assert all(i.offset + i.nbytes <= len(data) for i in found.tensors if i.nbytes)
    ends(lambda: gguf_imatrix.read(path))


@SETTINGS
@given(st.integers(0, 3), st.lists(st.tuples(STRING, VALUE).map(b"".join), max_size=3), st.data())
def test_gguf_values_are_read_back(place: Path, n: int, odd: list[bytes], data: st.DataObject) -> None:
    """What gguf_kv writes is what the reader reads, and what is behind it does no harm."""
    from qconvert.formats.gguf_kv import KV, header

    ranges = {"u8": (0, 255), "u16": (0, 65535), "u32": (0, 2**32 - 1), "u64": (0, 2**64 - 1), "i32": (-(2**31), 2**31 - 1)}
    kvs = []
    for i in range(n):
        kind: Any = data.draw(st.sampled_from(sorted(STRUCTS)))
        low, high = ranges.get(kind, (0, 1))
        one = (
            st.booleans()
            if kind == "bool"
            else st.floats(width=32, allow_nan=False)
            if kind == "f32"
            else st.integers(low, high)
        )
        many = data.draw(st.booleans()) and f"arr_{kind}" in ("arr_bool", "arr_u8", "arr_i32", "arr_u32", "arr_f32")
        value: Any = data.draw(st.lists(one, max_size=3)) if many else data.draw(one)
        kvs.append(KV(f"k{i}", f"arr_{kind}" if many else kind, value))
    found = gguf_reader.read_header(written(place, "kv.gguf", header(kvs)))
    assert found.kv == {kv.key: kv.value for kv in kvs}
    ends(lambda: gguf_reader.read_header(written(place, "kv.gguf", header(kvs) + b"".join(odd))))


@SETTINGS
@given(
    st.lists(st.tuples(STRING, HUGE, st.binary(max_size=16)).map(lambda t: t[0][:4] + t[0][8:] + u32(t[1]) + t[2]), max_size=3)
)
def test_old_imatrix(place: Path, entries: list[bytes]) -> None:
    ends(lambda: gguf_imatrix.read(written(place, "x.dat", u32(len(entries)) + b"".join(entries))))


SHARDS = st.sampled_from(["a.safetensors", "..", "/x", "a#b"]) | TEXT
INDEX = st.fixed_dictionaries({"weight_map": st.dictionaries(WORDS, SHARDS) | json_value(TEXT)})


@SETTINGS
@given(INDEX | json_object(["weight_map", "metadata"]) | json_value(TEXT))
@example({"weight_map": {"x": "a" * 300}})
@example({"weight_map": {"x": "\x00"}})
def test_index_of_shards(place: Path, document: Any) -> None:
    written(place / "index", "model.safetensors.index.json", json.dumps(document))

    def read() -> object:
        store = Store()
        store.add("base", place / "index")
        return store.tensors("base")

    ends(read)


# settings --------------------------------------------------------------------------------------------

ADAPTER_KEYS = [*adapter_config.CONSUMED, *adapter_config.HARMLESS]


@SETTINGS
@given(json_object(ADAPTER_KEYS), st.booleans())
@example({"peft_type": []}, True)
@example({"peft_type": "LORA", "rank_pattern": {"(": 3}}, True)
def test_adapter_config(place: Path, config: dict[str, Any], lora: bool) -> None:
    written(place, "adapter_config.json", json.dumps(config | ({"peft_type": "LORA"} if lora else {})))
    found = ends(lambda: adapter_config.read_config(place)) or {}
    ends(lambda: adapter_config.kind_of(found))
    for key in ("modules_to_save", "target_modules"):
        ends(lambda key=key: adapter_config.names_of(found, key))  # type: ignore[misc]
    for key in ("rank_pattern", "alpha_pattern"):
        ends(lambda key=key: adapter_config.pattern_value(found.get(key), "model.layers.0.q_proj", found.get("r"), key))  # type: ignore[misc]


PATTERN = st.text("ab.*+?|()[]{}\\^$09,-:=!<>P", max_size=14) | st.text(max_size=8)


@SETTINGS
@given(PATTERN, st.sampled_from(["model.layers.0.self_attn.q_proj", "a" * 100, "a.b" * 30]))
@example("(a+)+$", "a" * 100)
@example("(?P<a>.*)(?P=a){9}", "ab" * 50)
def test_patterns(pattern: str, name: str) -> None:
    config = {"rank_pattern": {pattern: 4}}
    ends(lambda: adapter_config.pattern_value(config["rank_pattern"], name, 8, "rank"))
    assert matcher.cache_info() is not None


CONFIG = json.loads((TINY / "config.json").read_text("utf-8"))
CONFIG_KEYS = [
    *CONFIG, "rope_scaling", "sliding_window", "layer_types", "num_experts", "num_local_experts", "rope_theta", "rope_type",
    "factor", "original_max_position_embeddings", "short_factor", "long_factor",
]  # fmt: skip


@SETTINGS
@given(json_object(CONFIG_KEYS), st.sampled_from([LLAMA, GEMMA3, QWEN3_MOE]), st.booleans())
def test_config(config: dict[str, Any], family: Any, mostly: bool) -> None:
    ends(lambda: read_settings(family, {**CONFIG, **config} if mostly else config, "config.json"))


@SETTINGS
@given(st.binary(max_size=40) | json_value(TEXT).map(lambda v: json.dumps(v).encode()))
@example(b'{"a": 1' + b"0" * 5000 + b"}")
@example(b"[" * 100_000)
@example(b"\xff")
def test_json(place: Path, data: bytes) -> None:
    path = written(place, "x.json", data)
    ends(lambda: read_json(path))
    ends(lambda: tokenizer_json.read_json(path))


RECIPE = st.dictionaries(
    st.sampled_from([*recipe.HINTS, "format", "to"]), json_value(st.sampled_from([*recipe.HINTS]), SCALAR), max_size=4
)


@SETTINGS
@given(RECIPE.map(json.dumps) | st.text(max_size=30) | st.text("&*!%@`{}[]:-#|>?,\"' \n\ta0", max_size=30))
@example("a: &a [*a]")
@example("model: !!python/object:os.system x")
@example("to: [{format: gguf, bits: 1e999}]")
@example("? [x]\n: 1")
@example("\x00")
@example("bits: 2024-13-45")
@example("model: <<")
@example("<<: 1")
@example("- " * 2000)
def test_recipe(place: Path, said: str) -> None:
    path = written(place, "recipe.yaml", said)
    ends(lambda: recipe.read_recipe(path))


@SETTINGS
@given(st.text(max_size=40) | st.text("-:{}[]!&*#|>\n' a", max_size=40))
@example("license: !!python/name:os.system ''")
@example("license: 2024-13-45")
def test_front_matter(place: Path, said: str) -> None:
    path = written(place, "README.md", f"---\n{said}\n---\n")
    ends(lambda: licenses.from_front_matter(path))
    licenses.recognised(said)


# words of a request ----------------------------------------------------------------------------------


@SETTINGS
@given(st.text(max_size=30) | st.text("a0.+:-e/~@ ", max_size=20))
@example("a" * 5000)
@example("x+" + "b" * 5000)
@example("a\x00b+c:1")
@example("x:1e999")
@example("~nobody/x")
@example("9" * 400)
@example("9" * 400 + "g")
@example("٣")
@example("²")
def test_words_of_a_request(said: str) -> None:
    ends(lambda: request.parse_model(said))
    ends(lambda: request.parse_adapter(said))
    ends(lambda: request.parse_target(said, None))
    if (n := ends(lambda: request.parse_nbytes(said))) is not None:
        assert n >= 0
    ends(lambda: Solving.of(said))


SPEC = st.text("quantizegpdm{}=,. 01+x", max_size=24) | st.sampled_from(
    ["gptq{damp=%s}", "quantize{mix=%s}", "pack{format=%s},x", "awq+gptq{%s}", "split-metadata{prefetch=%s}", "rtn{%s=1}"]
).flatmap(lambda form: st.text(max_size=6).map(lambda t: form.replace("%s", t)))


@SETTINGS
@given(SPEC | st.text(max_size=20))
@example("gptq{damp=nan}")
@example("gptq{damp=1e999}")
def test_specs_of_passes_and_solvers(said: str) -> None:
    ends(lambda: Solving.of(said))
    if passes := ends(lambda: parse_passes(said)):
        assert str(Pipeline(parse_passes(str(Pipeline(passes))))) == str(Pipeline(passes))


# graphs ----------------------------------------------------------------------------------------------

NAME = st.text("abcxyz._~0123456789-", min_size=1, max_size=8)
TYPE = st.builds(
    Type,
    st.sampled_from(["f32", "bf16", "q4_k", "gguf.q4_k"]),
    st.lists(st.integers(0, 99) | st.just("T"), max_size=3).map(tuple),
)
ATTRS = st.dictionaries(
    st.text(max_size=5),
    json_value(TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.floats(allow_nan=False)),
    max_size=2,
)
NODES = st.dictionaries(
    NAME,
    st.builds(Node, st.sampled_from(["load", "linear"]), st.lists(NAME, max_size=3).map(tuple), TYPE, ATTRS),
    min_size=1,
    max_size=3,
)


@SETTINGS
@given(st.builds(Graph, NODES, st.lists(NAME, min_size=1, max_size=2).map(tuple), ATTRS))
def test_graph_text_goes_both_ways(graph: Graph) -> None:
    assert text.parse(text.format(graph)) == graph


@SETTINGS
@given(st.text(max_size=40) | st.text('%ax:=()[]{}",T0 \n\u00b2return meta', max_size=60))
@example("%a : f32[²] = load()\nreturn %a")
@example("meta " + "[" * 100_000)
@example('%a : f32[1] = load() {"a": 1' + "0" * 5000 + "}")
def test_graph_text(said: str) -> None:
    ends(lambda: text.parse(said))


# tokenizers ------------------------------------------------------------------------------------------

TOKENIZER = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
SMALL = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": dict([*TOKENIZER["model"]["vocab"].items()][:20]), "merges": []}}
PARTS = """added_tokens normalizer pre_tokenizer post_processor decoder model type vocab merges id content pretokenizers
normalizers processors special unk_token unk_id single SpecialToken""".split()  # noqa: SIM905
TYPES = st.sampled_from(
    ["BPE", "Unigram", "Sequence", "ByteLevel", "Metaspace", "Precompiled", "TemplateProcessing", "Replace", "WordPiece"]
)


@SETTINGS
@given(json_object(PARTS, SCALAR | TYPES), json_object(PARTS, SCALAR | TYPES),
       json_object(["bos_token", "eos_token", "add_bos_token", "chat_template", "added_tokens_decoder", "content"]),
       st.sampled_from([0, 1, 24, 1024]))  # fmt: skip
def test_tokenizer(place: Path, changed: dict[str, Any], model: dict[str, Any], config: dict[str, Any], rows: int) -> None:
    folder = place / "tokenizer"
    written(folder, "config.json", "{}")
    written(folder, "tokenizer_config.json", json.dumps(config))
    written(folder, "tokenizer.json", json.dumps({**SMALL, **changed, "model": {**SMALL["model"], **model}}))
    if found := ends(lambda: read_tokenizer(folder, rows)):
        assert len(found.tokens) == len(found.types) == rows


@SETTINGS
@given(
    st.recursive(
        st.binary(max_size=8),
        lambda inner: st.lists(
            st.tuples(st.integers(0, 46), st.sampled_from([0, 1, 2, 2, 2, 3, 5]), inner).map(
                lambda t: bytes([t[0] << 3 & 127 | t[1]]) + (bytes([len(t[2])]) if t[1] == 2 else b"") + t[2]
            ),
            max_size=4,
        ).map(b"".join),
        max_leaves=12,
    )
)
@example(b"\x0a\x02\x0a\x00\x12\x04\xc2\x02\x01a")  # an id of a special token that is a string
def test_sentencepiece(place: Path, data: bytes) -> None:
    path = written(place, "x.model", data[:2000])
    if found := ends(lambda: read_sentencepiece(path)):
        ends(lambda: as_tokenizer_json(found))


JINJA = [
    "{{ m.content }}", "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% endif %}", "{{ m.role }}",
    "<|x|>", "{{ bos_token }}", "{% else %}", "{{ 1 / 0 }}", "{{ m.x.y }}", "{{ messages[9] }}", "\n", "{{ 'a' * 9 }}",
    "{{ [] | first }}",
]  # fmt: skip


@SETTINGS
@given(st.lists(st.sampled_from(JINJA), max_size=8).map("".join) | st.text("{}%m a'|", max_size=20))
@example("{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ 1 / 0 }}")
def test_chat_template(jinja: str) -> None:
    ends(lambda: go_template(jinja, {"bos_token": "<s>"}, True))


# reports and certificates ----------------------------------------------------------------------------

REPORT = Report(
    [{"path": "a.gguf", "format": "gguf", "quant": "Q4_K_M", "nbytes": 9, "bpw": {"codes": 4.0, "linear": 4.5, "file": 5.0}}],
    quality={"mean_kl": 0.1, "p999_kl": 1.0, "top1": 0.9, "perplexity_ratio": 1.0, "n_tokens": 5, "text": "x", "sequence": 5,
             "digest": "0"},
    quant="Q4_K_M", provenance={"model": "m", "revision": None, "family": "llama", "n_weights": 3},
)  # fmt: skip
SAID = REPORT.data()


@SETTINGS
@given(json_object([*SAID, *SAID["quality"], *SAID["provenance"], "what", "verdict"]), st.booleans())
@example({"quality": "x"}, True)
@example({"outputs": [3]}, True)
def test_baseline(place: Path, changed: dict[str, Any], as_list: bool) -> None:
    document: Any = {**SAID, **changed}
    path = written(place, "report.json", json.dumps([document] if as_list else document))
    if found := ends(lambda: read_baseline(path, 0.05, REPORT, Path("x"))):
        ends(lambda: found.refuse_another_text(REPORT.quality))


@SETTINGS
@given(st.binary(max_size=30))
@example(b"[" * 100_000)
@example(b"1" * 5000)
def test_baseline_that_is_no_report(place: Path, data: bytes) -> None:
    path = written(place, "report.json", data)
    ends(lambda: read_baseline(path, 0.05, REPORT, None))


SEALED = Certificate(
    "0", "a", True, None, [["runtime x", "mean KL", 0.0, 1.0, "pass", ""]], [{"name": "a", "sha256": "0"}], {}, {}, {}
)
PROBES = {"tokens": [[1]], "kind": "k", "metric": "mean KL", "reference": ["AAAA"], "expected": ["AAAA"]}


@SETTINGS
@given(json_object([*FIELDS, *PROBES]), st.booleans())
@example({"version": 0}, False)
@example({"pipeline": "\ud800"}, True)
def test_certificate(changed: dict[str, Any], sealed: bool) -> None:
    data = {**json.loads(SEALED.text()), **changed}
    if sealed:
        try:
            data["seal"] = seal({k: v for k, v in data.items() if k != "seal"})
        except ValueError:
            pass  # what has no canonical form
    if found := ends(lambda: read_certificate(Path("x"), json.dumps(data))):
        ends(lambda: probes_of({**PROBES, **found.probes}, "x"))
        assert found.told()


@SETTINGS
@given(st.text(max_size=20))
@example("[" * 100_000)
@example("1" * 5000)
def test_certificate_that_is_none(said: str) -> None:
    ends(lambda: read_certificate(Path("x"), said))


# layouts ---------------------------------------------------------------------------------------------


@SETTINGS
@given(st.data(), st.sampled_from(NAMES), st.integers(1, 3), st.integers(1, 3))
def test_layouts_of_any_shape(data: st.DataObject, name: str, n: int, blocks: int) -> None:
    """What any bytes mean, written and read again, means the same, if they mean anything."""
    layout = layout_of(name)
    k, n = math.lcm(layout.scheme.block, 8) * blocks, n if not hasattr(layout, "fits") or layout.fits(n) else 8 * n
    nbytes = n * layout.row_nbytes(k)
    seed = data.draw(st.binary(min_size=1, max_size=64) | st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f", b"\0\xff"]))
    rows = np.resize(np.frombuffer(seed, np.uint8), nbytes).reshape(n, -1)
    try:
        q = within(layout.unpack(rows))
    except InputError:
        return
    if name.startswith("onnx_kn."):  # a byte for each code on the way, which has room for others
        low = -layout.scheme.centre
        q = q._replace(codes=((q.codes.astype(np.int16) - low) % (1 << layout.scheme.bits) + low).astype(q.codes.dtype))
    assert q.codes.shape == (n, k)
    packed = layout.pack(q)
    again = layout.unpack(packed)
    np.testing.assert_array_equal(again.codes, q.codes)
    for a, b in zip(again.levels, q.levels, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(layout.pack(again), packed)
