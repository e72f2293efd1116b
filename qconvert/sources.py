"""Checkpoints and adapter folders: which tensors there are, and their rows. Headers only until a row is wanted.

A tensor is named by a ref, ALIAS/FILE#TENSOR: "base/model-00001-of-00002.safetensors#model.norm.weight".
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar, cast

from qconvert import registry
from qconvert.errors import InputError, Place, UnsupportedError
from qconvert.gguf_reader import read_header as read_gguf_header
from qconvert.model_cache import find_model
from qconvert.scheme import Array
from qconvert.tensor_files import SafetensorsFile, TensorFile, open_tensors
from qconvert.url_files import Mirror, is_url, local_path, mirrored

T = TypeVar("T")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
INCOMPLETE = "the download is not complete; fetch it again"


class TensorInfo(NamedTuple):
    """dtype is a name of dtypes.DTYPES, or the file's own in lower case where rows cannot be read (f8_e4m3, i8 …)."""

    ref: str
    dtype: str
    shape: tuple[int, ...]


class Store:
    """Tensors of several folders, each under an alias. Thread-safe; close() must wait for readers."""

    def __init__(self, scratch_in: Path | None = None) -> None:
        self.scratch_in = scratch_in
        self.roots: dict[str, Path] = {}
        self.mirrors: dict[Path, Mirror] = {}  # of folders whose weights are read by URL
        self._single: dict[str, str] = {}
        self._files: dict[tuple[str, str], TensorFile] = {}
        self._adopted: set[str] = set()
        self._tensors: dict[str, dict[str, TensorInfo]] = {}
        self._scratch: TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()
        self.answers: dict[str, tuple[object, object]] | None = None  # kind -> last question, its answer

    def add(self, alias: str, folder: Path) -> None:
        """Make a folder (or one file of tensors) known as `alias`; nothing is read yet."""
        path = Path(folder)
        root = path.parent if path.is_file() else path
        with self._lock:
            if self.roots.get(alias, root) != root:
                raise InputError(f"two sources are called {alias!r}: {self.roots[alias]} and {root}")
            self.roots[alias] = root
            if path.is_file():
                self._single[alias] = path.name

    def found(self, text: str) -> Path:
        """As find_model does; of a URL, a folder that has what is small, whose weights are read from where they lie."""
        path = local_path(text)
        if path is not None or not is_url(text):
            return find_model(str(path or text))
        if text.endswith(".gguf"):
            raise UnsupportedError(f"{text}: a GGUF is read from a disk", hint="copy it, and give the copy")
        name = text.rstrip("/").rpartition("/")[2]
        folder = self.scratch() / f"mirror{len(self.mirrors)}" / (name if re.fullmatch(r"\w[\w.-]*", name) else "model")
        folder.mkdir(parents=True)
        self.mirrors[folder] = mirrored(text, folder)
        return folder

    def places(self) -> tuple[tuple[str, str], ...]:
        """Each alias, and the folder, file or URL that a store elsewhere adds. UnsupportedError where that is not all."""
        if self._adopted:
            raise UnsupportedError(f"{self.roots[min(self._adopted)]}: one machine alone reads it", hint="--executor threads")
        here = {alias: str((root / self._single.get(alias, "")).absolute()) for alias, root in self.roots.items()}
        far = {alias: self.mirrors[root].url for alias, root in self.roots.items() if root in self.mirrors}
        return tuple((here | far).items())

    def add_place(self, alias: str, place: str) -> None:
        """What `places` gave elsewhere."""
        if is_url(place):
            self.mirrors[Path(place)] = Mirror(place)
        self.add(alias, Path(place))

    def stamp(self, alias: str, filename: str) -> str:
        """Tells a file from another in its place."""
        if (root := self._root(alias)) in self.mirrors:
            return self.mirrors[root].stamp(filename)
        stat = (root / filename).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def adopt(self, alias: str, filename: str, file: TensorFile, alone: bool = False) -> None:
        """Read a file of `alias` by a reader that is open already. alone: `alias` has no other."""
        with self._lock:
            self._files[alias, filename] = file
            self._adopted.add(alias)
            if alone:
                self._single[alias] = filename

    def tensors(self, alias: str) -> dict[str, TensorInfo]:
        """Every tensor under `alias` by its name, from the headers. InputError for a missing or damaged file."""
        with self._lock:
            if alias not in self._tensors:
                self._tensors[alias] = self._list(alias)
            return self._tensors[alias]

    def info(self, ref: str) -> TensorInfo:
        """InputError where there is no such tensor."""
        file, name = self._find(ref)
        return TensorInfo(ref, *file.types[name])

    def read(self, ref: str, begin: int, end: int) -> Array:
        """Rows begin..end in the file's dtype, bf16 as uint16. UnsupportedError for a dtype that numpy has not."""
        file, name = self._find(ref)
        shape = file.types[name][1]
        _check_range(ref, "rows", begin, end, shape[0] if shape else 1)
        return file.read(name, begin, end)

    def read_stacked(self, ref: str, begin: int, end: int) -> Array:
        """Rows begin..end of [E,N,K], counted through its E*N rows, as [end-begin, K]."""
        file, name = self._find(ref)
        _check_range(ref, "rows", begin, end, math.prod(file.types[name][1][:-1]))
        return file.read_stacked(name, begin, end)

    def read_columns(self, ref: str, begin: int, end: int) -> Array:
        """Columns begin..end of a matrix [N,K], as [N, end-begin]."""
        file, name = self._find(ref)
        shape = file.types[name][1]
        if len(shape) != 2:
            raise InputError(f"{ref}: {list(shape)} is not a matrix, so it has no columns to read")
        _check_range(ref, "columns", begin, end, shape[1])
        return file.read_columns(name, begin, end)

    def files(self) -> dict[str, Path]:
        """Every file of tensors that was opened, by ALIAS/FILE."""
        with self._lock:
            return {f"{alias}/{name}": self.roots[alias] / name for alias, name in self._files}

    def folders(self) -> dict[str, Path]:
        """By alias, the folders of which more than one file of tensors may be read."""
        with self._lock:
            return {alias: root for alias, root in self.roots.items() if alias not in self._single}

    def close(self) -> None:
        """Close all files. A later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def known(self, kind: str, question: object, find: Callable[[], T]) -> T:
        """What `find` gives; of each kind the last answer is kept where several outputs ask."""
        if self.answers is None:
            return find()
        if self.answers.get(kind, (None,))[0] != question:
            self.answers.pop(kind, None)
            self.answers[kind] = question, find()
        return cast(T, self.answers[kind][1])

    def scratch(self) -> Path:
        """A folder for what is made of a source and read again (a GGUF's tokenizer); close() removes it."""
        with self._lock:
            if self._scratch is None:
                Path(self.scratch_in or ".").mkdir(parents=True, exist_ok=True)
                self._scratch = TemporaryDirectory(prefix=".qconvert-", dir=self.scratch_in)
            return Path(self._scratch.name)

    def _find(self, ref: str) -> tuple[TensorFile, str]:
        place, _, name = ref.partition("#")
        alias, _, filename = place.partition("/")
        file = self._files.get((alias, filename)) or self._open(alias, filename)
        if name not in file.types:
            raise InputError(f"{ref}: there is no such tensor in the file")
        return file, name

    def _open(self, alias: str, filename: str) -> TensorFile:
        with self._lock:
            root = self._root(alias)
            if (alias, filename) not in self._files:
                given = self._single.get(alias) == filename  # the user's own path may be a link to anywhere
                path = root / filename if given else inside(root, filename)
                mirror = self.mirrors.get(root)
                self._files[alias, filename] = SafetensorsFile(mirror.open(filename)) if mirror else open_tensors(path)
            return self._files[alias, filename]

    def _far(self, root: Path) -> Container[str]:
        return self.mirrors[root].files if root in self.mirrors else ()

    def _root(self, alias: str) -> Path:
        if alias not in self.roots:
            raise InputError(f"no source is called {alias!r}; there are {', '.join(self.roots) or 'none'}")
        return self.roots[alias]

    def _list(self, alias: str) -> dict[str, TensorInfo]:
        root = self._root(alias)
        name = self._single.get(alias) or _weights_file(root, alias.startswith("adapter"), self._far(root))
        if name.endswith(".index.json"):
            return self._list_shards(alias, name)
        if name.endswith(".gguf"):
            files = [p.name for p in gguf_files(root / name)]
            return {
                t: TensorInfo(f"{alias}/{f}#{t}", *kind) for f in files for t, kind in self._open(alias, f).types.items()
            }
        file = self._open(alias, name)
        return {t: TensorInfo(f"{alias}/{name}#{t}", *kind) for t, kind in file.types.items()}

    def _list_shards(self, alias: str, index: str) -> dict[str, TensorInfo]:
        path = self.roots[alias] / index
        where = _weight_map(inside(self.roots[alias], index), path)
        out: dict[str, TensorInfo] = {}
        for name, shard in where.items():
            file = self._open_shard(alias, shard, f"{path}: {name}")
            if name not in file.types:
                raise InputError(f"{path}: {name} should be in {shard}, which does not have it", hint=INCOMPLETE)
            out[name] = TensorInfo(f"{alias}/{shard}#{name}", *file.types[name])
        for shard in dict.fromkeys(where.values()):
            for name, kind in self._open(alias, shard).types.items():
                if name not in where and name in out:
                    raise InputError(f"{path}: names no shard for {name}, which is in {out[name].ref} and in {shard}")
                out.setdefault(name, TensorInfo(f"{alias}/{shard}#{name}", *kind))
        return out

    def _open_shard(self, alias: str, shard: str, what: str) -> TensorFile:
        if (alias, shard) not in self._files:
            path = inside(self.roots[alias], shard, what)
            if not path.is_file() and shard not in self._far(self.roots[alias]):
                raise InputError(f"{what}: the shard {shard} is missing", hint=INCOMPLETE)
        return self._open(alias, shard)


class GGUFStorage(NamedTuple):
    """pairs: rows of queries and keys lie as they rotate there, neighbours together."""

    file: Path
    pairs: bool


class Checkpoint(NamedTuple):
    """A model as it lies on disk. revision is the commit where the folder is a snapshot of the Hugging Face cache.

    gguf: where it was read from such a file; `config` and `tensors` then have the names of a checkpoint, and the folder
    holds what a checkpoint's has beside its weights.
    """

    folder: Path
    config: dict[str, object]
    generation_config: dict[str, object]
    tensors: dict[str, TensorInfo]
    revision: str | None
    gguf: GGUFStorage | None = None

    @property
    def place(self) -> Path:
        """What errors name."""
        return self.gguf.file if self.gguf else self.folder


def read_checkpoint(path: Path, store: Store, alias: str = "base") -> Checkpoint:
    """Read a model folder, which `store` will then know as `alias`: its JSON files and its tensors' headers.

    InputError where something is missing or damaged; UnsupportedError for weights that are quantized already.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        hint = "a model folder in Hugging Face's layout is wanted"
        if ggufs := sorted(p.name for p in folder.glob("*.gguf")):
            hint = f"give the file: {folder / ggufs[0]}"
        if (folder / "adapter_config.json").is_file():
            hint = f"this is an adapter: give its model first, MODEL+{folder}"
        raise InputError(f"{folder}: has no config.json", hint=hint)
    config = read_json(inside(folder, "config.json"))
    if "quantization_config" not in config and (folder / "quantize_config.json").is_file():  # AutoGPTQ's older place for it
        config |= {"quantization_config": {"quant_method": "gptq", **read_json(inside(folder, "quantize_config.json"))}}
    _refuse_quantized(folder, config)
    has_generation = (folder / "generation_config.json").is_file()
    generation = read_json(inside(folder, "generation_config.json")) if has_generation else {}
    store.add(alias, folder)
    return Checkpoint(folder, config, generation, store.tensors(alias), revision_of(folder))


def revision_of(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot of the Hugging Face cache."""
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" else None


def _refuse_quantized(folder: Path, config: Mapping[str, object]) -> None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        found = part.get("quantization_config") or part.get("quantization")
        if found:
            method = found.get("quant_method", "mlx" if "quantization" in part else None) if isinstance(found, dict) else None
            if method in registry.entries("stored") and part is config:
                continue
            raise UnsupportedError(
                f"{folder}: the weights are already quantized ({method or 'config.json has quantization settings'})",
                hint="convert the checkpoint before quantization, in bf16, f16 or f32",
            )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. InputError for a file that is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=_count)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}", place=Place(str(path))) from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON: {e}", place=Place(str(path), getattr(e, "lineno", None))) from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was wanted, not a {type(value).__name__}", place=Place(str(path)))
    return cast(dict[str, object], value)


