"""Models, adapters and outputs by URL: the bytes of a disk, read by ranges; an output is there whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qconvert import url_files
from qconvert.conversion import convert, request_of
from qconvert.errors import InputError, MissingDependency, NotVerifiedError, ResourceError, UnsupportedError, UsageError
from qconvert.request import parse_model
from qconvert.url_files import UrlFile, is_url

GOLDEN = Path(__file__).parents[1] / "golden"
LORA = f"{GOLDEN / 'tiny'}+{GOLDEN / 'tiny-lora'}"
WEIGHTS_NBYTES = (GOLDEN / "tiny/model.safetensors").stat().st_size


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging folders are the test's own, and memory is empty."""
    monkeypatch.setattr(url_files, "gettempdir", lambda: str(tmp_path / "staging"))
    MemoryFileSystem.store.clear()


@pytest.fixture
def memory() -> str:
    """golden's tiny model and adapter in memory."""
    fs = fsspec.filesystem("memory")
    for name in ("tiny", "tiny-lora"):
        for path in (GOLDEN / name).iterdir():
            fs.pipe_file(f"/hub/{name}/{path.name}", path.read_bytes())
    return "memory://hub"


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("want") / "out.gguf"
    convert(LORA, output=out, bits=4, check=False)
    return out.read_bytes()


