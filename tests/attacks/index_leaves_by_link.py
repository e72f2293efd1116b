"""A shard is a link to a file elsewhere."""

from pathlib import Path

from safetensors_writer import write_model, write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "leads out of the folder, to"


def make(folder: Path) -> None:
    secret = write_model(folder.parent / "secret")
    write_shards(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(secret)
