"""What an output says of itself, so that it can be proven anywhere later without the model that it was made from.

plan -> with_slot (room in a header) -> written, checked -> sealed text -> slot            verify: text -> Certificate

A digest of each tensor's bytes; of each file one of all other bytes, the slot blank; the checks; probes: see probes.py.
It finds damage and mix-ups. It is no signature: whoever makes another file can make it another certificate.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qconvert import __version__
from qconvert.byte_files import ByteFile, LocalFile, fill
from qconvert.emit import FilePlan, Plan, write_all
from qconvert.errors import InputError, ResourceError
from qconvert.parallel import in_parallel
from qconvert.planes import Slot
from qconvert.report import Row
from qconvert.scheme import Array
from qconvert.target import Lowered
from qconvert.weights import Weights

KEY = "qconvert.certificate"
VERSION = 1
BLOCK_NBYTES = 1 << 22
ROOM = 1 << 14  # of what is the same for all models: the checks, most of all
PER_TENSOR = 200  # beside its name: digest, dtype, shape, a suffix
REASON = 160  # characters of a check's
AGAIN = "if another program wrote it again, no certificate holds any more: convert it again with --certify"
DAMAGED = "fetch the file again"


class Located(NamedTuple):
    """Where a tensor's bytes lie, as the file's own header says. kind: dtype and shape as they are there."""

    name: str
    file: Path
    offset: int
    nbytes: int
    kind: str


class Answers(NamedTuple):
    """Of something that ran the output: logits f32[T,V] of each prompt, or why there are none."""

    what: str
    logits: Sequence[Array] | None
    reason: str = ""
    about: Mapping[str, str] | None = None


class Certifier(Protocol):
    """A format's part in certificates. quoted: its header is JSON."""

    quoted: bool

    def header(self, file: FilePlan, key: str, value: bytes) -> bytes:
        """The file's header with one string more, its length a multiple of what it was aligned to."""
        ...

    def certificate(self, found: Path) -> tuple[Path, str] | None:
        """The file that has one, and its text; None where there is none."""
        ...

    def files(self, first: Path, names: Sequence[str]) -> list[Path]:
        """Where the files of an output lie, by the names that they were written under; `first` is there."""
        ...

    def located(self, files: Sequence[Path]) -> list[Located]: ...

    def facts(self, file: Path) -> Mapping[str, object]:
        """What the header of a file says, by key: to name what was changed."""
        ...

    def expected(self, lowered: Lowered, weights: Weights, files: Sequence[Path], prompts: list[list[int]]) -> Expected:
        """What the runtime should answer, by the reference evaluator over the written weights."""
        ...

    def answers(self, found: Path, prompts: list[list[int]], threads: int) -> list[Answers]:
        """What runtimes that are here answer."""
        ...


class Expected(NamedTuple):
    """kind: a row of check.LIMITS; metric: mean KL, or relative."""

    kind: str
    metric: str
    logits: Sequence[Array]


# room -----------------------------------------------------------------------------------------------


def with_slot(plan: Plan, certifier: Certifier, n_more: int) -> Plan:
    """The plan with room in its first file's header, and everything behind that moved. n_more: bytes for probes."""
    first = next(f for f in plan.files if f.header)
    names = [f.path.relative_to(plan.folder).as_posix() if plan.folder else "" for f in plan.files]
    room = n_more + ROOM + sum(PER_TENSOR + len(name) for name in names) + tensors_room(plan)
    blank = f"<{KEY}>".encode().ljust(room)
    header = certifier.header(first, KEY, blank)
    assert header.count(blank[: len(KEY) + 2]) == 1
    slot = Slot(first.path, header.index(blank[: len(KEY) + 2]), room, certifier.quoted)
    header = header.replace(blank, b" " * room)
    by = {f.path.name: len(header) - len(first.header) if f is first else 0 for f in plan.files}
    files = (moved(f, header if f is first else f.header, by) for f in plan.files)
    return plan._replace(files=tuple(files), slot=slot)


