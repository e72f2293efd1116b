"""config.json, the index and the weights of a checkpoint that lie; what a header alone can say is in tests/attacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutations import make_model
from safetensors.torch import load_file, save_file

from abuses import Maker, hostile

INDEX = "model.safetensors.index.json"


def made(folder: Path, text: str | None = None, file: str = "config.json", **keys: Any) -> Path:
    make_model(folder / "model")
    path = folder / "model" / file
    path.write_text(text if text is not None else json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")
    return folder / "model"


def named(name: str, make: Maker) -> Maker:
    make.__name__, make.__module__ = name, __name__  # type: ignore[attr-defined]
    return make


VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon_that_is_not_a_number": ("rms_norm_eps = nan", {"rms_norm_eps": float("nan")}),
    "epsilon_that_is_infinite": ("rms_norm_eps = inf", {"rms_norm_eps": float("inf")}),
    "epsilon_beyond_a_double": ("of 401 digits", {"rms_norm_eps": 10**400}),
    "layers_beyond_counting": ("num_hidden_layers", {"num_hidden_layers": 10**12}),
    "layers_of_a_million": ("num_hidden_layers", {"num_hidden_layers": 10**6}),
    "layers_that_are_negative": ("num_hidden_layers = -1", {"num_hidden_layers": -1}),
    "layers_that_are_a_truth_value": ("num_hidden_layers = True", {"num_hidden_layers": True}),
    "heads_that_do_not_divide": ("heads", {"num_attention_heads": 3}),
    "heads_beyond_counting": ("", {"num_attention_heads": 1 << 62, "head_dim": 1 << 62}),
    "vocabulary_beyond_counting": ("", {"vocab_size": 1 << 62}),
    "context_beyond_counting": ("max_position_embeddings", {"max_position_embeddings": 1 << 62}),
    "theta_that_is_text": ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}),
    "rope_of_unknown_type": ("rope", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}),
    "rope_that_is_a_list": ("rope_parameters", {"rope_parameters": [1]}),
    "architecture_that_is_a_number": ("architectures", {"architectures": 3, "model_type": 3}),
    "architecture_unknown": ("", {"architectures": ["NoSuchModel"], "model_type": "nosuch"}),
    "code_to_be_run": ("auto_map", {"auto_map": {"AutoModel": "evil.Model"}}),
    "quantization_of_unknown_method": ("quantized", {"quantization_config": {"quant_method": "os.system"}}),
    "quantization_that_is_text": ("quantized", {"quantization_config": "x"}),
}
for name, (words, keys) in VALUES.items():
    hostile(words)(named(name, lambda folder, keys=keys: made(folder, **keys)))  # type: ignore[misc]


@hostile("", harmless=True)
def quantization_without_groups(folder: Path) -> Path:
    """Nothing is quantized then."""
    return made(folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})


@hostile("rms_norm_eps = inf")
def number_beyond_a_double(folder: Path) -> Path:
    make_model(folder / "model")
    text = (folder / "model" / "config.json").read_text("utf-8").replace("1e-05", "1e400")
    (folder / "model" / "config.json").write_text(text, "utf-8")
    return folder / "model"


@hostile("not valid JSON")
def config_deeply_nested(folder: Path) -> Path:
    return made(folder, text='{"a":' * 200_000)


@hostile("not valid JSON")
def config_of_other_bytes(folder: Path) -> Path:
    path = made(folder)
    (path / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    return path


@hostile("not valid JSON")
def number_of_a_million_digits(folder: Path) -> Path:
    return made(folder, text='{"hidden_size": ' + "9" * 1_000_000 + "}")


@hostile("leads out of the folder")
def config_that_is_a_link_elsewhere(folder: Path) -> Path:
    path = made(folder)
    (path / "config.json").rename(folder / "elsewhere.json")
    (path / "config.json").symlink_to(folder / "elsewhere.json")
    return path


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = made(folder)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@hostile("q_proj")
def weight_that_is_not_a_number(folder: Path) -> Path:
    return changed(folder, lambda t: t[Q].view(-1)[:1].fill_(float("nan")))


@hostile("model.norm.weight")
def norm_that_is_infinite(folder: Path) -> Path:
    return changed(folder, lambda t: t[NORM][:1].fill_(float("inf")))


@hostile("q_proj")
def weight_of_another_shape(folder: Path) -> Path:
    return changed(folder, lambda t: t.update({Q: torch.zeros(64, 32)}))


@hostile("q_proj")
def weight_of_integers(folder: Path) -> Path:
    return changed(folder, lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int32)}))


def indexed(folder: Path, where: object) -> Path:
    path = made(folder)
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / INDEX).write_text(json.dumps(where), "utf-8")
    return path


SHARD = "model-00001-of-00001.safetensors"
INDEXES: dict[str, tuple[str, object]] = {
    "index_without_a_map": ("has no weight_map", {"metadata": {}}),
    "index_of_a_list": ("has no weight_map", {"weight_map": [NORM]}),
    "index_to_a_number": ("a file name was wanted", {"weight_map": {NORM: 3}}),
    "index_to_a_list": ("a file name was wanted", {"weight_map": {NORM: [SHARD]}}),
    "index_to_the_parent": ("leads out", {"weight_map": {NORM: f"../model/{SHARD}"}}),
    "index_to_the_root": ("leads out", {"weight_map": {NORM: "/etc/passwd"}}),
    "index_to_a_device": ("leads out", {"weight_map": {NORM: "/dev/zero"}}),
    "index_through_a_backslash": ("is no name", {"weight_map": {NORM: "..\\model.safetensors"}}),
    "index_to_no_name": ("is no name", {"weight_map": {NORM: ""}}),
    "index_to_the_folder": ("", {"weight_map": {NORM: "."}}),
    "index_with_a_nul": ("is no name", {"weight_map": {NORM: "a\0b"}}),
    "index_to_a_missing_shard": ("is missing", {"weight_map": {NORM: "model-00002-of-00002.safetensors"}}),
    "index_of_a_tensor_in_no_shard": ("does not have it", {"weight_map": {"model.nothing": SHARD}}),
    "index_to_its_own_json": ("", {"weight_map": {NORM: "config.json"}}),
}
for name, (words, where) in INDEXES.items():
    hostile(words)(named(name, lambda folder, where=where: indexed(folder, where)))  # type: ignore[misc]
