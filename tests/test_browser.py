"""Our folders in a real browser: onnxruntime-web and transformers.js in headless Chromium.

tests/browser/install brings both where it can. WebAssembly multiplies in f32 whatever accuracy level a file asks for, so
it is held against onnxruntime doing the same.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qconvert import convert
from qconvert.chat import CONVERSATIONS, render
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.tokenizer import read_tokenizer

pytestmark = pytest.mark.peer
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "browser"
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
TEXTS = ("A class is", "def f(x):\n    return", "Once upon a time there was a", "héllo 世界")
STEPS, NEW_TOKENS = 8, 16
SECONDS = 120
FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
)  # fmt: skip


def browser() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("no chromium; on Debian: apt-get install chromium")
    if not (HERE / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("no packages; npm ci in tests/browser")
    return found


class Handler(SimpleHTTPRequestHandler):
    """The page and its packages, /models/ from elsewhere, the job, and a place for what came out."""

    def __init__(self, *args: Any, models: Path, job: dict[str, Any], done: Any, **more: Any) -> None:
        self.models, self.job, self.done = models, job, done
        super().__init__(*args, **more)

    def translate_path(self, path: str) -> str:
        if path.startswith("/models/"):
            self.directory = str(self.models)
            return super().translate_path(path.removeprefix("/models"))
        return super().translate_path(path)

    def do_GET(self) -> None:
        if self.path != "/job.json":
            super().do_GET()
            return
        body = json.dumps(self.job).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.done(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def answers(models: Path, job: dict[str, Any], profile: Path) -> dict[str, Any]:
    """What the page posts; its own words where it fails."""
    program, arrived, posted = browser(), threading.Event(), list[dict[str, Any]]()

    def done(result: dict[str, Any]) -> None:
        posted.append(result)
        arrived.set()

    handler = partial(Handler, models=models, job=job, done=done, directory=str(HERE))
    command = [program, *FLAGS, *root_flags(), f"--user-data-dir={profile}"]
    with serving(handler) as url, running([*command, f"{url}/page.html"], profile.with_suffix(".log")) as said:
        if not arrived.wait(SECONDS):
            pytest.fail(f"no answer from {program} within {SECONDS} s:\n{said.read_text(errors='replace')[-4000:]}")
    if "error" in posted[0]:
        pytest.fail(posted[0]["error"])
    return posted[0]


def root_flags() -> list[str]:
    return ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(command: list[str], said: Path) -> Iterator[Path]:
    """The command in a process group of its own, which ends with the body; yields the file of what it says."""
    with said.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield said
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 model for onnxruntime, and in shards for transformers.js."""
    browser()
    folder = tmp_path_factory.mktemp("models")
    for name, options in (("plain", {}), ("web", {"layout": "transformersjs", "split_max_size": "500K"})):
        convert(f"{TINY}+{LORA}", to="onnx", bits=4, output=folder / name, check=False, **options)
    return folder


class Native(NamedTuple):
    """A prompt, the greedy tokens behind it by onnxruntime on this machine, and logits behind each token of both."""

    prompt: list[int]
    new: list[int]
    logits: Any


@pytest.fixture(scope="module")
def native(models: Path) -> Native:
    prompt = read_tokenizer(TINY, 1024).reference()(" ".join(TEXTS))[:24]
    model = OnnxRuntime().open(models / "plain" / "model.onnx", 256, 1, exact=True)
    new = model.generate(prompt, STEPS)
    return Native(prompt, new, model.decoded([*prompt, *new], STEPS))


@pytest.fixture(scope="module")
def found(models: Path, native: Native, tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = {
        "onnxruntime": {
            "model": "/models/plain/model.onnx", "data": ["model.onnx.data"], "prompt": native.prompt, "next": native.new,
        },
        "transformers": {"model": "web", "texts": TEXTS, "new_tokens": NEW_TOKENS, "conversation": CONVERSATIONS[1]},
    }  # fmt: skip
    return answers(models, job, tmp_path_factory.mktemp("chromium") / "profile")


def test_onnxruntime_web_gives_the_logits_and_the_greedy_tokens_of_onnxruntime(found: Any, native: Native) -> None:
    got = np.array(found["onnxruntime"]["logits"], np.float32).reshape(native.logits.shape)
    distance = np.linalg.norm(got - native.logits) / np.linalg.norm(native.logits)
    assert distance < 1e-5  # measured 6e-7, as between onnxruntime's versions
    assert got[-STEPS - 1 : -1].argmax(-1).tolist() == native.new


def test_transformersjs_generates_the_tokens_of_onnxruntime_from_a_folder_in_shards(found: Any, models: Path) -> None:
    assert len(list((models / "web" / "onnx").glob("*.onnx_data*"))) == 3
    tokenizer = read_tokenizer(TINY, 1024)
    encode = tokenizer.reference()
    model = OnnxRuntime().open(models / "web" / "onnx" / "model_q4.onnx", 256, 1, exact=True)
    for text, said in zip(TEXTS, found["transformers"]["generated"], strict=True):
        prompt = tokenizer.around(encode(text))
        new = model.generate(prompt, NEW_TOKENS)
        assert said == {"prompt": prompt, "all": [*prompt, *until_stop(new, tokenizer.stops)]}


def until_stop(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    """As far as a generation goes: the stop token is its last."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def test_transformersjs_renders_the_chat_template(found: Any) -> None:
    tokenizer = read_tokenizer(TINY, 1024)
    assert tokenizer.chat_template
    tokens = {f"{role}_token": tokenizer.tokens[i] for role, i in tokenizer.special.items()}
    assert found["transformers"]["chat"] == render(tokenizer.chat_template, CONVERSATIONS[1], tokens)
