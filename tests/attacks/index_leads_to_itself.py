"""A shard is a link to itself."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "model-00001-of-00002.safetensors"


def make(folder: Path) -> None:
    write_shards(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
