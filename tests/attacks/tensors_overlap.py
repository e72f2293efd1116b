"""Two tensors share bytes."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "b.weight overlaps"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["b.weight"]["data_offsets"] = [40, 56]
    write_raw(write_model(folder), table, bytes(56))