def _count(digits: str) -> int:
    if len(digits) > 20:  # no count of anything; and no float, which it might be taken for, holds much more
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def inside(folder: Path, name: str, what: str | None = None) -> Path:
    """folder/name, refused with InputError where the name or a link leads out of the folder.

    Links into the blobs of the same cached repository are what Hugging Face's cache is made of, so they are allowed.
    """
    path, base = folder / name, folder.resolve()
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(f"{what or folder}: the path {name!r} leads out of the folder", hint="do not trust this input")
    if not name.isprintable() or not pure.name or set(name) & set("\\#"):
        raise InputError(f"{what or folder}: {name!a} is no name for a file of tensors")
    try:
        target = path.resolve()
        path.is_file()  # raises for a name that is too long
    except (OSError, RuntimeError) as e:  # RuntimeError: a link that leads to itself
        raise InputError(f"{what or folder}: {name[:80]!a} is no name for a file of tensors: {str(e)[:80]}") from e
    allowed = [base, *([base.parent.parent / "blobs"] if base.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(a) for a in allowed):
        raise InputError(
            f"{what or path}: the link {name} leads out of the folder, to {target}",
            hint="put the file itself there, or give the folder that it lies in",
        )
    return path


def weights_files(folder: Path) -> list[str]:
    """Whatever lies in a folder that may hold weights, links that lead nowhere too."""
    endings = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".index.json")
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(endings)) if folder.is_dir() else []


