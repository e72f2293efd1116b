"""Two negative dimensions whose product is right."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "a.weight: the shape [-3, -4]"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["a.weight"]["shape"] = [-3, -4]
    write_raw(write_model(folder), table, bytes(64))
