"""llama.cpp as a runtime: its C API by ctypes, out of a prebuilt wheel, in this process.

The wheel xllamacpp links llama.cpp statically and exports its C symbols; llama-cpp-python ships libllama. Neither
package is imported: only the library file is loaded, and its structs are probed first (llama_cpp_abi.py).
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
from qconvert.formats.llama_cpp_abi import CONTEXT_DEFAULTS, MODEL_DEFAULTS, SIGNATURES, Batch

INSTALL = 'pip install "qconvert[llama]"'
TESTED = ("0.5.0-dev", "0.6.0-dev")  # llama_version() of the builds whose struct layouts were read and probed
ANY_VERSION = "QCONVERT_LLAMA_CPP"  # set to "any": use another version if its structs pass the probe
WHEELS = (("xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")), ("llama_cpp", ("lib/libllama.*", "lib/llama.dll")))
DISTRIBUTIONS = {"xllamacpp": "xllamacpp", "llama_cpp": "llama-cpp-python"}
MAX_BATCH_LOGITS = 16 << 20  # floats: 64 MB, so that a 150k vocabulary does not cost 300 MB per batch
GGML_F32 = 0
WARNING, ERROR = 3, 4  # ggml_log_level
LOG: deque[str] = deque(maxlen=40)


class Library(NamedTuple):
    """The loaded library, or (call is None) the reason why there is none."""

    call: Any
    version: str
    reason: str | None


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
