"""Where the weights of an ONNX folder lie: shards, safetensors, the layout of transformers.js."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors_writer import write_raw

from qconvert import convert
from qconvert.errors import UnsupportedError, UsageError, VerificationError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights in one file."""
    return made(tmp_path_factory.mktemp("whole") / "out", check=False)


def made(out: Path, **options: Any) -> Path:
    result = convert(f"{TINY}+{LORA}", to="onnx", output=out, threads=1, **{"quant": "uint4", **options})
    assert result.verified or not options.get("check", True)
    assert result.plan.nbytes == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return out


def tensors(model: Path) -> dict[str, Any]:
    """The weights' values, by the onnx package."""
    listed = onnx.load(model).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in listed if not t.name.startswith("const.")}


def logits(model: Path) -> Any:
    session = ort.InferenceSession(str(model))
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[2:]}
    ids = np.arange(4, 20)[None]
    return session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0]


def same_values(model: Path, whole: Path) -> None:
    found, wanted = tensors(model), tensors(whole / "model.onnx")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert np.array_equal(logits(model), logits(whole / "model.onnx"))


@pytest.mark.parametrize("weights_in", ["data", "safetensors"])
def test_shards_hold_the_same_weights_and_none_is_larger_than_asked(tmp_path: Path, whole: Path, weights_in: str) -> None:
    out = made(tmp_path / "out", split_max_size="300K", weights_in=weights_in)
    pattern = "model.onnx.data*" if weights_in == "data" else "model-*.safetensors"
    shards = sorted(out.glob(pattern))
    assert len(shards) > 3 and all(p.stat().st_size <= 300_000 for p in shards)
    same_values(out / "model.onnx", whole)


def test_shards_are_numbered_as_onnxruntimes_own_tools_number_them(tmp_path: Path) -> None:
    out = made(tmp_path / "out", split_max_size="500K", check=False)
    assert sorted(p.name for p in out.glob("*.data*")) == ["model.onnx.data", "model.onnx.data_1", "model.onnx.data_2"]


def test_a_weight_larger_than_a_shard_has_one_of_its_own(tmp_path: Path, whole: Path) -> None:
    out = made(tmp_path / "out", split_max_size="70K", check=False)
    sizes = {p.name: p.stat().st_size for p in out.glob("*.data*")}
    assert sizes["model.onnx.data"] > 70_000  # the embedding: 1024 x 256
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}
    assert {n for n, p in places.items() if p["location"] == "model.onnx.data"} == {
        f"model.embed_tokens.{part}" for part in ("qweight", "qweight.rows", "scales", "zero_points")
    }
    same_values(out / "model.onnx", whole)


def test_a_weights_codes_and_scales_lie_in_one_file(tmp_path: Path) -> None:
    out = made(tmp_path / "out", split_max_size="100K", check=False)
    files: dict[str, set[str]] = {}
    for t in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer:
        for e in t.external_data:
            if e.key == "location":
                files.setdefault(t.name.rpartition(".")[0].removesuffix(".qweight"), set()).add(e.value)
    assert len(set().union(*files.values())) > 5 and all(len(f) == 1 for f in files.values())


# safetensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["uint4", "fp16", "nf4"])
def test_safetensors_has_every_tensor_that_the_model_reads(tmp_path: Path, quant: str) -> None:
    safetensors, torch = pytest.importorskip("safetensors"), pytest.importorskip("torch")
    out = made(tmp_path / "out", weights_in="safetensors", quant=quant)
    assert not list(out.glob("*.data*"))
    values = tensors(out / "model.onnx")
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
        for name in names:
            assert torch.equal(opened.get_tensor(name), torch.from_numpy(values[name].copy())), name
        assert opened.metadata()["qconvert.base_model"] == "tiny"
    tied = {"model.embed_tokens.qweight.rows"} if quant != "fp16" else set()
    assert values.keys() - set(names) == tied


