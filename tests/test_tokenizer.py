"""Tokenizers read and written for llama.cpp.

Oracles: Hugging Face's `tokenizers` and transformers, sentencepiece, gguf-py, and llama.cpp with its own vocabularies.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qconvert.chat import CONVERSATIONS, render
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.formats import gguf_pretokenizers as pre
from qconvert.formats.gguf_kv import KV, header
from qconvert.formats.gguf_tokenizer import ENDS_BY_TEXT, metadata, notes, special_ids
from qconvert.formats.llama_cpp import LlamaCpp, Model
from qconvert.gguf_reader import read_header
from qconvert.sentencepiece_model import read_sentencepiece
from qconvert.tokenizer import Tokenizer, hard_corpus, read_tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# folder below shared/data, rows of its model's embedding, pre-tokenizer
SHIPPED = {
    "tokenizers/gpt2": (50257, "gpt-2"),
    "tokenizers/falcon": (65024, "falcon"),
    "tokenizers/gpt-neox-20b": (50432, "gpt-2"),
    "tokenizers/phi-2": (51200, "gpt-2"),
    "tokenizers/phi-3-mini": (32064, "default"),
    "tokenizers/roberta-base": (50265, "gpt-2"),
    "tokenizers/t5-small": (32128, "default"),
    "models/novels-13m": (4096, "gpt-2"),
    "models/stories260K": (512, "default"),
}


@pytest.fixture(scope="module")
def runtime() -> LlamaCpp:
    runtime = LlamaCpp()
    if reason := runtime.missing():
        pytest.skip(reason)
    return runtime


@cache
def shipped(folder: Path, rows: int) -> Tokenizer:
    return read_tokenizer(folder, rows)


@contextmanager
def in_llama_cpp(tokenizer: Tokenizer, name: str, path: Path) -> Iterator[Model]:
    """llama.cpp with a file that holds this vocabulary, whole."""
    path.write_bytes(header([KV("general.architecture", "str", "llama"), *metadata(tokenizer, name)]))
    with LlamaCpp().open_vocab(path) as model:
        yield model


@cache
def joined_everywhere() -> str:
    """A tokenizer.json with 3000 tokens learned from the corpus unsplit, so that every place of a split shows in the ids."""
    return trained(lambda: [])


def trained(splits: Callable[[], list[Any]]) -> str:
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = HuggingFace(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits(), byte_level])
    trainer = BpeTrainer(
        vocab_size=3000,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(hard_corpus() * 2, trainer)
    return str(tokenizer.to_str())


def splitting(folder: Path, *structure: str, **model: Any) -> Tokenizer:
    """The tokenizer of 3000 tokens with this pre-tokenizer, steps as in pre.STRUCTURES."""
    named = {"ByteLevel": {**BYTE_LEVEL, "use_regex": True}, "Digits 1": {"type": "Digits", "individual_digits": True}}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [named.get(step) or {**split, "pattern": {"Regex": step}} for step in structure]
    document = json.loads(joined_everywhere())
    byte_level = [] if "ByteLevel" in structure else [BYTE_LEVEL]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, *byte_level]}
    document["model"] |= model
    config = {"eos_token": "<|endoftext|>"}
    return read_tokenizer(write_json(folder, {"tokenizer.json": document, "tokenizer_config.json": config}), 3000)


def write_json(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return folder


def tiny(folder: Path, *, config: dict[str, Any] | None = None, added: list[str] | None = None, **files: Any) -> Path:
    """A folder with a byte-level tokenizer of 256 bytes and some special tokens behind them."""
    texts = ["<s>", "</s>", "<|stop|>"] if added is None else added
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(texts)],
        "pre_tokenizer": {**BYTE_LEVEL, "use_regex": True},
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(pre.byte_alphabet())}, "merges": []},
        "normalizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    }  # fmt: skip
    config = {"bos_token": "<s>", "eos_token": "</s>"} if config is None else config
    named = {name.replace("__", "."): value for name, value in files.items()}
    return write_json(folder, {"tokenizer.json": document, "tokenizer_config.json": config, **named})


# ---- what a written vocabulary does in llama.cpp


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_pre_tokenizer_is_found_and_every_hard_text_is_cut_alike(
    folder: str, shared_data: Path, runtime: LlamaCpp, tmp_path: Path
) -> None:
    rows, wanted = SHIPPED[folder]
    tokenizer = shipped(shared_data / folder, rows)
    found = pre.find_pre(tokenizer, runtime)
    assert (found.name, found.verified) == (wanted, True)
    encode = tokenizer.reference()
    with in_llama_cpp(tokenizer, found.name, tmp_path / "v.gguf") as model:
        for text in map(tokenizer.plain, hard_corpus()):
            assert model.tokenize(text, False, True) == encode(text), text


@pytest.mark.parametrize(
    ("folder", "name"),
    [("gpt2", "gpt-2"), ("falcon", "falcon"), ("gpt-neox-20b", "mpt"), ("phi-3-mini", "phi-3")],
)
def test_llama_cpps_own_cases_come_out_of_our_vocabulary(
    folder: str, name: str, shared_data: Path, runtime: LlamaCpp, tmp_path: Path
) -> None:
    rows, pre_name = SHIPPED[f"tokenizers/{folder}"]
    cases = shared_data / f"vocab-gguf/ggml-vocab-{name}.gguf"
    texts = Path(f"{cases}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = [[int(i) for i in line.split()] for line in Path(f"{cases}.out").read_text().split("\n")]
    assert len(texts) == len(wanted) == 47
    tokenizer = shipped(shared_data / "tokenizers" / folder, rows)
    with in_llama_cpp(tokenizer, pre_name, tmp_path / "v.gguf") as model:
        for text, ids in zip(texts, wanted, strict=True):
            assert model.tokenize(text, False, False) == ids, text


@pytest.mark.parametrize("folder", ["tokenizers/gpt-neox-20b", "tokenizers/phi-2", "models/novels-13m"])
def test_special_tokens_inside_a_text_are_seen_alike(folder: str, shared_data: Path, runtime: LlamaCpp, tmp_path: Path) -> None:
    rows, pre_name = SHIPPED[folder]
    tokenizer = shipped(shared_data / folder, rows)
    encode, special = tokenizer.reference(), [token.text for token in tokenizer.added]
    with in_llama_cpp(tokenizer, pre_name, tmp_path / "v.gguf") as model:
        for text in [*(f"a{s}b {s} c" for s in special), "".join(special)]:
            assert model.tokenize(text, False, True) == encode(text), text


@pytest.mark.parametrize(
    ("folder", "name"),
    [("gpt2", "gpt-2"), ("falcon", "falcon"), ("gpt-neox-20b", "gpt-neox"), ("phi-3-mini", "phi-3")],
)
def test_tokens_and_merges_are_those_of_llama_cpps_own_file(folder: str, name: str, shared_data: Path) -> None:
    theirs = read_header(shared_data / f"vocab-gguf/ggml-vocab-{name}.gguf").kv
    ours = {kv.key: kv.value for kv in metadata(shipped(shared_data / "tokenizers" / folder, rows_of(folder)), "x")}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key in ours:
            assert without_padding(ours[key]) == without_padding(theirs[key]), key


def rows_of(folder: str) -> int:
    return SHIPPED[f"tokenizers/{folder}"][0]


def without_padding(texts: Any) -> list[str]:
    return [text for text in texts if not text.startswith("[PAD")]


def test_pieces_and_scores_of_a_llama_vocabulary_are_those_of_llama_cpps_tools(shared_data: Path) -> None:
    theirs: Any = read_header(shared_data / "models/stories260K-gguf/stories260K.gguf").kv
    ours: Any = {kv.key: kv.value for kv in metadata(shipped(shared_data / "models/stories260K", 512), "x")}
    assert [*ours["tokenizer.ggml.scores"]] == [*theirs["tokenizer.ggml.scores"]]
    assert [*ours["tokenizer.ggml.token_type"]] == [*theirs["tokenizer.ggml.token_type"]]
    assert [*ours["tokenizer.ggml.tokens"]] == [*theirs["tokenizer.ggml.tokens"]]


# ---- pre-tokenizers


EXACT = {names: structure for structure, names in pre.STRUCTURES.items() if "falcon" not in names}
INEXACT = (("tekken", None), (None, "gpt-4o"))


@pytest.mark.parametrize("names", [n for n in EXACT if n not in INEXACT], ids=lambda names: names[1])
def test_a_known_expression_fits_its_own_name_and_no_other(
    names: tuple[str | None, str | None], runtime: LlamaCpp, tmp_path: Path
) -> None:
    tokenizer = splitting(tmp_path / "t", *EXACT[names])
    found = pre.find_pre(tokenizer, runtime)
    assert (found.name, found.verified) == (pre.known_by_structure(tokenizer), True)
    known = {name for both in EXACT for name in both if name}
    trial = pre.Trial(tokenizer, runtime, tmp_path / "trial.gguf")
    assert {name for name in known if trial.of(name).verified} == {*names} - {None}


@pytest.mark.parametrize("names", INEXACT, ids=str)
def test_expressions_that_llama_cpp_only_approximates_are_noticed(
    names: tuple[str | None, str | None], runtime: LlamaCpp, tmp_path: Path
) -> None:
    # its lookaheads leave out combining marks and take every letter but a-z for upper case
    with pytest.raises(UnsupportedError, match="cannot cut text like this tokenizer"):
        pre.find_pre(splitting(tmp_path / "t", *EXACT[names]), runtime)


def test_a_new_vocabulary_with_the_expression_of_llama_3_is_recognised(runtime: LlamaCpp, tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    files = {"tokenizer.json": trained(lambda: [Split(Regex(pre.LLAMA3), "isolated")])}
    found = pre.find_pre(read_tokenizer(write_json(tmp_path / "t", files), 3072), runtime)
    assert (found.name, found.verified) == ("dbrx", True)  # llama-bpe's expression, without its ignore_merges


def test_words_that_skip_their_merges_decide_between_two_names(tmp_path: Path, runtime: LlamaCpp) -> None:
    tokenizer = splitting(tmp_path / "t", pre.LLAMA3, ignore_merges=True)
    assert pre.find_pre(tokenizer, runtime).name == "llama-bpe"


def test_an_unknown_expression_names_the_nearest_and_its_first_differing_text(runtime: LlamaCpp, tmp_path: Path) -> None:
    tokenizer = splitting(tmp_path / "t", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+")
    with pytest.raises(UnsupportedError, match=r"Nearest is its pre-tokenizer '[\w.-]+': \d+ of \d+ texts are") as e:
        pre.find_pre(tokenizer, runtime)
    assert "in Hugging Face and [" in e.value.message
    assert "--pre-tokenizer" in (e.value.hint or "")


def test_a_forced_name_is_taken_and_reported_as_not_verified(runtime: LlamaCpp, tmp_path: Path) -> None:
    found = pre.find_pre(splitting(tmp_path / "t", pre.QWEN2), runtime, forced="gpt-2")
    assert (found.name, found.verified) == ("gpt-2", False)
    assert found.differences


def test_a_forced_name_that_llama_cpp_does_not_know_is_a_usage_error(runtime: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pre-tokenizer nonsense: .* unknown pre-tokenizer type: 'nonsense'"):
        pre.find_pre(splitting(tmp_path / "t", pre.QWEN2), runtime, forced="nonsense")


def test_without_llama_cpp_the_structure_decides_and_says_that_it_is_not_verified(tmp_path: Path) -> None:
    found = pre.find_pre(splitting(tmp_path / "t", pre.LLAMA3, ignore_merges=True), NoLlamaCpp())
    assert (found.name, found.verified, found.reason) == ("llama-bpe", False, "not verified: none here")


def test_without_llama_cpp_an_unknown_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="none can be tried"):
        pre.find_pre(splitting(tmp_path / "t", r"\w+|\W+"), NoLlamaCpp())


class NoLlamaCpp(LlamaCpp):
    def missing(self) -> str | None:
        return "none here"


def test_a_vocabulary_cut_down_to_the_texts_cuts_them_as_the_whole_one_does(
    shared_data: Path, runtime: LlamaCpp, tmp_path: Path
) -> None:
    tokenizer = shipped(shared_data / "models/novels-13m", 4096)
    small, ids = pre.cut_down(tokenizer, hard_corpus())
    assert len(small.tokens) < 4096
    with in_llama_cpp(small, "qwen2", tmp_path / "s.gguf") as a, in_llama_cpp(tokenizer, "qwen2", tmp_path / "v") as b:
        for text in hard_corpus():
            assert [ids[i] for i in a.tokenize(text, False, True)] == b.tokenize(text, False, True)


def test_the_corpus_is_in_normal_form_and_repeats_nothing() -> None:
    texts = hard_corpus()
    assert len(set(texts)) == len(texts) > 100
    assert all(unicodedata.normalize("NFC", text) == text for text in texts)


# ---- SentencePiece files


@pytest.mark.parametrize(
    "file",
    ["mistral/mistral_instruct_tokenizer_240323.model.v3", "sentencepiece-test/test_model.model"],
)
def test_a_sentencepiece_file_alone_is_cut_by_llama_cpp_as_by_sentencepiece(
    file: str, shared_data: Path, runtime: LlamaCpp, tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    shutil.copy(shared_data / "tokenizers" / file, tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer(tmp_path, theirs.vocab_size())
    pieces = read_sentencepiece(tmp_path / "tokenizer.model").pieces
    assert [(p.text, p.score) for p in pieces] == [
        (theirs.id_to_piece(i), theirs.get_score(i)) for i in range(theirs.vocab_size())
    ]
    assert (tokenizer.special["bos"], tokenizer.special["eos"]) == (theirs.bos_id(), theirs.eos_id())
    assert pre.find_pre(tokenizer, runtime).verified
    with in_llama_cpp(tokenizer, "default", tmp_path / "v.gguf") as model:
        for text in hard_corpus():
            assert model.tokenize(text, False, False) == theirs.encode(text), text


def test_our_reading_of_sentencepieces_rule_is_sentencepieces(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(str(shared_data / "models/stories260K/tokenizer.model"))
    tokenizer = shipped(shared_data / "models/stories260K", 512)
    assert tokenizer.is_sentencepiece
    assert [tokenizer.sentencepiece(text) for text in hard_corpus()] == [theirs.encode(text) for text in hard_corpus()]


def test_scores_without_the_sentencepiece_file_give_the_same_ids(shared_data: Path, runtime: LlamaCpp, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "models/stories260K" / name, tmp_path / name)
    tokenizer = read_tokenizer(tmp_path, 512)
    assert tokenizer.scores != shipped(shared_data / "models/stories260K", 512).scores
    assert pre.find_pre(tokenizer, runtime).verified


def test_a_broken_sentencepiece_file_is_an_input_error(tmp_path: Path) -> None:
    for rubbish in (b"", b"\x0a\xff\xff\xff\xff\x7f", b"\x0b\x01", b"plain text", b"\xff" * 12):
        (tmp_path / "tokenizer.model").write_bytes(rubbish)
        with pytest.raises(InputError, match="not a SentencePiece model"):
            read_tokenizer(tmp_path, 10)


# ---- the record


@pytest.mark.parametrize("folder", ["models/novels-13m", "models/stories260K", "tokenizers/phi-3-mini"])
def test_bos_and_eos_around_a_text_are_those_of_transformers(folder: str, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / folder)
    tokenizer = shipped(shared_data / folder, SHIPPED[folder][0])
    for text in ("Hello world", "x", "a\n\nb"):
        assert tokenizer.around(tokenizer.reference()(text)) == theirs(text).input_ids


def test_rows_beyond_the_vocabulary_become_unused_tokens(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tiny(tmp_path), 262)
    assert tokenizer.tokens[256:] == ("<s>", "</s>", "<|stop|>", "[PAD259]", "[PAD260]", "[PAD261]")
    assert tokenizer.types[256:] == ("control",) * 3 + ("unused",) * 3
    assert tokenizer.n_padding == 3


def test_a_padding_name_that_is_taken_gets_another(tmp_path: Path) -> None:
    assert read_tokenizer(tiny(tmp_path, added=["[PAD257]"], config={}), 258).tokens[256:] == ("[PAD257]", "[[PAD257]]")


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_names_the_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 tokens have no row in the embedding of 257, first: 257 '</s>', 258"):
        read_tokenizer(tiny(tmp_path), 257)


def test_a_text_that_is_two_tokens_is_refused_because_llama_cpp_would_abort(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a' is token 97 and token 256"):
        read_tokenizer(tiny(tmp_path, added=["a"], config={}), 257)


def test_an_added_token_that_two_files_tell_differently_is_refused(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"256": {"content": "<other>"}}}
    with pytest.raises(InputError, match=r"token 256 is '<s>' in tokenizer.json and '<other>' beside it"):
        read_tokenizer(tiny(tmp_path, config=config), 260)


def test_added_tokens_known_only_beside_tokenizer_json_are_read(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"259": {"content": "<tool>", "special": True}}}
    tokenizer = read_tokenizer(tiny(tmp_path, config=config, added_tokens__json={"<user>": 260}), 261)
    assert [(t.id, t.text, t.special) for t in tokenizer.added[-2:]] == [(259, "<tool>", True), (260, "<user>", False)]
    assert tokenizer.types[259:] == ("control", "user")
    assert tokenizer.reference()("a<tool><user>")[1:] == [259, 260]


def test_special_ids_come_from_the_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    folder = tiny(tmp_path, config={}, config__json={"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None})
    assert read_tokenizer(folder, 259).special == {"bos": 256, "eos": 257}


@pytest.mark.parametrize("explicit", [None, True, False])
def test_an_explicit_add_bos_token_outweighs_the_post_processor(explicit: bool | None, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<s>", "ids": [256], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {"type": "TemplateProcessing", "single": single, "special_tokens": {"<s>": bos}}
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if explicit is None else {"add_bos_token": explicit})
    write_json(folder, {"tokenizer.json": document, "tokenizer_config.json": config})
    assert read_tokenizer(folder, 259).add_bos is (explicit is not False)


def test_every_stop_of_the_generation_config_stops_llama_cpp(runtime: LlamaCpp, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "t", generation_config__json={"eos_token_id": [257, 258]})
    tokenizer = read_tokenizer(folder, 260)
    assert tokenizer.stops == (257, 258)
    assert special_ids(tokenizer)["eot"] == 258
    with in_llama_cpp(tokenizer, "gpt-2", tmp_path / "v.gguf") as model:
        assert model.eog_tokens() == {257, 258}


def test_stops_that_llama_cpp_cannot_be_told_are_noted(tmp_path: Path) -> None:
    texts = ["<s>", "</s>", "<1>", "<2>", "<3>", "<|im_end|>"]
    folder = tiny(tmp_path, added=texts, generation_config__json={"eos_token_id": [257, 258, 259, 260, 261]})
    assert notes(read_tokenizer(folder, 262)) == ["llama.cpp cannot be told to stop at '<3>'"]


def test_the_texts_at_which_llama_cpp_stops_by_itself_are_known(runtime: LlamaCpp, tmp_path: Path) -> None:
    texts = sorted(ENDS_BY_TEXT - {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"})
    tokenizer = read_tokenizer(tiny(tmp_path / "t", added=texts, config={"eos_token": "</s>"}), 256 + len(texts))
    with in_llama_cpp(tokenizer, "gpt-2", tmp_path / "v.gguf") as model:
        assert {tokenizer.tokens[i] for i in model.eog_tokens()} == set(texts)


def test_without_an_end_token_llama_cpp_does_not_stop_at_an_ordinary_one(runtime: LlamaCpp, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tiny(tmp_path / "t", added=[], config={}), 257)
    with in_llama_cpp(tokenizer, "gpt-2", tmp_path / "v.gguf") as model:
        assert {tokenizer.types[i] for i in model.eog_tokens()} == {"unused"}


def test_llama_vocabularies_without_byte_tokens_are_refused_before_llama_cpp_aborts(shared_data: Path) -> None:
    from dataclasses import replace

    tokenizer = shipped(shared_data / "models/stories260K", 512)
    types = tuple("normal" if type_ == "byte" else type_ for type_ in tokenizer.types)
    with pytest.raises(UnsupportedError, match="0 byte tokens"):
        metadata(replace(tokenizer, types=types), "default")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordPiece", "vocab": {"a": 0}}, "a WordPiece tokenizer"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}, "a BPE tokenizer; known"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, "neither byte-level nor falls back to bytes"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused_by_name(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_tokenizer(write_json(tmp_path, {"tokenizer.json": {"model": model}}), 10)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer: wanted tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read as JSON"),
        ({"tokenizer.json": "[]"}, "holds a list, wanted an object"),
        ({"tokenizer.json": "{}"}, "has no model with a vocabulary"),
        ({"vocab.json": "{}", "merges.txt": "#version: 0.2\na b c\n"}, "'a b c' is not a pair"),
    ],
)
def test_broken_tokenizer_files_are_input_errors(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_tokenizer(write_json(tmp_path, files), 10)


# ---- chat templates


def test_a_template_file_outweighs_the_one_in_the_config(tmp_path: Path) -> None:
    config = {"chat_template": "old", "eos_token": "</s>"}
    assert read_tokenizer(tiny(tmp_path, config=config), 259).chat_template == "old"
    write_json(tmp_path, {"chat_template.jinja": "new"})
    assert read_tokenizer(tmp_path, 259).chat_template == "new"


def test_several_templates_keep_their_names(runtime: LlamaCpp, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    tokenizer = read_tokenizer(tiny(tmp_path / "t", config={"chat_template": templates}), 259)
    with in_llama_cpp(tokenizer, "gpt-2", tmp_path / "v.gguf") as model:
        assert model.chat_template() == "{{ 1 }}"
        assert model.metadata("tokenizer.chat_template.tool_use") == "{{ 2 }}"


def test_templates_render_as_in_transformers(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "models/novels-13m")
    tokens = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
    for path in sorted((shared_data / "tokenizers/chat-templates").glob("*.jinja")):
        theirs.chat_template = path.read_text("utf-8")
        for messages in CONVERSATIONS:
            wanted = theirs.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            assert render(theirs.chat_template, messages, tokens) == wanted, path.name


def test_a_template_with_training_marks_renders_as_in_transformers(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "models/novels-13m")
    template = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
    {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
    {%- else %}{{ m | tojson(indent=2) }}
    {%- if loop.last %}{% break %}{% endif %}{% endif %}
{%- endfor %}"""
    for messages in CONVERSATIONS:
        wanted = theirs.apply_chat_template(list(messages), chat_template=template, tokenize=False)
        assert render(template, messages, {}, add_generation_prompt=False) == wanted


