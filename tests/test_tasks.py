"""Weights as tasks: what is carried to another process makes the same bytes there, and reads what was foretold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import pytest
import test_journal

from qconvert import emit, registry, tasks
from qconvert.conversion import request_of
from qconvert.emit import Executor, Opened, Progress, Todo
from qconvert.errors import InputError, UsageError
from qconvert.lowering import lower, read_source
from qconvert.sources import Store
from qconvert.target import Format
from qconvert.tasks import Done, Task, Tasks, perform
from qconvert.text import parse
from qconvert.together import written
from qconvert.weights import Weights

GOLDEN = Path(__file__).parents[1] / "golden"
LORA = f"{GOLDEN / 'tiny'}+{GOLDEN / 'tiny-lora'}"
HEADERS = {"tiny/model.safetensors", "tiny-lora/adapter_model.safetensors"}


class ByTasks:
    """Each task is pickled, changed by `as_seen`, and performed here."""

    def __init__(self, nbytes: int, as_seen: Callable[[Task], Task] = lambda task: task) -> None:
        self.nbytes, self.as_seen = nbytes, as_seen
        self.done: list[tuple[Done, int, Task]] = []

    def __call__(self, todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None:
        made = Tasks(weights, opened.paths, todo.journal.path, todo.journal.mark(), self.nbytes)
        for task in made.of(todo.blocks()):
            done = perform(self.as_seen(pickle.loads(pickle.dumps(task))))
            self.done.append((done, made.read_nbytes(task.blocks), task))
            for file, at, data in done.pieces or ():
                opened.put(file, memoryview(data), at)
            for block in task.blocks:
                todo.wrote(block)


def made(out: Path, executor: Executor | None, model: str = LORA, **options: object) -> list[bytes]:
    request = request_of(model, output=out, **options)
    store = Store()
    source = read_source(request, store)
    lowered = lower(request, source, cast(type[Format], registry.find("formats", request.to))())
    out.parent.mkdir(exist_ok=True)
    with written(lowered.plan, Weights(lowered.graph, store), 1, executor=executor):
        pass
    return [f.path.read_bytes() for f in lowered.plan.files]


CASES = {
    "gguf": {"to": "gguf", "bits": 4},
    "columns": {"to": "onnx", "quant": "int4"},
    "words of several rows": {"to": "safetensors", "quant": "gptq"},
    "a scale for all rows": {"to": "safetensors", "quant": "nvfp4a16"},
}


@pytest.mark.parametrize("case", CASES)
def test_tasks_make_the_bytes_of_threads(tmp_path: Path, case: str) -> None:
    options = dict(CASES[case])
    want = made(tmp_path / "threads" / "out", None, **options)
    in_place = ByTasks(100_000)
    assert made(tmp_path / "tasks" / "out", in_place, **options) == want
    assert len(in_place.done) > 10 and all(done.pieces is None for done, _, _ in in_place.done)
    elsewhere = ByTasks(100_000, lambda task: task._replace(journal=Path("/nowhere/journal")))
    assert made(tmp_path / "moved" / "out", elsewhere, **options) == want
    assert sum(done.moved for done, _, _ in elsewhere.done) == sum(done.made for done, _, _ in in_place.done)


def test_statistics_are_read_by_tasks_too(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the lines of a text that the model is run on\n" * 40)
    options = {"bits": 4, "calibrate": text, "calibrate_tokens": 128}
    executor = ByTasks(100_000)
    want = made(tmp_path / "threads" / "out.gguf", None, **options)
    assert made(tmp_path / "tasks" / "out.gguf", executor, **options) == want
    assert want != made(tmp_path / "plain" / "out.gguf", None, bits=4)
    assert any("statistics/" in task.text for _, _, task in executor.done)


@pytest.mark.parametrize("case", CASES)
def test_a_task_reads_what_was_foretold(tmp_path: Path, case: str) -> None:
    executor = ByTasks(100_000)
    made(tmp_path / "out", executor, **dict(CASES[case]))
    headers = sum(8 + int.from_bytes((GOLDEN / name).read_bytes()[:8], "little") for name in HEADERS)
    assert sum(done.read for done, _, _ in executor.done) == sum(told for _, told, _ in executor.done) + headers


@pytest.mark.parametrize(("case", "divided"), [("gguf", True), ("a scale for all rows", False)])
def test_a_weight_is_divided_by_rows_unless_each_part_would_read_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, divided: bool
) -> None:
    monkeypatch.setitem(emit.BLOCK_VALUES, "cpu", 1 << 14)
    executor = ByTasks(100_000)
    made(tmp_path / "out", executor, **dict(CASES[case]))
    tasks_of = [{b.entry.name for b in task.blocks if "embed" not in b.entry.name} for _, _, task in executor.done]
    shared = [name for a, b in pairwise(tasks_of) for name in a & b]
    assert bool(shared) is divided
    assert all(told <= 100_000 for _, told, task in executor.done) is divided


def test_a_task_is_a_few_nodes(tmp_path: Path) -> None:
    executor = ByTasks(300_000)
    made(tmp_path / "out.gguf", executor, to="gguf", bits=4)
    for _, _, task in executor.done:
        names = {b.entry.value for b in task.blocks}
        assert len(parse(task.text).nodes) <= 8 * len(names) and len(pickle.dumps(task)) < 20_000


def test_bytes_are_written_only_into_the_parts_of_the_run_that_asked(tmp_path: Path) -> None:
    """A worker that outlives its driver finds another run's mark, and leaves that run's parts alone."""
    test_journal.source(tmp_path)
    plan, weights = test_journal.subject(tmp_path, tmp_path)
    late: list[Task] = []

    def first(todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None:
        late.extend(Tasks(weights, opened.paths, todo.journal.path, todo.journal.mark(), 1 << 20).of(todo.blocks()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written(plan, weights, 1, executor=first):
        pass
    assert perform(late[0]).pieces  # no run at all

    def second(todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None:
        todo.journal.mark()
        before = [path.read_bytes() for path in opened.paths.values()]
        assert perform(late[0]).pieces
        assert [path.read_bytes() for path in opened.paths.values()] == before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written(plan, weights, 1, executor=second):
        pass


def test_a_run_by_threads_goes_on_from_one_by_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_journal.source(tmp_path / "in")
    want = test_journal.whole(tmp_path / "in", tmp_path / "once")
    plan, weights = test_journal.subject(tmp_path / "in", tmp_path)

    def half(todo: Todo, weights: Weights, opened: Opened, progress: Progress) -> None:
        made = Tasks(weights, opened.paths, todo.journal.path, todo.journal.mark(), 1 << 18)
        for task in islice(made.of(todo.blocks()), 5):
            perform(task)
            for block in task.blocks:
                todo.wrote(block)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written(plan, weights, 1, executor=half):
        pass
    names: list[str] = []
    encoded = Weights.encoded
    monkeypatch.setattr(Weights, "encoded", lambda self, name, *at: (names.append(name), encoded(self, name, *at))[1])
    with written(plan, weights, 1):
        pass
    assert [f.path.read_bytes() for f in plan.files] == want
    assert 0 < len(names) < test_journal.TENSORS - 5


def test_a_worker_that_sees_another_file_is_an_error(tmp_path: Path) -> None:
    test_journal.source(tmp_path / "in")
    plan, weights = test_journal.subject(tmp_path / "in", tmp_path)
    other = tmp_path / "other"
    test_journal.source(other, seed=1)
    os.utime(other / "model.safetensors", ns=(1, 1))
    elsewhere = ByTasks(1 << 20, lambda task: task._replace(mark="run 0", places=(("base", str(other)),)))
    with pytest.raises(InputError, match="sees another"), written(plan, weights, 1, executor=elsewhere):
        pass
    assert not plan.files[0].path.exists()


def test_a_worker_of_another_version_is_an_error(tmp_path: Path) -> None:
    executor = ByTasks(1 << 20, lambda task: task._replace(version="0.0.1"))
    with pytest.raises(UsageError, match=r"the driver 0\.0\.1"):
        made(tmp_path / "out.gguf", executor, bits=4)


def test_the_cache_of_stores_is_of_one_run(tmp_path: Path) -> None:
    tasks._store.cache_clear()
    test_journal.source(tmp_path)
    places = (("base", str(tmp_path)),)
    one = tasks._store("run 1", places)
    assert tasks._store("run 1", places) is one and tasks._store("run 2", places) is not one
