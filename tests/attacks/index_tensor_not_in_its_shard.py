"""The index sends a tensor to the wrong shard."""

from pathlib import Path

from safetensors_writer import write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "b.weight should be in model-00001-of-00002.safetensors"


def make(folder: Path) -> None:
    write_shards(folder, {"b.weight": "model-00001-of-00002.safetensors"})
