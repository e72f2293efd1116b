"""llama.cpp's importance matrix: read by gguf-py and by llama-quantize as written, read as llama-quantize reads it."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError
from qconvert.formats import gguf_imatrix
from qconvert.formats.gguf_imatrix import Entry, IMatrix
from qconvert.gguf_reader import read_header
from qconvert.tensor_files import GGUFFile

TINY = Path("golden/tiny")
BIN = os.environ.get("LLAMA_CPP_BIN")
needs_llama_cpp = pytest.mark.skipif(BIN is None, reason="LLAMA_CPP_BIN names no folder of llama.cpp's programs")
TEXT = "The gate was shut, so we walked round by the river and counted the boats: one, two, seven.\n" * 40


def some(seed: int = 0) -> IMatrix:
    """Two dense tensors and experts, of which one got no token."""
    rng = np.random.default_rng(seed)

    def entry(*counts: int, k: int = 96) -> Entry:
        sums = (100 * rng.chisquare(2, (len(counts), k))).astype(np.float32)
        moments = sums / np.maximum(counts, 1).astype(np.float32)[:, None]
        moments[np.array(counts) == 0] = 1
        return Entry(moments, np.array(counts))

    entries = {"blk.0.attn_q.weight": entry(1024), "blk.0.ffn_down_exps.weight": entry(700, 0, 324), "output.weight": entry(7)}
    return IMatrix(entries, ("some text.txt",), 2, 512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def llama(program: str, *words: object) -> None:
    done = subprocess.run([f"{BIN}/{program}", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# the file -----------------------------------------------------------------------------------------


def test_gguf_py_reads_the_sums_and_counts_that_are_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    imatrix = some()
    gguf_imatrix.write(tmp_path / "i.gguf", imatrix)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert [t.name for t in reader.tensors][:2] == ["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"]
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["some text.txt"]
    assert [reader.get_field(f"imatrix.chunk_{k}").contents() for k in ("count", "size")] == [2, 512]
    for name, (moments, counts) in imatrix.entries.items():
        assert tensors[f"{name}.counts"].data.tolist() == counts[:, None].tolist()
        sums = tensors[f"{name}.in_sum2"].data
        with np.errstate(invalid="ignore"):
            assert np.array_equal(np.where(counts[:, None], sums / counts[:, None].astype(np.float32), 1), moments)


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    imatrix = some()
    gguf_imatrix.write(tmp_path / name, imatrix)
    again = gguf_imatrix.read(tmp_path / name)
    assert again.entries.keys() == imatrix.entries.keys() and (again.datasets, again.chunks) == (("some text.txt",), 2)
    for key, entry in imatrix.entries.items():
        assert np.allclose(again.entries[key].moments.reshape(entry.moments.shape), entry.moments, rtol=2e-7)
        if name == "i.gguf":
            assert np.array_equal(again.entries[key].moments, entry.moments)
            assert again.entries[key].counts.tolist() == entry.counts.tolist()


def test_means_survive_their_way_through_sums() -> None:
    """Sums in f32 times and divided by counts: the mean that a file gives back is the one it was made of, to the bit."""
    rng = np.random.default_rng(0)
    for count in (3, 777, 32768, 65521):
        counts = np.array([count])
        means = (rng.chisquare(2, (1, 20000)).astype(np.float32) * 1000) / np.float32(count)
        sums = gguf_imatrix.sums_of(Entry(means, counts))
        assert np.array_equal(sums / np.float32(count), means)


def entry_bytes(name: str = "blk.0.a.weight", calls: int = 1, n: int = 2, values: bytes = bytes(8)) -> bytes:
    return struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, n) + values


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the number of entries passes the end"),
        (struct.pack("<i", 0) + bytes(20), "0 entries"),
        (struct.pack("<i", 1 << 30) + bytes(20), "entries in 24 bytes"),
        (struct.pack("<ii", 1, 1 << 20) + bytes(20), "entry 0 has a name of 1048576 bytes"),
        (struct.pack("<i", 1) + entry_bytes(n=1 << 20), "blk.0.a.weight passes the end"),
        (struct.pack("<i", 1) + entry_bytes(n=-1), "blk.0.a.weight has -1 values"),
        (struct.pack("<i", 1) + entry_bytes(values=struct.pack("<ff", 1, float("nan"))), "blk.0.a.weight: sums of squares"),
        (struct.pack("<i", 1) + entry_bytes(values=struct.pack("<ff", 1, -1)), "blk.0.a.weight: sums of squares"),
    ],
)
def test_a_damaged_old_file_is_named_with_its_tensor(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "bad.dat").write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        gguf_imatrix.read(tmp_path / "bad.dat")
    assert "bad.dat" in caught.value.message


def test_an_old_file_without_a_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 1) + entry_bytes(calls=4, values=struct.pack("<ff", 2, 6)))
    assert gguf_imatrix.read(tmp_path / "old.dat").entries["blk.0.a.weight"].moments.tolist() == [[0.5, 1.5]]


def broken(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    return path


def test_a_damaged_gguf_is_named_with_its_tensor(tmp_path: Path) -> None:
    for old, new, said in (
        (b"output.weight.counts", b"output.weight.countx", "output.weight.counts is missing"),
        (b"output.weight.in_sum2", b"output.weight.in_sumx", "output.weight.counts has no in_sum2"),
        (b"imatrix.datasets", b"imatrix.datasetx", "imatrix.datasets, chunk_count or chunk_size is missing"),
    ):
        gguf_imatrix.write(tmp_path / "i.gguf", some())
        with pytest.raises(InputError, match=said):
            gguf_imatrix.read(broken(tmp_path / "i.gguf", old, new))
    gguf_imatrix.write(tmp_path / "i.gguf", some())
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "i.gguf").read_bytes()[:-64])
    with pytest.raises(InputError, match="cut short"):
        gguf_imatrix.read(tmp_path / "cut.gguf")


# in a conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of golden/tiny on the text."""
    folder = tmp_path_factory.mktemp("imatrix")
    convert(TINY, quant="Q8_0", calibrate=text, save_imatrix=folder / "i.gguf", output=folder / "o.gguf", check=False)
    return folder / "i.gguf"


