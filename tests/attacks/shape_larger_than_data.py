"""The shape asks for far more bytes than the offsets give."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "a.weight: the shape [4611686018427387904, 4]"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["a.weight"]["shape"] = [1 << 62, 4]  # times 4 bytes is 0 in 64 bits
    write_raw(write_model(folder), table, bytes(64))
