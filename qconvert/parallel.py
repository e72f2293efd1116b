"""Threads: how many, and work shared among them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def default_threads() -> int:
    """QCONVERT_THREADS, else the cores that this process may use."""
    if (wanted := os.environ.get("QCONVERT_THREADS", "")).isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(items: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """Call work(item) for each item from `threads` threads; the first error stops all and is raised here."""
    source, lock, errors = iter(items), threading.Lock(), list[BaseException]()

    def loop() -> None:
        try:
            while not errors:
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item)
        except BaseException as e:
            errors.append(e)

    workers = [threading.Thread(target=loop, daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # wakes up for Ctrl-C
    except BaseException as e:
        errors.append(e)
        for worker in workers:
            if worker.ident is not None:  # Ctrl-C can come before all are started
                worker.join()
    if errors:
        raise errors[0]
