"""A GGUF as the source: settings, tokenizer, codes carried into ONNX without rounding, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf_families import MODELS, saved
from tiny_models import some_tokens, their_logits

from qconvert import convert
from qconvert.build import build
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats.gguf_header import encode
from qconvert.formats.gguf_kv import KV
from qconvert.formats.gguf_pretokenizers import STRUCTURES, cut_down
from qconvert.formats.gguf_source import read_gguf
from qconvert.formats.gguf_tokenizer import metadata
from qconvert.formats.gguf_tokenizer_files import ALIKE, tokenizer_files
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.gguf_reader import read_header
from qconvert.graph import Graph
from qconvert.run import run
from qconvert.sources import Store, read_checkpoint
from qconvert.tokenizer import Tokenizer, hard_corpus, read_tokenizer
from qconvert.weights import Weights

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
HELD = [name for name in MODELS if "moe" not in name and "mixtral" not in name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GGUF files of golden/tiny by type, each made once."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(quant: str, *, source: Path = TINY, **options: Any) -> Path:
        path = folder / f"{source.name}-{quant}-{'-'.join(map(str, options.values()))}.gguf"
        if not path.exists():
            convert(source, to="gguf", quant=quant, output=path, check=False, threads=1, **options)
        return path

    return make


def opened(path: Path) -> tuple[Graph, Store]:
    store = Store()
    checkpoint = read_gguf(path, store) if path.is_file() else read_checkpoint(path, store)
    return build(checkpoint), store


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    graph, store = opened(path)
    out = run(graph, Weights(graph, store), tokens)["logits"]
    store.close()
    return out


# settings and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HELD)
def test_graph_and_settings_are_those_of_the_checkpoint_it_was_made_from(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    saved(tmp_path / "model", kind, config)
    convert(tmp_path / "model", to="gguf", quant="F32", output=tmp_path / "a.gguf", check=False, threads=1)
    want, got = opened(tmp_path / "model")[0].meta["config"], opened(tmp_path / "a.gguf")[0].meta["config"]
    assert isinstance(want, dict) and isinstance(got, dict)
    lost = {"window", "window_layers", "context"} if name.endswith("window") and "gemma" not in name else set()  # by llama.cpp
    for key in want.keys() - lost:
        assert got.get(key) == want[key], key
    tokens = some_tokens(1024, 24)
    theirs = their_logits(tmp_path / "model", tokens)
    torch.testing.assert_close(logits(tmp_path / "a.gguf", tokens), theirs, rtol=1e-4, atol=1e-5)


def test_a_checkpoints_names_come_back(made: Any) -> None:
    graph, _ = opened(made("Q4_0"))
    assert graph.parameters() == opened(TINY)[0].parameters()


def test_a_split_file_is_read_by_its_first_part(made: Any, tmp_path: Path) -> None:
    convert(TINY, to="gguf", quant="F32", output=tmp_path / "a.gguf", split_max_size="2M", check=False, threads=1)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    tokens = some_tokens(1024, 8)
    assert torch.equal(logits(parts[0], tokens), logits(TINY, tokens))
    parts[1].unlink()
    with pytest.raises(InputError, match="is missing"):
        opened(parts[0])


def test_a_file_that_others_made_gives_the_logits_of_the_same_models_checkpoint(shared_data: Path) -> None:
    models, tokens = shared_data / "models", some_tokens(512, 32)
    got = logits(models / "stories260K-gguf" / "stories260K.gguf", tokens)
    torch.testing.assert_close(got, their_logits(models / "stories260K", tokens), rtol=1e-4, atol=1e-4)


# codes --------------------------------------------------------------------------------------------


def dequantized_by_gguf_py(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """By a checkpoint's names, rows of queries and keys in the checkpoint's order."""
    from gguf.quants import dequantize

    out = {}
    for t in gguf.GGUFReader(path).tensors:
        value = np.asarray(dequantize(t.data, t.tensor_type), np.float32)
        if t.name.split(".")[-2] in ("attn_q", "attn_k"):  # rows in pairs
            value = value.reshape(-1, 32, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        out[str(t.name)] = value
    return out


def dequantized_from_onnx(folder: Path, weight: str, bits: int) -> np.ndarray[Any, Any]:
    """By the contract of MatMulNBits alone: the first code in the low bits, zero point in the middle where none is given."""
    onnx = pytest.importorskip("onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}
    codes, scales = found[f"{weight}.qweight"], found[f"{weight}.scales"]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if f"{weight}.zero_points" in found:
        packed = found[f"{weight}.zero_points"]
        spread = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1) if bits == 4 else packed
        zeros = spread[:, : scales.shape[1]]
    value = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None].astype(np.float32)
    return value.reshape(len(codes), -1)


CASES = [("q4_0", 4, "int4_g32"), ("q8_0", 8, "int8_g32"), ("q5_0", 8, "int8_g32"), ("q3_k", 4, "int4_g16"),
         ("q6_k", 8, "int8_g16"), ("iq4_nl", 8, "int8_g32"), ("iq4_xs", 8, "int8_g32")]  # fmt: skip


@pytest.mark.parametrize(("stored", "bits", "scheme"), CASES, ids=[c[0] for c in CASES])
def test_codes_move_without_rounding(stored: str, bits: int, scheme: str, made: Any, tmp_path: Path) -> None:
    path, proven = made("Q8_0", tensor_types=(f".*={stored}",)), stored in ("q4_0", "q6_k")
    result = convert(path, to="onnx", bits=bits, output=tmp_path / "out", check=proven, threads=1)
    rows = {r.what: r.verdict for r in result.report.checks}
    assert not proven or (result.verified and rows["codes moved: 22 tensors, exact"] == "pass")
    assert {e.dtype for e in result.plan.entries} == {"f32", f"onnx.{scheme}"}
    theirs = dequantized_by_gguf_py(path)
    for ours, name in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        got = dequantized_from_onnx(tmp_path / "out", f"model.layers.1.{ours}", bits)
        assert np.array_equal(got.view(np.uint32), theirs[f"blk.1.{name}.weight"].view(np.uint32))


def test_uint4_takes_the_codes_of_q4_0_with_a_zero_point_in_the_middle(made: Any, tmp_path: Path) -> None:
    path = made("Q4_0")
    result = convert(path, to="onnx", quant="uint4", group=16, output=tmp_path / "out", check=False)
    assert result.report.notes[-1] == "21 weights keep their codes, q4_0 -> uint4_g16"
    got = dequantized_from_onnx(tmp_path / "out", "model.layers.0.mlp.up_proj", 4)
    assert np.array_equal(got, dequantized_by_gguf_py(path)["blk.0.ffn_up.weight"])


def test_fewer_bits_are_rounded_a_second_time_and_the_error_is_told(made: Any, tmp_path: Path) -> None:
    result = convert(made("Q8_0"), to="onnx", bits=4, output=tmp_path / "out", threads=1)
    assert "22 weights are rounded a second time, q8_0 -> int4_g32" in result.report.notes
    (row,) = (r for r in result.report.checks if r.what == "rounded again: q8_0 -> int4_g32")
    assert row.verdict == "info" and row.value is not None and 0.05 < row.value < 0.12 and "worst is" in row.reason
    assert not any(r.what.startswith("codes moved") for r in result.report.checks)


def test_grids_with_a_minimum_are_rounded_to_grids_with_zero_points(made: Any, tmp_path: Path) -> None:
    path = made("Q4_K_M")
    result = convert(path, to="onnx", bits=4, output=tmp_path / "out", threads=1)
    assert result.verified  # both kinds of MatMulNBits in one file
    assert {e.dtype for e in result.plan.entries} == {"f32", "onnx.uint4_g32", "onnx.int4_g32"}
    worst = max(r.value or 0 for r in result.report.checks if r.what.startswith("rounded again: q4_k"))
    forced = convert(path, to="onnx", quant="int4", output=tmp_path / "int4", threads=1)
    assert worst < max(r.value or 0 for r in forced.report.checks if r.what.startswith("rounded again: q4_k"))


def test_a_moved_code_that_is_wrong_fails_the_check(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert import stored_weights
    from qconvert.errors import VerificationError
    from qconvert.moves import moved

    def damaged(q: Any, target: Any) -> Any:
        out = moved(q, target)
        return out._replace(codes=np.where(out.codes > 0, out.codes - 1, out.codes).astype(out.codes.dtype))

    monkeypatch.setattr(stored_weights, "moved", damaged)
    with pytest.raises(VerificationError, match="codes moved"):
        convert(made("Q4_0"), to="onnx", bits=4, output=tmp_path / "out", threads=1)


@pytest.mark.parametrize("form", ["portable", "legacy"])
def test_every_form_takes_the_codes(form: str, made: Any, tmp_path: Path) -> None:
    result = convert(made("Q4_0"), to="onnx", bits=4, form=form, output=tmp_path / "out", threads=1)
    assert result.verified and any(r.what.startswith("codes moved: 21") for r in result.report.checks)


def test_the_same_type_again_keeps_every_byte_of_a_weight(made: Any, tmp_path: Path) -> None:
    path = made("Q4_0")
    result = convert(path, to="gguf", quant="Q4_0", output=tmp_path / "a.gguf", threads=1)
    assert result.verified
    before, after = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (path, tmp_path / "a.gguf"))
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_another_type_in_gguf_is_rounded_again(made: Any, tmp_path: Path) -> None:
    result = convert(made("Q8_0"), to="gguf", quant="Q4_K_M", output=tmp_path / "a.gguf", threads=1)
    assert result.verified and any("a second time, q8_0 -> q4_k" in n for n in result.report.notes)


# adapters -----------------------------------------------------------------------------------------


def test_an_adapter_is_merged_into_what_a_gguf_holds(made: Any, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from qconvert.formats.onnx_runtime import OnnxRuntime

    path = made("F32")
    convert(f"{path}+{LORA}", to="onnx", quant="fp32", output=tmp_path / "out", check=False, threads=1)
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokens = some_tokens(1024, 24)[:1]
    with torch.no_grad():
        want = peft.PeftModel.from_pretrained(base, str(LORA)).eval()(tokens).logits[0].numpy()
    model = OnnxRuntime().open(tmp_path / "out" / "model.onnx", 64, 1, exact=True)
    np.testing.assert_allclose(model.logits(tokens[0].tolist()), want, rtol=1e-3, atol=1e-3)


def test_only_what_the_adapter_leaves_alone_keeps_its_codes(made: Any, tmp_path: Path) -> None:
    result = convert(f"{made('Q4_0')}+{LORA}", to="onnx", bits=4, output=tmp_path / "out", threads=1)
    assert result.verified and any(r.what == "codes moved: 9 tensors, exact" for r in result.report.checks)


# tokenizers ---------------------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=str(LlamaCpp().missing()))


def cut_by_both(path: Path, folder: Path) -> list[str]:
    """Texts of the hard corpus that llama.cpp, by the file itself, and the tokenizer made of it cut differently."""
    kv = read_header(path).kv
    for name, value in tokenizer_files(kv, path).items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(value))
    tokenizer = read_tokenizer(folder, len(kv["tokenizer.ggml.tokens"]))  # type: ignore[arg-type]
    encode, model = tokenizer.reference(), LlamaCpp().open_vocab(path)
    texts = [*hard_corpus(), *(f"a{t.text} b {t.text}{t.text}" for t in tokenizer.added[:6])]
    found = [t for t in texts if (ids := model.tokenize(t, False, True)) != encode(t) and ids != tokenizer.sentencepiece(t)]
    around = model.tokenize("some words", True, True) != tokenizer.around(encode("some words"))
    model.close()
    return found + (["around"] if around else [])


@needs_llama_cpp
def test_text_is_cut_as_llama_cpp_cuts_it_by_the_file(made: Any, shared_data: Path, tmp_path: Path) -> None:
    models = shared_data / "models"
    assert cut_by_both(made("Q8_0"), tmp_path) == []
    assert cut_by_both(made("Q8_0", source=models / "stories260K"), tmp_path) == []
    assert cut_by_both(made("Q8_0", source=models / "novels-13m"), tmp_path) == []


@needs_llama_cpp
@pytest.mark.parametrize("name", ["models/stories260K-gguf/stories260K", "vocab-gguf/ggml-vocab-gpt-2",
                                  "vocab-gguf/ggml-vocab-falcon", "vocab-gguf/ggml-vocab-phi-3"])  # fmt: skip
def test_text_is_cut_as_llama_cpp_cuts_it_by_files_that_others_made(name: str, shared_data: Path, tmp_path: Path) -> None:
    assert cut_by_both(shared_data / f"{name}.gguf", tmp_path) == []


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    """Its tokens that lie in the hard corpus: pieces of every kind, so that each expression cuts otherwise."""
    whole = read_tokenizer(shared_data / "tokenizers" / "gpt2", 50257)
    return cut_down(replace(whole, added=()), hard_corpus())[0]


def vocabulary_file(tokenizer: Tokenizer, pre: str, path: Path) -> Path:
    kvs = [KV("general.architecture", "str", "llama"), *metadata(tokenizer, pre)]
    numbers = [("block_count", 1), ("context_length", 8), ("embedding_length", 2), ("feed_forward_length", 2)]
    kvs += [KV(f"llama.{k}", "u32", v) for k, v in (*numbers, ("attention.head_count", 1))]
    kvs.append(KV("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5))
    n = len(tokenizer.tokens)
    path.write_bytes(encode(kvs, [("token_embd.weight", "f32", (n, 2), 0)]) + bytes(8 * n))
    return path


NAMES = sorted({n for names in STRUCTURES.values() for n in names if n} | ALIKE.keys())


@needs_llama_cpp
@pytest.mark.parametrize("name", [n for n in NAMES if n != "falcon"])  # falcon's merges never cross its cuts; others' do
def test_every_known_pre_tokenizer_cuts_as_llama_cpp_does(name: str, gpt2: Tokenizer, tmp_path: Path) -> None:
    assert cut_by_both(vocabulary_file(gpt2, name, tmp_path / "vocab.gguf"), tmp_path) == []


def test_an_unknown_pre_tokenizer_is_refused_and_a_folder_takes_its_place(made: Any, tmp_path: Path) -> None:
    path = vocabulary_file(read_tokenizer(TINY, 1024), "chatglm-bpe", tmp_path / "vocab.gguf")
    with pytest.raises(UnsupportedError, match=r"pre-tokenizer 'chatglm-bpe'") as raised:
        opened(path)
    assert raised.value.hint is not None and "--tokenizer FOLDER" in raised.value.hint


def test_a_named_tokenizer_is_the_one_that_is_written(made: Any, tmp_path: Path) -> None:
    convert(made("Q4_0"), to="onnx", bits=4, tokenizer=TINY, output=tmp_path / "out", check=False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_the_chat_template_and_the_stop_tokens_come_along(made: Any, tmp_path: Path) -> None:
    convert(made("Q4_0"), to="onnx", bits=4, output=tmp_path / "out", check=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (TINY / "chat_template.jinja").read_text()
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (model["bos_token_id"], model["eos_token_id"]) == (0, 3)


# what is refused ----------------------------------------------------------------------------------


def edited(path: Path, out: Path, **changes: object) -> Path:
    """The file with other key/values: ... deletes one, names are without the architecture's."""
    header = read_header(path)
    kv = header.kv | {k if "." in k else f"llama.{k}": v for k, v in changes.items()}
    kinds = {bool: "bool", str: "str", float: "f32", int: "u32"}
    listed = {str: "arr_str", int: "arr_i32", float: "arr_f32"}
    kvs = [
        KV(k, listed[type(v[0])] if isinstance(v, list) else kinds[type(v)], v)  # type: ignore[arg-type,index]
        for k, v in kv.items()
        if v is not ...
    ]
    infos = [(t.name, t.dtype, t.shape, t.offset - header.data_offset) for t in header.tensors]
    out.write_bytes(encode(kvs, infos) + path.read_bytes()[header.data_offset :])
    return out


