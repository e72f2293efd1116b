"""The download stopped in the header."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "in a file of 60"


def make(folder: Path) -> None:
    path = write_model(folder)
    path.write_bytes(path.read_bytes()[:60])
