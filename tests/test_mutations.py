"""Inputs mutated at random end in a named error within bounds, or in the right file; none in a traceback, none in silence."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from mutations import NBYTES, TARGETS, bounded, mutated, outcome

from qconvert.errors import InputError

FAST, LONG = 200, int(os.environ.get("QCONVERT_MUTATIONS", "1000"))  # of all targets together
FIRST = int(os.environ.get("QCONVERT_MUTATIONS_FROM", str(FAST)))


def run(folder: Path, name: str, seeds: range) -> Counter[str]:
    """How many ended in what; AssertionError lists those that must not be."""
    original, counts, bad = folder / name, Counter[str](), []
    TARGETS[name].make(original)
    TARGETS[name].run(original, folder / "warm" / "out.gguf")  # what it imports and compiles is not part of the bounds
    shutil.rmtree(folder / "warm")
    assert outcome(name, original).kind == "right"
    for seed in seeds:
        how = mutated(name, original, folder / "mutated", seed)
        found = outcome(name, folder / "mutated")
        counts[found.kind] += 1
        if found.kind not in ("right", "error"):
            bad.append(f"{how} -> {found.kind}: {found.what}")
    assert bad == []
    return counts


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_end_in_a_named_error_or_the_right_file(name: str, tmp_path: Path) -> None:
    counts = run(tmp_path, name, range(FAST // len(TARGETS)))
    assert counts["right"] > 0 and counts["error"] > FAST // len(TARGETS) // 4, counts


def test_bounds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks a bound, or ends otherwise than in a named error, is seen to."""
    monkeypatch.setattr("mutations.SECONDS", 4)

    def endless() -> None:
        while True:
            pass

    def refused() -> None:
        raise InputError("no")

    def broken() -> None:
        raise KeyError("x")

    def large() -> int:
        return len(b"x" * (NBYTES + (8 << 20)))  # touched, so that it is resident

    ends = (lambda: None, refused, broken, endless, large, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert [bounded(each).kind for each in ends] == ["right", "error", "bug", "slow", "large", "killed"]
    assert bounded(lambda: bytearray(8 * NBYTES)).kind == "bug"  # MemoryError, whatever the machine has


@pytest.mark.peer
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_inputs_end_in_a_named_error_or_the_right_file(name: str, tmp_path: Path) -> None:
    """QCONVERT_MUTATIONS says how many, QCONVERT_MUTATIONS_FROM which are the first."""
    counts = run(tmp_path, name, range(FIRST, FIRST + LONG // len(TARGETS)))
    assert counts["right"] > 0, counts
