"""Files appear whole or not at all, whatever stops the writing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qconvert import emit
from qconvert.emit import Entry, FilePlan, Plan, Plane
from qconvert.errors import ResourceError, UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.parallel import in_parallel
from qconvert.preflight import preflight
from qconvert.sources import Store
from qconvert.together import written
from qconvert.weights import Weights

N, K = 40, 8


def subject(folder: Path) -> tuple[Plan, Weights]:
    values = [float(i) for i in range(N)]
    graph = Graph({"w": Node("constant", (), Type("f32", (N,)), {"values": values})}, ("w",))
    entry = Entry("w", "w", "f32", (N,), 4 * N, 8)
    return Plan((FilePlan(folder / "out.bin", b"HEADER--", (entry,), 8 + 4 * N + 24),)), Weights(graph, Store())


def test_header_rows_and_padding_land_where_the_plan_says(tmp_path: Path) -> None:
    plan, weights = subject(tmp_path)
    with written(plan, weights, 2) as parts:
        assert not plan.files[0].path.exists() and parts[0].exists()
    data = plan.files[0].path.read_bytes()
    assert data[:8] == b"HEADER--" and data[-24:] == bytes(24)
    assert np.array_equal(np.frombuffer(data[8:-24], "<f4"), np.arange(N))
    assert os.listdir(tmp_path) == ["out.bin"]


def test_an_error_before_the_rename_leaves_nothing(tmp_path: Path) -> None:
    plan, weights = subject(tmp_path)
    with pytest.raises(RuntimeError), written(plan, weights, 2):
        raise RuntimeError("check")
    assert os.listdir(tmp_path) == []


def test_an_error_in_a_worker_stops_all_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, weights = subject(tmp_path)
    monkeypatch.setattr(Weights, "encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), written(plan, weights, 3):
        pass
    assert os.listdir(tmp_path) == []


def test_each_item_is_worked_on_once() -> None:
    seen: list[int] = []
    in_parallel(range(500), seen.append, 4)
    assert sorted(seen) == list(range(500))
    assert threading.active_count() < 20


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    plan, weights = subject(tmp_path)
    plan.files[0].path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        preflight(plan, force=False)
    preflight(plan, force=True)
    with written(plan, weights, 1):
        assert plan.files[0].path.read_text() == "mine"
    assert plan.files[0].path.read_bytes()[:6] == b"HEADER"


def test_a_disk_without_room_is_found_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = subject(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match="GB free"):
        preflight(plan, force=False)
    assert os.listdir(tmp_path) == []


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_emit import subject, written
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
from qconvert.errors import ResourceError
try:
    with written(*subject(Path({folder!r})), 2):
        pass
except ResourceError as e:
    print(e.message)
"""


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    assert resource.RLIM_INFINITY  # the limit is set in the child alone
    here = Path(__file__).resolve().parent
    script = FULL.format(root=str(here.parent), tests=str(here), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and "out.bin" in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(emit.os, "access", lambda *_: False)
    tmp_path.chmod(0o500)
    plan, _ = subject(tmp_path)
    with pytest.raises(ResourceError, match="permission denied"):
        preflight(plan, force=False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan, _ = subject(tmp_path / "file" / "below")
    with pytest.raises(ResourceError, match="cannot make the folder"):
        preflight(plan, force=False)


def planar(folder: Path) -> tuple[Plan, Weights]:
    """A matrix whose first four columns lie at 64 and whose last lies at 0, in a folder of its own."""
    values = [[float(i * K + j) for j in range(5)] for i in range(N)]
    graph = Graph({"w": Node("constant", (), Type("f32", (N, 5)), {"values": values})}, ("w",))  # type: ignore[dict-item]
    entry = Entry("w", "w", "f32", (N, 5), 20 * N, 256, (Plane(256, 16), Plane(0, 4)))
    files = (
        FilePlan(folder / "out" / "model", b"MODEL", (), 5),
        FilePlan(folder / "out" / "data", b"", (entry,), 256 + 16 * N),
    )
    return Plan(files, folder / "out"), Weights(graph, Store())


def test_pieces_of_a_row_land_where_the_plan_says(tmp_path: Path) -> None:
    plan, weights = planar(tmp_path)
    with written(plan, weights, 2):
        pass
    want = np.array([[i * K + j for j in range(5)] for i in range(N)], np.float32)
    data = (tmp_path / "out" / "data").read_bytes()
    assert np.array_equal(np.frombuffer(data[256:], "<f4").reshape(N, 4), want[:, :4])
    assert np.array_equal(np.frombuffer(data[: 4 * N], "<f4"), want[:, 4])


def test_a_folder_appears_whole_and_its_files_have_their_names_before(tmp_path: Path) -> None:
    plan, weights = planar(tmp_path)
    preflight(plan, force=False)
    with written(plan, weights, 2) as parts:
        assert [p.name for p in parts] == ["model", "data"] and parts[0].read_bytes() == b"MODEL"
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_has_subfolders_also_where_it_exists_already(tmp_path: Path) -> None:
    plan, weights = planar(tmp_path)
    model, data = plan.files
    plan = plan._replace(files=(model._replace(path=tmp_path / "out" / "onnx" / "model"), data))
    for _ in range(2):
        with written(plan, weights, 1) as parts:
            assert parts[0].parent.name == "onnx" and parts[0].parent.parent == parts[1].parent
        assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["data", "model", "onnx"]
    with pytest.raises(RuntimeError), written(plan, weights, 1):
        raise RuntimeError("check")
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    plan, weights = planar(tmp_path)
    with pytest.raises(RuntimeError), written(plan, weights, 2):
        raise RuntimeError("check")
    assert os.listdir(tmp_path) == []


def test_a_file_in_a_subfolders_place_is_refused(tmp_path: Path) -> None:
    plan, _ = planar(tmp_path)
    model, data = plan.files
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onnx").write_text("x")
    plan = plan._replace(files=(model._replace(path=tmp_path / "out" / "onnx" / "model"), data))
    with pytest.raises(UsageError, match="onnx is a file"):
        preflight(plan, force=True)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    plan, _ = planar(tmp_path)
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        preflight(plan, force=True)
