"""Inputs mutated at random end in a named error within bounds, or in the right file; none in a traceback, none in silence."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from mutations import TARGETS, mutated, outcome

FAST, LONG = 200, int(os.environ.get("QCONVERT_MUTATIONS", "1000"))


def originals(folder: Path) -> dict[str, Path]:
    for name, target in TARGETS.items():
        target.make(folder / name)
        target.run(folder / name, folder / "warm" / "out.gguf")  # what it imports and compiles is not part of the bounds
        shutil.rmtree(folder / "warm")
        found = outcome(name, folder / name)
        assert found.kind == "right", (name, found)
    return {name: folder / name for name in TARGETS}


def run(folder: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """Outcomes, and those that must not be."""
    made, counts, bad = originals(folder), Counter[str](), []
    names = list(TARGETS)
    for seed in seeds:
        name = names[seed % len(names)]
        how = mutated(name, made[name], folder / "mutated", seed)
        found = outcome(name, folder / "mutated")
        counts[found.kind] += 1
        if found.kind not in ("right", "error"):
            bad.append(f"{how} -> {found.kind}: {found.what}")
    return counts, bad


def test_mutated_inputs_end_in_a_named_error_or_the_right_file(tmp_path: Path) -> None:
    counts, bad = run(tmp_path, range(FAST))
    assert bad == []
    assert counts["right"] > 0 and counts["error"] > FAST // 4, counts


@pytest.mark.peer
def test_many_mutated_inputs_end_in_a_named_error_or_the_right_file(tmp_path: Path) -> None:
    """QCONVERT_MUTATIONS says how many."""
    counts, bad = run(tmp_path, range(FAST, FAST + LONG))
    assert bad == []
    assert counts["right"] > 0, counts
