"""Several outputs of one model: each as it would be alone, of rows that were read and merged once, judged by itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_journal import source, subject, whole
from tiny_models import CASES, save_random

from qconvert import check, convert, convert_all, kernels, layerwise, quality, request_of
from qconvert.cli import cli
from qconvert.conversion import Result
from qconvert.emit import staged
from qconvert.errors import OutputsError, QConvertError, ResourceError, UsageError
from qconvert.graph import Graph, Node, Type
from qconvert.lockstep import Span, Weight, in_step, regions
from qconvert.request import Request
from qconvert.shared_rows import Blocks, identities
from qconvert.sources import Store
from qconvert.together import Making, write_together
from qconvert.weights import Weights

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
TUNED = f"{TINY}+{LORA}"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each reading of a source."""
    found: list[int] = []

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            rows = plain(*arguments)
            found.append(rows.nbytes)
            return rows

        return counted

    for name in ("read", "read_stacked", "read_columns"):
        monkeypatch.setattr(Store, name, counting(getattr(Store, name)))
    return found


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are shared stay as they were made, whoever reads them."""
    plain, sums = Blocks.of, dict[tuple[str, int], int]()

    def of(self: Blocks, key: tuple[str, int], make: Callable[[], Any]) -> Any:
        rows = plain(self, key, make)
        if isinstance(rows, np.ndarray):
            total = hash(rows.tobytes())
            assert sums.setdefault(key, total) == total
        return rows

    monkeypatch.setattr(Blocks, "of", of)


def asked(model: str, folder: Path, *outputs: dict[str, Any], **common: Any) -> list[Request]:
    folder.mkdir(exist_ok=True)
    names = [f"{i}{'.gguf' * each['to'].startswith('gguf')}" for i, each in enumerate(outputs)]
    return [request_of(model, **{**common, **each, "output": folder / n}) for each, n in zip(outputs, names, strict=True)]


def alone(requests: list[Request], folder: Path) -> list[Result]:
    folder.mkdir(exist_ok=True)
    out = []
    for request in requests:
        assert request.output is not None
        options = {name: getattr(request, name) for name in Request.__dataclass_fields__}
        out.append(convert(options.pop("model"), **{**options, "output": folder / request.output.name}))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


MIXED = ("gguf:Q4_K_M", "gguf:Q5_K_M", "onnx:int4", "onnx:int8", "safetensors:W4A16", "safetensors:nf4")
EXPERTS = CASES["qwen3-moe"][1] | {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.usefixtures("unchanged")
def test_each_is_what_it_is_alone_and_the_source_is_read_once(tmp_path: Path, read: list[int], experts: bool) -> None:
    model = str(save_random(tmp_path / "model", "Qwen3Moe", EXPERTS)) if experts else TUNED
    types = ("onnx:int4", "safetensors:W8A16") if experts else MIXED
    outputs = [{"to": each, "form": "portable" if each == "onnx:int8" else "ort"} for each in types]
    requests = asked(model, tmp_path / "all", *outputs, check=False, threads=2)
    read.clear()
    convert_all(requests)
    together, most = sum(read), 0
    for request in requests:
        read.clear()
        alone([request], tmp_path / "alone")
        most = max(most, sum(read))
    assert contents(tmp_path / "all") == contents(tmp_path / "alone")
    assert together <= 1.1 * most  # what each keeps whole for itself, such as factors of adapters, is read by each


def test_rows_are_made_once_where_outputs_have_the_same_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q6_k of output.weight, and q4_k of most others, are in both."""
    made: list[str] = []
    search = kernels.search
    monkeypatch.setattr(kernels, "search", lambda scheme, x, **more: made.append(scheme) or search(scheme, x, **more))
    convert_all(asked(str(TINY), tmp_path / "one", {"to": "gguf:Q4_K_M"}, check=False, threads=1))
    n = len(made)
    made.clear()
    convert_all(asked(str(TINY), tmp_path / "both", {"to": "gguf:Q4_K_M"}, {"to": "gguf:Q4_K_S"}, check=False, threads=1))
    assert n < len(made) < 1.7 * n


def test_a_text_is_run_once_for_all_that_solvers_ask_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = layerwise.run_layerwise
    monkeypatch.setattr(layerwise, "run_layerwise", lambda *a, **k: runs.append(1) or run(*a, **k))
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400, "utf-8")
    common: dict[str, Any] = {"calibrate": text, "calibrate_tokens": 512, "check": False, "threads": 1}
    outputs = ({"to": "gguf:Q4_K_M"}, {"to": "safetensors:W4A16", "solver": "gptq"}, {"to": "onnx:int4", "solver": "gptq"})
    requests = asked(TUNED, tmp_path / "all", *outputs, **common)
    convert_all(requests)
    assert len(runs) == 1
    alone(requests, tmp_path / "alone")
    assert len(runs) == 4
    assert contents(tmp_path / "all") == contents(tmp_path / "alone")