def test_a_template_that_refuses_or_reaches_out_is_an_input_error() -> None:
    for template in ("{{ raise_exception('no system') }}", "{{ ''.__class__.__mro__ }}", "{% if %}"):
        with pytest.raises(InputError, match="cannot be rendered"):
            render(template, CONVERSATIONS[0], {})


# ---- metadata bytes


def test_metadata_of_every_type_reads_back_in_gguf_py(tmp_path: Path) -> None:
    from gguf import GGUFReader

    kvs = [
        KV("general.architecture", "str", "llama"), KV("s", "str", "▁é"), KV("b", "bool", True), KV("u8", "u8", 200),
        KV("u16", "u16", 60000), KV("i", "i32", -5), KV("u", "u32", 4000000000), KV("f", "f32", 0.5),
        KV("U", "u64", 1 << 40), KV("as", "arr_str", ["a", "", "ü"]), KV("ab", "arr_bool", [True, False]),
        KV("a8", "arr_u8", b"\x00\xff"), KV("ai", "arr_i32", [-1, 2]), KV("au", "arr_u32", [1, 4000000000]),
        KV("af", "arr_f32", [0.25, -1e6]),
    ]  # fmt: skip
    (tmp_path / "x.gguf").write_bytes(header(kvs))
    fields = GGUFReader(tmp_path / "x.gguf").fields
    read = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read == {kv.key: [*kv.value] if kv.type.startswith("arr_") else kv.value for kv in kvs}  # type: ignore[misc]
