"""A local cluster of two machines (two node processes): the bytes of one machine, also where one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import test_urls
import torch
from safetensors.torch import load_file, save_file

from qconvert import conversion, ray_executor
from qconvert.conversion import Result, convert
from qconvert.emit import Progress
from qconvert.errors import InputError, ResourceError
from qconvert.ray_executor import RayExecutor, Traffic
from qconvert.tasks import Done, Task, Tasks

ray = pytest.importorskip("ray", reason="ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "golden"
LORA = f"{GOLDEN / 'tiny'}+{GOLDEN / 'tiny-lora'}"
TASK_NBYTES = 150_000
server = test_urls.server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, for the tests add machines to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def machines(cluster: Any) -> list[Any]:
    """Two, of one CPU each; one that a test lost is replaced."""
    for _ in range(5):
        if len(cluster.worker_nodes) == 2:
            break
        with suppress(Exception):  # ray gives a busy machine half a minute
            cluster.add_node(num_cpus=1)
    return list(cluster.worker_nodes)


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[RayExecutor]:
    """Those of the test's conversions; their tasks are small."""
    made: list[RayExecutor] = []

    def small(request: Any) -> RayExecutor | None:
        if request.executor == "threads":
            return None
        made.append(RayExecutor(TASK_NBYTES))
        return made[-1]

    monkeypatch.setattr(conversion, "executor_of", small)
    return made


def converted(out: Path, executor: str = "ray", **options: Any) -> Result:
    return convert(LORA, output=out, bits=4, check=False, executor=executor, **options)


def sums(executor: RayExecutor) -> Traffic:
    return Traffic(*(sum(column) for column in zip(*executor.traffic.values(), strict=True)))


def header_nbytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_two_machines_make_the_bytes_of_one_and_read_what_was_foretold(
    tmp_path: Path, machines: list[Any], executors: list[RayExecutor]
) -> None:
    converted(tmp_path / "one.gguf", "threads")
    told: list[int] = []
    plan = converted(tmp_path / "two.gguf", progress=lambda _: told.append).plan
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.gguf", "two.gguf"]
    (executor,) = executors
    found, weights = sums(executor), sum(e.nbytes for e in plan.entries)
    assert len(executor.traffic) == 2 and found.n_tasks > 15
    assert (found.made, found.moved, sum(told)) == (weights, 0, weights)
    headers = header_nbytes(GOLDEN / "tiny/model.safetensors"), header_nbytes(GOLDEN / "tiny-lora/adapter_model.safetensors")
    assert 0 < found.read - executor.predicted <= len(executor.traffic) * sum(headers)


def test_machines_that_do_not_see_the_parts_read_by_url_and_hand_bytes_back(
    tmp_path: Path, machines: list[Any], executors: list[RayExecutor], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(tmp_path / "one.gguf", "threads")
    task = Tasks.task
    unseen = Path("/nowhere/journal")
    monkeypatch.setattr(Tasks, "task", lambda self, blocks: task(self, blocks)._replace(journal=unseen))
    model = f"{server}/tiny+{server}/tiny-lora"
    made = convert(model, output="memory://out/two.gguf", bits=4, check=False, executor="ray")
    assert fsspec.filesystem("memory").cat_file("/out/two.gguf") == (tmp_path / "one.gguf").read_bytes()
    found = sums(executors[0])
    assert found.moved == found.made == sum(e.nbytes for e in made.plan.entries)
    assert 0 < found.read - executors[0].predicted < len(executors[0].traffic) * 10_000


def test_a_machine_lost_half_way_loses_nothing(
    tmp_path: Path, cluster: Any, machines: list[Any], executors: list[RayExecutor]
) -> None:
    converted(tmp_path / "one.gguf", "threads")
    lost: list[Any] = []
    raylets: list[int] = []

    def progress(_: Any) -> Progress:
        def count(_: int) -> None:
            """The machine whose worker made the first task ends, with the next one on it."""
            if not lost:
                (worker,) = executors[0].traffic
                raylets.append(int(Path(f"/proc/{worker.split()[1]}/stat").read_text().rpartition(")")[2].split()[1]))
                lost.extend(m for m in machines if m.all_processes["raylet"][0].process.pid == raylets[0])
                cluster.remove_node(lost[0], allow_graceful=False)

        return count

    converted(tmp_path / "two.gguf", progress=progress)
    assert len(lost) == 1 and not Path(f"/proc/{raylets[0]}").exists()
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    done = list(executors[0].traffic.values())
    assert len(done) > 1 and done[0].n_tasks < sum(t.n_tasks for t in done) / 2


RUN = """
import sys
from pathlib import Path
import qconvert.conversion, qconvert.journal
from qconvert.ray_executor import RayExecutor
qconvert.journal.SYNC_SECONDS = 0.0
qconvert.conversion.executor_of = lambda _: RayExecutor(int(sys.argv[3]))
told = lambda nbytes: print("made", nbytes, flush=True)
qconvert.conversion.convert(sys.argv[1], output=Path(sys.argv[2]), bits=4, check=False, executor="ray", progress=lambda _: told)
"""


@pytest.mark.parametrize("again", ["ray", "threads"])
def test_a_driver_that_was_killed_goes_on_with_either_executor(
    tmp_path: Path, machines: list[Any], executors: list[RayExecutor], again: str
) -> None:
    converted(tmp_path / "one.gguf", "threads")
    two = tmp_path / "two.gguf"
    run = subprocess.Popen([sys.executable, "-c", RUN, LORA, str(two), str(TASK_NBYTES)], stdout=subprocess.PIPE, cwd=ROOT)
    assert run.stdout is not None
    for _ in range(6):
        assert run.stdout.readline().startswith(b"made")
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not two.exists()
    n_done = len((tmp_path / ".two.gguf.part.journal").read_text().splitlines())
    told: list[int] = []
    converted(two, again, progress=lambda _: told.append)
    assert two.read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert n_done > 5 and told[0] > 0  # what was done already is told first
    assert again == "threads" or sums(executors[-1]).made == sum(told[1:]) < sum(told)


def test_an_error_in_a_task_is_the_users_as_it_is_with_threads(
    tmp_path: Path, machines: list[Any], executors: list[RayExecutor]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((GOLDEN / "tiny" / name).read_bytes())
    tensors = load_file(GOLDEN / "tiny/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj.weight: nan at \[3, 5\]"):
        convert(str(tmp_path), output=tmp_path / "out.gguf", bits=4, check=False, executor="ray")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_task_that_ends_its_worker_each_time_is_an_error_and_the_rest_is_kept(
    tmp_path: Path, machines: list[Any], executors: list[RayExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = ray_executor.perform

    def dies(task: Task) -> Done:
        if task.blocks[0].entry.name == "blk.1.attn_q.weight":
            os._exit(1)
        return perform(task)

    monkeypatch.setattr(ray_executor, "perform", dies)
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    with pytest.raises(ResourceError, match=r"blk\.1\.attn_q\.weight was lost 2 times"):
        converted(tmp_path / "two.gguf")
    assert len((tmp_path / ".two.gguf.part.journal").read_text().splitlines()) > 2
    monkeypatch.undo()
    converted(tmp_path / "one.gguf", "threads")
    converted(tmp_path / "two.gguf", "threads")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
