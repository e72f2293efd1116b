"""Files by URL, through fsspec: read by ranges, folders mirrored without their weights, outputs that appear whole.

s3://bucket/model -> Mirror: config, tokenizer ... copied to a folder here; weights stay there, read as rows are wanted
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from getpass import getuser
from pathlib import Path, PurePosixPath
from tempfile import gettempdir
from typing import Any, cast

from qconvert.byte_files import READ, ByteFile
from qconvert.errors import InputError, MissingDependency, QConvertError, ResourceError, UnsupportedError, UsageError, require

AHEAD_NBYTES = 8 << 20  # asked for at once: a request takes as long as a few MB of its answer
KEPT = 16  # of such chunks, in the whole process
TRIES = 5  # half a second, one, two, four between them
COPIED = (".json", ".jinja", ".model", ".txt", ".md")  # what of a model's folder is no weight
COPIED_NBYTES = 64 << 20
SCHEME = re.compile(r"\w[\w+.-]*(?:::\w[\w+.-]*)*://")
CHANGES = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")  # by file systems, the best first
GONE = (FileNotFoundError, PermissionError, NotImplementedError)


def is_url(text: str) -> bool:
    return SCHEME.match(text) is not None


def local_path(url: str) -> Path | None:
    """The path that a file:// or local:// URL names; None for all else."""
    protocol, found, rest = url.partition("://")
    return Path(rest) if found and protocol in ("file", "local") else None


@cache
def reached(url: str) -> tuple[Any, str]:
    """fsspec's file system, and what it calls the place. MissingDependency where its library is not installed."""
    fsspec = require("fsspec", url)
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as e:
        raise MissingDependency(f"{url}: {e}", hint="s3:// needs s3fs, gs:// gcsfs, http:// aiohttp") from e
    except Exception as e:
        raise UsageError(f"{url}: {_told(e)}", hint="s3://bucket/folder, or another URL that fsspec knows") from e


def _told(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e)[:300]}" if str(e) else type(e).__name__


# reading ------------------------------------------------------------------------------------------

_chunks: OrderedDict[tuple[str, int], tuple[int, Future[bytes]]] = OrderedDict()
_lock = threading.Lock()


class UrlFile:
    """Read in chunks, the last few of which are kept: threads that take turns at a tensor's rows share them."""

    def __init__(self, url: str) -> None:
        self.name, (self.fs, self.key) = url, reached(url)
        size = _tried(url, lambda: self.fs.size(self.key))
        if size is None:
            raise InputError(f"{url}: the server does not say how long it is", hint="copy the folder, and give the copy")
        self.nbytes = int(size)

    def read_into(self, out: memoryview, offset: int, end: int) -> int:
        start, data = self._chunk(offset, min(self.nbytes, max(end, offset + len(out))), len(out))
        part = data[offset - start : offset - start + len(out)]
        out[: len(part)] = part
        return len(part)

    def close(self) -> None:
        with _lock:
            for key in [key for key in _chunks if key[0] == self.name]:
                del _chunks[key]

    def _chunk(self, offset: int, end: int, nbytes: int) -> tuple[int, memoryview]:
        """The chunk that has the byte at `offset`, and where it starts; who misses it first fetches it."""
        with _lock:
            have = (
                (start, found)
                for (name, start), (stop, found) in _chunks.items()
                if name == self.name and start <= offset < stop
            )
            start, found = next(have, (None, Future[bytes]()))
            stop = min(end, offset + max(nbytes, AHEAD_NBYTES))
            if start is None:
                _chunks[self.name, offset] = stop, found
                while len(_chunks) > KEPT:
                    _chunks.popitem(last=False)
        if start is not None:
            return start, memoryview(found.result())
        try:
            found.set_result(self._fetched(offset, stop))
        except BaseException as e:
            with _lock:
                _chunks.pop((self.name, offset), None)
            found.set_exception(e)
            raise
        return offset, memoryview(found.result())

    def _fetched(self, start: int, stop: int) -> bytes:
        if stop == start:
            return b""
        data: bytes = _tried(self.name, lambda: self.fs.cat_file(self.key, start=start, end=stop), ResourceError)
        if len(data) != stop - start:
            what = f"{len(data)} bytes came where {stop - start} were asked for, from {start} on"
            raise InputError(f"{self.name}: {what}", hint="the server may know no ranges; copy the folder, and give the copy")
        READ.nbytes += len(data)
        return data


