"""What lies beside model.onnx: the configuration of onnxruntime-genai, and the tokenizer's files as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from qconvert.companions import carried, n_vocab
from qconvert.formats.onnx_arch import is_encoder
from qconvert.formats.onnx_lowering import MASK, PAST, PRESENT, TOKENS
from qconvert.graph import Attr, Graph
from qconvert.target import Source
from qconvert.tokenizer import Tokenizer

# genai runs all of these alike, by the names that the file gives; its own gpt2 has another cache, so that is a llama here
TYPES: Mapping[str, str] = {"mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
MAX_LENGTH = 4096  # genai reserves a cache of search.max_length at once; a caller may ask for more


def companions(
    source: Source, graph: Graph, context: int, tokenizer: Tokenizer | None, share_cache: bool
) -> dict[str, bytes]:
    """File name -> bytes. share_cache: past and present may be one buffer."""
    if is_encoder(graph):  # which genai does not run
        return carried(source)
    config = genai_config(graph, context, special_ids(source, tokenizer, n_vocab(graph)), share_cache)
    return {"genai_config.json": (json.dumps(config, indent=2) + "\n").encode(), **carried(source)}


def special_ids(source: Source, tokenizer: Tokenizer | None, vocab: int) -> dict[str, object]:
    """bos, eos (every stop token) and pad, those that there are: the tokenizer's, else what the model's JSON files say.

    genai refuses ids beyond the vocabulary, which a configuration's defaults may be.
    """
    found: dict[str, object]
    if tokenizer is not None:
        stops = list(tokenizer.stops)
        found = {"bos": tokenizer.special.get("bos"), "eos": stops or None, "pad": tokenizer.special.get("pad")}
    else:
        c = source.checkpoint
        found = {k: c.generation_config.get(f"{k}_token_id", c.config.get(f"{k}_token_id")) for k in ("bos", "eos", "pad")}
    listed = found["eos"]
    eos = listed if isinstance(listed, list) else [listed]
    found["eos"] = eos[0] if len(eos) == 1 else eos
    if found["pad"] is None:
        found["pad"] = eos[0]
    return {f"{key}_token_id": kept for key, value in found.items() if (kept := within(value, vocab)) is not None}


def within(ids: object, vocab: int) -> object:
    if isinstance(ids, list):
        return [i for i in ids if i < vocab] or None
    return ids if isinstance(ids, int) and ids < vocab else None


def genai_config(graph: Graph, context: int, ids: Mapping[str, object], share_cache: bool) -> dict[str, object]:
    """genai_config.json, with the keys that the model builder of onnxruntime-genai 0.18 writes."""
    config = cast(Mapping[str, Attr], graph.meta["config"])
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.get("head_dim") or cast(int, config["width"]) // cast(int, config["heads"]),
        "hidden_size": config["width"],
        "inputs": {"input_ids": TOKENS, "attention_mask": MASK, **cache_names("past", PAST)},
        "outputs": {"logits": graph.outputs[0], **cache_names("present", PRESENT)},
        "num_attention_heads": config["heads"],
        "num_hidden_layers": config["layers"],
        "num_key_value_heads": config["kv_heads"],
    }
    search = {
        "do_sample": False, "early_stopping": True, "max_length": min(context, MAX_LENGTH), "min_length": 0, "num_beams": 1,
        "num_return_sequences": 1, "past_present_share_buffer": share_cache, "repetition_penalty": 1.0, "temperature": 1.0,
        "top_k": 1, "top_p": 1.0,
    }  # fmt: skip
    return {
        "model": {
            **ids,
            "context_length": context,
            "decoder": decoder,
            "type": TYPES.get(str(graph.meta["family"]), "llama"),
            "vocab_size": n_vocab(graph),
        },
        "search": search,
    }


def cache_names(prefix: str, template: str) -> dict[str, str]:
    names = {part: template.format(i="%d", part=part) for part in ("key", "value")}
    return {f"{prefix}_{part}_names": name for part, name in names.items()}
