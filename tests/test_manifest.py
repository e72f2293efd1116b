"""manifest.json says what an output was made from and by; coreutils' sha256sum agrees with SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qconvert import certificate as c
from qconvert.certifying import certifier_of
from qconvert.conversion import convert
from qconvert.errors import InputError, ResourceError, UsageError
from qconvert.manifest import SUMS, Output, canonical, line, manifest_digest, write_manifest
from qconvert.recipe import read_recipe

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def agreed(folder: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("coreutils' sha256sum is not installed")
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    convert(f"{TINY}+{LORA}:0.5", bits=4, output=folder / "out" / "a.gguf", manifest=folder / "m" / "manifest.json",
            certify=True, threads=1)  # fmt: skip
    return folder, json.loads((folder / "m" / "manifest.json").read_text())


def test_sha256sum_agrees(made: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = made
    agreed(folder / "m")
    (output,) = manifest["outputs"]
    assert output == {"path": "../out/a.gguf", "nbytes": (folder / "out" / "a.gguf").stat().st_size,
                      "sha256": sha256(folder / "out" / "a.gguf")}  # fmt: skip


def test_every_file_that_was_read_is_there_by_its_sum(made: tuple[Path, dict[str, Any]]) -> None:
    found = {i["file"]: i["sha256"] for i in made[1]["inputs"]}
    read = {"base": list(TINY.iterdir()), "adapter0": list(LORA.iterdir())}
    assert found == {f"{alias}/{p.name}": sha256(p) for alias, paths in read.items() for p in paths}


def test_weights_are_those_that_gguf_py_reads(made: tuple[Path, dict[str, Any]]) -> None:
    from gguf import GGUFReader

    read = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in GGUFReader(made[0] / "out" / "a.gguf").tensors}
    assert made[1]["weights"] == read


def test_its_recipe_makes_the_same_file(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    manifest = made[1]
    (tmp_path / "recipe.yaml").write_text(manifest["recipe"])
    (options,) = read_recipe(tmp_path / "recipe.yaml").outputs
    convert(**options, output=tmp_path / "b.gguf", threads=1)
    assert sha256(tmp_path / "b.gguf") == manifest["outputs"][0]["sha256"]


def test_the_certificate_has_the_manifests_digest(made: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = made
    first, text = certifier_of("gguf").certificate(folder / "out" / "a.gguf")  # type: ignore[union-attr, misc]
    certificate = c.read_certificate(first, text)
    assert certificate.manifest == manifest_digest(manifest)
    plain = {k: v for k, v in manifest.items() if k != "outputs"}
    assert certificate.manifest == hashlib.sha256(canonical(plain)).hexdigest()
    assert [row[0] for row in certificate.checks] == [row["what"] for row in manifest["checks"]]
    assert certificate.verified == manifest["verified"]


def test_there_is_no_date_but_that_of_source_date_epoch(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "date" not in made[1]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    convert(TINY, bits=8, output=tmp_path / "a.gguf", manifest=tmp_path / "m.json", check=False)
    assert json.loads((tmp_path / "m.json").read_text())["date"] == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        convert(TINY, bits=8, output=tmp_path / "b.gguf", manifest=tmp_path / "m.json", check=False)
    assert not (tmp_path / "b.gguf").exists()


def test_a_second_output_beside_the_first_adds_its_lines(tmp_path: Path) -> None:
    for bits in (8, 4):
        convert(TINY, bits=bits, output=tmp_path / f"{bits}.gguf", manifest=tmp_path / f"{bits}.json", check=False)
    assert len((tmp_path / SUMS).read_text().splitlines()) == 4
    agreed(tmp_path)
    before = (tmp_path / SUMS).read_text()
    convert(TINY, bits=4, output=tmp_path / "4.gguf", manifest=tmp_path / "4.json", check=False, force=True)
    assert (tmp_path / SUMS).read_text() == before


def test_a_folder_is_listed_file_by_file(tmp_path: Path) -> None:
    convert(TINY, to="safetensors", bits=8, output=tmp_path / "a", manifest=tmp_path / "a" / "manifest.json", check=False)
    agreed(tmp_path / "a")
    listed = {o["path"] for o in json.loads((tmp_path / "a" / "manifest.json").read_text())["outputs"]}
    assert listed == {p.name for p in (tmp_path / "a").iterdir()} - {"manifest.json", SUMS}


@pytest.mark.parametrize("name", ["with space", "back\\slash", "line\nbreak", "return\r", "*star", "-dash", "ünicode", " lead"])
def test_odd_names_are_escaped_as_sha256sum_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    for _ in range(2):  # a line of its own is found again
        write_manifest(tmp_path / "m.json", {}, [Output(path, 1, sha256(path))])
    assert len((tmp_path / SUMS).read_text().splitlines()) == 2
    agreed(tmp_path)
    said = subprocess.run(["sha256sum", "--", name], cwd=tmp_path, capture_output=True).stdout
    assert said.decode() == f"{line(name, sha256(path))}\n"


def test_a_manifest_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*file/m\.json"):
        write_manifest(tmp_path / "file" / "m.json", {}, [])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_cached_download_must_have_the_sum_that_its_name_says(tmp_path: Path, damaged: bool) -> None:
    repo = tmp_path / "models--a--tiny"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in TINY.iterdir():
        name = sha256(path) if path.suffix == ".safetensors" else "1" * 39 + str(len(list(blobs.iterdir())))
        if damaged and path.suffix == ".safetensors":
            name = "2" * 64
        shutil.copyfile(path, blobs / name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / name, snapshot))
    out = tmp_path / "a.gguf"
    if damaged:
        with pytest.raises(InputError, match="the cache has it as 2222"):
            convert(snapshot, bits=8, output=out, manifest=tmp_path / "m.json", check=False)
        assert not out.exists()
        return
    convert(snapshot, bits=8, output=out, manifest=tmp_path / "m.json", check=False)
    assert json.loads((tmp_path / "m.json").read_text())["revision"] == "0" * 40


def test_texts_and_statistics_are_inputs_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and a class is a thing. " * 200)
    convert(TINY, bits=4, output=tmp_path / "a.gguf", calibrate=text, calibrate_tokens=512, eval=text,
            manifest=tmp_path / "m.json", check=False, save_statistics=tmp_path / "s.safetensors")  # fmt: skip
    found = {i["file"]: i["sha256"] for i in json.loads((tmp_path / "m.json").read_text())["inputs"]}
    assert found["calibrate/text.txt"] == found["eval/text.txt"] == sha256(text)
    convert(TINY, bits=4, output=tmp_path / "b.gguf", statistics=tmp_path / "s.safetensors", manifest=tmp_path / "n.json",
            check=False)  # fmt: skip
    found = {i["file"]: i["sha256"] for i in json.loads((tmp_path / "n.json").read_text())["inputs"]}
    assert found["statistics/s.safetensors"] == sha256(tmp_path / "s.safetensors")
