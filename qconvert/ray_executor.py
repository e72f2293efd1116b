"""Weights as Ray tasks: on every CPU of a cluster, over storage that its machines share, or that URLs reach.

tasks -> as many at once as keep the CPUs busy -> each done one told to the journal; Ray runs lost ones again, elsewhere
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qconvert.emit import Opened, Progress, Todo
from qconvert.errors import ResourceError, UnsupportedError, require
from qconvert.tasks import TASK_NBYTES, Done, Task, Tasks, perform
from qconvert.weights import Weights

log = logging.getLogger("qconvert")
RETRIES = 5  # of a task whose worker or machine was lost
AHEAD = 2  # tasks for each CPU: the next one is there when one is done
SECONDS = 1.0  # between looks at how large the cluster is


class Traffic(NamedTuple):
    """Bytes of some tasks: read of sources, made, and of those moved to the driver, which wrote them."""

    n_tasks: int = 0
    read: int = 0
    made: int = 0
    moved: int = 0

    def plus(self, done: Done) -> Traffic:
        return Traffic(self.n_tasks + 1, self.read + done.read, self.made + done.made, self.moved + done.moved)


@dataclass
class RayExecutor:
    """nbytes: of source in a task. traffic: by worker; predicted: what all tasks would read, headers apart."""

    nbytes: int = TASK_NBYTES
    predicted: int = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)

    def __call__(self, todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None:
        if weights.device != "cpu":
            raise UnsupportedError(f"--executor ray: tasks quantize on CPUs, not on {weights.device}", hint="--device cpu")
        ray: Any = require("ray", "--executor ray", "'qconvert[ray]'")
        made = Tasks(weights, opened.paths, todo.journal.path, todo.journal.mark(), self.nbytes)
        with connected(ray):
            self._run(ray, made, todo, opened, progress)
        for worker, (n, *sums) in self.traffic.items():
            log.info("ray %-24s %4d tasks   MB: read %.1f   made %.1f   moved %.1f", worker, n, *(x / 1e6 for x in sums))

    def _run(self, ray: Any, made: Tasks, todo: Todo, opened: Opened, progress: Progress) -> None:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(perform)
        tasks, pending = made.of(todo.blocks()), dict[Any, Task]()
        if not ray.cluster_resources().get("CPU"):
            log.warning("ray: the cluster has no CPU yet; tasks wait for one")
        try:
            while True:
                room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while len(pending) < room and (task := next(tasks, None)):
                    self.predicted += made.read_nbytes(task.blocks)
                    pending[remote.remote(task)] = task
                if not pending:
                    return
                ready, _ = ray.wait(list(pending), timeout=SECONDS)
                for ref in ready:
                    self._finish(ray, ref, pending.pop(ref), todo, opened, progress)
        except BaseException:
            for ref in pending:
                with suppress(Exception):
                    ray.cancel(ref, force=True)
            raise

    def _finish(self, ray: Any, ref: Any, task: Task, todo: Todo, opened: Opened, progress: Progress) -> None:
        try:
            done = ray.get(ref)
        except ray.exceptions.RayTaskError as e:
            raise e.cause from e
        except ray.exceptions.RayError as e:
            what = f"the task that makes {task.blocks[0].entry.name} was lost {RETRIES + 1} times"
            hint = "have the machines memory left? the same command goes on from here"
            raise ResourceError(f"{what}: {str(e).splitlines()[0][:300]}", hint=hint) from e
        for file, at, data in done.pieces or ():
            opened.put(file, memoryview(data), at)
        for block in task.blocks:
            todo.wrote(block)
        self.traffic[done.worker] = self.traffic.get(done.worker, Traffic()).plus(done)
        progress(done.made)


@contextmanager
def connected(ray: Any) -> Iterator[None]:
    """To the cluster that RAY_ADDRESS names, else to one of this machine, which is started where there is none."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as e:
        raise ResourceError(f"--executor ray: no cluster answers: {e}", hint="RAY_ADDRESS names its head node") from e
    try:
        yield
    finally:
        ray.shutdown()