def test_an_imatrix_of_another_model_is_refused_by_name(tmp_path: Path, ours: Path) -> None:
    gguf_imatrix.write(tmp_path / "other.gguf", some())
    with pytest.raises(InputError, match=r"other\.gguf: blk\.0\.attn_q\.weight has 96 values, 256 were wanted"):
        convert(TINY, quant="Q4_K_M", imatrix=tmp_path / "other.gguf", dry_run=True)
    imatrix = gguf_imatrix.read(ours)
    gguf_imatrix.write(tmp_path / "none.gguf", imatrix._replace(entries={"v.blk.0.weight": some().entries["output.weight"]}))
    with pytest.raises(InputError, match=r"none\.gguf: no entry is of this model"):
        convert(TINY, quant="Q4_K_M", imatrix=tmp_path / "none.gguf", dry_run=True)


def test_a_tensor_without_an_entry_is_said_or_refused(tmp_path: Path, ours: Path) -> None:
    imatrix = gguf_imatrix.read(ours)
    fewer = {n: e for n, e in imatrix.entries.items() if n != "blk.1.attn_q.weight"}
    gguf_imatrix.write(tmp_path / "few.gguf", imatrix._replace(entries=fewer))
    notes = convert(TINY, quant="Q4_K_M", imatrix=tmp_path / "few.gguf", dry_run=True).report.notes
    assert f"1 tensors have no entry in {tmp_path / 'few.gguf'} and are quantized without, first blk.1.attn_q.weight" in notes
    with pytest.raises(InputError, match=r"few\.gguf: no entry for blk\.1\.attn_q\.weight"):
        convert(TINY, quant="Q4_K_M", imatrix=tmp_path / "few.gguf", no_data="error", dry_run=True)
    with pytest.raises(UnsupportedError, match=r"blk\.1\.attn_q\.weight: q2_k in a Q2_K_S file needs an imatrix"):
        convert(TINY, quant="Q2_K_S", imatrix=tmp_path / "few.gguf", dry_run=True)
    convert(TINY, quant="Q2_K_S", imatrix=ours, dry_run=True)


