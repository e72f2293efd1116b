"""A file looked over by itself: each finding has a file that shows it and nothing else; whole files show none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from abuses.gguf import ARCH, tensor, write
from click.testing import CliRunner
from mutations import make_model, make_onnx
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.cli import cli
from qconvert.doctor import diagnose
from qconvert.findings import Finding
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.gguf_reader import GGML_TYPES

Change = Callable[[dict[str, Any], dict[str, Any]], object]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
T = "tokenizer.ggml."
KEYS: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10000.0,
    "general.file_type": 0,
    T + "model": "gpt2",
    T + "pre": "gpt-2",
    T + "merges": ["a b"],
    T + "tokens": ["a", "b", "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|stop|>", "c"],
    T + "token_type": [1, 1, 1, 3, 3, 3, 3, 1],
    T + "eos_token_id": 4,
    T + "bos_token_id": 5,
    "tokenizer.chat_template": CHATML,
}


def one(found: tuple[Finding, ...]) -> tuple[str, str, str]:
    assert len(found) == 1, found
    assert found[0].do
    return found[0].severity, found[0].place, found[0].what


def made(path: Path, change: Change = lambda kv, t: None) -> Path:
    """A file of gguf-py's writer, of these keys and tensors."""
    rng = np.random.default_rng(0)
    kv, tensors = json.loads(json.dumps(KEYS)), {"token_embd.weight": rng.random((8, 64), np.float32)}
    tensors |= {"blk.0.ffn_up.weight": rng.random((64, 64), np.float32), "output_norm.weight": np.ones(64, np.float32)}
    change(kv, tensors)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in kv.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, data in tensors.items():
        kind = gguf.GGMLQuantizationType[data[0]] if isinstance(data, tuple) else None
        writer.add_tensor(name, data[1] if isinstance(data, tuple) else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def key(**values: Any) -> Change:
    """Keys, _ for a dot in the architecture's and T_ for a tokenizer's; None leaves one out."""

    def change(kv: dict[str, Any], _: dict[str, Any]) -> None:
        for name, value in values.items():
            full = T + name[2:] if name.startswith("T_") else name.replace("__", ".")
            kv.pop(full, None) if value is None else kv.update({full: value})

    return change


def template(text: str) -> Change:
    return lambda kv, _: kv.update({"tokenizer.chat_template": text})


def put(name: str, data: Any) -> Change:
    return lambda _, tensors: tensors.update({name: data})


def with_nan() -> Any:
    data = np.ones((64, 64), np.float32)
    data[3, 5] = np.nan
    return data


TOKENS = KEYS[T + "tokens"]
LAYER = np.ones((64, 64), np.float32)


def rows(n: int) -> Change:
    return put("token_embd.weight", np.ones((n, 64), np.float32))


GGUFS: dict[str, tuple[Change, tuple[str, str, str]]] = {
    "nan": (put("blk.0.ffn_up.weight", with_nan()), ("error", "blk.0.ffn_up.weight", "1 of 4,096 values")),
    "inf in f16": (
        put("output_norm.weight", np.full(64, np.inf, np.float16)),
        ("error", "output_norm.weight", "64 of 64 values"),
    ),
    "label": (key(general__file_type=15), ("warning", "general.file_type", "15 (Q4_K_M: mostly q4_k), but 100%")),
    "context of zero": (key(llama__context_length=0), ("error", "llama.context_length", "is 0")),
    "no context": (key(llama__context_length=None), ("error", "llama.context_length", "is missing")),
    "heads": (
        key(llama__attention__head_count=3, llama__attention__head_count_kv=3),
        ("error", "llama.attention.head_count", "3 heads do not divide"),
    ),
    "kv heads": (key(llama__attention__head_count_kv=3), ("error", "llama.attention.head_count_kv", "3 heads of keys")),
    "kv heads of a layer": (key(llama__attention__head_count_kv=[2, 3]), ("error", "llama.attention.head_count_kv", "3 heads")),
    "layer missing": (key(llama__block_count=2), ("error", "llama.block_count", "no tensor of blk.1")),
    "layer too many": (put("blk.1.ffn_up.weight", LAYER), ("error", "llama.block_count", "there is blk.1")),
    "width": (key(llama__embedding_length=32), ("error", "llama.embedding_length", "rows of 64")),
    "yarn without a factor": (
        key(llama__rope__scaling__type="yarn", llama__rope__scaling__original_context_length=64),
        ("error", "llama.rope.scaling.factor", "is None"),
    ),
    "yarn without a beginning": (
        key(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0),
        ("warning", "llama.rope.scaling.original_context_length", "is missing"),
    ),
    "stretched to less": (
        key(
            llama__rope__scaling__type="yarn",
            llama__rope__scaling__factor=2.0,
            llama__rope__scaling__original_context_length=512,
        ),
        ("warning", "llama.context_length", "is 128"),
    ),
    "factor without a type": (key(llama__rope__scaling__factor=4.0), ("warning", "llama.rope.scaling.factor", "linear")),
    "factor of no type": (
        key(llama__rope__scaling__factor=4.0, llama__rope__scaling__type="none"),
        ("warning", "llama.rope.scaling.factor", "no effect"),
    ),
    "older key": (
        key(llama__rope__scale_linear=2.0, llama__rope__scaling__type="none"),
        ("warning", "llama.rope.scale_linear", "replaced"),
    ),
    "base": (key(llama__rope__freq_base=0.0), ("error", "llama.rope.freq_base", "is 0.0")),
    "frequencies": (put("rope_freqs.weight", np.ones(4, np.float32)), ("error", "rope_freqs.weight", "4 factors, and 8 pairs")),
    "no tokens": (key(T_tokens=None), ("error", T + "tokens", "is missing")),
    "types": (key(T_token_type=[1] * 7 + [3]), ("warning", T + "token_type", "<|im_start|>, <|im_end|>")),
    "types too few": (key(T_token_type=[1, 1, 1, 3, 3, 3, 3]), ("error", T + "token_type", "7 entries for 8 tokens")),
    "scores too few": (key(T_scores=[0.0] * 5), ("error", T + "scores", "5 entries for 8 tokens")),
    "no types": (key(T_token_type=None), ("warning", T + "token_type", "is missing")),
    "no merges": (key(T_merges=None), ("error", T + "merges", "is missing")),
    "no pre-tokenizer": (key(T_pre=None), ("note", T + "pre", "is missing")),
    "token twice": (key(T_tokens=[*TOKENS[:7], "a"]), ("error", T + "tokens", "'a' is token 7")),
    "rows too many": (rows(9), ("error", T + "tokens", "8 tokens, and the embedding has 9")),
    "rows too few": (rows(7), ("error", T + "tokens", "8 tokens, and the embedding has 7")),
    "stop beyond": (key(T_eos_token_id=99), ("error", T + "eos_token_id", "eos is token 99")),
    "no stop": (
        key(T_eos_token_id=None, T_tokens=list("abcdefgh"), tokenizer__chat_template=None),
        ("warning", T + "eos_token_id", "no token ends"),
    ),
    "another stop": (
        template(CHATML.replace("<|im_end|>", "<|stop|>")),
        ("warning", T + "eos_token_id", "with <|stop|>, token 6"),
    ),
    "no template": (key(tokenizer__chat_template=None), ("note", "tokenizer.chat_template", "<|im_start|>")),
    "template that fails": (
        template("{{ raise_exception('no') }}"),
        ("warning", "tokenizer.chat_template", "cannot be rendered"),
    ),
    "head that repeats": (
        lambda _, t: t.update({"output.weight": t["token_embd.weight"]}),
        ("note", "output.weight", "repeats"),
    ),
    "type unknown": (
        put("blk.0.ffn_down.weight", ("Q8_K", np.zeros((4, 292), np.uint8))),
        ("note", "tensors", "1 of ggml's type15"),
    ),
}


def test_a_whole_gguf_shows_nothing(tmp_path: Path) -> None:
    assert diagnose(made(tmp_path / "a.gguf")).findings == ()


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_shows_this_and_nothing_else(name: str, tmp_path: Path) -> None:
    change, want = GGUFS[name]
    severity, place, what = one(diagnose(made(tmp_path / "a.gguf", change)).findings)
    assert (severity, place) == want[:2] and want[2] in what, what


def test_name_that_lies_about_the_bits(tmp_path: Path) -> None:
    found = one(diagnose(made(tmp_path / "tiny-Q4_K_M.gguf")).findings)
    assert found[:2] == ("warning", "tiny-Q4_K_M.gguf") and "32.00 bits each" in found[2]


def test_gap_between_tensors_is_found(tmp_path: Path) -> None:
    severity, place, what = one(
        diagnose(write(tmp_path, [ARCH], [tensor(b"a"), tensor(b"b", offset=256 + 32)], bytes(1024))).findings[:1]
    )
    assert (severity, place) == ("error", "b") and "behind the tensor before it" in what


def real_fields(name: str) -> list[str]:
    """MXFP4 has none: each of its scales is a power of two, that of all ones too."""
    block = LAYOUTS[f"gguf.{name}"].block
    return [f for f in block.names or () if block[f].base.kind == "f"]


def known(name: str) -> bool:
    return name.upper() in gguf.GGMLQuantizationType.__members__


@pytest.mark.parametrize("name", sorted(n for n in GGML_TYPES if f"gguf.{n}" in LAYOUTS and real_fields(n) and known(n)))
def test_every_scale_of_every_type_is_looked_at(name: str, tmp_path: Path) -> None:
    """A NaN in each field of real numbers, in the last block alone."""
    block = LAYOUTS[f"gguf.{name}"].block
    for field in real_fields(name):
        data = np.zeros((64, 1), block)
        data[-1, 0][field] = np.nan
        raw = data.view(np.uint8).reshape(64, -1)
        found = diagnose(made(tmp_path / "a.gguf", put("x.weight", (name.upper(), raw)))).findings
        assert ("error", "x.weight") in [(f.severity, f.place) for f in found]


# folders of safetensors -----------------------------------------------------------------------------


def model(folder: Path, **keys: Any) -> Path:
    make_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")
    return folder


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def sharded(folder: Path, leave_out: str = "", **facts: Any) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    where = {n: "model-00001-of-00001.safetensors" for n in names if n != leave_out}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where, "metadata": facts}))


