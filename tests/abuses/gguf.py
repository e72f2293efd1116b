"""GGUF files that lie. Source of the rules: ggml/docs/gguf.md; gguf.cpp refuses each of these too, or crashed on one once."""

from __future__ import annotations

import struct
from pathlib import Path

from abuses import ABUSES, Abuse, Maker, hostile

F32, Q4_K, STRING, ARRAY, U32 = 0, 12, 8, 9, 4


def text(s: bytes) -> bytes:
    return struct.pack("<Q", len(s)) + s


def kv(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...] = (32, 2), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = kv(b"general.architecture", STRING, text(b"llama"))


def write(
    folder: Path, kvs: list[bytes], infos: list[bytes], data: bytes = bytes(512), counts: tuple[int, int] | None = None
) -> Path:
    n_tensors, n_kv = counts or (len(infos), len(kvs))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv) + b"".join(kvs) + b"".join(infos)
    path = folder / "model.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


@hostile("do not fit")
def tensors_beyond_counting(folder: Path) -> Path:
    return write(folder, [ARCH], [], counts=(1 << 60, 1))


@hostile("do not fit")
def keys_beyond_counting(folder: Path) -> Path:
    return write(folder, [ARCH], [], counts=(0, (1 << 64) - 1))


@hostile("damaged GGUF")
def more_tensors_than_there_are(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a")], counts=(3, 1))


@hostile("a.weight overlaps")
def tensors_overlap(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"b.weight"), tensor(b"a.weight", offset=224)])


@hostile("a ends at byte")
def tensor_out_of_the_file(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", offset=1 << 40)])


@hostile("a ends at byte")
def offset_that_wraps(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", offset=(1 << 64) - 256)])


@hostile("a begins at byte 33 of the data")
def offset_that_is_not_aligned(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", offset=33)])


@hostile("5 dimensions")
def five_dimensions(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", (2, 2, 2, 2, 2))])


@hostile("4294967295 dimensions")
def four_billion_dimensions(folder: Path) -> Path:
    return write(folder, [ARCH], [text(b"a") + struct.pack("<IQIQ", (1 << 32) - 1, 1, F32, 0)])


@hostile("is not a list of counts")
def product_of_dimensions_that_wraps_to_zero(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", (1 << 32, 1 << 32))])


@hostile("is not a list of counts")
def dimension_vast_beside_a_zero(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", (0, 1 << 63, 1 << 63))])


@hostile("no whole q4_k blocks")
def row_that_is_no_whole_block(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a", (100, 1), Q4_K)])


@hostile("passes the end")
def string_longer_than_the_file(folder: Path) -> Path:
    return write(folder, [struct.pack("<Q", (1 << 64) - 1) + b"x"], [])


@hostile("passes the end")
def array_longer_than_the_file(folder: Path) -> Path:
    return write(folder, [kv(b"a", ARRAY, struct.pack("<IQ", U32, 1 << 61))], [])


@hostile("passes the end")
def array_whose_bytes_pass_the_end(folder: Path) -> Path:
    return write(folder, [kv(b"a", ARRAY, struct.pack("<IQ", U32, 400))], [], data=bytes(800))


@hostile("nested")
def arrays_within_arrays(folder: Path) -> Path:
    return write(folder, [kv(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", U32, 0))], [])


@hostile("the key 'general.architecture' occurs twice")
def key_twice(folder: Path) -> Path:
    return write(folder, [ARCH, kv(b"general.architecture", STRING, text(b"qwen2"))], [])


@hostile("the tensor 'a' occurs twice")
def tensor_twice(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a"), tensor(b"a", offset=256)])


@hostile("value type 13")
def value_of_unknown_type(folder: Path) -> Path:
    return write(folder, [kv(b"a", 13, bytes(8))], [])


@hostile("value type 77")
def array_of_unknown_type(folder: Path) -> Path:
    return write(folder, [kv(b"a", ARRAY, struct.pack("<IQ", 77, 2))], [])


@hostile("")
def tensor_of_unknown_type(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"token_embd.weight", kind=250)])


@hostile("general.alignment is 0")
def alignment_of_zero(folder: Path) -> Path:
    return write(folder, [kv(b"general.alignment", U32, struct.pack("<I", 0))], [])


@hostile("general.alignment is 48")
def alignment_that_is_no_power_of_two(folder: Path) -> Path:
    return write(folder, [kv(b"general.alignment", U32, struct.pack("<I", 48))], [])


@hostile("general.alignment is 'x'")
def alignment_that_is_text(folder: Path) -> Path:
    return write(folder, [kv(b"general.alignment", STRING, text(b"x"))], [])


@hostile("version 9")
def version_of_the_future(folder: Path) -> Path:
    path = write(folder, [ARCH], [])
    path.write_bytes(b"GGUF" + struct.pack("<I", 9) + path.read_bytes()[8:])
    return path


@hostile("big-endian")
def bytes_in_the_other_order(folder: Path) -> Path:
    path = write(folder, [ARCH], [])
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + path.read_bytes()[8:])
    return path


@hostile("not printable")
def name_with_terminal_codes(folder: Path) -> Path:
    return write(folder, [ARCH], [tensor(b"a\x1b]0;owned\x07")])


@hostile("the key '\\udcff' is not")
def key_that_is_not_utf8(folder: Path) -> Path:
    return write(folder, [kv(b"\xff", U32, bytes(4))], [])


@hostile("is not a GGUF file")
def nothing_at_all(folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(b"")
    return path


@hostile("is missing")
def shards_beyond_counting(folder: Path) -> Path:
    path = write(folder, [ARCH, kv(b"split.count", 2, struct.pack("<H", 65535))], [])
    return path.rename(folder / "m-00001-of-65535.gguf")


def cut(at: int) -> Maker:
    def make(folder: Path) -> Path:
        path = write(folder, [ARCH, kv(b"a", ARRAY, struct.pack("<IQII", U32, 2, 1, 2))], [tensor(b"x.weight")])
        path.write_bytes(path.read_bytes()[:at])
        return path

    return make


SECTIONS = {6: "version", 12: "counts", 40: "key", 60: "value", 80: "array", 118: "tensor", 300: "data"}
ABUSES.extend(Abuse(f"gguf: cut_in_the_{section}", cut(at), "model.gguf") for at, section in SECTIONS.items())
