"""Ends before it begins."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "b.weight: data_offsets [64, 48]"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["b.weight"]["data_offsets"] = [64, 48]
    write_raw(write_model(folder), table, bytes(64))
