"""onnxruntime as a runtime: its CPU kernels, with the key/value cache that a chat would have."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import MissingDependency, VerificationError

INSTALL = 'pip install "qconvert[onnx]"'
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
FUSED_ACCURACY = "session.qdq_matmulnbits_accuracy_level"  # of products that it makes of DequantizeLinear and MatMul
QUIET = 3  # errors only


class OnnxRuntime:
    """The runtime onnxruntime: `missing()` is None where it can be used."""

    name = "onnxruntime"

    def missing(self) -> str | None:
        try:
            package_version("onnxruntime")
        except PackageNotFoundError:
            return f"onnxruntime is not installed ({INSTALL})"
        return None

    def version(self) -> str:
        return "" if self.missing() else package_version("onnxruntime")

    def open(self, path: Path, n_ctx: int, threads: int, *, exact: bool = False, adapter: Path | None = None) -> Model:
        """Load a folder's model.onnx. `exact`: quantized products in f32, whatever level the file or the default asks for.
        adapter: a file whose factors fill the model's slots.

        Errors: MissingDependency without onnxruntime; VerificationError with its own words if it does not load.
        """
        if reason := self.missing():
            raise MissingDependency(f"the check needs onnxruntime: {reason}", hint=INSTALL)
        return Model(path, n_ctx, session(path, threads, exact), active(adapter) if adapter else None)


def session(path: Path, threads: int, exact: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, QUIET
    options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent))
    if exact:
        options.add_session_config_entry(FUSED_ACCURACY, "0")
    source = exact_proto(path) if exact else path.read_bytes()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions have no common class of their own
        raise VerificationError(f"{path}: onnxruntime does not load it: {e}") from e


def active(adapter: Path) -> Active:
    """Options of a run in which an adapter is active. The run reads its memory, so it is kept with them."""
    import onnxruntime

    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(adapter))
    options.add_active_adapter(loaded)
    return Active(loaded, options)


class Active(NamedTuple):
    adapter: Any
    options: Any


def exact_proto(path: Path) -> bytes:
    """The model's protobuf with activations left in f32."""
    import onnx

    from qconvert.formats.onnx_exact import without_rounding

    data: bytes = without_rounding(onnx.load(path, load_external_data=False)).SerializeToString()
    return data


class Model:
    """One open decoder; each call begins a fresh sequence."""

    def __init__(self, path: Path, n_ctx: int, session: Any, active: Active | None = None) -> None:
        self.path, self.n_ctx, self._session, self._active = path, n_ctx, session, active
        self._past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token, all at once: ids [T] -> f32[T,V]."""
        return self._step(tokens, self._empty())[0]

    def decoded(self, tokens: Sequence[int], n_steps: int) -> NDArray[np.float32]:
        """The same by the cache: all but the last n_steps tokens at once, then one at a time."""
        first = len(tokens) - n_steps
        out, past = self._step(tokens[:first], self._empty())
        rows = [out]
        for token in tokens[first:]:
            out, past = self._step([token], past)
            rows.append(out)
        return np.concatenate(rows)

    def generate(self, tokens: Sequence[int], n: int) -> list[int]:
        """n tokens that greedily follow."""
        past, step, new = self._empty(), list(tokens), list[int]()
        while len(new) < n:
            out, past = self._step(step, past)
            step = [int(out[-1].argmax())]
            new += step
        return new

    def _empty(self) -> list[NDArray[np.float32]]:
        return [np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in self._past]

    def _step(
        self, tokens: Sequence[int], past: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        ids = np.asarray([tokens], np.int64)
        length = past[0].shape[2] + ids.shape[1]
        if length > self.n_ctx:
            raise VerificationError(f"{self.path}: {length} tokens do not fit its context of {self.n_ctx}")
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64)}
        feeds |= {i.name: p for i, p in zip(self._past, past, strict=True)}
        try:
            logits, *present = self._session.run(None, feeds, *([self._active.options] if self._active else ()))
        except Exception as e:
            raise VerificationError(f"{self.path}: onnxruntime cannot run it: {e}") from e
        return logits[0], present

    def close(self) -> None:
        self._session = None
