"""What lies beside an ONNX file that transformers.js loads: config.json with its own section, tokenizer.json, the template.

Source: transformers.js 4.3.2: src/models/session.js and utils/model-loader.js (files), tokenization_utils.js (tokenizer).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

from qconvert.companions import carried, n_vocab
from qconvert.errors import UnsupportedError
from qconvert.formats.onnx_storage import Storage
from qconvert.graph import Graph
from qconvert.target import Source
from qconvert.tokenizer import Tokenizer

if TYPE_CHECKING:
    from onnx import ValueInfoProto

# model types whose decoders it runs: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES of its src/models/registry.js, as far as we write them
MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2", "phi3", "gemma2", "gemma3_text")
CACHE_DTYPES = {1: "float32", 10: "float16"}  # TensorProto's numbers


def companions(source: Source, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The tokenizer's files. It reads tokenizer.json alone, and a chat template only inside tokenizer_config.json."""
    files = carried(source)
    if tokenizer is None:
        return files
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = as_json(dict(tokenizer.document))
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = {f"{role}_token": tokenizer.tokens[i] for role, i in tokenizer.special.items()}
    more: dict[str, object] = {key: text for key, text in named.items() if config.get(key) is None}
    if templates := tokenizer.chat_templates:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        more["chat_template"] = templates["default"] if list(templates) == ["default"] else listed
    if any(config.get(key) != value for key, value in more.items()):
        files["tokenizer_config.json"] = as_json(config | more)
    return files


def config_of(source: Source, graph: Graph) -> dict[str, object]:
    """The model's config.json, with the vocabulary that the graph has."""
    config = dict(source.checkpoint.config)
    return config | {"vocab_size": n_vocab(graph)} if "vocab_size" in config else config


def config_json(config: Mapping[str, object], storage: Storage, n_files: int, inputs: Sequence[ValueInfoProto]) -> bytes:
    """config.json that says what to load where nobody asks for a dtype, and in how many files the weights lie."""
    if (kind := config.get("model_type")) not in MODELS:
        raise UnsupportedError(f"--layout transformersjs: it runs no {kind}", hint=f"it runs {', '.join(MODELS)}")
    caches = {i.type.tensor_type.elem_type for i in inputs if i.name.startswith("past_key_values.")}
    own: dict[str, object] = {
        "dtype": cast(str, storage.browser_dtype),
        "use_external_data_format": {PurePosixPath(storage.model).name: n_files},
        "kv_cache_dtype": CACHE_DTYPES[caches.pop()],
    }
    return as_json({**config, "transformers.js_config": own})


def as_json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
