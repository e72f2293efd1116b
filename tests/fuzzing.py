"""Hypothesis for what reads other people's bytes: any input ends in a value or in a named error, soon.

QCONVERT_FUZZ=N runs N examples of each test, from new seeds; else a few, always the same.
"""

from __future__ import annotations

import os
import string
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qconvert.errors import QConvertError

T = TypeVar("T")
LONG = int(os.environ.get("QCONVERT_FUZZ", "0"))
SECONDS = 2.0  # of this thread's own work, for one input; most take a thousandth of that
SETTINGS = settings(
    max_examples=LONG or 25, derandomize=not LONG, database=None, deadline=None, print_blob=bool(LONG),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip


def ends(read: Callable[[], T]) -> T | None:
    """Its value; None for an error that is told to a user. Whatever else is raised, or takes long, fails the test."""
    start = time.thread_time()
    try:
        value = read()
    except QConvertError as e:
        assert e.message and e.exit_code in (1, 2, 3, 4, 5)
        value = None
    taken = time.thread_time() - start
    assert taken < SECONDS, f"{taken:.1f} s"
    return value


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


HUGE = st.sampled_from(
    [-1, 0, 1, 2, 31, 32, 64, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30]
)
TEXT = st.text(max_size=12)
SCALAR = st.none() | st.booleans() | st.integers() | HUGE | st.floats() | TEXT


def json_value(keys: st.SearchStrategy[str], scalars: st.SearchStrategy[Any] = SCALAR) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
    )


def json_object(keys: list[str], scalars: st.SearchStrategy[Any] = SCALAR) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the keys that are read, and others, at any depth."""
    names = st.sampled_from(keys) | TEXT
    return st.dictionaries(names, json_value(names, scalars), max_size=8)


def u32(n: int) -> bytes:
    return struct.pack("<I", n % (1 << 32))


def u64(n: int) -> bytes:
    return struct.pack("<Q", n % (1 << 64))


WORDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=10)
