"""A certified output is proven anywhere without its model; a changed byte is found and named; what is forged is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qconvert import certificate as c
from qconvert import probes as p
from qconvert.certifying import FILES, WEIGHTS, certificate_report, certifier_of, digest_rows
from qconvert.conversion import Result, convert
from qconvert.errors import InputError, UnsupportedError
from qconvert.planes import Slot
from qconvert.report import Report, Row
from qconvert.target import reader_of

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
FORMATS = {"gguf": None, "onnx": "onnxruntime", "safetensors": "transformers"}


class Made(NamedTuple):
    format: str
    result: Result
    path: Path  # of the output, in a folder of its own

    def copy(self, folder: Path) -> Path:
        """The output elsewhere, a file under another name."""
        into = folder / ("moved.gguf" if self.path.is_file() else "moved")
        (shutil.copytree if self.path.is_dir() else shutil.copyfile)(self.path, into)
        return into


@pytest.fixture(scope="module", params=list(FORMATS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    if FORMATS[request.param]:
        pytest.importorskip(FORMATS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / ("a.gguf" if request.param == "gguf" else "a")
    return Made(request.param, convert(f"{TINY}+{LORA}", to=request.param, bits=4, output=path, certify=True), path)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    return Made("gguf", convert(TINY, bits=8, output=path, certify=True), path)


def rows_of(path: Path, threads: int = 1) -> dict[str, Row]:
    report = certificate_report(path, threads)
    assert report is not None
    return {row.what.partition(":")[0]: row for row in report.checks}


def digests_of(path: Path) -> dict[str, Row]:
    """Without asking a runtime."""
    reader, found = reader_of(path)  # type: ignore[misc]
    certifier = reader.certifier()  # type: ignore[attr-defined]
    first, text = certifier.certificate(found)
    rows = digest_rows(certifier, c.read_certificate(first, text), first, text, 1)
    return {row.what.partition(":")[0]: row for row in rows}


def tensors_of(path: Path) -> list[c.Located]:
    reader, found = reader_of(path)  # type: ignore[misc]
    files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
    return reader.certifier().located(files)  # type: ignore[attr-defined, no-any-return]


def flip(path: Path, at: int) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


# what holds -----------------------------------------------------------------------------------------


def test_an_output_moved_elsewhere_passes_without_its_model(made: Made, tmp_path: Path) -> None:
    report = certificate_report(made.copy(tmp_path), 1)
    assert report is not None and report.exit == 0
    verdicts = {row.what.partition(":")[0]: row.verdict for row in report.checks}
    assert verdicts.pop("price of the bits, probes") == "info"
    ran = [what for what in verdicts if what.startswith("runtime")]
    assert len(ran) == 1 and (verdicts.pop(ran[0]) == "pass") is report.verified
    assert verdicts == {WEIGHTS: "pass", FILES: "pass"}


def test_its_files_are_as_long_as_planned_and_every_byte_is_counted(made: Made) -> None:
    plan, counted = made.result.plan, made.result.report.accounting["files"]
    assert plan.slot is not None and plan.slot.nbytes > 100_000
    for file, count in zip(plan.files, counted, strict=True):
        assert file.path.stat().st_size == file.nbytes == count["nbytes"] == sum(count["parts"].values())
    size = made.result.report.accounting["size"]
    assert size["header"] > plan.slot.nbytes and size["total"] == plan.nbytes


def test_its_text_is_json_to_the_formats_own_library(made: Made) -> None:
    if made.format == "gguf":
        from gguf import GGUFReader

        text = GGUFReader(made.path).fields[c.KEY].contents()
    elif made.format == "onnx":
        import onnx

        model = onnx.load(made.path / "model.onnx", load_external_data=False)
        onnx.checker.check_model(str(made.path / "model.onnx"), full_check=True)
        (text,) = (prop.value for prop in model.metadata_props if prop.key == c.KEY)
    else:
        from safetensors import safe_open

        with safe_open(made.path / "model.safetensors", "np") as file:
            text = file.metadata()[c.KEY]
    data = json.loads(text)
    assert data["pipeline"] == made.result.report.pipeline and len(data["manifest"]) == 64
    assert [row[0] for row in data["checks"]] == [row.what for row in made.result.report.checks]


def test_digests_are_those_of_the_bytes_that_the_formats_own_library_reads(made: Made) -> None:
    import hashlib

    wanted = {}
    if made.format == "gguf":
        from gguf import GGUFReader

        wanted = {t.name: t.data.tobytes() for t in GGUFReader(made.path).tensors}
    elif made.format == "onnx":
        import onnx

        for t in onnx.load(made.path / "model.onnx").graph.initializer:
            wanted[t.name] = t.raw_data
    else:
        from safetensors.torch import load_file

        tensors = load_file(made.path / "model.safetensors")
        wanted = {n: t.contiguous().reshape(-1).view(t.dtype).numpy(force=True).tobytes() if t.dtype.itemsize > 2
                  or not t.is_floating_point() else t.view(__import__("torch").int16).numpy().tobytes()
                  for n, t in tensors.items()}  # fmt: skip
    said = json.loads(certifier_of(made.format).certificate(reader_of(made.path)[1])[1])["weights"]  # type: ignore
    assert said.keys() <= wanted.keys() and len(said) >= 29
    assert {n: text[:64] for n, text in said.items()} == {n: hashlib.sha256(wanted[n]).hexdigest() for n in said}


def test_the_same_conversion_gives_the_same_certificate_wherever_it_is_written(gguf: Made, tmp_path: Path) -> None:
    again = tmp_path / "other-name.gguf"
    convert(TINY, bits=8, output=again, certify=True, manifest=tmp_path / "m.json")
    assert again.read_bytes() == gguf.path.read_bytes()


def test_a_run_that_goes_on_gives_the_same_certificate(gguf: Made, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"

    def stop(_: object) -> Callable[[int], None]:
        seen = iter(range(5))

        def progress(nbytes: int) -> None:
            if next(seen, None) is None:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        convert(TINY, bits=8, output=path, certify=True, progress=stop)
    assert (tmp_path / ".a.gguf.part.journal").exists()
    convert(TINY, bits=8, output=path, certify=True)
    assert path.read_bytes() == gguf.path.read_bytes()


def test_a_size_that_was_asked_for_holds_with_the_certificate(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    result = convert(TINY, target_size="1500k", output=path, certify=True, check=False)
    assert path.stat().st_size == result.plan.nbytes <= 1_500_000
    assert digests_of(path)[WEIGHTS].verdict == "pass"


def test_a_split_output_is_proven_whole(tmp_path: Path) -> None:
    convert(TINY, bits=8, output=tmp_path / "a.gguf", split_max_size="600k", certify=True, check=False)
    path, last = (tmp_path / f"a-0000{i}-of-00004.gguf" for i in (1, 4))
    assert {row.verdict for row in digests_of(path).values()} == {"pass"}
    flip(last, last.stat().st_size - 100)
    assert digests_of(path)[WEIGHTS].verdict == "fail"


# what was changed -----------------------------------------------------------------------------------


def test_a_changed_byte_of_a_weight_is_found_and_its_tensor_named(made: Made, tmp_path: Path) -> None:
    path = made.copy(tmp_path)
    rng = np.random.default_rng(0)
    for tensor in tensors_of(path)[:: 1 if made.format == "gguf" else 9]:
        at = tensor.offset + int(rng.integers(tensor.nbytes))
        flip(tensor.file, at)
        row = digests_of(path)[WEIGHTS]
        assert (row.verdict, row.value, row.reason) == ("fail", 1.0, f"{tensor.name} has other bytes")
        flip(tensor.file, at)
    assert digests_of(path)[WEIGHTS].verdict == "pass"


def test_verify_exits_6_and_names_the_tensor(gguf: Made, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qconvert.cli import cli

    path = gguf.copy(tmp_path)
    right = CliRunner().invoke(cli, ["verify", str(path), "--json", str(tmp_path / "r.json")])
    assert right.exit_code == 0 and "nothing found" in right.output and WEIGHTS in right.output
    assert json.loads((tmp_path / "r.json").read_text())["certificate"]["checks"][0]["verdict"] == "pass"
    tensor = next(t for t in tensors_of(path) if t.name == "blk.1.ffn_up.weight")
    flip(path, tensor.offset + 20)
    wrong = CliRunner().invoke(cli, ["verify", str(path)])
    assert wrong.exit_code == 6 and "blk.1.ffn_up.weight has other bytes" in wrong.output


def test_a_changed_key_of_the_header_is_named(made: Made, tmp_path: Path) -> None:
    path, key = made.copy(tmp_path), ""
    if made.format == "gguf":
        key = "llama.rope.freq_base"
        replace_bytes(path, struct.pack("<If", 6, 10000.0), struct.pack("<If", 6, 10001.0))
    elif made.format == "onnx":
        key = "qconvert.quant"
        replace_bytes(path / "model.onnx", b"\x0eqconvert.quant\x12\x04int4", b"\x0eqconvert.quant\x12\x04int8")
    else:
        key = "qconvert.base_model"
        replace_bytes(path / "model.safetensors", b'"qconvert.base_model":"tiny"', b'"qconvert.base_model":"tine"')
    rows = digests_of(path)
    assert rows[WEIGHTS].verdict == "pass" and rows[FILES].verdict == "fail"
    assert key in rows[FILES].reason


def test_every_byte_that_is_no_tensor_counts(gguf: Made, tmp_path: Path) -> None:
    path, slot = gguf.copy(tmp_path), gguf.result.plan.slot
    assert slot is not None
    taken = [(t.offset, t.offset + t.nbytes) for t in tensors_of(path)]
    gaps = [end for _, end in taken if end < path.stat().st_size and not any(b <= end < e for b, e in taken)]
    for at in [*gaps[:2], slot.offset - 1, slot.offset + slot.nbytes]:
        flip(path, at)
        report = _without_traceback(path)
        assert report is None or report.exit == 6, at
        flip(path, at)


def _without_traceback(path: Path) -> Report | None:
    try:
        return certificate_report(path, 1)
    except InputError:
        return None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "genai_config.json"])
def test_a_changed_file_beside_the_weights_is_named(made: Made, tmp_path: Path, name: str) -> None:
    path = made.copy(tmp_path)
    if not (path / name).is_file():
        pytest.skip(f"{made.format} has no {name}")
    (path / name).write_text((path / name).read_text() + " ")
    row = digests_of(path)[FILES]
    assert row.verdict == "fail" and row.reason.startswith(f"{name};")
    if name == "config.json":  # without which there is no model
        return
    (path / name).unlink()
    assert f"{name} is missing" in digests_of(path)[FILES].reason


def test_another_programs_file_has_no_certificate(gguf: Made, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert certificate_report(path) is None
    convert(TINY, bits=8, output=tmp_path / "plain.gguf", check=False)
    assert certificate_report(tmp_path / "plain.gguf") is None
    assert len(gguf.path.read_bytes()) - (tmp_path / "plain.gguf").stat().st_size < 250_000


def test_a_format_without_a_place_for_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qconvert.certifying.certifier_of", lambda _: None)
    with pytest.raises(UnsupportedError, match="--certify: gguf has no place"):
        convert(TINY, bits=8, output=tmp_path / "a.gguf", certify=True)


# what was forged ------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], sealed: bool = True) -> None:
    """The certificate of a GGUF, changed and sealed anew."""
    first, text = certifier_of("gguf").certificate(path)  # type: ignore[union-attr, misc]
    data = path.read_bytes()
    said = json.loads(text)
    change(said)
    if sealed:
        said["seal"] = c.seal(said)
    slot = Slot(path, data.index(text.encode()), len(text), False)
    c.fill_slot(slot, first, json.dumps(said, separators=(",", ":")).encode())


def test_answers_of_another_model_are_not_its_own(gguf: Made, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.gguf"
    convert(f"{TINY}+{LORA}", bits=8, output=tuned, certify=True)
    theirs = json.loads(certifier_of("gguf").certificate(tuned)[1])["probes"]  # type: ignore[union-attr, index]
    path = gguf.copy(tmp_path)
    rewritten(path, lambda said: said.update(probes=theirs))
    rows = rows_of(path)
    assert rows[WEIGHTS].verdict == rows[FILES].verdict == "pass"
    runtime = rows.get("runtime llama.cpp, probes")
    if runtime is None:
        pytest.skip("llama.cpp is not installed")
    assert runtime.verdict == "fail" and (runtime.value or 0) > 0.01


def test_a_changed_certificate_is_told_by_its_seal(gguf: Made, tmp_path: Path) -> None:
    path = gguf.copy(tmp_path)
    rewritten(path, lambda said: said.update(verified=False), sealed=False)
    row = rows_of(path)["certificate"]
    assert row.verdict == "fail" and "seal" in row.reason


def test_a_truncated_certificate_is_told(made: Made, tmp_path: Path) -> None:
    path, slot = made.copy(tmp_path), made.result.plan.slot
    assert slot is not None
    at = slot.path if made.path.is_file() else path / slot.path.relative_to(made.path)
    target = path if made.path.is_file() else at
    with target.open("rb+") as file:
        file.seek(slot.offset + 5000)
        file.write(b" " * (slot.nbytes - 5000))
    row = rows_of(path)["certificate"]
    assert row.verdict == "fail" and "no JSON any more" in row.reason


FORGED: list[dict[str, Any]] = [
    {"version": 99}, {"version": "1"}, {"weights": {"a": 1}}, {"weights": []}, {"files": []}, {"facts": None},
    {"checks": [1]}, {"more": 1}, {"files": [{"name": "../../../etc/passwd"}]}, {"files": [{"sha256": "x"}]},
    {"files": [{"name": "a", "sha256": "x"}] * 3}, {"weights": {}}, {"runtime": {"name": 1}}, {"probes": []},
    {"probes": {}}, {"probes": {"tokens": [[1]], "kind": "price", "metric": "mean KL", "reference": [], "expected": []}},
    {"probes": {"tokens": [[]], "kind": "runtime f32", "metric": "mean KL", "reference": [""], "expected": [""]}},
    {"probes": {"tokens": [[1 << 40]], "kind": "runtime f32", "metric": "mean KL", "reference": ["AAAA"], "expected": ["AA"]}},
    {"probes": {"tokens": "x", "kind": {}, "metric": [], "reference": 1, "expected": None}},
]  # fmt: skip


@pytest.mark.parametrize("change", FORGED, ids=lambda change: str(change)[:60])
def test_what_is_forged_ends_in_a_failed_row(gguf: Made, tmp_path: Path, change: dict[str, Any]) -> None:
    path = gguf.copy(tmp_path)
    rewritten(path, lambda said: said.update(change))
    report = certificate_report(path, 1)
    assert report is not None and report.exit == 6 and not report.verified
    assert all(row.reason for row in report.failed)


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "a/../../b", ""])
@pytest.mark.parametrize("to", ["onnx", "safetensors"])
def test_names_of_files_do_not_lead_out_of_the_folder(tmp_path: Path, to: str, name: str) -> None:
    certifier = certifier_of(to)
    assert certifier is not None
    with pytest.raises(InputError):
        certifier.files(tmp_path / "model.x", ["model.x", name])


def test_a_model_does_not_lie_deeper_than_its_path_says(tmp_path: Path) -> None:
    certifier = certifier_of("onnx")
    assert certifier is not None
    for name in ("", "a/" * 40 + "model.onnx"):
        with pytest.raises(InputError, match="does not lie"):
            certifier.files(tmp_path / "model.onnx", [name, "x"])


def test_a_file_that_is_cut_ends_in_a_users_error(gguf: Made, tmp_path: Path) -> None:
    path = gguf.copy(tmp_path)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 4000)
    with pytest.raises(InputError, match="cut short"):
        certificate_report(path)


def test_a_rewritten_onnx_model_does_not_keep_the_old_certificate(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    convert(TINY, to="onnx", quant="fp32", output=tmp_path / "a", certify=True, check=False)
    convert(str(tmp_path / "a" / "model.onnx"), to="onnx", bits=8, output=tmp_path / "b", check=False)
    assert certificate_report(tmp_path / "b") is None
    convert(str(tmp_path / "a" / "model.onnx"), to="onnx", bits=8, output=tmp_path / "c", check=False, certify=True)
    rows = rows_of(tmp_path / "c")
    assert rows[WEIGHTS].verdict == rows[FILES].verdict == "pass"
    assert rows["runtime"].verdict == "skip"


# its parts ------------------------------------------------------------------------------------------


def test_a_certificate_too_long_for_its_slot_loses_informative_checks_first() -> None:
    checks = [[f"check {i}", "metric", 1.0, None, "info" if i % 2 else "pass", "x" * 100] for i in range(40)]
    whole = c.Certificate("m", "p", True, None, checks, [{"name": "a", "sha256": "b"}], {}, {}, {"skipped": "here"})
    slot = Slot(Path("a"), 0, len(whole.text()) - 1000, False)
    data = c.fitted(whole, slot)
    found = c.read_certificate(Path("a"), data.decode())
    assert len(data) <= slot.nbytes and 25 < len(found.checks) < 40
    assert sum(row[4] == "pass" for row in found.checks) == 20
    assert found == replace(whole, checks=found.checks)


def test_kl_of_tops_is_kl_where_they_hold_all_and_less_where_not() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((7, 300)).astype(np.float32) * 3 for _ in range(2))
    logs = [torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (a, b)]
    want = float(torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean"))
    assert p.mean_kl([p.top_of(a, 300)], [b]) == pytest.approx(want, rel=1e-6)
    some = [p.mean_kl([p.top_of(a, k)], [b]) for k in (8, 64, 200)]
    assert 0 < some[0] <= some[1] <= some[2] <= want
    assert abs(p.mean_kl([p.top_of(a)], [a])) < 1e-12
    assert p.relative([p.top_of(a)], [a]) == 0
    assert p.relative([p.top_of(a)], [a * np.float32(1.01)]) == pytest.approx(0.01, rel=1e-4)


def test_answers_that_are_not_numbers_fail() -> None:
    a = np.ones((2, 100), np.float32)
    b = np.full((2, 100), np.nan, np.float32)
    assert np.isnan(p.mean_kl([p.top_of(a)], [b])) and np.isnan(p.relative([p.top_of(a)], [b]))


def test_tops_survive_their_spelling() -> None:
    top = p.top_of(np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32))
    back = p.read(p.spelled(top), 5)
    assert all(np.array_equal(x, y) for x, y in zip(top, back, strict=True))
    assert (np.diff(top.values, axis=1) <= 0).all()


def test_room_for_probes_is_enough_for_the_largest_token_ids() -> None:
    n = p.LENGTH
    logits = np.random.default_rng(0).standard_normal((n, 200_000)).astype(np.float32)
    tops = [p.top_of(logits)] * p.PROMPTS
    probes = p.Probes([[199_999] * n] * p.PROMPTS, "runtime blocks of 256", "mean KL", tops, tops)
    assert len(json.dumps(json.dumps(probes.data(), separators=(",", ":")))) <= p.NBYTES + 400  # names are in ROOM
