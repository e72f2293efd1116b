"""The index is JSON, but a list."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "a JSON object was wanted, not a list"


def make(folder: Path) -> None:
    write_shards(folder).write_text("[]")
