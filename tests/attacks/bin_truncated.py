"""A .bin cut in the middle."""

from pathlib import Path

import torch
from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "pytorch_model.bin"


def make(folder: Path) -> None:
    write_model(folder).unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"a.weight": torch.ones(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:20_000])
