"""The index points to the root of the disk."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "'/etc/passwd' leads out of the folder"


def make(folder: Path) -> None:
    write_shards(folder, {"a.weight": "/etc/passwd"})
