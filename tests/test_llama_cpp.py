"""llama.cpp through ctypes. Oracles: transformers' logits, gguf-py's writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qconvert.errors import MissingDependency, VerificationError
from qconvert.formats import llama_cpp
from qconvert.formats.llama_cpp import LlamaCpp, Model

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside."


@pytest.fixture(scope="module")
def runtime() -> LlamaCpp:
    runtime = LlamaCpp()
    if reason := runtime.missing():
        pytest.skip(reason)
    return runtime


@pytest.fixture(scope="module")
def gguf(shared_data: Path) -> Path:
    """A file that llama.cpp's own tools made."""
    return shared_data / "models/stories260K-gguf/stories260K.gguf"


@pytest.fixture(scope="module")
def model(runtime: LlamaCpp, gguf: Path) -> Iterator[Model]:
    with runtime.open(gguf, n_ctx=512, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def transformer(shared_data: Path):  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(shared_data / "models/stories260K", dtype=torch.float32)


def reference_logits(transformer, tokens: list[int]) -> np.ndarray:  # type: ignore[no-untyped-def]
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.asarray(transformer(torch.tensor([tokens])).logits[0])


def test_logits_at_every_position_equal_transformers(model: Model, transformer) -> None:  # type: ignore[no-untyped-def]
    tokens = model.tokenize(TEXT, True, False)
    difference = np.abs(model.logits(tokens) - reference_logits(transformer, tokens))
    assert difference.max() < 1e-4  # f32 weights and cache; measured 1.2e-5


def test_a_long_sequence_in_small_batches_gives_the_same_logits(
    runtime: LlamaCpp, gguf: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "MAX_BATCH_LOGITS", 1)  # the smallest batch, 32
    tokens = (model.tokenize(TEXT, True, False) * 10)[:200]
    with runtime.open(gguf, n_ctx=256, threads=1) as small:
        np.testing.assert_allclose(small.logits(tokens), model.logits(tokens), atol=1e-5)


def test_each_call_begins_a_new_sequence(model: Model) -> None:
    tokens = model.tokenize(TEXT, True, False)
    first = model.logits(tokens)
    model.generate(tokens[:4], 8)
    np.testing.assert_array_equal(model.logits(tokens), first)


def test_greedy_tokens_equal_transformers(model: Model, transformer) -> None:  # type: ignore[no-untyped-def]
    torch = pytest.importorskip("torch")
    tokens = model.tokenize(TEXT, True, False)
    with torch.no_grad():
        wanted = transformer.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)[0, len(tokens) :]
    assert model.generate(tokens, 20) == wanted.tolist()


def test_generation_ends_with_its_end_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = model.tokenize(TEXT, True, False)
    free = model.generate(tokens, 10)
    monkeypatch.setattr(model, "is_eog", lambda token: token == free[3])
    assert model.generate(tokens, 10) == free[: free.index(free[3]) + 1]


def test_pieces_put_the_text_together_again(model: Model) -> None:
    tokens = model.tokenize("Größe 🚀 and \n\ttabs", False, False)
    assert b"".join(map(model.piece, tokens)).decode() == " Größe 🚀 and \n\ttabs"


def test_special_ids_and_metadata_are_the_files(model: Model) -> None:
    assert (model.n_vocab, model.bos, model.eos, model.add_bos, model.add_eos) == (512, 1, 2, True, False)
    assert model.eog_tokens() == {2}
    assert model.metadata("llama.context_length") == "2048"
    assert model.metadata("no.such.key") is None
    assert model.chat_template() is None


def test_a_split_file_loads_by_its_first_shard_and_by_any_names(runtime: LlamaCpp, gguf: Path, tmp_path: Path) -> None:
    shards = split(gguf, tmp_path)
    assert len(shards) == 3
    with runtime.open(gguf, n_ctx=64, threads=1) as whole:
        wanted = whole.logits([1, 403, 407])
    with runtime.open(shards[0], n_ctx=64, threads=1) as model:
        np.testing.assert_array_equal(model.logits([1, 403, 407]), wanted)
    renamed = [shard.rename(tmp_path / f"{i}.partial") for i, shard in enumerate(shards)]
    with runtime.open(renamed[0], n_ctx=64, threads=1, shards=renamed) as model:
        np.testing.assert_array_equal(model.logits([1, 403, 407]), wanted)


def split(path: Path, folder: Path) -> list[Path]:
    """The file again in shards of 20 tensors, by gguf-py."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    writer = GGUFWriter(folder / "part", "llama", split_max_tensors=20)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("part-*.gguf"))


def test_a_file_that_is_no_gguf_is_refused_in_llama_cpps_words(runtime: LlamaCpp, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"rubbish" * 100)
    with pytest.raises(VerificationError, match="invalid magic"):
        runtime.open(tmp_path / "x.gguf", n_ctx=64, threads=1)


def test_a_truncated_file_is_refused(runtime: LlamaCpp, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises(VerificationError, match="not within the file bounds"):
        runtime.open(tmp_path / "x.gguf", n_ctx=64, threads=1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([5] * 600, "do not fit"), ([512], "token 512 is not"), ([-1], "token -1"), ([], "no tokens")],
)
def test_tokens_that_llama_cpp_would_stumble_over_are_refused_first(
    model: Model, tokens: list[int], message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        model.logits(tokens)


def test_a_vocabulary_alone_tokenizes_but_has_no_logits(runtime: LlamaCpp, gguf: Path, model: Model) -> None:
    with runtime.open_vocab(gguf) as vocab:
        assert vocab.tokenize(TEXT, True, False) == model.tokenize(TEXT, True, False)
        with pytest.raises(VerificationError, match="vocabulary only"):
            vocab.logits([1])


def test_closing_twice_is_harmless(runtime: LlamaCpp, gguf: Path) -> None:
    model = runtime.open(gguf, n_ctx=64, threads=1)
    model.close()
    model.close()


def test_without_a_wheel_the_reason_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda package: None)
    monkeypatch.setattr(llama_cpp, "library", llama_cpp.library.__wrapped__)
    assert LlamaCpp().missing() == 'llama.cpp is not installed (pip install "qconvert[llama]")'
    with pytest.raises(MissingDependency, match="not installed"):
        LlamaCpp().open(tmp_path / "x.gguf", n_ctx=64, threads=1)


def test_an_untested_version_is_refused_unless_asked_for(runtime: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "TESTED", ("9.9",))
    assert "is not a tested version (9.9)" in (llama_cpp.library.__wrapped__().reason or "")
    monkeypatch.setenv("QCONVERT_LLAMA_CPP", "any")
    assert llama_cpp.library.__wrapped__().reason is None


def test_a_shifted_struct_is_refused_before_it_is_used(runtime: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "CONTEXT_DEFAULTS", llama_cpp.CONTEXT_DEFAULTS | {"type_k": 30})
    assert "has other structs: ContextParams.type_k is 1" in (llama_cpp.library.__wrapped__().reason or "")


def test_a_broken_library_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(llama_cpp, "_library_file", lambda: ("xllamacpp", tmp_path / "xllamacpp.abi3.so"))
    assert "xllamacpp.abi3.so of xllamacpp cannot be used" in (llama_cpp.library.__wrapped__().reason or "")