def test_what_was_trained_answers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as for one output: on the evaluation text, and on the prompts of the check."""
    calls: list[str] = []
    trunk, log_probs = quality.trunk, check.log_probs
    monkeypatch.setattr(quality, "trunk", lambda *a, **k: calls.append("trunk") or trunk(*a, **k))
    monkeypatch.setattr(check, "log_probs", lambda *a, **k: calls.append("log_probs") or log_probs(*a, **k))
    common = {"eval_tokens": 256, "threads": 1}
    (one,) = convert_all(asked(TUNED, tmp_path / "one", {"to": "gguf:Q8_0"}, **common))
    before = {name: calls.count(name) for name in ("trunk", "log_probs")}
    calls.clear()
    first, second = convert_all(asked(TUNED, tmp_path / "both", {"to": "gguf:Q8_0"}, {"to": "gguf:Q4_K_M"}, **common))
    assert calls.count("trunk") == before["trunk"] + 1 == 4  # of what was trained, of the base, and of each output
    assert calls.count("log_probs") == 2 * before["log_probs"] - 2  # not again with adapters beside their linears, and merged
    assert first.report.quality == one.report.quality
    merged = [[row for row in each.report.checks if row.what == "merge"] for each in (one, first, second)]
    assert len(merged[0]) == 1 and merged[0] == merged[1] == merged[2]


# failures -----------------------------------------------------------------------------------------


def test_each_is_judged_by_itself(tmp_path: Path) -> None:
    outputs = ({"to": "gguf:Q8_0"}, {"to": "gguf:Q2_K", "max_kl": 1e-6}, {"to": "gguf:F16"})
    with pytest.raises(OutputsError, match="1 of 3 outputs failed, first .*1.gguf: --max-kl 1e-06") as caught:
        convert_all(asked(str(TINY), tmp_path / "out", *outputs, eval_tokens=256, threads=1))
    assert caught.value.exit_code == 7
    assert sorted(os.listdir(tmp_path / "out")) == ["0.gguf", "2.gguf"]
    first, second, third = (result for result in caught.value.results if isinstance(result, Result))
    assert (first.error, third.error) == (None, None) and second.error is not None and second.outputs == ()
    assert second.report.quality["mean_kl"] > 1e-6
    assert second.data()["exit"] == 7 and second.data()["outputs"] == [] and not second.data()["verified"]


def test_a_weight_that_one_type_cannot_hold_fails_that_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    outputs = ({"to": "gguf:F16"}, {"to": "safetensors:fp32"}, {"to": "gguf:BF16"})
    with pytest.raises(OutputsError, match="does not fit f16") as caught:
        convert_all(asked(str(model), tmp_path / "out", *outputs, check=False))
    assert caught.value.exit_code == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["1", "2.gguf"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"to": "onnx:int4", "group": 17}, "--group 17"),
        ({"to": "gguf:Q4_K_M", "group": 32}, "GGUF's types fix their blocks"),
        ({"to": "gguf:Q9_K"}, "Q9_K"),
        ({"to": "onnx:int4", "eval": Path("nowhere.txt")}, "--eval nowhere.txt"),
        ({"to": "gguf:Q4_K_M", "dry_run": True}, "--dry-run"),
    ],
)
def test_a_mistake_in_the_second_is_found_before_a_byte_is_written(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    with pytest.raises(QConvertError, match=said):
        convert_all(asked(str(TINY), tmp_path / "out", {"to": "gguf:Q8_0"}, second))
    assert os.listdir(tmp_path / "out") == []


def test_two_outputs_in_one_place(tmp_path: Path) -> None:
    inside = request_of(str(TINY), to="gguf:Q8_0", output=tmp_path / "0" / "a.gguf", check=False)
    (folder,) = asked(str(TINY), tmp_path, {"to": "onnx:int4"}, check=False)
    for requests in ([folder, inside], [inside, folder], [inside, inside]):
        with pytest.raises(UsageError, match="two outputs are to be written to"):
            convert_all(requests)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_holds_one_but_not_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(str(TINY), tmp_path / "out", {"to": "gguf:Q8_0"}, {"to": "gguf:Q6_K"}, check=False)
    sizes = [convert(str(TINY), to=f"gguf:{r.quant}", dry_run=True, output=r.output).plan.nbytes for r in requests]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": sum(sizes) - 1}))
    with pytest.raises(ResourceError, match="the 2 outputs need"):
        convert_all(requests)
    assert os.listdir(tmp_path / "out") == []


# interruptions ------------------------------------------------------------------------------------


def both(folder: Path, out: Path, count: Callable[[int], None] = lambda _: None) -> list[bytes]:
    """The weights of test_journal in two schemes."""
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


def test_each_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path / "in")
    want = [data for scheme in ("q4_0", "q8_0") for data in whole(tmp_path / "in", tmp_path / scheme, scheme)]
    made: list[str] = []
    encoded = Weights.encoded
    monkeypatch.setattr(Weights, "encoded", lambda self, name, *rows: made.append(name) or encoded(self, name, *rows))

    def stop(_: int) -> None:
        if len(made) > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both(tmp_path / "in", tmp_path / "out", stop)
    before = len(made)
    assert both(tmp_path / "in", tmp_path / "out") == want
    assert len(made) - before < 80 - 30
    assert sorted(os.listdir(tmp_path / "out" / "q8_0")) == ["0.bin", "1.bin"]


RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
import qconvert.journal, test_outputs as t
qconvert.journal.SYNC_SECONDS = 0.0
print("ready", flush=True)
t.both(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.peer
def test_two_outputs_killed_at_50_random_points(tmp_path: Path) -> None:
    source(tmp_path / "in")
    want = [data for scheme in ("q4_0", "q8_0") for data in whole(tmp_path / "in", tmp_path / scheme, scheme)]
    out, rng, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(400):
        run = subprocess.Popen([sys.executable, "-c", RUN, str(ROOT), str(tmp_path / "in"), str(out)], stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(rng.random() * 0.4)
        run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if (out / "q8_0" / "1.bin").exists():
            shutil.rmtree(out)
        if killed == 50:
            break
    assert killed == 50
    assert both(tmp_path / "in", out) == want
    assert sorted(os.listdir(out / "q4_0")) == sorted(os.listdir(out / "q8_0")) == ["0.bin", "1.bin"]


# on the command line ------------------------------------------------------------------------------


def test_outputs_by_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--to", "gguf:Q8_0,safetensors:bf16", "--to", "onnx:int4", "--no-check", "-q", "--json", "report.json"]
    done = CliRunner().invoke(cli, ["convert", str(TINY), *flags])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [each["quant"] for each in data] == ["Q8_0", "bf16", "int4_g32"]
    assert all(Path(line).exists() for line in done.output.split())


def test_one_of_several_by_flags_fails(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {TINY}\neval-tokens: 256\nto:\n"
        f"- {{format: gguf, quant: Q8_0, output: {tmp_path / 'a.gguf'}}}\n"
        f"- {{format: gguf, quant: Q2_K, output: {tmp_path / 'b.gguf'}, max-kl: 1.0e-6}}\n"
    )
    done = CliRunner().invoke(cli, ["convert", "--recipe", str(recipe), "--json", str(tmp_path / "report.json"), "-q"])
    assert done.exit_code == 7
    reports = json.loads((tmp_path / "report.json").read_text())
    assert [(each["exit"], bool(each["outputs"])) for each in reports] == [(0, True), (7, False)]
    assert (tmp_path / "a.gguf").exists() and not (tmp_path / "b.gguf").exists()


# order --------------------------------------------------------------------------------------------


def test_who_is_furthest_behind_goes_on() -> None:
    told: list[tuple[str, int]] = []

    def chain(name: str, *rows: int) -> Any:
        for row in rows:
            told.append((name, row))
            yield row

    in_step([chain("a", 4, 8), chain("b", 2, 4, 6, 8), chain("c", 8)])
    assert told == [("a", 4), ("b", 2), ("c", 8), ("b", 4), ("a", 8), ("b", 6), ("b", 8)]


def test_regions_have_the_same_rows_of_all_outputs() -> None:
    load = Node("load", (), Type("f32", (8, 4)), {"tensor": "base/x#w"})
    graphs = [Graph({"w~real": load, "w": Node("cast", ("w~real",), Type(d, (8, 4)))}, ("w",)) for d in ("f16", "bf16")]
    spans = [[Span(0, 4, "a"), Span(4, 8, "b")], [Span(i, i + 2, i) for i in range(0, 8, 2)]]
    work = regions([(graph, [Weight("w", lambda each=each: each)]) for graph, each in zip(graphs, spans, strict=True)])
    assert [[[s.work for s in each] for each in region] for region in work] == [[["a"], [0, 2]], [["b"], [4, 6]]]


def test_an_identity_is_of_what_is_computed_and_of_whose_tensors() -> None:
    load = Node("load", (), Type("f32", (8, 4)), {"tensor": "base/x#w"})
    a = Graph({"w": load}, ("w",))
    b = Graph({"w~real": load, "w": Node("cast", ("w~real",), Type("f16", (8, 4)))}, ("w",))
    store = Store()
    assert identities(a, ["w"], store)["w"] == identities(b, ["w"], store)["w~real"]
    assert identities(a, ["w"], store)["w"] != identities(a, ["w"], Store())["w"]
