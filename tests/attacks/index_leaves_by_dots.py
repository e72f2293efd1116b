"""The index points above the folder."""

from pathlib import Path

from safetensors_writer import write_model, write_shards

from qconvert.errors import InputError

ERROR, SAYS = InputError, "'../secret/model.safetensors' leads out of the folder"


def make(folder: Path) -> None:
    write_model(folder.parent / "secret")
    write_shards(folder, {"a.weight": "../secret/model.safetensors"})
