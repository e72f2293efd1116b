"""Licences of what an output is made from, and the one that they leave it together: read, never guessed.

README.md's front matter, else a LICENSE file with a known text, else a GGUF's general.license -> License, or None: unknown
several -> joined: the one that asks most where all others are permissive; two that are not are a refusal
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import yaml  # type: ignore[import-untyped]

from qconvert.errors import MISSHAPEN, InputError, UnsupportedError, UsageError

# Source: huggingface/hub-docs, docs/hub/repositories-licenses.md
IDS = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql unlicense wtfpl zlib
"""
HUB = frozenset(IDS.split())
# of what asks no more than that its notice stays: each asks at least what those before it ask
PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "zlib", "bsl-1.0", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0"
)  # fmt: skip
NOT_TOGETHER = ({"apache-2.0", "gpl-2.0"},)  # GPL 2 takes no further conditions, such as those on patents
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
BSD = "redistribution and use in source", "possibility of such damage"
# a licence's words, in lower case and single spaces, from its first to its last: their sha256; BSD has several wordings
TEXTS = (
    ("mit", "permission is hereby granted", "dealings in the software",
     "0cf21bdfd1964a97a8615e128534845826afbc887edc95aa5c925cbf64386b5c"),
    ("apache-2.0", "apache license version 2 0", "end of terms and conditions",
     "f45538b138cf9aea39fa205de037a0bede8305e68281650e7ab809a8b3ebb2f0"),
    ("bsd-3-clause", *BSD, "9b83d3dee0616d07b82a272dd9bf5134a9f402b750f5ee6188458073b0a32ff2"),
    ("bsd-3-clause", *BSD, "53075742228962c7ea381b8242c64602fa32e7b8f52facb6d13ee4f9c596ddfa"),
    ("bsd-3-clause", *BSD, "986c3c3199a93b916c8f2e0aeed57819bcbdcb2cd9d99902dcc9d74b53f93a74"),
)  # fmt: skip
# licences of one publisher, whose title nobody else has
TITLES = (
    ("llama 2 community license agreement", "llama2"),
    ("meta llama 3 community license agreement", "llama3"),
    ("llama 3 1 community license agreement", "llama3.1"),
    ("llama 3 2 community license agreement", "llama3.2"),
    ("llama 3 3 community license agreement", "llama3.3"),
    ("llama 4 community license agreement", "llama4"),
    ("gemma terms of use", "gemma"),
)
MOST_NBYTES = 1 << 20
SAY = "--license ID says which it is"


class License(NamedTuple):
    """id: the Hub's. name, link: of one that is `other`. where: the file that says so."""

    id: str
    name: str | None = None
    link: str | None = None
    where: str = ""

    @property
    def shown(self) -> str:
        return self.name if self.id == "other" and self.name else self.id


def said(text: str) -> License:
    """What --license says. UsageError for what the Hub does not know."""
    if text not in HUB:
        near = get_close_matches(text.lower(), HUB, n=1)
        hint = f"did you mean {near[0]}?" if near else "an identifier of huggingface.co/docs/hub/repositories-licenses"
        raise UsageError(f"--license {text!r}: the Hub has no such identifier", hint=hint)
    return License(text, where="--license")


def license_of(folder: Path) -> License | None:
    """Of a model's or an adapter's folder; None where nothing says. InputError for front matter that cannot be read."""
    if found := from_front_matter(folder / "README.md"):
        return found
    for name in FILES:
        if (folder / name).is_file() and (known := recognised(read(folder / name))):
            return License(known, where=str(folder / name))
    return None


def from_front_matter(path: Path) -> License | None:
    if not path.is_file() or not (matter := front_matter(path)):
        return None
    value, where = matter.get("license"), str(path)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "unknown":
        return None
    if not isinstance(value, str) or value.lower() not in HUB:
        raise InputError(f"{path}: license: {str(value)[:80]!r} is no identifier of the Hub's", hint=SAY)
    name, link = (matter.get(key) for key in ("license_name", "license_link"))
    return License(value.lower(), text_or_none(name), text_or_none(link), where)


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def front_matter(path: Path) -> dict[str, object]:
    """What a README.md has between two lines ---; {} without."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", read(path), re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except (yaml.YAMLError, *MISSHAPEN) as e:
        raise InputError(f"{path}: its front matter is not YAML: {str(e)[:200]}", hint=SAY) from e
    return value if isinstance(value, dict) else {}


def read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MOST_NBYTES).decode("utf-8", "replace")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e


def of_gguf(kv: Mapping[str, object], where: Path) -> License | None:
    """What general.license says; llama.cpp's converter puts the Hub's identifiers there."""
    value = kv.get("general.license")
    if not isinstance(value, str) or value.lower() not in HUB:
        return None
    name, link = (text_or_none(kv.get(f"general.license.{key}")) for key in ("name", "link"))
    return License(value.lower(), name, link, str(where))


def recognised(text: str) -> str | None:
    """The licence whose text this is, with nothing added and nothing left out; or that an SPDX line names."""
    if tagged := re.search(r"SPDX-License-Identifier:\s*([\w.+-]+)\s*$", text, re.MULTILINE):
        return tagged[1].lower() if tagged[1].lower() in HUB else None
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    if titled := next((id for title, id in TITLES if title in words[:200]), None):
        return titled
    return next((id for id, *known in TEXTS if digest(words, known[0], known[1]) == known[2]), None)


def digest(words: str, first: str, last: str) -> str | None:
    """Of the words from `first` to `last`; None where more than a page in front or an appendix behind speaks too."""
    begin, end = words.find(first), words.find(last)
    if begin < 0 or end < begin or begin > 400:
        return None
    body, rest = words[begin : end + len(last)], words[end + len(last) :].strip()
    if rest and not (rest.startswith("appendix how to apply") and rest.endswith("limitations under the license")):
        return None
    return hashlib.sha256(body.encode()).hexdigest()


def joined(found: Sequence[tuple[str, License | None]], changed: bool) -> License | None:
    """The licence of all together, each with the name of what it is of; None where one is unknown.

    changed: adapters change the model, which licences without derivatives forbid to share. UnsupportedError where two go not
    together.
    """
    total: tuple[str, License] | None = None
    for what, each in found:
        if each is None:
            continue
        if changed and "-nd-" in each.id:
            raise UnsupportedError(f"{what} is {each.id} ({each.where}): it may not be shared changed", hint=SAY)
        total = (what, each) if total is None else stricter(total, (what, each))
    return None if total is None or any(each is None for _, each in found) else total[1]


def stricter(a: tuple[str, License], b: tuple[str, License]) -> tuple[str, License]:
    """Of two licences the one under which both may be shared."""
    x, y = a[1], b[1]
    if x.id == y.id and (x.id != "other" or (x.name and x.name == y.name) or (x.link and x.link == y.link)):
        return a
    apart = {x.id, y.id} in NOT_TOGETHER
    ranks = [PERMISSIVE.index(each.id) if each.id in PERMISSIVE else len(PERMISSIVE) for each in (x, y)]
    if apart or min(ranks) == len(PERMISSIVE):
        why = f"{a[0]} is {x.shown} ({x.where}), {b[0]} is {y.shown} ({y.where})"
        raise UnsupportedError(f"two licences that are not known to go together: {why}", hint=SAY)
    return a if ranks[0] >= ranks[1] else b
