"""An interrupted run goes on where it stopped, with the bytes of one that was not; what has changed is made anew."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qconvert import journal
from qconvert.emit import Entry, FilePlan, Plan
from qconvert.errors import ResourceError, UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.sources import Store
from qconvert.together import written
from qconvert.weights import Weights

ROOT = Path(__file__).parents[1]
N, K, TENSORS = 64, 256, 40
SCHEMES = ("q4_0", "q8_0")


def source(folder: Path, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    save_file({f"w{i}": rng.standard_normal((N, K), np.float32) for i in range(TENSORS)}, folder / "model.safetensors")


def subject(folder: Path, out: Path, scheme: str = "q4_0") -> tuple[Plan, Weights]:
    """TENSORS weights in two files, quantized."""
    nodes: dict[str, Node] = {}
    nbytes = {"q4_0": 18, "q8_0": 34}[scheme] * K // 32 * N
    for i in range(TENSORS):
        attrs = {"tensor": f"base/model.safetensors#w{i}"}
        nodes[f"w{i}~real"] = Node("load", (), Type("f32", (N, K)), attrs)  # type: ignore[arg-type]
        nodes[f"w{i}~code"] = Node("quantize", (f"w{i}~real",), Type(scheme, (N, K)), {"solver": "search"})
        nodes[f"w{i}"] = Node("pack", (f"w{i}~code",), Type(f"gguf.{scheme}", (N, K)))
    files = []
    for half in range(2):
        names = [f"w{i}" for i in range(half, TENSORS, 2)]
        entries = tuple(Entry(n, n, f"gguf.{scheme}", (N, K), nbytes, 8 + nbytes * at) for at, n in enumerate(names))
        files.append(FilePlan(out / f"{half}.bin", b"HEADER--", entries, 8 + nbytes * len(names)))
    store = Store()
    store.add("base", folder)
    return Plan(tuple(files)), Weights(Graph(nodes, tuple(f"w{i}" for i in range(TENSORS))), store)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the values that are evaluated for a file."""
    names: list[str] = []
    encoded = Weights.encoded

    def told(self: Weights, name: str, begin: int, end: int) -> np.ndarray:
        names.append(name)
        return encoded(self, name, begin, end)

    monkeypatch.setattr(Weights, "encoded", told)
    return names


def stopped(plan: Plan, weights: Weights, at: int, error: BaseException) -> None:
    """A run that ends with `error` as it begins tensor number `at`."""
    seen = 0

    def count(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen > at:
            raise error

    kind = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), written(plan, weights, 1, count):
        pass


def whole(folder: Path, out: Path, scheme: str = "q4_0") -> list[bytes]:
    out.mkdir(exist_ok=True)
    plan, weights = subject(folder, out, scheme)
    with written(plan, weights, 2):
        pass
    return [f.path.read_bytes() for f in plan.files]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_only_what_is_missing_is_made(tmp_path: Path, made: list[str], error: BaseException) -> None:
    source(tmp_path / "in")
    want = whole(tmp_path / "in", tmp_path / "once")
    plan, weights = subject(tmp_path / "in", tmp_path)
    stopped(plan, weights, 11, error)
    made.clear()
    assert whole(tmp_path / "in", tmp_path) == want
    assert len(made) == TENSORS - 11
    assert sorted(os.listdir(tmp_path)) == ["0.bin", "1.bin", "in", "once"]


def changed_source(folder: Path) -> None:
    source(folder, 1)


def one_flipped_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("hashed", [0, 64 << 20], ids=["known by its times", "known by its contents"])
@pytest.mark.parametrize("change", [changed_source, one_flipped_bit])
def test_a_changed_source_is_read_anew(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], hashed: int
) -> None:
    monkeypatch.setattr(journal, "HASHED_NBYTES", hashed)
    source(tmp_path / "in")
    plan, weights = subject(tmp_path / "in", tmp_path)
    stopped(plan, weights, 11, KeyboardInterrupt())
    change(tmp_path / "in")
    made.clear()
    got = whole(tmp_path / "in", tmp_path)
    assert len(made) == TENSORS
    assert got == whole(tmp_path / "in", tmp_path / "once")


def test_another_recipe_never_takes_what_was_made_by_the_first(tmp_path: Path, made: list[str]) -> None:
    source(tmp_path / "in")
    plan, weights = subject(tmp_path / "in", tmp_path)
    stopped(plan, weights, 30, KeyboardInterrupt())
    made.clear()
    assert whole(tmp_path / "in", tmp_path, "q8_0") == whole(tmp_path / "in", tmp_path / "once", "q8_0")


def test_a_part_that_lost_its_end_is_not_used(tmp_path: Path, made: list[str]) -> None:
    source(tmp_path / "in")
    plan, weights = subject(tmp_path / "in", tmp_path)
    stopped(plan, weights, 30, KeyboardInterrupt())
    os.truncate(tmp_path / ".1.bin.part", 100)
    made.clear()
    assert whole(tmp_path / "in", tmp_path) == whole(tmp_path / "in", tmp_path / "once")


def test_two_runs_at_once_into_one_output(tmp_path: Path) -> None:
    source(tmp_path / "in")
    plan, weights = subject(tmp_path / "in", tmp_path)
    with written(plan, weights, 1), pytest.raises(UsageError, match="another run"), written(plan, weights, 1):
        pass
    assert plan.files[0].path.exists()


RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
import qconvert.journal, test_journal as t
from qconvert.together import written
qconvert.journal.SYNC_SECONDS = 0.0
plan, weights = t.subject(Path(sys.argv[2]), Path(sys.argv[3]))
print("ready", flush=True)
with written(plan, weights, 2):
    pass
"""


@pytest.mark.peer
def test_kill_at_50_random_points(tmp_path: Path) -> None:
    source(tmp_path / "in")
    want = whole(tmp_path / "in", tmp_path / "once")
    out = tmp_path / "out"
    out.mkdir()
    rng, killed = random.Random(0), 0
    for _ in range(400):
        run = subprocess.Popen([sys.executable, "-c", RUN, str(ROOT), str(tmp_path / "in"), str(out)], stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(rng.random() * 0.25)
        run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if (out / "1.bin").exists():
            assert [(out / f"{i}.bin").read_bytes() for i in range(2)] == want
            for path in out.iterdir():
                path.unlink()
        if killed == 50:
            break
    assert killed == 50
    assert whole(tmp_path / "in", out) == want
    assert sorted(os.listdir(out)) == ["0.bin", "1.bin"]
