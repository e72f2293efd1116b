"""Two outputs of the weights of test_journal, in two schemes; loads little, so that a process that does it starts soon."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from test_journal import subject

from qconvert.emit import staged
from qconvert.together import Making, write_together


def both(folder: Path, out: Path, count: Callable[[int], None] = lambda _: None) -> list[bytes]:
    with ExitStack() as stack:
        outputs = []
        for scheme in ("q4_0", "q8_0"):
            (out / scheme).mkdir(parents=True, exist_ok=True)
            plan, weights = subject(folder, out / scheme, scheme)
            outputs.append(Making(stack.enter_context(staged(plan)), weights, count))
        outputs[1].weights.store = outputs[0].weights.store
        assert not write_together(outputs, 2)
        for making in outputs:
            making.output.publish()
    return [f.path.read_bytes() for making in outputs for f in making.output.plan.files]