def tensors_room(plan: Plan) -> int:
    names = [len(e.name) for e in plan.entries for _ in e.pieces]
    n_constants = sum(len(f.between) for f in plan.files)
    return sum(names) + PER_TENSOR * len(names) + n_constants * (PER_TENSOR + max(names, default=0))


def moved(file: FilePlan, header: bytes, by: Mapping[str, int]) -> FilePlan:
    """by: how far what lies in a file moves."""
    own, entries = by[file.path.name], []
    for entry in file.entries:
        names = entry.files_of_pieces(file.path.name)
        planes = tuple(p._replace(offset=p.offset + by[n]) for p, n in zip(entry.planes, names, strict=bool(entry.planes)))
        entries.append(entry._replace(offset=entry.offset + by[names[0]], planes=planes))
    between = tuple((offset + own, data) for offset, data in file.between)
    return file._replace(header=header, entries=tuple(entries), nbytes=file.nbytes + own, between=between)


def fill_slot(slot: Slot, part: Path, data: bytes) -> None:
    """Write `data` and spaces behind it where the plan left room for it in the file that lies at `part`."""
    assert len(data) <= slot.nbytes, (len(data), slot.nbytes)
    try:
        with part.open("rb+") as file:
            write_all(file.fileno(), memoryview(data.ljust(slot.nbytes)), slot.offset)
            os.fsync(file.fileno())
    except OSError as e:
        raise ResourceError(f"cannot write {slot.path}: {e.strerror or e}", hint="-o on another disk") from e


def raw(text: str, quoted: bool) -> bytes:
    """The text as it lies in the file; it is ASCII."""
    return (json.dumps(text)[1:-1] if quoted else text).encode("ascii")


# digests --------------------------------------------------------------------------------------------


def digest(path: Path, begin: int = 0, end: int | None = None) -> str:
    """sha256 of a file, or of its bytes begin..end."""
    h = hashlib.sha256()
    for block in blocks(path, begin, path.stat().st_size if end is None else end):
        h.update(block)
    return h.hexdigest()


