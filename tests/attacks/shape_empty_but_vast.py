"""No element, so no byte, but a row too long for any array."""

from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "c.weight: the shape [0, 4611686018427387904]"


def make(folder: Path) -> None:
    table = entries(WEIGHTS)
    table["c.weight"] = {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [64, 64]}
    write_raw(write_model(folder), table, bytes(64))