def test_an_index_says_in_which_file_of_safetensors_a_tensor_is(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    out = made(tmp_path / "out", weights_in="safetensors", split_max_size="400K", check=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {}
    for path in sorted(out.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as opened:
            held |= dict.fromkeys(opened.keys(), path.name)
    assert index["weight_map"] == held and len(set(held.values())) > 2


def test_transformers_loads_the_safetensors_of_plain_types(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "out"
    convert(TINY, to="onnx", quant="fp32", weights_in="safetensors", output=out, check=False)
    (out / "config.json").write_bytes((TINY / "config.json").read_bytes())
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (out, TINY))
    ids = torch.arange(4, 20)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_safetensors_that_say_something_else_than_the_model_fail_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconvert.formats import onnx_files

    true = onnx_files.described

    def swapped(piece: Any, begin: int) -> dict[str, object]:
        out = true(piece, begin)
        q, k = (f"model.layers.1.self_attn.{x}_proj.qweight" for x in "kv")
        return {{q: k, k: q}.get(name, name): value for name, value in out.items()}

    monkeypatch.setattr(onnx_files, "described", swapped)
    with pytest.raises(VerificationError, match=r"read by safetensors.*layers\.1\.self_attn\.k_proj"):
        made(tmp_path / "out", weights_in="safetensors")
    assert list(tmp_path.iterdir()) == []


# transformers.js ----------------------------------------------------------------------------------


def test_the_layout_of_transformersjs_has_its_names_and_says_them_in_config_json(tmp_path: Path, whole: Path) -> None:
    out = made(tmp_path / "out", layout="transformersjs", split_max_size="500K")
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == [
        "chat_template.jinja", "config.json", "generation_config.json", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data",
        "onnx/model_q4.onnx_data_1", "onnx/model_q4.onnx_data_2", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config.pop("transformers.js_config") == {
        "dtype": "q4", "use_external_data_format": {"model_q4.onnx": 3}, "kv_cache_dtype": "float32",
    }  # fmt: skip
    assert config == json.loads((TINY / "config.json").read_text())
    same_values(out / "onnx" / "model_q4.onnx", whole)


def test_a_model_that_is_onnx_already_keeps_its_layout(tmp_path: Path, shared_data: Path) -> None:
    for name, value in (("layout", "genai"), ("weights_in", "safetensors"), ("split_max_size", "1G")):
        with pytest.raises(UnsupportedError, match=f"{value}: a model that is ONNX already"):
            model = shared_data / "silero-vad" / "silero_vad_half.onnx"
            convert(model, to="onnx", bits=8, output=tmp_path / "out", **{name: value})


def test_transformersjs_has_no_adapters_to_swap(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no adapters to swap"):
        made(tmp_path / "out", layout="transformersjs", adapters_as="swap")


def test_transformersjs_gets_the_chat_template_where_it_looks_for_it(tmp_path: Path) -> None:
    out = made(tmp_path / "out", layout="transformersjs", check=False)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (TINY / "chat_template.jinja").read_text()


NAMES = [("fp32", "model"), ("fp16", "model_fp16"), ("int8", "model_int8"), ("int4", "model_q4")]


@pytest.mark.parametrize(("quant", "name"), NAMES)
def test_the_file_is_named_for_its_type_as_transformersjs_names_it(tmp_path: Path, quant: str, name: str) -> None:
    made(tmp_path / "out", layout="transformersjs", quant=quant, check=False)
    assert (tmp_path / "out" / "onnx" / f"{name}.onnx_data").is_file()


@pytest.mark.parametrize(
    ("layers", "vocab", "limit", "kind", "said"),
    [
        (16, 64, "1K", UsageError, r"files; transformers\.js reads 100"),
        (1, 1 << 23, None, UnsupportedError, r"embed_tokens\.weight alone takes 2\.1 GB"),
    ],
)
def test_what_no_browser_could_load_is_refused(
    tmp_path: Path, layers: int, vocab: int, limit: str | None, kind: type[Exception], said: str
) -> None:
    folder = hollow(tmp_path / "model", layers, vocab)
    with pytest.raises(kind, match=said):
        convert(folder, to="onnx:fp32", layout="transformersjs", split_max_size=limit, output=tmp_path / "out", dry_run=True)


def hollow(folder: Path, layers: int, vocab: int, width: int = 64) -> Path:
    """A llama of nothing but headers: its file is one hole."""
    config = {"model_type": "llama", "hidden_size": width, "intermediate_size": width, "num_attention_heads": 1,
              "num_hidden_layers": layers, "vocab_size": vocab, "tie_word_embeddings": True}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [vocab, width], "model.norm.weight": [width]}
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    for i, part in product(range(layers), linears):
        shapes[f"model.layers.{i}.{part}.weight"] = [width, width]
    for i, part in product(range(layers), ("input_layernorm", "post_attention_layernorm")):
        shapes[f"model.layers.{i}.{part}.weight"] = [width]
    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    write_raw(folder / "model.safetensors", header, b"")
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate(f.seek(0, 2) + at)
    return folder
