"""A dtype that nobody defined."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "b.weight: unknown dtype 'F128'"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["b.weight"]["dtype"] = "F128"
    write_raw(write_model(folder), table, bytes(64))
