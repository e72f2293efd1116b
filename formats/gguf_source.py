"""A GGUF as a checkpoint: the settings of its header as a config.json says them, its tensors by a checkpoint's names.

The tables are those by which files are written (gguf_arch), read backwards; build.py makes the graph as ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from qconvert import registry
from qconvert.errors import InputError, UnsupportedError, misshapen
from qconvert.families import Family
from qconvert.formats import gguf_vocabulary_check
from qconvert.formats.gguf_arch import ARCHS, CAPS, KEYS, Arch, attention_scalar
from qconvert.formats.gguf_names import STEMS
from qconvert.formats.gguf_rope import FREQUENCIES, llama3_scaling, yarn_scaling
from qconvert.formats.gguf_tokenizer_files import tokenizer_files
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.gguf_reader import Header, read_header
from qconvert.graph import Attr
from qconvert.report import Row
from qconvert.sources import Checkpoint, GGUFStorage, Store, TensorInfo
from qconvert.target import Source, tokenizer_folder
from qconvert.tokenizer import read_tokenizer

KV = Mapping[str, object]
Config = dict[str, object]
# families that a file of that architecture is read as; llama.cpp's llama is Mistral's too
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3",
            "gpt2": "gpt2"}  # fmt: skip
ROPE = ("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned")  # fmt: skip
READ = (*KEYS.values(), *CAPS.values(), *ROPE, "attention.key_length", "attention.value_length", "attention.sliding_window",
        "vocab_size")  # fmt: skip
# keys that are understood at these values only
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,), "rope.scale_linear": (1.0,), "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,), "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
}  # fmt: skip


def read_gguf(path: Path, store: Store, alias: str = "base") -> Checkpoint:
    """The model in a GGUF, which `store` will then know as `alias`; its tokenizer as files in a folder of the store's.

    InputError for what is missing or damaged; UnsupportedError for architectures and settings that no graph here has.
    """
    with misshapen(str(path)):
        return _read(path, store, alias)


def _read(path: Path, store: Store, alias: str) -> Checkpoint:
    header = read_header(path)
    if header.kv.get("general.type", "model") != "model":
        raise InputError(f"{path} holds a {header.kv['general.type']}, not a model")
    store.add(alias, path)
    stored = store.tensors(alias)
    family, arch = family_of(header, path)
    config = settings_of(header, path, family, arch, stored, store)
    files = {**tokenizer_files(header.kv, path), "config.json": config}
    folder = store.scratch() / alias
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    generation = cast(Config, files.get("generation_config.json", {}))
    tensors = {checkpoint_name(family, name): info for name, info in stored.items()}
    return Checkpoint(folder, config, generation, tensors, None, GGUFStorage(path, arch.permuted))


def family_of(header: Header, path: Path) -> tuple[Family, Arch]:
    arch = header.kv.get("general.architecture")
    known = ", ".join(FAMILIES)
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise UnsupportedError(f"{path}: the architecture {arch!r} is not read from GGUF yet", hint=f"these are: {known}")
    if header.kv.get(f"{arch}.expert_count", 0):
        raise UnsupportedError(f"{path}: mixtures of experts are not read from GGUF yet", hint=f"without experts: {known}")
    name = FAMILIES[arch]
    return cast(Family, registry.find("families", name)), ARCHS[name]


def checkpoint_name(family: Family, name: str) -> str:
    """blk.3.attn_q.weight as the family's checkpoints call it; a name that no role has stays as it is."""
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" and len(parts) > 3 and parts[1].isdigit() else None
    stem = ".".join(parts[:-1] if layer is None else parts[2:-1])
    for role, module in family.names.items():
        if STEMS.get(role, role) == stem and ("{i}" in module) == (layer is not None):
            return f"{family.module(role, layer)}.{parts[-1]}"
    return name


# settings -----------------------------------------------------------------------------------------


