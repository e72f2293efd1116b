"""The download never began."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "0 bytes are too few"


def make(folder: Path) -> None:
    write_model(folder).write_bytes(b"")