REFUSED: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "another architecture": ({"general.architecture": "mamba"}, UnsupportedError, r"'mamba' is not read from GGUF yet"),
    "an adapter": ({"general.type": "adapter"}, InputError, "holds a adapter, not a model"),
    "experts": ({"expert_count": 8}, UnsupportedError, "mixtures of experts"),
    "a key that may matter": ({"logit_scale": 0.5}, UnsupportedError, r"llama\.logit_scale = 0\.5 is not read here"),
    "no layers": ({"block_count": ...}, InputError, "block_count is None; one positive number was wanted"),
    "a head count that is a text": ({"llama.attention.head_count": "4"}, InputError, "head_count is 4; one positive number"),
    "no heads": ({"llama.attention.head_count": 0}, InputError, "head_count is 0"),
    "a window": ({"llama.attention.sliding_window": 8}, UnsupportedError, "a sliding window of 8, which llama has not"),
    "another scaling": ({"llama.rope.scaling.type": "longrope"}, UnsupportedError, "rope scaling 'longrope'"),
    "part of each head": ({"llama.rope.dimension_count": 16}, UnsupportedError, "16 of 64 values of each head rotate"),
    "more layers than there are": ({"block_count": 9}, InputError, r"no tensor is called model\.layers\.3"),
    "another width": ({"embedding_length": 128, "llama.attention.key_length": 64}, InputError, r"shape \[1024, 256\]"),
    "a token that is not there": ({"tokenizer.ggml.bos_token_id": 5000}, InputError, "bos_token_id is 5000, and there are"),
    "a type of token that is none": ({"tokenizer.ggml.token_type": [9] * 1024}, InputError, "token_type"),
    "another tokenizer": ({"tokenizer.ggml.model": "rwkv"}, UnsupportedError, "tokenizer model 'rwkv'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_read_wrongly_is_refused_by_name(what: str, made: Any, tmp_path: Path) -> None:
    changes, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        opened(edited(made("Q4_0"), tmp_path / "a.gguf", **changes))


def test_a_type_that_is_not_read_is_named(made: Any, tmp_path: Path) -> None:
    path = made("Q4_0")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    data[at : at + 4] = (15).to_bytes(4, "little")  # q8_k, of activations
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(UnsupportedError, match=r"#blk\.0\.attn_q\.weight: type15 is not a type of weights"):
        logits(tmp_path / "a.gguf", some_tokens(1024, 4))


def test_a_scale_that_is_not_finite_is_named(made: Any, tmp_path: Path) -> None:
    path = made("Q4_0")
    info = next(t for t in read_header(path).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight: nan in row 0"):
        logits(tmp_path / "a.gguf", some_tokens(1024, 4))


def test_float_zero_points_take_the_codes_of_grids_with_an_offset(made: Any, tmp_path: Path) -> None:
    path = made("Q8_0", tensor_types=(".*=q4_1",))
    result = convert(path, to="onnx", bits=4, zero_point="float", output=tmp_path / "out", threads=1)
    (row,) = (r for r in result.report.checks if r.what == "codes moved, zero points rounded: q4_1 -> uint4f_g32")
    assert result.verified and row.verdict == "pass" and row.value is not None and row.value < 1e-6


def test_a_group_without_a_scale_is_the_offset_itself() -> None:
    from qconvert.moves import moved
    from qconvert.scheme import QTensor, scheme_of

    q4_1, target = scheme_of("q4_1"), scheme_of("uint4f_g32")
    assert q4_1 is not None and target is not None
    flat = QTensor(q4_1, np.full((1, 32), 7, np.int8), (np.zeros((1, 1), np.float32), np.full((1, 1), 0.25, np.float32)))
    assert np.array_equal(moved(flat, target).dequantize(), np.full((1, 32), 0.25, np.float32))
