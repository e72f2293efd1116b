"""What is wrong with an ONNX model that somebody made, from its files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qconvert.byte_files import LocalFile, fill
from qconvert.dtypes import DTYPES
from qconvert.errors import InputError, QConvertError
from qconvert.findings import UNREAD, Finding, Places, Vocabulary, n_not_finite, not_finite, of_vocabulary
from qconvert.formats.onnx_foreign_sites import odd_name
from qconvert.formats.onnx_foreign_tensors import Place, dtype_of, place_of, read
from qconvert.formats.onnx_proto import graphs_of
from qconvert.sources import read_json
from qconvert.target import TOKENIZER_FILES
from qconvert.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

GENAI = "genai_config.json"
BLOCK_NBYTES = 1 << 24
CUT = "the download is not complete, or the two files do not belong together"
# keys of names in which %d stands for a layer's number
CACHE = {"inputs": ("past_key_names", "past_value_names"), "outputs": ("present_key_names", "present_value_names")}


def diagnose(path: Path, values: bool) -> list[Finding]:
    model = read(path)
    if (odd := odd_name(model)) is not None:
        return [
            Finding(
                "error",
                path.name,
                f"the name {odd!a} is not text in UTF-8",
                "the file is damaged: fetch it again",
                "damaged-file",
            )
        ]
    tensors = [t for graph in graphs_of(model.graph) for t in graph.initializer]
    found, places = placed(path, tensors)
    if (path.parent / GENAI).is_file():
        found += genai(path, model)
    return found + (numbers(path, places) if values else [])


def placed(path: Path, tensors: list[TensorProto]) -> tuple[list[Finding], list[tuple[TensorProto, Place]]]:
    """Tensors whose bytes cannot be where the file says, and where those of the others are."""
    found, places, used = list[Finding](), [], dict[str, int]()
    for tensor in tensors:
        try:
            place = place_of(path, tensor)
        except InputError as e:
            found.append(Finding("error", tensor.name, e.message, e.hint or CUT, "damaged-file"))
            continue
        places.append((tensor, place))
        if place.file and place.file != path.name:
            used[place.file] = max(used.get(place.file, 0), place.offset + place.nbytes)
    for name, end in {} if found else used.items():
        nbytes = (path.parent / name).stat().st_size
        if nbytes - end > 1 << 20:
            what = f"{nbytes - end:,} of its {nbytes:,} bytes lie behind the last tensor"
            found.append(Finding("note", name, what, "the file may be of another model", "stale-file"))
    return found, places


def numbers(path: Path, places: list[tuple[TensorProto, Place]]) -> list[Finding]:
    """NaN and infinity in tensors of real numbers, scales among them; infinity alone is what masks are made of."""
    found = []
    for tensor, place in places:
        dtype = dtype_of(tensor)
        if dtype not in DTYPES or DTYPES[dtype].numpy is None:
            continue
        bad = n = 0
        for data in pieces(path, place):
            values = data.view(DTYPES[dtype].numpy)
            n += values.size
            if dtype == "bf16":
                bad += int(np.count_nonzero((values & 0x7FFF) > 0x7F80))
            elif math.prod(tensor.dims) > 1:
                bad += int(np.count_nonzero(np.isnan(values))) if is_mask(values) else n_not_finite(values)
        if bad:
            found.append(not_finite(tensor.name, bad, "values", n))
    return found


def is_mask(values: np.ndarray[Any, Any]) -> bool:
    """Nothing but 0 and infinity of one sign."""
    return bool(np.isin(values, (0, -np.inf)).all())


def pieces(path: Path, place: Place) -> Iterator[np.ndarray[Any, Any]]:
    if place.data is not None:
        yield np.frombuffer(place.data, np.uint8)
        return
    file = path.parent / place.file
    with closing(LocalFile(file)) as opened:
        for at in range(0, place.nbytes, BLOCK_NBYTES):
            out = np.empty(min(BLOCK_NBYTES, place.nbytes - at), np.uint8)
            yield fill(opened, out, place.offset + at, place.file)


# genai_config.json ----------------------------------------------------------------------------------


def genai(path: Path, model: ModelProto) -> list[Finding]:
    """What onnxruntime-genai is told against what the graph has."""
    config = read_json(path.parent / GENAI).get("model")
    decoder = config.get("decoder") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(decoder, dict):
        return [Finding("error", GENAI, "has no model.decoder", "make the folder again", "missing-key")]
    n = decoder.get("num_hidden_layers")
    edges = {"inputs": {v.name for v in model.graph.input}, "outputs": {v.name for v in model.graph.output}}
    found = []
    for side, names in edges.items():
        said = decoder.get(side)
        for key, name in said.items() if isinstance(said, dict) else ():
            n_names = min(n, 10_000) if key in CACHE[side] and isinstance(n, int) else 1
            wanted = [str(name).replace("%d", str(i)) for i in range(n_names)]
            if missing := [w for w in wanted if w not in names]:
                what = f"model.decoder.{side}.{key}: the graph has no {side[:-1]} {missing[0]}"
                found.append(Finding("error", GENAI, what, "the configuration is of another model", "wrong-key"))
        layers = {name for name in names if name.startswith(("past_key_values.", "present."))}
        if isinstance(n, int) and layers and not found and len(layers) != 2 * n:
            what = f"model.decoder.num_hidden_layers is {n}, and the graph has {len(layers)} caches of keys and values"
            found.append(Finding("error", GENAI, what, "the configuration is of another model", "wrong-key"))
    return found + ids(path, model, config)


def ids(path: Path, model: ModelProto, config: dict[str, Any]) -> list[Finding]:
    """vocab_size and the special tokens against the logits and the tokenizer."""
    found, vocab = [], config.get("vocab_size")
    for value in model.graph.output:
        dims = value.type.tensor_type.shape.dim
        width = dims[-1].dim_value if dims else 0
        if value.name == "logits" and width and isinstance(vocab, int) and vocab != width:
            what = f"model.vocab_size is {vocab}, and the graph gives {width} logits"
            found.append(Finding("error", GENAI, what, "the configuration is of another model", "wrong-key"))
    stops = config.get("eos_token_id")
    listed = stops if isinstance(stops, list) else [stops]
    if not [i for i in listed if isinstance(i, int)]:
        found.append(
            Finding("warning", f"{GENAI}: eos_token_id", "no token ends a generation", "list the stop tokens", "stop-token")
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        for i in value if isinstance(value, list) else [value]:
            if isinstance(i, int) and isinstance(vocab, int) and not 0 <= i < vocab:
                found.append(
                    Finding("error", f"{GENAI}: {key}", f"is {i}, and there are {vocab} tokens", "correct the id", "vocabulary")
                )
    return found + (tokenizer(path.parent, vocab, listed) if isinstance(vocab, int) else [])


def tokenizer(folder: Path, vocab: int, stops: list[Any]) -> list[Finding]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return []
    try:
        read = read_tokenizer(folder, vocab)
    except InputError as e:
        return [Finding("error", "tokenizer.json", e.message, e.hint or CUT, "vocabulary")]
    except QConvertError as e:
        return [Finding("note", "tokenizer.json", f"not looked into: {e.message}", e.hint or "", UNREAD)]
    marked = {i for i, kind in enumerate(read.types) if kind in ("control", "user")}
    ends = [i for i in stops if isinstance(i, int)]
    if not ends:
        return []
    places = Places("tokenizer.json", f"{GENAI}: eos_token_id", "chat_template", "added_tokens", "list it in eos_token_id")
    vocabulary = Vocabulary(read.tokens, marked, ends, read.chat_template, dict(read.special), (), len(read.tokens))
    return of_vocabulary(vocabulary, places, True)
