"""manifest.json: what an output was made from and by, and SHA256SUMS beside it, which `sha256sum -c` reads.

inputs (hashed while the conversion runs) + recipe, versions, checks, every weight's digest -> digest of that -> + outputs
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qconvert import __version__
from qconvert.byte_files import ByteFile, LocalFile
from qconvert.calibration import files_of
from qconvert.certificate import blocks_of, canonical
from qconvert.companions import FILES
from qconvert.errors import InputError, ResourceError, UsageError
from qconvert.recipe import recipe_text
from qconvert.report import Report
from qconvert.request import Request
from qconvert.sources import MODEL_FILES, Store

SCHEMA = 1
SUMS = "SHA256SUMS"
READ = ("config.json", "adapter_config.json", "quantize_config.json", *MODEL_FILES, *FILES)
# options that leave the output as it is
ELSEWHERE: Mapping[str, Any] = {
    "output": None, "force": False, "threads": None, "dump_ir": None, "manifest": None, "save_imatrix": None,
    "save_statistics": None, "executor": "threads",
}  # fmt: skip


class Output(NamedTuple):
    path: Path
    nbytes: int
    sha256: str


# inputs ---------------------------------------------------------------------------------------------


def inputs_of(request: Request, store: Store) -> dict[str, Path]:
    """Every file that was or will be read, by ALIAS/NAME as tensors' refs have it; other files by the flag that names them."""
    found = store.files()
    for alias, root in store.folders().items() if not request.keeps_graph else ():
        found |= {f"{alias}/{name}": root / name for name in READ if (root / name).is_file()}
    if request.keeps_graph:
        found[f"base/{Path(request.model).name}"] = Path(request.model).expanduser()
    if request.tokenizer:
        found |= {f"tokenizer/{name}": request.tokenizer / name for name in FILES if (request.tokenizer / name).is_file()}
    if request.calibrate:
        found |= {f"calibrate/{path.name}": path for path in files_of(request.calibrate)}
    for flag in ("imatrix", "statistics", "eval", "inputs"):
        if (path := getattr(request, flag)) is not None:
            found[f"{flag}/{path.name}"] = path
    return dict(sorted((name, path) for name, path in found.items() if path.is_file()))


def far_inputs_of(store: Store) -> dict[str, ByteFile]:
    """Files of tensors that are read by URL: all of them is fetched once more."""
    places = ((ref, store.roots[ref.partition("/")[0]], ref.partition("/")[2]) for ref in store.files())
    return {ref: store.mirrors[root].open(name) for ref, root, name in places if root in store.mirrors}


class Hashing:
    """Sums of files, made by a thread of its own while others read the same files. close() ends it early."""

    def __init__(self, files: Mapping[str, Path], far: Mapping[str, ByteFile] = MappingProxyType({})) -> None:
        self._files, self._far, self._found = files, far, dict[str, dict[str, Any]]()
        self._stop, self._error = threading.Event(), list[BaseException]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sums(self) -> list[dict[str, Any]]:
        """{file, nbytes, sha256} of each. InputError where a file of the Hugging Face cache is not what its name says."""
        while self._thread.is_alive():
            self._thread.join(0.2)  # wakes up for Ctrl-C
        if self._error:
            raise self._error[0]
        return [self._found[name] for name in sorted(self._found)]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for name, path in self._files.items():
                with closing(LocalFile(path)) as here:
                    self._add(name, here)
                if name in self._found:
                    refuse_other_blob(path, self._found[name]["sha256"])
            for name, file in self._far.items():
                self._add(name, file)
        except BaseException as e:
            self._error.append(e)

    def _add(self, name: str, file: ByteFile) -> None:
        h = hashlib.sha256()
        for block in blocks_of(file, 0, file.nbytes):
            if self._stop.is_set():
                return
            h.update(block)
        self._found[name] = {"file": name, "nbytes": file.nbytes, "sha256": h.hexdigest()}