def test_the_file_says_what_it_was_made_with(tmp_path: Path, ours: Path, text: Path) -> None:
    convert(TINY, quant="Q8_0", imatrix=ours, output=tmp_path / "o.gguf", check=False)
    kv = read_header(tmp_path / "o.gguf").kv
    assert {k.rpartition(".")[2]: v for k, v in kv.items() if k.startswith("quantize.imatrix.")} == {
        "file": str(ours)[:127], "dataset": str(text)[:127], "entries_count": 22, "chunks_count": 6,
    }  # fmt: skip


def test_an_imatrix_and_the_statistics_that_it_was_made_of_give_the_same_weights(
    tmp_path: Path, ours: Path, text: Path
) -> None:
    made: list[dict[str, Any]] = []
    for options in ({"calibrate": text}, {"imatrix": ours}, {}):
        convert(TINY, quant="Q4_K_M", output=tmp_path / "o.gguf", force=True, check=False, **options)
        file = GGUFFile(tmp_path / "o.gguf")
        made.append({n: file.read(n, 0, t.shape[0]).tobytes() for n, t in file.infos.items()})
        file.close()
    assert made[0] == made[1]
    differ = {name for name in made[0] if made[0][name] != made[2][name]}
    assert {"blk.0.ffn_down.weight", "blk.2.attn_q.weight", "token_embd.weight"} <= differ
    assert not any("norm" in name for name in differ)


# against llama.cpp --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    convert(TINY, quant="F32", output=path, check=False)
    return path


@needs_llama_cpp
@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_numbers_are_those_of_llama_imatrix_on_the_same_text(
    tmp_path: Path, f32: Path, ours: Path, text: Path, name: str
) -> None:
    form = ["--output-format", "dat"] if name == "i.dat" else []
    llama("llama-imatrix", "-m", f32, "-f", text, "-o", tmp_path / name, "-c", 256, "-b", 256, "--no-ppl", "-t", 1, *form)
    want, got = gguf_imatrix.read(tmp_path / name), gguf_imatrix.read(ours)
    assert want.datasets == got.datasets == (str(text),) and want.chunks == got.chunks
    assert got.entries.keys() - want.entries.keys() == {"token_embd.weight"}  # the head, which it leaves out
    for key, entry in want.entries.items():
        assert np.allclose(got.entries[key].moments, entry.moments, rtol=1e-3, atol=1e-6 * entry.moments.max())
        assert name == "i.dat" or got.entries[key].counts.tolist() == entry.counts.tolist()


@needs_llama_cpp
@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K_S", "Q4_0", "IQ4_XS"])
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_weights_are_those_of_llama_quantize_with_the_same_imatrix(
    tmp_path: Path, f32: Path, ours: Path, quant: str, form: str
) -> None:
    imatrix = tmp_path / f"i.{form}"
    gguf_imatrix.write(imatrix, gguf_imatrix.read(ours))
    llama("llama-quantize", "--imatrix", imatrix, f32, tmp_path / "theirs.gguf", quant, 1)
    convert(TINY, quant=quant, imatrix=imatrix, output=tmp_path / "mine.gguf", check=False)
    mine, theirs = GGUFFile(tmp_path / "mine.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert {n: (t.dtype, t.shape) for n, t in mine.infos.items()} == {n: (t.dtype, t.shape) for n, t in theirs.infos.items()}
    for name, info in theirs.infos.items():
        assert np.array_equal(mine.read(name, 0, info.shape[0]), theirs.read(name, 0, info.shape[0])), name
    kvs = [read_header(tmp_path / f).kv for f in ("mine.gguf", "theirs.gguf")]
    assert len({str({k: v for k, v in kv.items() if k.startswith("quantize.imatrix")}) for kv in kvs}) == 1
