"""A second file appended to the first."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "4 bytes after the last tensor"


def make(folder: Path) -> None:
    path = write_model(folder)
    path.write_bytes(path.read_bytes() + b"more")