def blocks(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes begin..end of a file. InputError where it ends before."""
    with closing(LocalFile(path)) as file:
        yield from blocks_of(file, begin, end)


def blocks_of(file: ByteFile, begin: int, end: int) -> Iterator[memoryview]:
    for at in range(begin, end, BLOCK_NBYTES):
        yield fill(file, np.empty(min(BLOCK_NBYTES, end - at), np.uint8), at, "its bytes", end).data


def tensor_digest(t: Located) -> str:
    return f"{digest(t.file, t.offset, t.offset + t.nbytes)} {t.kind}"


def rest_digest(path: Path, tensors: Sequence[Located], text: bytes = b"") -> str:
    """Of all bytes of a file that no tensor takes; the certificate's text among them counts as so many spaces."""
    h, at = hashlib.sha256(), 0
    taken = [(t.offset, t.offset + t.nbytes, b"") for t in tensors]
    if text and (begin := place_of(path, text)) is not None:
        taken.append((begin, begin + len(text), b" " * len(text)))
    end = path.stat().st_size
    for begin, stop, instead in [*sorted(taken), (end, end, b"")]:
        for block in blocks(path, at, begin):
            h.update(block)
        h.update(instead)
        at = max(at, stop)
    return h.hexdigest()


def place_of(path: Path, text: bytes) -> int | None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(text)
    return None if at < 0 else at


class Digests(NamedTuple):
    """weights: tensor -> "sha256 kind"; files: of each, in order, of what is no tensor."""

    weights: dict[str, str]
    files: list[str]


def digests(certifier: Certifier, files: Sequence[Path], threads: int, text: bytes = b"") -> Digests:
    """Of an output, by what its headers say. text: the certificate that is in it by now."""
    tensors, found, rest = certifier.located(files), dict[str, str](), dict[Path, str]()
    of = {path: [t for t in tensors if t.file == path] for path in files}

    def work(each: Located | Path) -> None:
        if isinstance(each, Located):
            found[each.name] = tensor_digest(each)
        else:
            rest[each] = rest_digest(each, of[each], text)

    each: list[Located | Path] = [*tensors, *files]
    in_parallel(each, work, threads)
    return Digests(dict(sorted(found.items())), [rest[path] for path in files])


def fact_digests(facts: Mapping[str, object]) -> dict[str, str]:
    """Short ones: they name what was changed, and prove nothing."""
    return {k: hashlib.sha256(canonical(v)).hexdigest()[:16] for k, v in facts.items() if k != KEY}


def canonical(value: object) -> bytes:
    """JSON without choices: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


# the text -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """manifest: sha256 of manifest.json's canonical form without outputs. checks: rows as when the output was made.

    files: {name, sha256} of each; weights: tensor -> "sha256 kind"; facts: of the first file's header.
    probes: probes.Probes as JSON, or {"skipped": why}.
    """

    manifest: str
    pipeline: str
    verified: bool
    runtime: dict[str, str] | None
    checks: list[list[Any]]
    files: list[dict[str, str]]
    weights: dict[str, str]
    facts: dict[str, str]
    probes: dict[str, Any]
    qconvert: str = __version__
    version: int = VERSION

    def told(self) -> str:
        """What it was when it was made, in a line."""
        by = f"verified in {' '.join(self.runtime.values())}" if self.verified and self.runtime else "not verified"
        return f"made by qconvert {self.qconvert}, {by} then; manifest {self.manifest}"

    def text(self) -> str:
        """JSON in ASCII, with a seal: the sha256 of all the rest."""
        data = asdict(self)
        return json.dumps({**data, "seal": seal(data)}, separators=(",", ":"))


def seal(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in data.items() if k != "seal"})).hexdigest()


def fitted(certificate: Certificate, slot: Slot) -> bytes:
    """Its bytes for the slot; where they are too long without some checks: informative ones first, then the last."""
    checks = sorted(certificate.checks, key=lambda row: row[4] == "info")
    while True:
        kept = [row for row in certificate.checks if row in checks]
        data = raw(Certificate(**{**asdict(certificate), "checks": kept}).text(), slot.quoted)
        if len(data) <= slot.nbytes or not checks:
            return data
        checks.pop()


def row_data(row: Row) -> list[Any]:
    return list(row._replace(reason=row.reason[:REASON]))


def read_certificate(where: Path, text: str) -> Certificate:
    """InputError where the text is cut, changed, or of a later version than this."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: its certificate is no JSON any more: {e}", hint=DAMAGED) from e
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise InputError(f"{where}: its certificate has no version", hint=DAMAGED)
    if data["version"] > VERSION:
        what = f"{where}: its certificate has version {data['version']}; {VERSION} is read"
        raise InputError(what, hint=f"verify with qconvert {str(data.get('qconvert'))[:20]!a} or later")
    if data.pop("seal", None) != seal(data):
        raise InputError(f"{where}: its certificate was changed: the seal is not its own", hint=DAMAGED)
    wrong = [name for name, kind in FIELDS.items() if not is_like(data.get(name), kind)]
    if wrong or data.keys() - FIELDS.keys():
        raise InputError(f"{where}: its certificate's {min(wrong or data.keys() - FIELDS.keys())} is not as it should be")
    return Certificate(**data)


# field -> its type; [kind]: a list of such, {"": kind}: values by any name
FIELDS: Mapping[str, Any] = {
    "manifest": str, "pipeline": str, "verified": bool, "runtime": ({"": str}, None), "checks": [list],
    "files": [{"name": str, "sha256": str}], "weights": {"": str}, "facts": {"": str}, "probes": dict,
    "qconvert": str, "version": int,
}  # fmt: skip


def is_like(value: object, kind: Any) -> bool:
    match kind:
        case tuple():
            return any(is_like(value, each) for each in kind)
        case [inner]:
            return isinstance(value, list) and bool(value) and all(is_like(v, inner) for v in value)
        case {"": inner}:
            return isinstance(value, dict) and all(is_like(v, inner) for v in value.values())
        case None:
            return value is None
        case {}:
            return isinstance(value, dict) and value.keys() == kind.keys() and all(is_like(value[k], kind[k]) for k in kind)
    return isinstance(value, kind)
