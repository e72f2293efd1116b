"""llama.cpp as a runtime: its C API by ctypes, out of a prebuilt wheel, in this process.

The wheel xllamacpp links llama.cpp statically and exports its C symbols; llama-cpp-python ships libllama. Neither
package is imported: only the library file is loaded. Structs that travel by value are declared up to the last field
used here, as in include/llama.h, and padded; before the first call their defaults are compared with the known ones,
so that another layout is refused and never misread.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
from collections import deque
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import MissingDependency, VerificationError

INSTALL = 'pip install "qconvert[llama]"'
TESTED = ("0.5.0-dev", "0.6.0-dev")  # llama_version() of the builds whose struct layouts were read and probed
ANY_VERSION = "QCONVERT_LLAMA_CPP"  # set to "any": use another version if its structs pass the probe
WHEELS = (("xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")), ("llama_cpp", ("lib/libllama.*", "lib/llama.dll")))
DISTRIBUTIONS = {"xllamacpp": "xllamacpp", "llama_cpp": "llama-cpp-python"}
PADDED_NBYTES = 1024  # more than any version of the structs takes: the callee reads only its own part
MAX_BATCH_LOGITS = 16 << 20  # floats: 64 MB, so that a 150k vocabulary does not cost 300 MB per batch
GGML_F32 = 0


class ModelParams(c.Structure):
    """llama_model_params, whole in 0.5 and 0.6."""

    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("rest", c.c_ubyte * PADDED_NBYTES),
    )


class ContextParams(c.Structure):
    """llama_context_params up to type_v; behind it the versions differ."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("rest", c.c_ubyte * PADDED_NBYTES),
    )