def settings_of(
    header: Header, path: Path, family: Family, arch: Arch, tensors: Mapping[str, TensorInfo], store: Store
) -> Config:
    """config.json. InputError for a key that no graph here reads, since it may change what the model computes."""
    kv = {k.removeprefix(f"{arch.name}."): v for k, v in header.kv.items() if k.startswith(f"{arch.name}.")}
    refuse_unread(kv, path, arch)
    values: dict[str, object] = {name: number(kv, key, path) for name, key in KEYS.items() if name != "kv_heads"}
    heads, width = (cast(int, values[k]) for k in ("heads", "width"))
    values["kv_heads"] = kv.get(KEYS["kv_heads"], heads)
    values["eps"] = number(kv, f"attention.{arch.norm_key}", path)
    head_dim = cast(int, number({"attention.key_length": width // heads, **kv}, "attention.key_length", path))
    values["head_dim"] = head_dim
    if kv.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{path}: keys of {head_dim} and values of {kv['attention.value_length']} in a head")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: no tensor is called token_embd.weight", hint="does the file hold a vocabulary alone?")
    values["vocab"] = tensors["token_embd.weight"].shape[0]
    values["tied"] = "output.weight" not in tensors
    values |= {name: kv.get(key) for name, key in CAPS.items()}
    window = cast(int, number(kv, "attention.sliding_window", path)) if "attention.sliding_window" in kv else None
    values["window"] = window
    if window is not None and "window" not in family.config and window < cast(int, values["context"]):
        raise UnsupportedError(f"{path}: a sliding window of {window}, which {family.name} has not")
    values["attn_scalar"] = attention_scalar(arch, cast(Mapping[str, Attr], values))
    values |= {flag: has_bias(family, flag, tensors) for flag in family.biases.values() if isinstance(flag, str)}
    config: Config = {"architectures": [family.hf[0]], "model_type": family.model_type}
    for name, value in values.items():
        if name in family.config and (value is not None or name != "window"):
            config[family.config[name].spellings[0]] = shortest(value)
    if arch.window_period is not None and values["window"] is None:
        config["layer_types"] = ["full_attention"] * cast(int, values["layers"])
    return config | (rope_of(kv, path, family, head_dim, values, tensors, store) if arch.rotary else {})


def refuse_unread(kv: KV, path: Path, arch: Arch) -> None:
    for key, value in kv.items():
        if key in READ or key == f"attention.{arch.norm_key}" or value in NEUTRAL.get(key, ()):
            continue
        raise UnsupportedError(
            f"{path}: {arch.name}.{key} = {str(value)[:80]} is not read here, and may change what the model computes",
            hint="give the checkpoint that the file was made from",
        )


def number(kv: KV, key: str, path: Path) -> object:
    value = kv.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{path}: {key} is {str(value)[:80]}; one positive number was wanted", hint="is the file complete?")
    return value


def shortest(value: object) -> object:
    """A float as f32 prints it: 1e-05 is stored as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def has_bias(family: Family, flag: str, tensors: Mapping[str, TensorInfo]) -> bool:
    roles = [role for role, of in family.biases.items() if of == flag]
    return any(f"blk.0.{STEMS.get(role, role)}.bias" in tensors for role in roles)


def rope_of(
    kv: KV, path: Path, family: Family, head_dim: int, values: KV, tensors: Mapping[str, TensorInfo], store: Store
) -> Config:
    """The keys of config.json that say how heads rotate."""
    theta = cast(float, shortest(kv.get("rope.freq_base", 10000.0)))
    rope: Config = {"rope_theta": theta}
    dims = cast(int, number({"rope.dimension_count": head_dim, **kv}, "rope.dimension_count", path))
    if dims != head_dim:
        if not family.partial_rope:
            raise UnsupportedError(f"{path}: {dims} of {head_dim} values of each head rotate, which {family.name} has not")
        rope["partial_rotary_factor"] = dims / head_dim
    if family.window_theta is not None:
        rope["rope_local_base_freq"] = shortest(kv.get("rope.freq_base_swa", 10000.0))
    if long := [t for t in tensors if t.startswith("rope_factors_")]:
        raise UnsupportedError(f"{path}: {long[0]}: longrope is not read from GGUF yet")
    scaling: Config | None = None
    match kv.get("rope.scaling.type", "linear"):  # llama.cpp's default, with a factor of 1
        case "none":
            pass
        case "linear":
            if (factor := kv.get("rope.scaling.factor", 0.0)) not in (0.0, 1.0):
                scaling = {"rope_type": "linear", "factor": shortest(factor)}
        case "yarn":
            scaling = yarn_scaling({k: shortest(v) for k, v in kv.items()}, cast(int, values["context"]))
        case other:
            raise UnsupportedError(f"{path}: rope scaling {other!r} is not read from GGUF", hint="none, linear and yarn are")
    if FREQUENCIES in tensors:
        if scaling is not None:
            raise UnsupportedError(f"{path}: {FREQUENCIES} beside {scaling['rope_type']} scaling is not read")
        factors = store.read(tensors[FREQUENCIES].ref, 0, tensors[FREQUENCIES].shape[0])
        scaling = llama3_scaling([float(f) for f in factors], theta, head_dim, str(path))
    return rope if scaling is None else {**rope, "rope_scaling": scaling}


# proof --------------------------------------------------------------------------------------------


def tokenizer_rows(source: Source) -> list[Row]:
    """What was made of a GGUF's tokenizer against llama.cpp by the file itself; nothing for other sources."""
    gguf, folder = source.checkpoint.gguf, source.checkpoint.folder
    if gguf is None or tokenizer_folder(source) != folder or not (folder / "tokenizer.json").is_file():
        return []
    runtime, what = LlamaCpp(), "tokenizer of the GGUF"
    if reason := runtime.missing():
        return [Row(what, "not verified", None, None, "skip", reason)]
    vocab = cast(Mapping[str, int], source.base.meta["config"])["vocab"]
    model = runtime.open_vocab(gguf.file)
    try:
        found = gguf_vocabulary_check.rows(model, read_tokenizer(folder, vocab))
        return [row._replace(what=f"{what}: {row.what}") for row in found]
    finally:
        model.close()
