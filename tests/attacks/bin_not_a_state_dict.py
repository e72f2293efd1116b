"""A .bin that holds one tensor without a name."""

from pathlib import Path

import torch
from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "holds a Tensor, not tensors by name"


def make(folder: Path) -> None:
    write_model(folder).unlink()
    torch.save(torch.ones(3), folder / "pytorch_model.bin")