class Batch(c.Structure):
    """llama_batch: pos and seq_id left null are counted on by the runtime, sequence 0."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    )


# What the default structs hold: a shifted field would show one of these wrong.
MODEL_DEFAULTS = {
    "devices": None, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
    "kv_overrides": None, "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False,
}  # fmt: skip
CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0, "n_outputs_max_per_seq": 1,
    "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "defrag_thold": -1.0, "cb_eval": None, "type_k": 1, "type_v": 1,
}  # fmt: skip

_P, _I, _B, _S = c.c_void_p, c.c_int32, c.c_bool, c.c_char_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_version": (_S, ()),
    "ggml_version": (_S, ()),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_P, _P)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (_P, (_S, ModelParams)),
    "llama_model_load_from_splits": (_P, (_P, c.c_size_t, ModelParams)),
    "llama_model_free": (None, (_P,)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_chat_template": (_S, (_P, _S)),
    "llama_model_meta_val_str": (_I, (_P, _S, _P, c.c_size_t)),
    "llama_init_from_model": (_P, (_P, ContextParams)),
    "llama_free": (None, (_P,)),
    "llama_n_ctx": (c.c_uint32, (_P,)),
    "llama_get_memory": (_P, (_P,)),
    "llama_memory_clear": (None, (_P, _B)),
    "llama_decode": (_I, (_P, Batch)),
    "llama_get_logits": (_P, (_P,)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_vocab_is_eog": (_B, (_P, _I)),
    "llama_vocab_bos": (_I, (_P,)),
    "llama_vocab_eos": (_I, (_P,)),
    "llama_vocab_get_add_bos": (_B, (_P,)),
    "llama_vocab_get_add_eos": (_B, (_P,)),
    "llama_tokenize": (_I, (_P, _S, _I, _P, _I, _B, _B)),
    "llama_token_to_piece": (_I, (_P, _I, _P, _I, _I, _B)),
}


class Library(NamedTuple):
    """The loaded library, or (call is None) the reason why there is none."""

    call: Any
    version: str
    reason: str | None


LOG: deque[str] = deque(maxlen=40)
WARNING, ERROR = 3, 4  # ggml_log_level


def _collect(level: int, text: bytes, _: object) -> None:
    if level in (WARNING, ERROR):
        LOG.append(text.decode("utf-8", "replace").rstrip())


_COLLECT = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(_collect)  # module level: the library keeps calling it


def _library_file() -> tuple[str, Path] | None:
    """(package, library) of the first installed wheel; finds the package without importing it."""
    for package, patterns in WHEELS:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
            if files:
                return package, files[0]
    return None


def _wrong_defaults(params: c.Structure, wanted: dict[str, Any]) -> str | None:
    for field, value in wanted.items():
        if getattr(params, field) != value:
            return f"{type(params).__name__}.{field} is {getattr(params, field)!r}, known is {value!r}"
    return None


def _load(package: str, file: Path) -> Library:
    try:
        lib = c.CDLL(str(file))
        for name, (result, arguments) in SIGNATURES.items():
            getattr(lib, name).restype = result
            getattr(lib, name).argtypes = arguments
    except (OSError, AttributeError) as e:
        return Library(None, "", f"{file.name} of {package} cannot be used: {e}")
    try:
        packaged = f"{DISTRIBUTIONS[package]} {package_version(DISTRIBUTIONS[package])}"
    except PackageNotFoundError:
        packaged = package
    number = str(lib.llama_version().decode())
    version = f"{number}, ggml {lib.ggml_version().decode()} ({packaged})"
    if number not in TESTED and os.environ.get(ANY_VERSION) != "any":
        return Library(None, version, f"llama.cpp {version} is not a tested version ({', '.join(TESTED)})")
    wrong = _wrong_defaults(lib.llama_model_default_params(), MODEL_DEFAULTS)
    wrong = wrong or _wrong_defaults(lib.llama_context_default_params(), CONTEXT_DEFAULTS)
    if wrong:
        return Library(None, version, f"llama.cpp {version} has other structs: {wrong}")
    lib.llama_log_set(c.cast(_COLLECT, c.c_void_p), None)
    lib.llama_backend_init()
    return Library(lib, version, None)


@cache
def library() -> Library:
    """The library, loaded once a process."""
    if sys.byteorder != "little":
        return Library(None, "", "llama.cpp is only driven on little-endian machines")
    found = _library_file()
    if found is None:
        return Library(None, "", "llama.cpp is not installed")
    return _load(*found)


class LlamaCpp:
    """The runtime llama.cpp: `missing()` is None where it can be used."""

    name = "llama.cpp"

    def missing(self) -> str | None:
        """Why it cannot be used and how to install it; None when it can."""
        reason = library().reason
        return None if reason is None else f"{reason} ({INSTALL})"

    def version(self) -> str:
        """For example "0.6.0-dev, ggml 0.26.0 (xllamacpp 2026.10.11549)"; "" where none is installed."""
        return library().version

    def open(self, path: Path, n_ctx: int, threads: int, *, shards: Sequence[Path] = ()) -> Model:
        """Load a GGUF for inference; of a split one its first shard, or all `shards` where their names differ.

        Errors: MissingDependency without llama.cpp; VerificationError with llama.cpp's own words if it does not load.
        """
        return Model(self._library(), path, n_ctx=n_ctx, threads=threads, shards=shards)

    def open_vocab(self, path: Path) -> Model:
        """Load only the vocabulary: tokenize, pieces and special ids work, logits do not."""
        return Model(self._library(), path, n_ctx=0, threads=1, vocab_only=True)

    def _library(self) -> Any:
        lib = library()
        if lib.call is None:
            raise MissingDependency(f"the check needs llama.cpp: {lib.reason}", hint=INSTALL)
        return lib.call


class Model:
    """One open GGUF on the CPU, in the plainest arithmetic: no repacking, no flash attention, f32 cache."""

    def __init__(
        self, lib: Any, path: Path, *, n_ctx: int, threads: int, shards: Sequence[Path] = (), vocab_only: bool = False
    ) -> None:
        self._lib, self.path, self._context = lib, path, None
        self._model = self._load(shards, vocab_only)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx = n_ctx
        if not vocab_only:
            self._context = self._new_context(n_ctx, threads)

    def _load(self, shards: Sequence[Path], vocab_only: bool) -> int:
        no_devices = (c.c_void_p * 1)()  # an empty list, where null would mean every GPU there is
        params = self._lib.llama_model_default_params()
        params.devices = c.cast(no_devices, c.c_void_p)
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.check_tensors = not vocab_only  # blocks that hold NaN or impossible scales fail the load
        params.use_extra_bufts = False  # repacked weights would sum in another order
        LOG.clear()
        if shards:
            paths = (c.c_char_p * len(shards))(*[os.fsencode(p) for p in shards])
            model = self._lib.llama_model_load_from_splits(c.cast(paths, c.c_void_p), len(shards), params)
        else:
            model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not model:
            raise VerificationError(f"{self.path}: llama.cpp does not load it: {_log()}")
        return int(model)

    def _new_context(self, n_ctx: int, threads: int) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = self._n_batch = max(32, min(512, n_ctx, MAX_BATCH_LOGITS // self.n_vocab))
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        params.type_k = params.type_v = GGML_F32  # a cache in f16 would cost more than the conversion does
        LOG.clear()
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            raise VerificationError(f"{self.path}: llama.cpp makes no context of {n_ctx} tokens: {_log()}")
        return int(context)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token, of a fresh sequence: ids [T] -> f32[T,V]."""
        self._clear()
        return self._decode(tokens, every=True)

    def generate(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that greedily follow; an end-of-generation token ends the list and is its last."""
        self._clear()
        new: list[int] = []
        step = tokens
        while len(new) < n:
            new.append(int(self._decode(step, every=False)[-1].argmax()))
            if self.is_eog(new[-1]):
                break
            step = new[-1:]
        return new

    def _clear(self) -> None:
        if self._context is None:
            raise VerificationError(f"{self.path}: opened for its vocabulary only")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], *, every: bool) -> NDArray[np.float32]:
        """Append tokens to the sequence; logits of all of them, or of the last alone."""
        ids = np.asarray(tokens, dtype=np.int32)
        wrong = ids[(ids < 0) | (ids >= self.n_vocab)]
        if ids.size == 0 or wrong.size:
            what = f"token {wrong[0]} is not in the vocabulary of {self.n_vocab}" if wrong.size else "no tokens"
            raise VerificationError(f"{self.path}: {what}")
        if ids.size > self.n_ctx:
            raise VerificationError(f"{self.path}: {ids.size} tokens do not fit its context of {self.n_ctx}")
        out = np.empty((ids.size if every else 1, self.n_vocab), np.float32)
        for begin in range(0, ids.size, self._n_batch):
            part = np.ascontiguousarray(ids[begin : begin + self._n_batch])
            wanted = np.full(part.size, every, np.int8)
            wanted[-1] = 1
            batch = Batch(part.size, part.ctypes.data, None, None, None, None, wanted.ctypes.data)
            LOG.clear()
            status = self._lib.llama_decode(self._context, batch)
            if status:
                raise VerificationError(f"{self.path}: llama_decode gave {status} at token {begin}: {_log()}")
            rows = slice(begin, begin + part.size) if every else slice(0, 1)
            out[rows] = self._read_logits(int(wanted.sum()))
        return out

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        pointer = c.cast(self._lib.llama_get_logits(self._context), c.POINTER(c.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self.n_vocab))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids as llama.cpp cuts the text; with add_special its BOS/EOS, with parse_special control tokens too."""
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        while True:
            ids = (c.c_int32 * room)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            room = -n

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens give their text."""
        room = 64
        while True:
            buffer = c.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def is_eog(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def eog_tokens(self) -> set[int]:
        """Every token at which llama.cpp stops to generate."""
        return {token for token in range(self.n_vocab) if self.is_eog(token)}

    @property
    def bos(self) -> int | None:
        return self._id("llama_vocab_bos")

    @property
    def eos(self) -> int | None:
        return self._id("llama_vocab_eos")

    @property
    def add_bos(self) -> bool:
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def add_eos(self) -> bool:
        return bool(self._lib.llama_vocab_get_add_eos(self._vocab))

    def _id(self, function: str) -> int | None:
        token = int(getattr(self._lib, function)(self._vocab))
        return None if token < 0 else token

    def chat_template(self) -> str | None:
        """The template's text as llama.cpp read it."""
        text = self._lib.llama_model_chat_template(self._model, None)
        return None if text is None else str(text.decode())

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value as llama.cpp prints it."""
        n = self._lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if n < 0:
            return None
        buffer = c.create_string_buffer(n + 1)
        self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, n + 1)
        return buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None  # type: ignore[assignment]

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _log() -> str:
    return "; ".join(list(LOG)[-4:]) or "it gave no reason"
