"""GGUF headers: what ours writes gguf-py reads, what gguf-py writes ours reads, and damage is named."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from qconvert.errors import InputError
from qconvert.formats.gguf_header import encode
from qconvert.formats.gguf_kv import KV
from qconvert.gguf_reader import read_header

KVS = (
    KV("general.architecture", "str", "llama"),
    KV("a.u32", "u32", 7),
    KV("a.f32", "f32", 1e-5),
    KV("a.bool", "bool", True),
    KV("a.texts", "arr_str", ["", "é", "▁the"]),
    KV("a.ints", "arr_i32", [-1, 2]),
    KV("a.floats", "arr_f32", [0.5, -1.0]),
)


def written(path: Path) -> Path:
    data = np.arange(64, dtype=np.float32).tobytes()
    path.write_bytes(encode(KVS, [("x.weight", "f32", (2, 32), 0), ("y.weight", "q8_0", (1, 32), 256)]) + data + bytes(64))
    return path


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(tmp_path / "a.gguf"))
    assert reader.fields["a.texts"].contents() == ["", "é", "▁the"]
    assert reader.fields["a.bool"].contents() is True
    assert reader.fields["a.f32"].contents() == pytest.approx(1e-5)
    x, y = reader.tensors
    assert (x.name, list(x.shape), y.tensor_type) == ("x.weight", [32, 2], gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(x.data, np.arange(64, dtype=np.float32).reshape(2, 32))


def test_we_read_what_gguf_py_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen2")
    writer.add_uint32("n", 3)
    writer.add_array("words", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("w", np.ones((3, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "b.gguf")
    assert header.kv["general.architecture"] == "qwen2"
    assert (header.kv["n"], header.kv["words"], header.kv["numbers"]) == (3, ["a", "b"], [1, 2, 3])
    (w,) = header.tensors
    assert (w.name, w.dtype, w.shape, w.nbytes) == ("w", "f16", (3, 64), 384)


def test_our_reader_reads_our_writer(tmp_path: Path) -> None:
    header = read_header(written(tmp_path / "a.gguf"))
    assert [kv.key for kv in KVS] == list(header.kv)
    assert [t.offset for t in header.tensors] == [header.data_offset, header.data_offset + 256]


@pytest.mark.parametrize("n", [0, 3, 20, 60, 200])
def test_a_file_cut_short_is_named(tmp_path: Path, n: int) -> None:
    path = written(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(InputError, match=r"a\.gguf"):
        read_header(path)


def test_missing_tensor_data_names_the_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"y\.weight ends at byte"):
        read_header(path)


def test_absurd_counts_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64))
    with pytest.raises(InputError, match="do not fit"):
        read_header(path)


def test_every_flipped_byte_of_a_header_gives_an_answer_or_a_named_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    good = path.read_bytes()
    for at in range(0, read_header(path).data_offset, 3):
        bad = bytearray(good)
        bad[at] ^= 0xFF
        path.write_bytes(bad)
        try:
            read_header(path)
        except InputError:
            pass
