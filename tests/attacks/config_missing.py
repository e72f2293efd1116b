"""Weights alone."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "has no config.json"


def make(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").unlink()