def rewritten(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")


UP = "model.layers.0.mlp.up_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, str, str]]] = {
    "nan": (lambda f: retensored(f, lambda t: t[UP].view(-1)[:2].fill_(float("nan"))), ("error", UP, "2 of 6,144 values")),
    "shape": (lambda f: rewritten(f, "config.json", intermediate_size=64), ("error", "config.json", "mlp")),
    "heads": (
        lambda f: rewritten(f, "config.json", num_attention_heads=2, num_key_value_heads=3),
        ("error", "config.json", "heads"),
    ),
    "tied, and another head": (
        lambda f: retensored(f, lambda t: t.update({"lm_head.weight": torch.ones(1024, 64)})),
        ("error", "lm_head.weight", "loaders throw it away"),
    ),
    "quantized by config alone": (
        lambda f: rewritten(f, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("warning", "config.json", "no tensor holds codes"),
    ),
    "quantized without config": (
        lambda f: retensored(f, lambda t: t.update({"model.x.qweight": torch.ones(4, 4, dtype=torch.int32)})),
        ("error", "config.json", "look quantized"),
    ),
    "index that forgets": (lambda f: sharded(f, UP), ("warning", "model.safetensors.index.json", f"first {UP}")),
    "index that miscounts": (lambda f: sharded(f, total_size=3), ("note", "model.safetensors.index.json", "total_size is 3")),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("note", "tokenizer.json", "no tokenizer")),
    "tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text("{}"), ("error", "tokenizer.json", "no model")),
    "stop that is no token": (
        lambda f: rewritten(f, "generation_config.json", eos_token_id=5000),
        ("error", "eos_token_id", "5000"),
    ),
    "another stop": (
        lambda f: (f / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|im_start|>")),
        ("warning", "eos_token_id", "<|im_start|>"),
    ),
}


def test_a_whole_folder_shows_nothing(tmp_path: Path) -> None:
    assert diagnose(model(tmp_path / "m")).findings == ()


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_shows_this_and_nothing_else(name: str, tmp_path: Path) -> None:
    change, want = FOLDERS[name]
    change(model(tmp_path / "m"))
    severity, place, what = one(diagnose(tmp_path / "m").findings)
    assert (severity, place) == want[:2] and want[2] in what, what


# ONNX -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai")
    make_model(folder / "m")
    convert(str(folder / "m"), to="onnx", quant="int4", check=False, threads=1, output=folder / "out")
    return folder / "out"


def regenai(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config["model"])
    path.write_text(json.dumps(config), "utf-8")


GENAI: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, str, str]]] = {
    "name": (lambda m: m["decoder"]["inputs"].update(input_ids="tokens"), ("error", "genai_config.json", "no input tokens")),
    "layers": (lambda m: m["decoder"].update(num_hidden_layers=0), ("error", "genai_config.json", "num_hidden_layers is 0")),
    "vocabulary": (lambda m: m.update(vocab_size=2000), ("error", "genai_config.json", "1024 logits")),
    "no stop": (lambda m: m.pop("eos_token_id"), ("warning", "genai_config.json: eos_token_id", "no token ends")),
    "stop beyond": (lambda m: m.update(pad_token_id=1024), ("error", "genai_config.json: pad_token_id", "is 1024")),
    "another stop": (lambda m: m.update(eos_token_id=1), ("warning", "genai_config.json: eos_token_id", "<|im_end|>")),
}


