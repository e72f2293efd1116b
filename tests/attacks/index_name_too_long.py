"""A shard's name is longer than any file's."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "File name too long"


def make(folder: Path) -> None:
    write_shards(folder, {"a.weight": "a" * 5000})
