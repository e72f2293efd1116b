"""Outputs written side by side: rows that they are all made from are read and merged once.

plans -> parts, each with its journal -> regions of rows (lockstep) -> blocks of each output, shared rows (shared_rows)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qconvert.emit import Block, Executor, Opened, Progress, Staged, Todo, opened, staged, writing, written_nbytes
from qconvert.errors import QConvertError, ResourceError
from qconvert.journal import sync_all
from qconvert.lockstep import Span, Weight, in_step, regions
from qconvert.parallel import in_parallel
from qconvert.plans import Entry, Plan
from qconvert.shared_rows import shared
from qconvert.weights import Weights


class Making(NamedTuple):
    """An output on its way, and what its rows are evaluated by."""

    output: Staged
    weights: Weights
    progress: Progress


@contextmanager
def written(
    plan: Plan, weights: Weights, threads: int, progress: Progress = lambda _: None, executor: Executor | None = None
) -> Iterator[tuple[Path, ...]]:
    """Write every file beside its final name and yield those paths, to be checked; then rename them all; see `staged`."""
    with staged(plan) as output:
        for error in write_together([Making(output, weights, progress)], threads, executor).values():
            raise error
        yield tuple(output.parts.paths.values())
        output.publish()


def write_together(
    outputs: Sequence[Making], threads: int, executor: Executor | None = None
) -> Mapping[int, QConvertError]:
    """Every file of every plan, but for tensors of which a journal says that they are there.

    By its number, the error of each output that cannot be made. ResourceError ends them all.
    """
    asked = [(m.weights.graph, [e.value for e in m.output.plan.entries], m.weights.store) for m in outputs]
    for making, common in zip(outputs, shared(asked), strict=True):
        making.weights.shared = common
    try:
        with ExitStack() as stack:
            lines = [Line(making, stack.enter_context(opened(*making.output))) for making in outputs]
            work = regions([(line.making.weights.graph, line.weights()) for line in lines])
            try:
                if executor is None:
                    in_parallel(work, lambda region: in_step(map(Line.written, lines, region)), threads)
                else:
                    for line in lines:  # what they share is read by the tasks of each
                        line.written_by(executor)
            finally:
                for line in lines:
                    line.todo.flush()
            for fd in (fd for line in lines for fd in line.opened.fds.values()):
                os.fsync(fd)
    except OSError as e:
        made = ", ".join(str(m.output.plan.files[0].path) for m in outputs)
        raise ResourceError(f"cannot write {made}: {e.strerror or e}", hint="-o on another disk") from e
    finally:
        for making in outputs:
            making.weights.shared = None
    return {i: line.error for i, line in enumerate(lines) if line.error is not None}


class Line:
    """What is left to do for one output, or why it cannot be made."""

    def __init__(self, making: Making, opened: Opened) -> None:
        self.making, self.opened = making, opened
        self.error: QConvertError | None = None
        self.todo = Todo(making.output.plan, making.weights, making.output.journal, partial(sync_all, opened.fds.values()))
        if self.todo.done_nbytes:
            making.progress(self.todo.done_nbytes)

    def weights(self) -> Iterator[Weight[Block]]:
        for path, entry in self.todo.entries():
            yield Weight(entry.value, partial(self.spans, path, entry))

    def spans(self, path: Path, entry: Entry) -> Iterator[Span[Block]]:
        for block in self.todo.blocks_of(path, entry):
            yield Span(block.begin, block.end, block)

    def written_by(self, executor: Executor) -> None:
        try:
            executor(self.todo, self.making.weights, self.opened, self.making.progress)
        except ResourceError:
            raise
        except QConvertError as e:
            self.error = e

    def written(self, spans: Sequence[Span[Block]]) -> Iterator[int]:
        """Write blocks; yields the row that it has reached, within a block too."""
        for span in spans:
            if self.error is not None:
                return
            try:
                for row in writing(span.work, self.making.weights, self.opened.put):
                    yield span.begin + row - span.work.begin
            except ResourceError:
                raise
            except QConvertError as e:
                self.error = e
                return
            self.making.progress(written_nbytes(span.work))
            self.todo.wrote(span.work)
            yield span.end