def _weights_file(folder: Path, adapter: bool, far: Container[str] = ()) -> str:
    names = ADAPTER_FILES + MODEL_FILES if adapter else MODEL_FILES + ADAPTER_FILES
    for name in names:
        if name in far or (folder / name).is_file():
            return name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    have = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt"))
    dangling = [n for n in names if (folder / n).is_symlink()]
    raise InputError(
        f"{folder}: no weights: looked for {', '.join(names)}, found {', '.join(have[:5]) or 'nothing like it'}",
        hint=f"the link {dangling[0]} leads nowhere; fetch the model again" if dangling else INCOMPLETE,
    )


def _weight_map(path: Path, shown: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{shown}: has no weight_map, tensor name -> file name")
    for name, shard in where.items():
        if not isinstance(shard, str):
            raise InputError(f"{shown}: {name}: a file name was wanted, not {str(shard)[:80]}")
    return cast(dict[str, str], where)


def gguf_files(path: Path) -> list[Path]:
    """The files of a split GGUF, by the first one's name; a whole file alone. InputError where one is missing."""
    n = read_gguf_header(path).kv.get("split.count", 0)
    if not isinstance(n, int) or n < 2:
        return [path]
    stem = path.name.rpartition("-of-")[0][:-6]
    found = [path.with_name(f"{stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]
    if missing := [p for p in found if not p.is_file()]:
        raise InputError(f"{path} is one of {n} shards, and {missing[0]} is missing")
    return found


def _check_range(ref: str, what: str, begin: int, end: int, n: int) -> None:
    if not 0 <= begin <= end <= n:
        raise InputError(f"{ref}: {what} {begin}..{end} of {n}")