def _tried(url: str, call: Callable[[], Any], kind: type[QConvertError] = InputError) -> Any:
    """What `call` gives, tried again where the network fails. `kind` in the end; a ResourceError lets the next run go on."""
    for i in range(TRIES):
        try:
            return call()
        except Exception as e:
            if i == TRIES - 1 or isinstance(e, GONE):
                raise kind(f"{url}: cannot be read: {_told(e)}", hint="is it there, and may you read it?") from e
            time.sleep(0.5 * 2**i)
    raise AssertionError


@dataclass(frozen=True)
class Mirror:
    """A folder by URL. files: the names in it that were not copied."""

    url: str
    files: frozenset[str] = frozenset()

    def open(self, name: str) -> ByteFile:
        if not name.endswith(".safetensors"):
            raise UnsupportedError(
                f"{self.url}/{name}: safetensors alone are read by URL", hint="copy the folder, and give the copy"
            )
        return UrlFile(f"{self.url}/{name}")

    def stamp(self, name: str) -> str:
        """Tells the file from itself after a change, where its server says what it holds."""
        fs, key = reached(f"{self.url}/{name}")
        info: Mapping[str, Any] = _tried(f"{self.url}/{name}", lambda: fs.info(key))
        return f"{info.get('size')} {next((info[k] for k in CHANGES if info.get(k)), '')}"


def mirrored(url: str, folder: Path) -> Mirror:
    """Copy what is small of the folder at `url`. InputError where there is none, or where a name leads out of it."""
    url = url.rstrip("/")
    fs, root = reached(url)
    found: dict[str, Any] = _tried(url, lambda: fs.find(root, maxdepth=2, detail=True))
    files: set[str] = set()
    for key, info in found.items():
        name = str(key)[len(root) :].lstrip("/") if str(key).startswith(root) else PurePosixPath(str(key)).name
        if not name.isprintable() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{url}: {name[:80]!a} is no name for a file of a model")
        if name.endswith(COPIED) and (info.get("size") or 0) <= COPIED_NBYTES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_tried(f"{url}/{name}", partial(fs.cat_file, key)))
        elif name:
            files.add(name)
    if not found:
        raise InputError(f"{url}: no such folder", hint="a model's folder in Hugging Face's layout is wanted")
    return Mirror(url, frozenset(files))


# writing ------------------------------------------------------------------------------------------


def refuse_existing(url: str, force: bool) -> None:
    """UsageError for an output that is there, or where nothing can be written."""
    fs, key = reached(url)
    if url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: http cannot be written", hint="-o s3://bucket/name, or a path")
    if not force and _tried(url, lambda: fs.exists(key)):
        raise UsageError(f"{url} exists already", hint="--force overwrites it; -o writes elsewhere")


def upload(files: Sequence[tuple[Path, str]]) -> None:
    """Copy files to URLs of one file system; when all have arrived they appear, in this order. ResourceError."""
    if not files:
        return
    fs, _ = reached(files[0][1])
    try:
        with fs.transaction:
            for path, url in files:
                with path.open("rb") as source, fs.open(reached(url)[1], "wb") as target:
                    shutil.copyfileobj(source, target, AHEAD_NBYTES)
    except Exception as e:
        made = f"what was made lies in {files[0][0].parent}"
        raise ResourceError(f"cannot write {files[0][1]}: {_told(e)}", hint=made) from e


@contextmanager
def staging(url: str) -> Iterator[Path]:
    """A folder where the output for `url` is made, the same for each run; what an interrupted one finished stays there."""
    known = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    folder = Path(gettempdir()) / f"qconvert-{getuser()}" / known
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ResourceError(f"{url}: cannot make the folder {folder}: {e.strerror}", hint="TMPDIR says where") from e
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)