@pytest.mark.parametrize("name", GENAI)
def test_genai_folder_shows_this_and_nothing_else(name: str, genai: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(genai, tmp_path / "g")
    assert diagnose(tmp_path / "g").findings == ()
    change, want = GENAI[name]
    regenai(tmp_path / "g", change)
    found = diagnose(tmp_path / "g").findings
    assert {(f.severity, f.place) for f in found} == {want[:2]} and want[2] in found[0].what, found


def external(path: Path, change: Callable[[Any], object]) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def data_of(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(change(path.read_bytes()))


ONNX: dict[str, tuple[Callable[[Path], object], tuple[str, str, str]]] = {
    "data too short": (lambda f: data_of(f, lambda d: d[:-64]), ("error", "c", "takes 128 bytes")),
    "data too long": (
        lambda f: data_of(f, lambda d: d + bytes(2 << 20)),
        ("note", "model.onnx.data", "behind the last tensor"),
    ),
    "nan": (lambda f: data_of(f, lambda d: b"\x00\x00\xc0\x7f" + d[4:]), ("error", "w.weight", "1 of 6,144 values")),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnx_shows_this_and_nothing_else(name: str, tmp_path: Path) -> None:
    make_onnx(tmp_path / "o")
    assert diagnose(tmp_path / "o" / "model.onnx").findings == ()
    change, want = ONNX[name]
    change(tmp_path / "o")
    severity, place, what = one(diagnose(tmp_path / "o" / "model.onnx").findings)
    assert (severity, place) == want[:2] and want[2] in what, what


# what others made -----------------------------------------------------------------------------------


def test_nothing_false_is_found_in_what_others_made(shared_data: Path) -> None:
    """The exceptions are true: an output written twice, a vocabulary before pre-tokenizers had names, ChatML never trained."""
    expected = {
        "stories260K.gguf": [("note", "output.weight")],
        "ggml-vocab-gpt-neox.gguf": [("note", T + "pre")],
        "novels-13m": [("warning", "eos_token_id")],
    }
    files = [
        *shared_data.glob("vocab-gguf/*.gguf"),
        *shared_data.glob("models/*/*.gguf"),
        *shared_data.glob("silero-vad/*.onnx"),
    ]
    files += [p.parent for p in shared_data.glob("models/*/config.json")]
    assert len(files) > 8
    found = {p.name: [(f.severity, f.place) for f in diagnose(p).findings] for p in files}
    assert {name: f for name, f in found.items() if f} == expected


# the command ----------------------------------------------------------------------------------------


def test_verify_without_a_model_exits_by_what_it_finds(tmp_path: Path) -> None:
    noted = made(tmp_path / "a.gguf", key(T_pre=None))
    result = CliRunner().invoke(cli, ["verify", str(noted), "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0 and "1 note" in result.output
    facts = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert facts["exit"] == 0 and facts["findings"][0].keys() == {"severity", "place", "what", "do", "rule", "file"}
    broken = made(tmp_path / "b.gguf", put("blk.0.ffn_up.weight", with_nan()))
    result = CliRunner().invoke(cli, ["verify", str(broken), "-q"])
    assert result.exit_code == 6 and "blk.0.ffn_up.weight" in result.output


def test_inspect_shows_what_headers_tell(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(made(tmp_path / "a.gguf", key(llama__context_length=0)))])
    assert result.exit_code == 0 and "error   llama.context_length: is 0" in result.output
