"""Bytes that belong to no tensor can carry anything."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "a hole of 8 bytes"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["b.weight"]["data_offsets"] = [56, 72]
    write_raw(write_model(folder), table, bytes(72))
