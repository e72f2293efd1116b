"""The same inside the archive that torch.save writes."""

from pathlib import Path

import torch
from safetensors_writer import write_model

from attacks.pickle_with_code import Bomb
from qconvert.errors import InputError

ERROR, SAYS = InputError, "system; it was not executed"


def make(folder: Path) -> None:
    write_model(folder).unlink()
    torch.save({"a.weight": Bomb(folder.parent / "executed")}, folder / "pytorch_model.bin")
