"""JSON nested deep enough to exhaust a recursive parser."""

from pathlib import Path

from safetensors_writer import write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "not valid JSON"


def make(folder: Path) -> None:
    write_raw(write_model(folder), b'{"a":' + b"[" * 200_000, b"")
