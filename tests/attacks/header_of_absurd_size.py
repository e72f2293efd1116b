"""The header claims exabytes: a reader that believes it runs out of memory."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "a header of 18446744073709551615 bytes"


def make(folder: Path) -> None:
    path = write_model(folder)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