def test_a_model_and_its_adapter_are_read_from_where_they_lie(
    tmp_path: Path, memory: str, want: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    cat = MemoryFileSystem.cat_file

    def told(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        data: bytes = cat(self, path, start=start, end=end, **more)
        asked.append((path, len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", told)
    convert(f"{memory}/tiny+{memory}/tiny-lora", output=tmp_path / "out.gguf", bits=4, check=False)
    assert (tmp_path / "out.gguf").read_bytes() == want
    of_weights = [n for path, n in asked if path.endswith("model.safetensors")]
    assert max(of_weights) < WEIGHTS_NBYTES / 2  # never the file, but its tensors


def test_a_model_by_url_is_proven_as_one_on_disk(tmp_path: Path, memory: str) -> None:
    made = convert(f"{memory}/tiny+{memory}/tiny-lora", output=tmp_path / "out.gguf", bits=8, eval_tokens=64)
    assert not made.report.failed and {"file bytes"} <= {row.what for row in made.report.checks}
    assert made.report.data()["provenance"]["model"] == f"{memory}/tiny"


def test_a_dry_run_reads_no_weight(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    fetched = UrlFile._fetched
    monkeypatch.setattr(UrlFile, "_fetched", lambda *a: (lengths.append(a[2] - a[1]), fetched(*a))[1])
    made = convert(f"{memory}/tiny", output="memory://o/x.gguf", bits=4, dry_run=True)
    assert made.plan.nbytes > 1e6 and sum(lengths) < 8000
    assert made.outputs == () and made.report.outputs[0]["path"] == "memory://o/x.gguf"


def test_file_urls_are_paths(tmp_path: Path, want: bytes) -> None:
    model = f"file://{GOLDEN / 'tiny'}+file://{GOLDEN / 'tiny-lora'}"
    made = convert(model, output=f"file://{tmp_path}/out.gguf", bits=4, check=False)
    assert made.outputs == (tmp_path / "out.gguf",) and (tmp_path / "out.gguf").read_bytes() == want


@pytest.mark.parametrize("name", ["file", "local"])
def test_an_output_with_the_name_of_a_scheme_is_a_path(name: str) -> None:
    assert request_of("m", output=name).output == Path(name)
    assert request_of("m", output=f"{name}:///a/b").output == Path("/a/b")


def test_an_output_by_url_is_there_when_it_is_proven(tmp_path: Path, want: bytes) -> None:
    made = convert(LORA, output="memory://out/it.gguf", bits=4, check=False)
    assert made.outputs == ("memory://out/it.gguf",) and made.report.outputs[0]["path"] == "memory://out/it.gguf"
    assert fsspec.filesystem("memory").cat_file("/out/it.gguf") == want
    assert not any((tmp_path / "staging").rglob("*.gguf"))


def test_a_folder_by_url_has_all_files_of_one_on_disk(tmp_path: Path) -> None:
    convert(LORA, to="safetensors", quant="w4a16", output=tmp_path / "out", check=False)
    made = convert(LORA, to="safetensors", quant="w4a16", output="memory://b/c/out", check=False)
    fs = fsspec.filesystem("memory")
    assert made.outputs == ("memory://b/c/out",)
    assert {k.removeprefix("/b/c/out/"): fs.cat_file(k) for k in fs.find("/b/c/out")} == {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }


def test_an_output_that_is_there_is_kept(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/out/it.gguf", b"mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(LORA, output="memory://out/it.gguf", bits=4, check=False)
    assert fs.cat_file("/out/it.gguf") == b"mine"
    convert(LORA, output="memory://out/it.gguf", bits=4, check=False, force=True)
    assert fs.cat_file("/out/it.gguf")[:4] == b"GGUF"


def test_what_is_not_proven_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(NotVerifiedError):
        convert(LORA, output="memory://out/it.gguf", bits=4, check=False, require_verified=True)
    assert not fsspec.filesystem("memory").exists("/out/it.gguf")
    assert not any((tmp_path / "staging").rglob("it*"))


def test_an_upload_that_breaks_leaves_nothing_there_and_the_file_here(
    tmp_path: Path, want: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Any, target: Any, length: int) -> None:
        target.write(source.read(1000))
        raise OSError("the connection was reset")

    monkeypatch.setattr(url_files.shutil, "copyfileobj", broken)
    with pytest.raises(ResourceError, match="connection was reset") as e:
        convert(LORA, output="memory://out/it.gguf", bits=4, check=False)
    assert not fsspec.filesystem("memory").exists("/out/it.gguf")
    kept = Path(str(e.value.hint).removeprefix("what was made lies in "))
    assert (kept / "it.gguf").read_bytes() == want


def test_an_interrupted_run_to_a_url_goes_on(want: bytes) -> None:
    told: list[int] = []

    def stop(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(LORA, output="memory://out/it.gguf", bits=4, check=False, threads=1, progress=lambda _: stop)
    again: list[int] = []
    convert(LORA, output="memory://out/it.gguf", bits=4, check=False, threads=1, progress=lambda _: again.append)
    assert fsspec.filesystem("memory").cat_file("/out/it.gguf") == want
    assert again[0] >= sum(told[:11])


def test_a_changed_file_behind_the_url_is_read_anew(memory: str) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(f"{memory}/tiny", output="memory://out/it.gguf", bits=4, check=False, threads=1, progress=lambda _: stop)
    fs = fsspec.filesystem("memory")
    data = bytearray(fs.cat_file("/hub/tiny/model.safetensors"))
    data[-1] ^= 1
    fs.pipe_file("/hub/tiny/model.safetensors", bytes(data))
    told: list[int] = []
    convert(f"{memory}/tiny", output="memory://out/it.gguf", bits=4, check=False, threads=1, progress=lambda _: told.append)
    convert(f"{memory}/tiny", output="memory://once/it.gguf", bits=4, check=False)
    assert fs.cat_file("/out/it.gguf") == fs.cat_file("/once/it.gguf")


def test_a_manifest_has_the_sums_of_what_was_read_by_url(tmp_path: Path, memory: str) -> None:
    sums = []
    for model in (LORA, f"{memory}/tiny+{memory}/tiny-lora"):
        options = {"output": tmp_path / "out.gguf", "bits": 4, "check": False, "force": True}
        convert(model, manifest=tmp_path / "manifest.json", **options)
        found = json.loads((tmp_path / "manifest.json").read_text())
        sums.append((found["inputs"], found["weights"]))
    assert sums[0] == sums[1]
    want = hashlib.sha256((GOLDEN / "tiny/model.safetensors").read_bytes()).hexdigest()
    assert {"file": "base/model.safetensors", "nbytes": WEIGHTS_NBYTES, "sha256": want} in sums[1][0]


def test_what_is_written_beside_an_output_goes_with_it(memory: str) -> None:
    convert(f"{memory}/tiny", output="memory://out/it.gguf", bits=4, check=False, modelfile=True)
    assert set(fsspec.filesystem("memory").find("/out")) == {"/out/it.gguf", "/out/Modelfile"}


# ranges -------------------------------------------------------------------------------------------


def test_chunks_are_fetched_once_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    fsspec.filesystem("memory").pipe_file("/x", data.tobytes())
    monkeypatch.setattr(url_files, "AHEAD_NBYTES", 1 << 16)
    fetched: list[int] = []
    one = UrlFile._fetched
    monkeypatch.setattr(UrlFile, "_fetched", lambda self, a, b: (fetched.append(b - a), one(self, a, b))[1])
    file, out = UrlFile("memory://x"), np.zeros(1 << 20, np.uint8)
    turns, lock = iter(range(0, 1 << 20, 1 << 12)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                at = next(turns, None)
            if at is None:
                return
            done = 0
            while done < 1 << 12:
                done += file.read_into(out[at + done : at + (1 << 12)].data, at + done, 1 << 20)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(out, data) and sum(fetched) < 1.5 * (1 << 20)


def test_a_network_that_fails_now_and_then_is_asked_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_files.time, "sleep", lambda _: None)
    cat, calls = MemoryFileSystem.cat_file, iter(range(10**6))

    def flaky(self: Any, *args: Any, **more: Any) -> bytes:
        if next(calls) % 3:
            raise TimeoutError
        return bytes(cat(self, *args, **more))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    file, out = UrlFile(f"{memory}/tiny/config.json"), np.zeros(100, np.uint8)
    assert file.read_into(out.data, 10, 110) == 100
    assert out.tobytes() == (GOLDEN / "tiny/config.json").read_bytes()[10:110]


# over http and S3 ---------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's server, which answers ranges unless `ignored`."""

    ignored = False
    seen: list[str] = []  # noqa: RUF012

    def send_head(self) -> Any:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        file = super().send_head() if wanted is None or self.ignored else None
        if wanted is None or self.ignored:
            return file
        self.seen.append(self.path)
        data = Path(self.translate_path(self.path)).read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/*")
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    Ranges.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=str(GOLDEN))) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_address[1]}"
        it.shutdown()


def test_a_model_over_http(tmp_path: Path, server: str, want: bytes) -> None:
    convert(f"{server}/tiny+{server}/tiny-lora", output=tmp_path / "out.gguf", bits=4, check=False)
    assert (tmp_path / "out.gguf").read_bytes() == want
    assert "/tiny/model.safetensors" in Ranges.seen
    with pytest.raises(UsageError, match="cannot be written"):
        convert(f"{server}/tiny", output=f"{server}/out.gguf", bits=4)


def test_a_server_without_ranges_is_an_error(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranges, "ignored", True)
    with pytest.raises(InputError, match="bytes came where 8 were asked for"):
        convert(f"{server}/tiny", output=tmp_path / "out.gguf", bits=4, check=False)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    pytest.importorskip("s3fs", reason="fsspec reads s3 with s3fs")
    servers = pytest.importorskip("moto.server", reason="moto plays S3")
    it = servers.ThreadedMotoServer("127.0.0.1", port=0)
    it.start()
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "none")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*it.get_host_and_port()))
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        for name in ("tiny", "tiny-lora"):
            fs.put(str(GOLDEN / name), f"bucket/{name}", recursive=True)
        yield fs
    it.stop()
    url_files.reached.cache_clear()
    type(fs).clear_instance_cache()


def test_a_model_and_an_output_in_s3(s3: Any, want: bytes) -> None:
    convert("s3://bucket/tiny+s3://bucket/tiny-lora", output="s3://bucket/out/it.gguf", bits=4, check=False)
    s3.invalidate_cache()
    assert s3.cat_file("bucket/out/it.gguf") == want
    with pytest.raises(UsageError, match="exists already"):
        convert("s3://bucket/tiny", output="s3://bucket/out/it.gguf", bits=4)


def test_an_upload_to_s3_that_breaks_leaves_no_object(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, target: Any, length: int) -> None:
        target.write(os.urandom(60 << 20) + source.read())  # one part of an upload is there already
        raise OSError("the connection was reset")

    monkeypatch.setattr(url_files.shutil, "copyfileobj", broken)
    with pytest.raises(ResourceError, match="connection was reset"):
        convert("s3://bucket/tiny", output="s3://bucket/broken/it.gguf", bits=4, check=False)
    s3.invalidate_cache()
    assert not s3.exists("bucket/broken/it.gguf")


# what users mistype -------------------------------------------------------------------------------


def test_what_a_url_is() -> None:
    assert all(map(is_url, ("s3://b/m", "gs://b", "http://h:80/m", "simplecache::s3://b/m", "memory://m")))
    assert not any(map(is_url, ("org/name", "./m", "/a//b", "C:\\m", "model+s3", "")))
    model, adapters = parse_model("s3://b/m+gs://b/a:0.5+http://h:8000/a")
    assert model == "s3://b/m" and [tuple(a) for a in adapters] == [("gs://b/a", 0.5), ("http://h:8000/a", 1.0)]


@pytest.mark.parametrize(
    ("model", "error", "told"),
    [
        ("memory://nothing", InputError, "no such folder"),
        ("nosuch://bucket/model", UsageError, "nosuch"),
        ("memory://hub/model.gguf", UnsupportedError, "a GGUF is read from a disk"),
        ("memory://pickled", UnsupportedError, "safetensors alone are read by URL"),
        ("memory://hub/tiny-lora", InputError, "has no config.json"),
    ],
)
def test_a_url_that_is_no_model(memory: str, model: str, error: type[Exception], told: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/pickled/config.json", (GOLDEN / "tiny/config.json").read_bytes())
    fs.pipe_file("/pickled/pytorch_model.bin", b"PK")
    with pytest.raises(error, match=told):
        convert(model, output="memory://out.gguf", bits=4)


def test_a_shard_that_is_not_there_is_named(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.rm_file("/hub/tiny/model.safetensors")
    fs.pipe_file("/hub/tiny/model.safetensors.index.json", b'{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    with pytest.raises(InputError, match=r"the shard a\.safetensors is missing"):
        convert(f"{memory}/tiny", output="memory://out.gguf", bits=4)
    fs.pipe_file("/hub/tiny/model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/a.safetensors"}}')
    with pytest.raises(InputError, match="leads out of the folder"):
        convert(f"{memory}/tiny", output="memory://out.gguf", bits=4)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    url_files.reached.cache_clear()
    with pytest.raises(MissingDependency, match="Install s3fs"):
        convert("s3://bucket/model", bits=4)
    url_files.reached.cache_clear()
