"""What is wrong with a folder of safetensors that somebody made, from the folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qconvert.build import build
from qconvert.dtypes import DTYPES
from qconvert.errors import InputError, MissingDependency, QConvertError
from qconvert.findings import UNREAD, Finding, Places, Vocabulary, n_not_finite, not_finite, of_vocabulary
from qconvert.sources import MODEL_FILES, Checkpoint, Store, TensorInfo, read_checkpoint, read_json
from qconvert.stored_forms import method_of
from qconvert.target import TOKENIZER_FILES
from qconvert.tokenizer import Tokenizer, read_tokenizer

BLOCK = 1 << 22  # values looked at at a time
INDEX = "model.safetensors.index.json"
CODES = ("weight_packed", "qweight", "weight.absmax", "weight_scale", "SCB", "W_q", "scales", "weight_scale_inv", "_blocks")
MEND_STOPS = "list it in generation_config.json's eos_token_id"
PLACES = Places("tokenizer.json", "eos_token_id", "chat_template", "added_tokens", MEND_STOPS)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def diagnose(folder: Path, values: bool) -> list[Finding]:
    store = Store()
    try:
        checkpoint = read_checkpoint(folder, store)
        found = quantized(checkpoint) or head(checkpoint, store) or built(checkpoint)
        found += listed(checkpoint) + tokenizer(checkpoint)
        return found + (numbers(checkpoint, store) if values else [])
    finally:
        store.close()


def built(checkpoint: Checkpoint) -> list[Finding]:
    """config.json against the tensors: their names and shapes, heads that divide, settings that contradict each other."""
    try:
        build(checkpoint)
    except InputError as e:
        return [Finding("error", "config.json", e.message, e.hint or "take the configuration of these weights", "wrong-key")]
    except QConvertError as e:
        return [Finding("note", "config.json", f"not compared with the tensors: {e.message}", e.hint or "", UNREAD)]
    return []


def listed(checkpoint: Checkpoint) -> list[Finding]:
    """The index against the files; that each tensor is where it says was asked in reading."""
    path = checkpoint.folder / INDEX
    if not path.is_file():
        return []
    index = read_json(path)
    where, facts = index.get("weight_map"), index.get("metadata")
    found = []
    if isinstance(where, dict) and (forgotten := sorted(checkpoint.tensors.keys() - where.keys())):
        what = f"does not name {len(forgotten)} tensors of its shards, first {forgotten[0]}"
        found.append(Finding("warning", INDEX, what, "loaders leave them out: save the model again", "stale-file"))
    if isinstance(where, dict):
        others = {p.name for p in checkpoint.folder.glob("model*.safetensors")} - set(where.values())
        if (checkpoint.folder / MODEL_FILES[0]).is_file():
            what = f"stands beside {MODEL_FILES[0]}, which is read in its place"
            found.append(Finding("warning", INDEX, what, "remove the one that is stale", "stale-file"))
        elif others:
            what = f"names nothing in {min(others)}, which lies beside it"
            found.append(Finding("warning", INDEX, what, "remove the file if it is stale", "stale-file"))
    said = facts.get("total_size") if isinstance(facts, dict) else None
    sizes = [math.prod(t.shape) * DTYPES[t.dtype].nbytes for t in checkpoint.tensors.values() if t.dtype in DTYPES]
    if isinstance(said, int) and len(sizes) == len(checkpoint.tensors) and said != sum(sizes):
        what = f"total_size is {said}, the tensors have {sum(sizes)} bytes"
        found.append(Finding("note", INDEX, what, "save the model again", "wrong-key"))
    return found


def quantized(checkpoint: Checkpoint) -> list[Finding]:
    method = method_of(checkpoint.config)
    codes = [n for n in checkpoint.tensors if n.endswith(CODES)]
    if method and not codes:
        what = f"quantization_config says {method[0]}, and no tensor holds codes or scales"
        return [Finding("warning", "config.json", what, "remove the key where the weights are plain", "wrong-type")]
    if codes and not method and "quantization" not in checkpoint.config:
        what = f"{len(codes)} tensors look quantized, first {codes[0]}, and there is no quantization_config"
        return [Finding("error", "config.json", what, "add the configuration that they were quantized with", "wrong-type")]
    return []


def head(checkpoint: Checkpoint, store: Store) -> list[Finding]:
    """A head that was trained apart and that tying would throw away."""
    tensors = checkpoint.tensors
    if not checkpoint.config.get("tie_word_embeddings") or not {HEAD, EMBEDDING} <= tensors.keys():
        return []
    a, b = tensors[HEAD], tensors[EMBEDDING]
    if a.dtype == b.dtype and a.shape == b.shape and a.dtype in DTYPES and equal(store, a, b):
        return []
    what = f"tie_word_embeddings is true, and {HEAD} is another tensor than {EMBEDDING}: loaders throw it away"
    return [Finding("error", HEAD, what, "set tie_word_embeddings to false, or remove the tensor", "tied-head")]


def equal(store: Store, a: TensorInfo, b: TensorInfo) -> bool:
    n, step = a.shape[0], max(1, BLOCK // math.prod(a.shape[1:]))
    spans = ((i, min(n, i + step)) for i in range(0, n, step))
    return all(np.array_equal(store.read(a.ref, *s), store.read(b.ref, *s)) for s in spans)


def numbers(checkpoint: Checkpoint, store: Store) -> list[Finding]:
    """NaN and infinity in every tensor of real numbers, scales among them."""
    found = []
    for name, info in checkpoint.tensors.items():
        if info.dtype not in DTYPES or 0 in info.shape:
            continue
        n, step = (info.shape[0], max(1, BLOCK // math.prod(info.shape[1:]))) if info.shape else (1, 1)
        bad = 0
        for i in range(0, n, step):
            rows = store.read(info.ref, i, min(n, i + step))
            bad += int(np.count_nonzero((rows & 0x7F80) == 0x7F80)) if info.dtype == "bf16" else n_not_finite(rows)
        if bad:
            found.append(not_finite(name, bad, "values", math.prod(info.shape)))
    return found


def tokenizer(checkpoint: Checkpoint) -> list[Finding]:
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [
            Finding(
                "note", "tokenizer.json", "there is no tokenizer in the folder", "save the model's own there", "missing-key"
            )
        ]
    rows = n_rows(checkpoint.tensors)
    if rows is None:
        return []
    try:
        read = read_tokenizer(folder, rows)
    except MissingDependency as e:
        return [Finding("note", "tokenizer.json", f"not looked into: {e.message}", e.hint or "", UNREAD)]
    except InputError as e:
        return [
            Finding(
                "error",
                "tokenizer.json",
                e.message,
                e.hint or "take the tokenizer that the model was trained with",
                "vocabulary",
            )
        ]
    except QConvertError as e:
        return [Finding("note", "tokenizer.json", f"not looked into: {e.message}", e.hint or "", UNREAD)]
    found = of_vocabulary(vocabulary_of(read), PLACES, causal(checkpoint.config))
    said = checkpoint.generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = said if isinstance(said, list) else [said]
    known = {i for i, kind in enumerate(read.types) if kind != "unused"}
    if causal(checkpoint.config) and (odd := [i for i in ids if isinstance(i, int) and i not in known]):
        what = f"{odd[0]} is no token of the vocabulary of {len(known)}"
        found.append(Finding("error", PLACES.stops, what, "correct the id: a generation does not end", "stop-token"))
    return found


def vocabulary_of(read: Tokenizer) -> Vocabulary:
    n = len(read.tokens) - read.n_padding
    marked = {i for i, kind in enumerate(read.types) if kind in ("control", "user")}
    return Vocabulary(read.tokens, marked, read.stops, read.chat_template, dict(read.special), (), max(n, len(read.tokens)))


def causal(config: Mapping[str, object]) -> bool:
    names = config.get("architectures")
    return any("CausalLM" in str(n) or "LMHead" in str(n) for n in names) if isinstance(names, list) else False


def n_rows(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Of the embedding; None where no name says which tensor that is."""
    for name, info in tensors.items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")) and len(info.shape) == 2:
            return info.shape[0]
    return None