def refuse_other_blob(path: Path, sha256: str) -> None:
    """The cache calls large files by their sum."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64 and blob.name != sha256:
        raise InputError(f"{path}: its sha256 is {sha256}, and the cache has it as {blob.name}", hint="fetch it again")


@contextmanager
def hashing(asked: Sequence[tuple[Request, Store]]) -> Iterator[list[Hashing | None]]:
    """For each output its inputs' sums in the making, where a manifest or a certificate is asked for; equal ones are one."""
    begun: dict[tuple[object, ...], Hashing] = {}
    found = list[Hashing | None]()
    try:
        for request, store in asked:
            if not (request.manifest or request.certify):
                found.append(None)
                continue
            here, far = inputs_of(request, store), far_inputs_of(store)
            key = (*here.items(), *((name, file.name) for name, file in far.items()))
            if key not in begun:
                begun[key] = Hashing(here, far)
            found.append(begun[key])
        yield found
    finally:
        for each in begun.values():
            each.close()


# the manifest ---------------------------------------------------------------------------------------


def manifest_of(
    request: Request, report: Report, inputs: Sequence[Mapping[str, Any]], weights: Mapping[str, str]
) -> dict[str, Any]:
    """All but the outputs. weights: tensor -> sha256 of its bytes. Without a date, unless SOURCE_DATE_EPOCH says one."""
    return {
        "schema": SCHEMA, "qconvert": __version__, **date(),
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__, "platform": f"{sys.platform} {platform.machine()}",
        },
        **report.provenance, "inputs": list(inputs), "recipe": recipe_text((replace(request, **ELSEWHERE),)),
        "pipeline": report.pipeline, "quant": report.quant, "verified": report.verified, "runtime": report.runtime,
        "checks": [row._asdict() for row in report.checks],
        "sizes": {"parts": report.accounting["parts"], **report.accounting["size"]}, "weights": dict(weights),
    }  # fmt: skip


def date() -> dict[str, str]:
    """UsageError where SOURCE_DATE_EPOCH is no number of seconds."""
    if (said := os.environ.get("SOURCE_DATE_EPOCH")) is None:
        return {}
    try:
        return {"date": datetime.fromtimestamp(int(said), UTC).isoformat().replace("+00:00", "Z")}
    except (ValueError, OverflowError, OSError) as e:
        raise UsageError(f"SOURCE_DATE_EPOCH={said!r} is no number of seconds: {e}") from e


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """What certificates have of it: sha256 of its canonical form without outputs."""
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "outputs"})).hexdigest()


def write_manifest(path: Path, manifest: Mapping[str, Any], outputs: Sequence[Output]) -> None:
    """The file, and SHA256SUMS beside it, in which lines of other files stay. ResourceError where it cannot be written."""
    listed = [{"path": beside(o.path, path), "nbytes": o.nbytes, "sha256": o.sha256} for o in outputs]
    text = json.dumps({**manifest, "outputs": listed}, indent=2, ensure_ascii=False, default=str) + "\n"
    own = Output(path, len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    sums = path.with_name(SUMS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        lines = dict(map(parsed, sums.read_text("utf-8").splitlines())) if sums.is_file() else {}
        lines |= {named(beside(o.path, path)): line(beside(o.path, path), o.sha256) for o in (*outputs, own)}
        sums.write_bytes("".join(f"{lines[name]}\n" for name in sorted(lines)).encode())
    except OSError as e:
        raise ResourceError(f"cannot write {path}: {e.strerror or e}", hint="--manifest FILE in another folder") from e


def apart(paths: Sequence[Path | None]) -> list[Path | None]:
    """Numbers in the names of those that several outputs would share."""
    twice = {path for path in paths if path is not None and paths.count(path) > 1}
    return [p.with_stem(f"{p.stem}-{i + 1}") if p is not None and p in twice else p for i, p in enumerate(paths)]


def beside(path: Path, manifest: Path) -> str:
    return Path(os.path.relpath(path.resolve(), manifest.parent.resolve())).as_posix()


def line(name: str, sha256: str) -> str:
    """As coreutils writes it: a backslash first where the name has one or a line break, which are escaped."""
    return f"{chr(92) * (named(name) != name)}{sha256}  {named(name)}"


def named(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def parsed(text: str) -> tuple[str, str]:
    """Name and line of a SHA256SUMS."""
    return text.removeprefix("\\")[66:], text
