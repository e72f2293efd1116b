"""The prefetch schedule: no latencies break it, and a schedule that can be broken is seen to be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from qconvert.prefetch import Step, execute, hazard, schedule, simulate, violations

STAGED = {
    "all blocks": [True] * 5,
    "every second": [True, False, True, False, True, False],
    "one": [False, True, False],
    "two beside each other": [False, True, True, False],
}


def host(block: int) -> np.ndarray:
    return np.full(8 + block, block + 1, np.uint8)


@dataclass
class Reader:
    """What computations found in their slots that was not their block's."""

    wrong: int = 0

    def __call__(self, step: Step, slot: np.ndarray) -> None:
        want = host(step.block)
        self.wrong += step.slot is not None and not np.array_equal(slot[: len(want)], want)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
@pytest.mark.parametrize("staged", STAGED.values(), ids=STAGED.keys())
def test_no_latencies_break_the_schedule(staged: list[bool], ahead: int) -> None:
    assert hazard(schedule(staged, ahead, forwards=4)) is None


def test_all_assignments_of_two_latencies_agree_with_the_proof() -> None:
    steps = schedule([True] * 3, 1, forwards=2)
    assert len(steps) == 12
    for seconds in product((1.0, 30.0), repeat=len(steps)):
        assert violations(steps, simulate(steps, seconds)) == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_random_order_on_real_bytes_shows_each_block_its_own(ahead: int) -> None:
    staged = [True, False, True, True, True]
    for seed in range(20):
        reader = Reader()
        copied = execute(schedule(staged, ahead), host, 16, reader, seed)
        once = sum(len(host(b)) for b, away in enumerate(staged) if away)
        assert (reader.wrong, copied.of_last_forward, copied.nbytes) == (0, once, 3 * once)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_every_wait_is_needed_and_its_absence_is_named(ahead: int) -> None:
    whole = schedule([True] * 4, ahead)
    seen = set()
    for i, step in enumerate(whole):
        if not step.after:
            continue
        steps = [*whole[:i], step._replace(after=()), *whole[i + 1 :]]
        found = hazard(steps)
        assert found is not None
        wanted = "overwritten before its use is done" if step.stream == "copy" else "read before its copy is complete"
        assert wanted in found.what
        assert found.what in violations(steps, simulate(steps, found.seconds))
        seen.add(wanted)
    # without look-ahead the one slot's copies are held up by every computation before them
    assert len(seen) == 2


def test_bytes_show_what_the_simulator_says_of_a_broken_schedule() -> None:
    whole = schedule([True] * 4, 1)
    for i, step in enumerate(whole):
        if step.after:
            steps, reader = [*whole[:i], step._replace(after=()), *whole[i + 1 :]], Reader()
            for seed in range(200):
                execute(steps, host, 16, reader, seed)
                if reader.wrong:
                    break
            assert reader.wrong, f"{step} without its wait was never caught"


def test_one_slot_too_few_is_overwritten() -> None:
    steps = [s._replace(slot=0) for s in schedule([True] * 4, 1)]
    found = hazard(steps)
    assert found is not None and "overwritten before its use is done: copy of block 1" in found.what


def test_a_copy_into_another_slot_than_is_read_is_found() -> None:
    steps = schedule([True] * 4, 1)
    steps[0] = steps[0]._replace(slot=1)
    found = hazard(steps)
    assert found is not None and "which no copy fills" in found.what


def test_a_wait_for_what_is_issued_later_holds_nobody_up() -> None:
    steps = [Step("copy", 0, 0, 0), Step("copy", 0, 1, 0, (2,)), Step("compute", 0, 0, 0, (0,)), Step("compute", 0, 1, 0, (1,))]
    found = hazard(steps)
    assert found is not None and "overwritten before its use is done: copy of block 1" in found.what


def test_copies_hide_behind_computations_where_the_link_is_fast_enough() -> None:
    steps = schedule([True] * 4, 1, forwards=3)
    spans = simulate(steps, [0.9 if s.stream == "copy" else 1.0 for s in steps])
    ends = [span.end for s, span in zip(steps, spans, strict=True) if s.stream == "compute"]
    assert ends[-1] - ends[-5] == pytest.approx(4.0)  # a forward takes what its computations take
    alone = schedule([True] * 4, 0, forwards=3)
    spans = simulate(alone, [0.9 if s.stream == "copy" else 1.0 for s in alone])
    ends = [span.end for s, span in zip(alone, spans, strict=True) if s.stream == "compute"]
    assert ends[-1] - ends[-5] == pytest.approx(7.6)  # without look-ahead, copies too
