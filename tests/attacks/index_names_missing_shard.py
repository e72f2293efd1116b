"""The index names a shard that was never downloaded."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "the shard model-00002-of-00002.safetensors is missing"


def make(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
